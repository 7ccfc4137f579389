"""Compares ways to forget on one request: trains, retrains, forgets and measures what a workdir lacks.

A `Scenario` says what was trained and what is to go; a `Study` holds its models and their records, whose files
`llmeraser_jax.evaluation.records` describes. Besides, `before/` and `retrained/seed_*/` are run directories. All
methods are chosen in `METHODS` and `Study.method`, and run in `Study.fit`.

All methods get the same adapter, data and requests. Rivals get the learning rate, or the strength that they have in
its place, of a small grid at which the mean losses come nearest to the retrained models': an oracle that no user
has, and that this package's own methods are not given.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments.common import claim_settings, log_progress
from llmeraser_jax import data, files, trees, unlearning
from llmeraser_jax.checks import check_at_least
from llmeraser_jax.data import Action, Example, Recipe, Request, TokenDataset
from llmeraser_jax.environment import describe_devices, library_versions
from llmeraser_jax.evaluation import measures, robustness
from llmeraser_jax.evaluation.closure import seed_mean
from llmeraser_jax.evaluation.job import page_of, receipt_to_keep
from llmeraser_jax.evaluation.page import terminal_blocks
from llmeraser_jax.evaluation.records import (
    BEFORE,
    COMPARISON_FILE,
    KLOM,
    RECORDS,
    RETRAINED,
    Comparison,
    MetricMeaning,
    Record,
    read_comparison,
    read_record,
    record_path,
    write_plan,
    write_record,
)
from llmeraser_jax.evaluation.render import render_text, write_page
from llmeraser_jax.evaluation.scoring import score_examples
from llmeraser_jax.evaluation.summary import REPORT_FILE, summarise
from llmeraser_jax.lora import Lora, LoraConfig
from llmeraser_jax.models import Model, load_model
from llmeraser_jax.parallel import parse_mesh
from llmeraser_jax.rivals import RIVALS, Ensemble, ensemble_model, get_method, make_ensemble
from llmeraser_jax.rivals.arithmetic import TaskVector
from llmeraser_jax.rivals.descent import Descent
from llmeraser_jax.runs import Run
from llmeraser_jax.training import TrainConfig
from llmeraser_jax.training.job import finetune_run
from llmeraser_jax.training.retrain import retrain
from llmeraser_jax.types import LoraParams
from llmeraser_jax.unlearning import (
    Budget,
    Method,
    Result,
    UnlearningError,
    UnlearningTask,
    Workspace,
    task_of_run,
)

logger = logging.getLogger("study")

FIRST_KLOM_SEED = 1000  # after the training's own seed; retrained models have the seeds that follow that
LEARNING_RATES = (
    1e-4,
    1e-3,
    4e-3,
)  # offered to descents; of the full presets, from a twentieth of the training's rate
FULL_LEARNING_RATES = (1e-5, 5e-5, 2e-4)
NUM_DESCENT_STEPS = 20  # at least: where the forget set is a batch or two, descents take more epochs than their own

# Of rivals without a learning rate: the field that says how far they go, and what is offered.
STRENGTHS: Mapping[str, tuple[str, tuple[float, ...]]] = {
    "k-fade": ("kl", (1e-4, 1e-3, 1e-2)),
    "win-u": ("damping", (1e-4, 1e-3, 1e-2)),
    "msa": ("scale", (0.5, 1.0, 2.0)),
    "task-vector": ("scale", (0.5, 1.0, 2.0)),
}

DESCENTS = tuple(name for name, method in RIVALS.items() if isinstance(method, Descent))
KNOWN = (*unlearning.METHODS, *RIVALS)
SHARDED = ("sisa", "receraser")
ONE_SEED = ("paper-step", "path", "finetune-edited", "msa", "task-vector")  # they draw nothing, or cost retrainings
METHODS = (
    "auto", "path", "step", "paper-step", "paper-descent",
    "public-script", "finetune-edited", *DESCENTS, *STRENGTHS, *SHARDED,
)  # fmt: skip
# KLOM wants every method on each of many trained models: not methods that cost as much as training them.
WITHOUT_KLOM = (*SHARDED, "paper-step", "paper-descent", "path")

Encode = Callable[[Sequence[Example]], TokenDataset]
Losses = Mapping[str, Any]  # name of a mean loss -> it; None where there is none


class NotYetError(LookupError):
    """A method needs the result of another that is not there."""


def check_methods(names: Iterable[str], known: Collection[str] = KNOWN) -> None:
    """Refuses names that are no methods.

    Raises:
        ValueError: which, and what there is.
    """
    unknown = sorted(set(names) - set(known))
    if unknown:
        msg = f"Unknown methods {', '.join(unknown)}; there are {', '.join(known)}."
        raise ValueError(msg)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """Which ways to forget are compared, and how often.

    Attributes:
        methods: ways to forget, names that `llmeraser_jax.rivals.get_method` knows.
        retrain_seeds: retrained models; the held-out KL and deviations between seeds take at least 2.
        method_seeds: seeds of each method that draws anything.
        sharded_seeds: seeds of sisa and receraser, which train all their shards for each.
        klom_seeds: models trained with other seeds and forgotten from for KLOM, which takes as many retrained ones
            and wants at least 10; 0 leaves it out.
    """

    methods: tuple[str, ...] = METHODS
    retrain_seeds: int = 3
    method_seeds: int = 3
    sharded_seeds: int = 1
    klom_seeds: int = 0

    def __post_init__(self):
        check_methods(self.methods)
        check_at_least(self, retrain_seeds=1, method_seeds=1, sharded_seeds=1, klom_seeds=0)

    @property
    def seeds(self) -> dict[str, int]:
        """Name of each method -> how many seeds it has."""
        several = {name: self.sharded_seeds if name in SHARDED else self.method_seeds for name in self.methods}
        return {name: 1 if name in ONE_SEED else count for name, count in several.items()}

    @property
    def klom(self) -> dict[str, int]:
        """Models behind KLOM by name; empty where it is left out."""
        if not self.klom_seeds:
            return {}
        references = {BEFORE: self.klom_seeds, RETRAINED: max(self.klom_seeds, self.retrain_seeds)}
        return references | {name: self.klom_seeds for name in self.methods if name not in WITHOUT_KLOM}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig(StudyOptions):
    """What experiments on a data set of the user's share: places, devices, training.

    Attributes:
        base: base model, a directory in Hugging Face layout.
        data: directory with the data, see the page.
        workdir: everything is kept there.
        mesh: devices, e.g. data=4,model=2; empty is one device.
        seed: of training and of what is drawn.
        max_length: tokens of a row.
        rank: of the adapter, on all linear layers.
        epochs: of training.
        batch_size: of training.
        learning_rate: of training.
        l2: lambda.
        full: the full-size preset.
    """

    base: Path = tyro.MISSING
    data: Path = tyro.MISSING
    workdir: Path = tyro.MISSING
    mesh: str = ""
    seed: int = 0
    max_length: int = 1024
    rank: int = 8
    epochs: int = 24
    batch_size: int = 8
    learning_rate: float = 4e-3
    l2: float = 1e-3
    full: tyro.conf.Suppress[bool] = False

    @property
    def lora(self) -> LoraConfig:
        """The adapter."""
        return LoraConfig(rank=self.rank, alpha=32.0 if self.full else 2.0 * self.rank, target_modules="all-linear")

    @property
    def train(self) -> TrainConfig:
        """Its training, in micro-batches of 2 rows on a CPU, where float32 is bound by memory."""
        return TrainConfig(
            epochs=self.epochs,
            batch_size=self.batch_size,
            microbatch_size=4 if self.full else 2,
            learning_rate=self.learning_rate,
            warmup_ratio=0.05 if self.full else 0.1,
            l2=self.l2,
            max_grad_norm=1.0 if self.full else None,
            seed=self.seed,
            checkpoint_every_steps=50,
        )

    def load_base(self) -> Model:
        """The base: in bfloat16 in the full preset, else in float32."""
        return load_model(self.base, dtype="bfloat16" if self.full else "float32", mesh=parse_mesh(self.mesh))

    def scenario(self, **fields: Any) -> Scenario:
        """A scenario trained as this configuration says."""
        fields.setdefault("learning_rates", FULL_LEARNING_RATES if self.full else LEARNING_RATES)
        chunk_size = self.train.examples_per_pass
        return Scenario(**{"lora": self.lora, "train": self.train, "chunk_size": chunk_size, **fields})


# Llama-2-7B as the recommendation papers train it. LLaRA's script also puts dropout 0.1 on LoRA's input, which is
# refused here, and its L2 term on the projector alone.
FULL_SIZE: Mapping[str, Any] = {
    "full": True, "max_length": 1024, "rank": 8, "epochs": 5, "batch_size": 128, "learning_rate": 2e-4, "l2": 1e-5,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nearest:
    """Of several configurations the one whose mean losses end nearest to a reference.

    Attributes:
        candidates: by what the choice is called, a number.
        chosen_as: what the number is.
        oracle: whether the reference is the retrained models, which no user has, or what every method is given: see
            `Study.targets`.
    """

    candidates: Mapping[float, Any]
    chosen_as: str
    oracle: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Scenario:
    """One request on one trained adapter.

    Attributes:
        name: of the comparison.
        model: the base, loaded.
        recipe: how examples become tokens.
        lora, train: the adapter and its training.
        chunk_size: examples per micro-batch of every method that forgets.
        examples: as trained on.
        requests: what is to go.
        shown: calibration rows: of the same kind, not trained on, and shown to methods.
        heldout: rows that no model saw: held-out KL, and non-members of membership inference. They should not be
            those that a method takes as its target.
        num_nonmembers: so many of them, the first, are like the training examples; None is all.
        make_task: `(model, encode) -> measures.Task`.
        users: id -> user, where examples have one.
        learning_rates: offered to the descents.
        oracle: whether rivals get the rate or strength that ends nearest to retraining, or their own default.
        methods: by name, in the place of `get_method`'s or besides them; a function is given the `Study`.
        num_task_seeds: so many seeds of a method are measured on the task; None is all.
        probed: also round and relearn (see `measures.PROBES`).
        question: what is asked, in a sentence or two for a reader who did not run it.
        metrics: what the task's metrics mean, where the library does not know them.
        settings: JSON-like: what else the workdir must have been made with.
        before, retrained: directories of the trained and the retrained models, where they are not in the workdir.
    """

    name: str
    model: Model
    recipe: Recipe
    lora: LoraConfig
    train: TrainConfig
    chunk_size: int
    examples: tuple[Example, ...]
    requests: tuple[Request, ...]
    shown: tuple[Example, ...]
    heldout: tuple[Example, ...]
    num_nonmembers: int | None = None
    make_task: Callable[[Model, Encode], measures.Task]
    users: Mapping[str, str] | None = None
    learning_rates: tuple[float, ...] = LEARNING_RATES
    oracle: bool = True
    methods: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    num_task_seeds: int | None = None
    probed: bool = True
    question: str = ""
    metrics: Mapping[str, MetricMeaning] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    before: Path | None = None
    retrained: Path | None = None


class Study:
    """The models of a scenario, made or loaded when first needed, and their records.

    Args:
        scenario: what.
        workdir: of this scenario.
        retrain_seeds: retrained models; the held-out KL and deviations between seeds take at least 2.
    """

    def __init__(self, scenario: Scenario, workdir: Path, *, retrain_seeds: int = 3):
        self.scenario, self.workdir, self.retrain_seeds = scenario, workdir, retrain_seeds
        check_at_least(self, retrain_seeds=1)
        self.model = scenario.model
        parts = {name: dataclasses.asdict(getattr(scenario, name)) for name in ("lora", "train")}
        recipe = scenario.recipe.to_mapping()
        claim_settings(workdir, {**scenario.settings, **parts, "chunk_size": scenario.chunk_size, "recipe": recipe})
        # Held-out KL, and what an oracle chose, are of the retrained models there were at that time.
        plan = workdir / COMPARISON_FILE
        found = files.read_json(plan)["retrain_seeds"] if plan.exists() else retrain_seeds
        if found != retrain_seeds and any((workdir / RECORDS).glob(f"{RETRAINED}-seed_*.json")):
            msg = f"{workdir} compares with {found} retrained models, and retrain_seeds is {retrain_seeds}. " \
                  "Repeat that number, or name another workdir."  # fmt: skip
            raise ValueError(msg)
        self.data = workdir / "data"
        self._keep_data()

    def _keep_data(self) -> None:
        """Writes the examples and the requests, or finds them as they were.

        Raises:
            ValueError: other ones are there.
        """
        rows = {"train": self.scenario.examples, "shown": self.scenario.shown, "heldout": self.scenario.heldout}
        lines = "".join(data.request_to_json(request) + "\n" for request in self.scenario.requests)
        requests = self.data / "requests.jsonl"
        other = [name for name, examples in rows.items() if (path := self.data / f"{name}.jsonl").exists()
                 and data.load_examples(path) != tuple(examples)]  # fmt: skip
        if requests.exists() and requests.read_text(encoding="utf-8") != lines:
            other.append("requests")
        if other:
            msg = (
                f"{self.data} holds other {', '.join(other)}. Give the data as they were, or name another workdir."
            )
            raise ValueError(msg)
        self.data.mkdir(parents=True, exist_ok=True)
        for name, examples in rows.items():
            data.save_examples(self.data / f"{name}.jsonl", examples)
        files.atomic_write_text(requests, lines)

    @functools.cached_property
    def before(self) -> Run:
        """The trained model."""
        of = self.scenario
        return finetune_run(self.model, self.data / "train.jsonl", of.before or self.workdir / "before",
                            recipe=of.recipe, lora=of.lora, config=of.train)  # fmt: skip

    @functools.cached_property
    def requests(self) -> tuple[Request, ...]:
        """As files hold them, validated."""
        return data.load_requests(self.data / "requests.jsonl", self.scenario.examples)

    def _retrain(self, requests: Sequence[Request], directory: Path, seeds: int | range) -> tuple[Run, ...]:
        path = self.data / "train.jsonl"
        return retrain(self.before, requests, directory, seeds=seeds, model=self.model, data_path=path)

    def _retrain_edited(self, seeds: int) -> tuple[Run, ...]:
        return self._retrain(self.requests, self.scenario.retrained or self.workdir / "retrained", seeds)

    @functools.cached_property
    def retrained(self) -> tuple[Run, ...]:
        """Trained on the edited data, one per seed."""
        return self._retrain_edited(self.retrain_seeds)

    @functools.cached_property
    def lora(self) -> Lora:
        """The trained adapter."""
        return self.before.load_adapter(self.model)

    def encode(self, examples: Sequence[Example]) -> TokenDataset:
        """As the training saw them."""
        return self.before.encode(examples, self.model.tokenizer)

    def task(self, workdir: Path | None = None, run: Run | None = None) -> UnlearningTask:
        """What a method is given: the trained model, or another one that was trained on the same data."""
        return task_of_run(self.before if run is None else run, self.requests, model=self.model,
                           data_path=self.data / "train.jsonl", calibration=self.scenario.shown,
                           users=self.scenario.users, workdir=workdir)  # fmt: skip

    @functools.cached_property
    def bench(self) -> measures.Bench:
        """What every model is measured on."""
        return measures.Bench(
            model=self.model,
            problem=self.task().problem,
            retrained=tuple(run.load_adapter(self.model) for run in self.retrained),
            heldout=self.encode(self.scenario.heldout),
            task=self.scenario.make_task(self.model, self.encode),
            train=self.scenario.train,
            quantise=quantise,
            relearn=relearn,
        )

    def losses(self, model: Model, params: LoraParams) -> dict[str, float | None]:
        """Mean losses in nats per response token on the forget set, the replacements and retained examples."""
        return _mean_losses(measures.training_examples(self.bench, model, params))

    def _kept(self, model: str, seed: int | None, compute: Callable[[], Record], where: str = RECORDS) -> Record:
        """The record that is in a file, or is computed and then kept there."""
        path = record_path(self.workdir, model, seed, where)
        if not path.exists():
            started = time.perf_counter()
            record = compute()
            seconds = time.perf_counter() - started
            details = {**record.details, "cell_seconds": seconds}
            write_record(self.workdir, dataclasses.replace(record, details=details), where)
            logger.info("%s: %s, %.0f s", self.scenario.name, path.stem, seconds)
        return read_record(path)

    def _measures(self, seed: int = 0) -> tuple[measures.Measure, ...]:
        with_task = self.scenario.num_task_seeds is None or seed < self.scenario.num_task_seeds
        taken = measures.STANDARD if with_task else (*measures.LOSSES, measures.heldout_kl)
        return (*taken, *measures.PROBES) if self.scenario.probed and seed == 0 else taken

    def reference(self) -> tuple[Record, tuple[Record, ...]]:
        """Before and retrained, measured once."""

        def kept(name: Any, seed: int | None, run: Run, lora: LoraParams) -> Record:
            def compute() -> Record:
                cost = {
                    key: run.result.get(key) for key in ("gradient_equivalents", "seconds", "peak_memory_bytes")
                }
                scores = measures.measure(self.bench, self.model, lora, self._measures())
                return Record(model=name, kind=name, seed=seed, scores=scores, cost=cost)

            return self._kept(name, seed, compute)

        pairs = zip(self.retrained, self.bench.retrained, strict=True)  # trained before anything is timed
        before = kept(BEFORE, None, self.before, self.lora)
        return before, tuple(kept(RETRAINED, run.train_config.seed, run, lora) for run, lora in pairs)

    @functools.cached_property
    def targets(self) -> Losses:
        """Mean losses that a user would want, from the trained model and rows that every method is given.

        Removed rows should be like calibration rows, edited pairs like their replacements are now, replacements and
        retained rows like retained rows are now.
        """
        now = _mean_losses(self.reference()[0].scores)
        unknown = np.mean(score_examples(self.model, self.lora, self.encode(self.scenario.shown)).losses)
        removed = sum(request.action is Action.REMOVE for request in self.requests)
        edited = len(self.requests) - removed
        named = (removed * unknown + edited * (now["wanted_loss"] or 0.0)) / len(self.requests)
        wanted = None if now["wanted_loss"] is None else now["retained_loss"]
        return {"forget_loss": float(named), "wanted_loss": wanted, "retained_loss": now["retained_loss"]}

    def _distance(self, fitted: Result, oracle: bool) -> float:
        """Sum of the differences of the mean losses from the reference's, in nats."""
        if oracle:
            retrained: list[Losses] = [_mean_losses(record.scores) for record in self.reference()[1]]
            measured = [name for name, value in retrained[0].items() if value is not None]
            ends = {name: seed_mean([seed[name] for seed in retrained]) for name in measured}
        else:
            ends = self.targets
        losses = self.losses(_model_of(fitted), fitted.params)
        gaps = [abs(value - ends[name]) for name, value in losses.items() if value is not None]
        return float(sum(gaps)) if np.isfinite(gaps).all() else np.inf

    def distance_moved(self, name: str) -> float:
        """How far the first seed of a method moved the adapter.

        Raises:
            NotYetError: it has no record, or moved nothing.
        """
        return self._known(name, "length to move as far as", lambda record: record.details.get("delta_norm"))

    def spent(self, name: str) -> float:
        """What the first seed of a method cost, in gradient equivalents.

        Raises:
            NotYetError: it has no record, or failed.
        """
        return self._known(name, "cost to spend", lambda record: (record.cost or {}).get("gradient_equivalents"))

    def _known(self, name: str, what: str, of: Callable[[Record], float | None]) -> float:
        path = record_path(self.workdir, name, 0)
        value = of(read_record(path)) if path.exists() else None
        if value is None:
            msg = f"{self.scenario.name}/{name} has no {what}; run it first."
            raise NotYetError(msg)
        return value

    def method(self, name: str, seed: int) -> Any:
        """A way to forget with its seed, or the candidates of one that an oracle chooses from.

        Where the scenario has an oracle, all rivals are chosen by it.
        """
        listed: Any = self.scenario.methods[name] if name in self.scenario.methods else get_method(name)
        if callable(listed):
            listed = listed(self)
        if not isinstance(listed, Nearest):
            listed = self.nearest(name, listed) if self.scenario.oracle else self.in_steps(listed)
        if isinstance(listed, Nearest):
            seeded = {number: _seeded(candidate, seed) for number, candidate in listed.candidates.items()}
            return dataclasses.replace(listed, candidates=seeded)
        return _seeded(listed, seed)

    def in_steps(self, listed: Any) -> Any:
        """A rival with no fewer steps than descents take, in the training's micro-batches; others as they are."""
        train, num_named = self.scenario.train, len(self.bench.problem.named)
        if isinstance(listed, Descent | TaskVector):
            size = listed.batch_size if isinstance(listed, Descent) else train.batch_size
            epochs = max(listed.epochs, math.ceil(NUM_DESCENT_STEPS / math.ceil(num_named / size)))
            listed = dataclasses.replace(listed, epochs=epochs)
        if isinstance(listed, Descent):
            size = None if train.microbatch_size is None else min(train.microbatch_size, listed.batch_size)
            listed = dataclasses.replace(listed, microbatch_size=size)
        return listed

    def nearest(self, name: str, listed: Any, *, oracle: bool = True) -> Any:
        """What a rival is chosen from, by learning rate or by strength; others as they are."""
        listed = self.in_steps(listed)
        field, offered = STRENGTHS.get(name, ("", ()))
        if isinstance(listed, Descent):
            field, offered = "learning_rate", self.scenario.learning_rates
        if not field:
            return listed
        candidates = {value: dataclasses.replace(listed, **{field: value}) for value in offered}
        return Nearest(candidates=candidates, chosen_as=field, oracle=oracle)

    def _choose(self, nearest: Nearest, seed: int) -> tuple[Result, dict[str, Any]]:
        """Of several configurations the one that comes nearest to retraining, fitted, and what was tried."""
        found: dict[str, float | str] = {}
        best, chosen, least = None, math.nan, np.inf
        for number, candidate in nearest.candidates.items():
            try:
                fitted = self._run(candidate, seed, self.task())
                found[f"{number:g}"] = distance = self._distance(fitted, nearest.oracle)
            except FloatingPointError as error:
                found[f"{number:g}"] = str(error)
                continue
            if distance < least:
                best, chosen, least = fitted, number, distance
        if best is None:
            msg = f"No {nearest.chosen_as} of {tuple(nearest.candidates)} ended in finite losses."
            raise FloatingPointError(msg)
        told = {nearest.chosen_as: chosen, f"distances_of_{nearest.chosen_as}s": found, "oracle": nearest.oracle}
        return best, told

    def fit(self, name: str, seed: int, workdir: Path | None = None, run: Run | None = None) -> tuple[Result, Any]:
        """A method with a seed, and what was chosen for it: by the first seed, for all."""
        method, chosen = self.method(name, seed), {}
        if isinstance(method, Nearest):
            first = record_path(self.workdir, name, 0)
            tuned = read_record(first).details.get("chosen") if first.exists() else None
            if tuned is None:
                return self._choose(method, seed)
            chosen = {method.chosen_as: tuned[method.chosen_as], "oracle": method.oracle}
            method = method.candidates[tuned[method.chosen_as]]
        return self._run(method, seed, self.task(workdir, run)), chosen

    def _run(self, method: Method, seed: int, task: UnlearningTask) -> Result:
        """A method with its seed. None is cut short at a retraining's cost, since cost is a result."""
        workspace = Workspace(
            budget=Budget(retraining=task.cost_of_retraining),
            mesh=task.mesh,
            chunk_size=self.scenario.chunk_size,
            seed=self.scenario.train.seed + seed,
        )
        return method.run(task, workspace)

    def run(self, name: str, seed: int) -> Record:
        """One method with one seed, or its file. One that finds no step is a result too: `failed`, the reason."""
        self.reference()

        def compute() -> Record:
            checkpoints = self.workdir / "checkpoints" / f"{name}-seed_{seed}" if name in SHARDED else None
            try:
                fitted, chosen = self.fit(name, seed, checkpoints)
            except (UnlearningError, FloatingPointError) as error:
                return Record(model=name, kind="unlearned", seed=seed, failed=str(error))
            details = {k: v for k, v in fitted.details.items() if k != "loss_terms"}
            oracle = chosen.pop("oracle", False)
            if _model_of(fitted) is self.model:
                details["delta_norm"] = float(trees.tree_norm(trees.tree_sub(fitted.params, self.lora)))
            else:
                details["own_before"] = self.losses(_model_of(fitted), fitted.before)
            return Record(
                model=name,
                kind="unlearned",
                seed=seed,
                scores=measures.measure(self.bench, _model_of(fitted), fitted.params, self._measures(seed)),
                cost={
                    "gradient_equivalents": fitted.cost.total,
                    "seconds": fitted.seconds,
                    "preparation_gradient_equivalents": fitted.cost.preparation,
                },
                receipt=None if fitted.receipt is None else receipt_to_keep(fitted.receipt.to_mapping()),
                details={"chosen": chosen, "oracle": oracle, **details},
            )

        return self._kept(name, seed, compute)

    def measure_klom(self, methods: Sequence[str], num_models: int) -> None:
        """Losses of models that each have a seed of training of their own: what KLOM compares.

        Args:
            methods: each forgets from every one of them.
            num_models: trained as `before` was, with other seeds; as many retrained ones, or all that there are.
        """
        first = self.scenario.train.seed + FIRST_KLOM_SEED
        trained = self._retrain((), self.workdir / "trained_again", range(first, first + num_models))
        retrained = self._retrain_edited(max(num_models, self.retrain_seeds))

        def keep(name: str, kind: Any, seed: int, fit: Callable[[], tuple[Model, LoraParams]]) -> None:
            def compute() -> Record:
                try:
                    scores = measures.measure(self.bench, *fit(), measures.LOSSES)
                except (UnlearningError, FloatingPointError) as error:
                    return Record(model=name, kind=kind, seed=seed, failed=str(error))
                losses = {part: {"losses": found["losses"]} for part, found in scores.items()}
                return Record(model=name, kind=kind, seed=seed, scores=losses)

            self._kept(name, seed, compute, KLOM)

        def forgotten(name: str, seed: int, run: Run) -> tuple[Model, LoraParams]:
            fitted, _ = self.fit(name, seed, run=run)
            return _model_of(fitted), fitted.params

        for kind, runs in ((RETRAINED, retrained), (BEFORE, trained)):
            for seed, run in enumerate(runs):
                keep(kind, kind, seed, lambda run=run: (self.model, run.load_adapter(self.model)))
        for seed, run in enumerate(trained):
            for name in methods:
                keep(name, "unlearned", seed, functools.partial(forgotten, name, seed, run))

    def plan(self, methods: Mapping[str, int], klom: Mapping[str, int] | None = None) -> Comparison:
        """The comparison without its records."""
        of, versions = self.scenario, library_versions()
        actions = {request.id: request.action.value for request in of.requests}
        named = [example.id for example in of.examples if example.id in actions]
        outside = len(of.heldout)
        nonmembers = outside if of.num_nonmembers is None else of.num_nonmembers
        facts = {
            "Rows that no model was trained on": f"{nonmembers} non-members, {outside} behind the held-out KL; "
            f"{len(of.shown)} other calibration rows.",
            "Model": f"`{Path(of.model.path).name}`, LoRA of rank {of.lora.rank}, {of.train.epochs} epochs of "
            f"batches of {of.train.batch_size} at a learning rate of {of.train.learning_rate}.",
            "Compared": f"{self.retrain_seeds} retrained models and {len(methods)} methods, with up to "
            f"{max(methods.values(), default=1)} seeds each.",
            "Made on": f"{describe_devices()}; python {versions['python']}, jax {versions['jax']}.",
        }
        return Comparison(
            name=of.name,
            question=of.question,
            facts=facts,
            ids=tuple(named),
            actions=tuple(actions[id_] for id_ in named),
            num_examples=len(of.examples),
            nonmembers=None if of.num_nonmembers is None else tuple(k < nonmembers for k in range(outside)),
            metrics=of.metrics,
            retrain_seeds=self.retrain_seeds,
            methods=methods,
            klom=klom or {},
        )


def _mean_losses(scores: Mapping[str, Any]) -> dict[str, float | None]:
    """Of the forget set, the replacements and retained examples; None of what there is not."""
    names = {"named": "forget_loss", "wanted": "wanted_loss", "retained": "retained_loss"}
    losses = {name: [math.nan if x is None else x for x in scores[part]["losses"]] for part, name in names.items()}
    return {name: seed_mean(values) if values else None for name, values in losses.items()}


def _model_of(result: Result) -> Model:
    """What reads a language model's parameters."""
    assert result.model is not None
    return result.model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budgeted:
    """A method with a budget of its own.

    Attributes:
        method: what forgets.
        budget: share of a retraining.
    """

    method: Method
    budget: float

    def run(self, task: UnlearningTask, workspace: Workspace) -> Result:
        """The method's result within the budget."""
        budget = Budget.of_share(self.budget, task.cost_of_retraining)
        return self.method.run(task, dataclasses.replace(workspace, budget=budget))


def _seeded(method: Any, seed: int) -> Any:
    has_seed = any(field.name == "seed" for field in dataclasses.fields(method))
    return dataclasses.replace(method, seed=seed) if has_seed else method


def quantise(model: Model, params: Any, **options: Any) -> tuple[Model, Any]:
    """`robustness.quantise_merged`; of an ensemble every member is merged and rounded by itself."""
    if not isinstance(params, Ensemble):
        return robustness.quantise_merged(model, params, **options)
    both = ensemble_model(model)
    member = robustness.RoundingModel.of(both.member, params.member(0), **options)
    return dataclasses.replace(both, member=member), params


def relearn(model: Model, params: Any, *arguments: Any, **options: Any) -> Any:
    """`robustness.relearn`; of an ensemble every member is trained on the same rows."""
    if not isinstance(params, Ensemble):
        return robustness.relearn(model, params, *arguments, **options)
    alone = ensemble_model(model).member
    members = [params.member(k) for k in range(params.num_members)]
    again = [robustness.relearn(alone, member, *arguments, **options) for member in members]
    return make_ensemble(again, gate=params.gate, aggregation=params.aggregation)


def run_study(scenario: Scenario, workdir: Path, options: StudyOptions) -> Comparison:
    """Computes what a workdir lacks.

    Returns:
        What the workdir holds now, earlier calls' methods included.
    """
    study = Study(scenario, workdir, retrain_seeds=options.retrain_seeds)
    plan = study.plan(options.seeds, options.klom)
    write_plan(workdir, plan)
    logger.info("%s: trained, loss %.4f", scenario.name, study.before.result["loss"])
    study.reference()
    for name, seeds in options.seeds.items():
        for seed in range(seeds):
            study.run(name, seed)
    if options.klom:
        study.measure_klom([name for name in options.methods if name in options.klom], options.klom_seeds)
    between, cut = study.bench.between_retrained, study.bench.problem.examples.num_truncated
    facts = {**plan.facts, **({"Prompts cut to fit": f"{cut} of the training examples'."} if cut else {})}
    positions = between.num_positions if between else 0
    write_plan(workdir, dataclasses.replace(plan, facts=facts, num_positions=positions))
    return read_comparison(workdir)


def show(scenario: Scenario, workdir: Path, options: StudyOptions) -> None:
    """Runs a study, writes its report (JSON, HTML, Markdown) beside its records, and prints the first table."""
    log_progress("study")
    report = summarise(run_study(scenario, workdir, options))
    files.atomic_write_json(workdir / REPORT_FILE, report)
    page = write_page(page_of(report), workdir)
    named, of = report["named"]["total"], report["num_examples"]
    sys.stdout.write(
        f"\n{report['name']}: {named} of {of} examples named\n\n{render_text(terminal_blocks(report))}\n"
        f"Report: {page}\n{describe_devices()}; {json.dumps(library_versions())}\n"
    )
