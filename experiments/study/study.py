"""Owns the comparison of all ways to forget on one request: training, retraining, rivals, measures.

A `Scenario` says what is trained, what is to go, and how the task is measured; `run_study` computes what its
workdir lacks and returns everything. What a workdir holds of measures is `llmeraser_jax.evaluation.records`';
besides, before/ and retrained/seed_*/ are run directories.

What a rival is told. All get the same adapter, data and requests. The descents' learning rates are those of a
small grid at which the losses come nearest to the retrained models' (an oracle that no user has, and that the ways
of this package are not given); everything else is the default of `llmeraser_jax.baselines`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llmeraser_jax.baselines import BASELINES, Baseline, Fitted, Setting, retrain, setting_of_run
from llmeraser_jax.baselines.descent import Descent
from llmeraser_jax.baselines.erasing import Erasing

from experiments.study.options import SHARDED, StudyOptions
from experiments.workdirs import claim_settings
from llmeraser_jax import files, trees
from llmeraser_jax.data import (
    Example,
    Recipe,
    Request,
    TokenDataset,
    load_examples,
    load_requests,
    request_to_json,
    save_examples,
)
from llmeraser_jax.environment import describe_devices, library_versions
from llmeraser_jax.evaluation import measures
from llmeraser_jax.evaluation.closure import seed_mean
from llmeraser_jax.evaluation.job import receipt_to_keep
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
from llmeraser_jax.lora import Lora, LoraConfig
from llmeraser_jax.models import Model
from llmeraser_jax.runs import Run
from llmeraser_jax.training import TrainConfig
from llmeraser_jax.training.job import finetune_run
from llmeraser_jax.types import LoraParams
from llmeraser_jax.unlearning import EraseConfig, UnlearningError

logger = logging.getLogger("study")

FIRST_KLOM_SEED = 1000  # after the training's own; retrained models have those that follow it
LEARNING_RATES = (1e-4, 1e-3, 4e-3)
NUM_DESCENT_STEPS = 20  # at least: where S is a batch or two, the descents take more than their own epochs

Encode = Callable[[Sequence[Example]], TokenDataset]
Losses = Mapping[str, Any]  # name of a mean loss -> it, None of what there is not


class NotYetError(LookupError):
    """A method needs the result of another that is not there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nearest:
    """Of several configurations the one that ends nearest to retraining: an oracle that no user has.

    Attributes:
        candidates: by what the choice is called, a number.
        chosen_as: what the number is.
    """

    candidates: Mapping[float, Any]
    chosen_as: str


def sum_of_gaps(before: Losses, losses: Losses, retrained: Sequence[Losses]) -> float:
    """Sum of the differences of the mean losses from the retrained models', in nats."""
    gaps = [
        abs(value - np.mean([seed[name] for seed in retrained]))
        for name, value in losses.items()
        if value is not None
    ]
    return float(sum(gaps)) if np.isfinite(gaps).all() else np.inf


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Scenario:
    """One request on one trained adapter.

    Attributes:
        name: of the comparison.
        model: the base, loaded.
        recipe: how examples become tokens.
        lora, train: the adapter and its training.
        erase: what the package's own ways share; each then states what is its own.
        examples: as trained on.
        requests: what is to go.
        shown: examples of the same kind that were not trained on and that methods are shown: where target matching
            looks up how removed examples should end.
        heldout: that no model saw: held-out KL, and non-members of membership inference, which should not be those
            that a method takes as its target.
        num_nonmembers: so many of them, the first, are like the training examples; None is all.
        make_task: `(model, encode) -> measures.Task`.
        users: id -> user, where examples have one.
        learning_rates: that the descents are offered.
        baselines: by name, in the place of `BASELINES`' own or besides them; a function is given the `Study`.
        distance: how far losses are from the retrained models', for choices by an oracle.
        num_task_seeds: so many seeds of a method are measured on the task, which may take longer than forgetting
            does; all other measures are of all seeds. None is all.
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
    erase: EraseConfig
    examples: tuple[Example, ...]
    requests: tuple[Request, ...]
    shown: tuple[Example, ...]
    heldout: tuple[Example, ...]
    num_nonmembers: int | None = None
    make_task: Callable[[Model, Encode], measures.Task]
    users: Mapping[str, str] | None = None
    learning_rates: tuple[float, ...] = LEARNING_RATES
    baselines: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    distance: Callable[[Losses, Losses, Sequence[Losses]], float] = sum_of_gaps
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
        retrain_seeds: retrained models, at least 2.
    """

    def __init__(self, scenario: Scenario, workdir: Path, *, retrain_seeds: int = 3):
        if retrain_seeds < 2:
            msg = f"retrain_seeds is {retrain_seeds}; the held-out KL needs at least 2."
            raise ValueError(msg)
        self.scenario, self.workdir, self.retrain_seeds = scenario, workdir, retrain_seeds
        self.model = scenario.model
        parts = {name: dataclasses.asdict(getattr(scenario, name)) for name in ("lora", "train", "erase")}
        claim_settings(workdir, {**scenario.settings, **parts, "recipe": scenario.recipe.to_mapping()})
        self._refuse_other_references()
        self.data = workdir / "data"
        self._keep_data()

    def _keep_data(self) -> None:
        """Writes the examples and the requests, or finds them as they were.

        Raises:
            ValueError: other ones are there.
        """
        rows = {"train": self.scenario.examples, "shown": self.scenario.shown, "heldout": self.scenario.heldout}
        lines = "".join(request_to_json(request) + "\n" for request in self.scenario.requests)
        requests = self.data / "requests.jsonl"
        other = [
            name
            for name, examples in rows.items()
            if (path := self.data / f"{name}.jsonl").exists() and load_examples(path) != tuple(examples)
        ]
        if requests.exists() and requests.read_text(encoding="utf-8") != lines:
            other.append("requests")
        if other:
            msg = (
                f"{self.data} holds other {', '.join(other)}. Give the data as they were, or name another workdir."
            )
            raise ValueError(msg)
        self.data.mkdir(parents=True, exist_ok=True)
        for name, examples in rows.items():
            save_examples(self.data / f"{name}.jsonl", examples)
        files.atomic_write_text(requests, lines)

    def _refuse_other_references(self) -> None:
        """Held-out KL, and what an oracle chose, are of the retrained models there were at that time."""
        plan = self.workdir / COMPARISON_FILE
        found = files.read_json(plan)["retrain_seeds"] if plan.exists() else self.retrain_seeds
        if found != self.retrain_seeds and any((self.workdir / RECORDS).glob(f"{RETRAINED}-seed_*.json")):
            msg = (
                f"{self.workdir} compares with {found} retrained models, and retrain_seeds is "
                f"{self.retrain_seeds}: numbers against different models would stand in one table. Name another "
                "workdir."
            )
            raise ValueError(msg)

    @functools.cached_property
    def before(self) -> Run:
        """The trained model."""
        scenario = self.scenario
        return finetune_run(
            self.model,
            self.data / "train.jsonl",
            scenario.before or self.workdir / "before",
            recipe=scenario.recipe,
            lora=scenario.lora,
            config=scenario.train,
        )

    @functools.cached_property
    def requests(self) -> tuple[Request, ...]:
        """As files hold them, validated."""
        return load_requests(self.data / "requests.jsonl", self.scenario.examples)

    def _retrain(self, seeds: int) -> tuple[Run, ...]:
        directory = self.scenario.retrained or self.workdir / "retrained"
        return retrain(self.before, self.requests, directory, seeds=seeds, model=self.model,
                       data_path=self.data / "train.jsonl")  # fmt: skip

    @functools.cached_property
    def retrained(self) -> tuple[Run, ...]:
        """Trained on the edited data, one per seed."""
        return self._retrain(self.retrain_seeds)

    @property
    def retrained_loras(self) -> tuple[LoraParams, ...]:
        """Their adapters."""
        return self.bench.retrained

    @functools.cached_property
    def lora(self) -> Lora:
        """The trained adapter."""
        return self.before.load_adapter(self.model)

    def encode(self, examples: Sequence[Example]) -> TokenDataset:
        """As the training saw them."""
        return self.before.encode(examples, self.model.tokenizer)

    def setting(self, workdir: Path | None = None, run: Run | None = None) -> Setting:
        """What a baseline is given: the trained model, or another one that was trained on the same data."""
        return setting_of_run(
            self.before if run is None else run,
            self.requests,
            model=self.model,
            data_path=self.data / "train.jsonl",
            heldout=self.scenario.shown,
            users=self.scenario.users,
            workdir=workdir,
        )

    @functools.cached_property
    def bench(self) -> measures.Bench:
        """What every model is measured on."""
        scenario = self.scenario
        return measures.Bench(
            model=self.model,
            problem=self.setting().problem,
            retrained=tuple(run.load_adapter(self.model) for run in self.retrained),
            heldout=self.encode(scenario.heldout),
            task=scenario.make_task(self.model, self.encode),
            train=scenario.train,
        )

    def losses(self, model: Model, params: LoraParams) -> dict[str, float | None]:
        """Mean losses in nats per response token on the forget set, the replacements and retained examples."""
        return _mean_losses(measures.training_examples(self.bench, model, params))

    def _kept(self, model: str, seed: int | None, compute: Callable[[], Record], where: str = RECORDS) -> Record:
        """The record that is in a file, or is computed and then kept there."""
        path = record_path(self.workdir, model, seed, where)
        if not path.exists():
            started = time.perf_counter()
            write_record(self.workdir, compute(), where)
            logger.info("%s: %s, %.0f s", self.scenario.name, path.stem, time.perf_counter() - started)
        return read_record(path)

    def _measures(self, seed: int = 0) -> tuple[measures.Measure, ...]:
        with_task = self.scenario.num_task_seeds is None or seed < self.scenario.num_task_seeds
        taken = measures.STANDARD if with_task else (*measures.LOSSES, measures.heldout_kl)
        return (*taken, *measures.PROBES) if self.scenario.probed and seed == 0 else taken

    def reference(self) -> tuple[Record, tuple[Record, ...]]:
        """Before and retrained, measured once."""

        def of(name: Any, seed: int | None, run: Run, lora: LoraParams) -> Record:
            cost = {key: run.result.get(key) for key in ("gradient_equivalents", "seconds", "peak_memory_bytes")}
            scores = measures.measure(self.bench, self.model, lora, self._measures())
            return Record(model=name, kind=name, seed=seed, scores=scores, cost=cost)

        before = self._kept(BEFORE, None, lambda: of(BEFORE, None, self.before, self.lora))
        retrained = [
            self._kept(RETRAINED, seed, functools.partial(of, RETRAINED, seed, run, lora))
            for run, lora in zip(self.retrained, self.retrained_loras, strict=True)
            for seed in [run.train_config.seed]
        ]
        return before, tuple(retrained)

    def _distance(self, fitted: Fitted) -> float:
        before, retrained = self.reference()
        losses = self.losses(fitted.model, fitted.params)
        return self.scenario.distance(
            _mean_losses(before.scores), losses, [_mean_losses(of.scores) for of in retrained]
        )

    def distance_moved(self, name: str) -> float:
        """How far the first seed of a method moved the adapter.

        Raises:
            NotYetError: it has no record, or moved nothing.
        """
        path = record_path(self.workdir, name, 0)
        norm = read_record(path).details.get("delta_norm") if path.exists() else None
        if norm is None:
            msg = f"{self.scenario.name}/{name} has no length to move as far as; run it first."
            raise NotYetError(msg)
        return norm

    def _listed(self, name: str) -> Any:
        """A method as the scenario or else the library has it.

        Descents take `NUM_DESCENT_STEPS` or more, in the training's micro-batches, at the best of several rates.
        """
        listed: Any = self.scenario.baselines[name] if name in self.scenario.baselines else BASELINES[name]
        if not isinstance(listed, Descent):
            return listed(self) if callable(listed) else listed
        steps_per_epoch = math.ceil(len(self.bench.problem.named) / listed.batch_size)
        size = self.scenario.train.microbatch_size
        descent: Any = dataclasses.replace(
            listed,
            epochs=max(listed.epochs, math.ceil(NUM_DESCENT_STEPS / steps_per_epoch)),
            microbatch_size=None if size is None else min(size, listed.batch_size),
        )
        rates = self.scenario.learning_rates
        candidates = {rate: dataclasses.replace(descent, learning_rate=rate) for rate in rates}
        return Nearest(candidates=candidates, chosen_as="learning_rate")

    def _choose(self, nearest: Nearest) -> tuple[Fitted, dict[str, Any]]:
        """Of several configurations the one that comes nearest to retraining, fitted, and what was tried."""
        found: dict[float, float | str] = {}
        best, chosen, least = None, math.nan, np.inf
        for number, baseline in nearest.candidates.items():
            try:
                fitted = baseline.fit(self.setting())
                found[number] = distance = self._distance(fitted)
            except FloatingPointError as error:
                found[number] = str(error)
                continue
            if distance < least:
                best, chosen, least = fitted, number, distance
        if best is None:
            msg = f"No {nearest.chosen_as} of {tuple(nearest.candidates)} ended in finite losses."
            raise FloatingPointError(msg)
        tried = {f"{number:g}": value for number, value in found.items()}
        return best, {nearest.chosen_as: chosen, f"distances_of_{nearest.chosen_as}s": tried}

    def fit(self, name: str, seed: int, workdir: Path | None = None, run: Run | None = None) -> tuple[Fitted, Any]:
        """A method with a seed, and what was chosen for it: by the first seed, for all."""
        baseline, chosen = self._listed(name), {}
        if isinstance(baseline, Nearest):
            first = record_path(self.workdir, name, 0)
            tuned = read_record(first).details.get("chosen") if first.exists() else None
            if tuned is None:
                baseline = dataclasses.replace(
                    baseline, candidates={k: _seeded(b, seed) for k, b in baseline.candidates.items()}
                )
                return self._choose(baseline)
            chosen = {baseline.chosen_as: tuned[baseline.chosen_as]}
            baseline = baseline.candidates[tuned[baseline.chosen_as]]
        if isinstance(baseline, Erasing):
            own = {k: v for k, v in _changed(baseline.config).items() if k not in ("l2", "seed")}
            config = dataclasses.replace(self.scenario.erase, **own, seed=self.scenario.erase.seed + seed)
            baseline = dataclasses.replace(baseline, config=config)
        return _seeded(baseline, seed).fit(self.setting(workdir, run)), chosen

    def run(self, name: str, seed: int) -> Record:
        """One method with one seed, or its file. One that finds no step is a result too: `failed`, the reason."""
        self.reference()

        def compute() -> Record:
            checkpoints = self.workdir / "checkpoints" / f"{name}-seed_{seed}"
            try:
                fitted, chosen = self.fit(name, seed, checkpoints if name in SHARDED else None)
            except (UnlearningError, FloatingPointError) as error:
                return Record(model=name, kind="unlearned", seed=seed, failed=str(error))
            single = fitted.model is self.model
            costs = ("gradient_equivalents", "seconds", "preparation_gradient_equivalents")
            details = {k: v for k, v in fitted.details.items() if k not in ("loss_terms", "receipt")}
            if single:
                details["delta_norm"] = float(trees.tree_norm(trees.tree_sub(fitted.params, self.lora)))
            else:
                details["own_before"] = self.losses(fitted.model, fitted.before)
            receipt = fitted.details.get("receipt")
            return Record(
                model=name,
                kind="unlearned",
                seed=seed,
                scores=measures.measure(self.bench, fitted.model, fitted.params, self._measures(seed)),
                cost={key: getattr(fitted, key) for key in costs},
                receipt=None if receipt is None else receipt_to_keep(receipt),
                details={"chosen": chosen, "oracle": bool(chosen), **details},
            )

        return self._kept(name, seed, compute)

    def measure_klom(self, methods: Sequence[str], num_models: int) -> None:
        """Losses of models that each have a seed of training of their own: what KLOM compares.

        Args:
            methods: each forgets from every one of them.
            num_models: trained as `before` was, with other seeds; as many retrained ones, or all that there are.
        """
        first = self.scenario.train.seed + FIRST_KLOM_SEED
        seeds = range(first, first + num_models)
        trained = retrain(self.before, (), self.workdir / "trained_again", seeds=seeds, model=self.model,
                          data_path=self.data / "train.jsonl")  # fmt: skip

        def keep(name: str, kind: Any, seed: int, fit: Callable[[], tuple[Model, LoraParams]]) -> None:
            def compute() -> Record:
                try:
                    model, params = fit()
                except (UnlearningError, FloatingPointError) as error:
                    return Record(model=name, kind=kind, seed=seed, failed=str(error))
                scores = measures.measure(self.bench, model, params, measures.LOSSES)
                losses = {part: {"losses": found["losses"]} for part, found in scores.items()}
                return Record(model=name, kind=kind, seed=seed, scores=losses)

            self._kept(name, seed, compute, KLOM)

        for seed, run in enumerate(self._retrain(max(num_models, self.retrain_seeds))):
            keep(RETRAINED, RETRAINED, seed, lambda run=run: (self.model, run.load_adapter(self.model)))
        for seed, run in enumerate(trained):
            keep(BEFORE, BEFORE, seed, lambda run=run: (self.model, run.load_adapter(self.model)))
            for name in methods:

                def fit(name=name, seed=seed, run=run) -> tuple[Model, LoraParams]:
                    fitted, _ = self.fit(name, seed, run=run)
                    return fitted.model, fitted.params

                keep(name, "unlearned", seed, fit)

    def plan(self, methods: Mapping[str, int], klom: Mapping[str, int] | None = None) -> Comparison:
        """The comparison without its records."""
        scenario = self.scenario
        actions = {request.id: request.action.value for request in scenario.requests}
        named = [example.id for example in scenario.examples if example.id in actions]
        versions = library_versions()
        outside = len(scenario.heldout)
        nonmembers = outside if scenario.num_nonmembers is None else scenario.num_nonmembers
        train = scenario.train
        facts = {
            "Examples that no model was trained on": f"{nonmembers} to tell the forget set from (membership "
            f"inference), {outside} behind the held-out KL, which no method saw; {len(scenario.shown)} others were "
            "shown to methods.",
            "Model": f"`{Path(scenario.model.path).name}`, LoRA of rank {scenario.lora.rank}, {train.epochs} "
            f"epochs of batches of {train.batch_size} at a learning rate of {train.learning_rate}.",
            "Compared": f"{self.retrain_seeds} retrained models and {len(methods)} methods, with up to "
            f"{max(methods.values(), default=1)} seeds each.",
            "Made on": f"{describe_devices()}; python {versions['python']}, jax {versions['jax']}.",
        }
        return Comparison(
            name=scenario.name,
            question=scenario.question,
            facts=facts,
            ids=tuple(named),
            actions=tuple(actions[id_] for id_ in named),
            num_examples=len(scenario.examples),
            nonmembers=None if scenario.num_nonmembers is None else tuple(k < nonmembers for k in range(outside)),
            metrics=scenario.metrics,
            retrain_seeds=self.retrain_seeds,
            methods=methods,
            klom=klom or {},
        )


def _mean_losses(scores: Mapping[str, Any]) -> dict[str, float | None]:
    """Of the forget set, the replacements and retained examples; None of what there is not."""
    names = {"named": "forget_loss", "wanted": "wanted_loss", "retained": "retained_loss"}
    losses = {name: [math.nan if x is None else x for x in scores[part]["losses"]] for part, name in names.items()}
    return {name: seed_mean(values) if values else None for name, values in losses.items()}


def _changed(config: EraseConfig) -> dict[str, Any]:
    """The fields of a configuration that are not its defaults, and its method."""
    default = EraseConfig()
    names = [field.name for field in dataclasses.fields(config)]
    changed = {name: getattr(config, name) for name in names if getattr(config, name) != getattr(default, name)}
    return {**changed, "method": config.method}


def _seeded(baseline: Any, seed: int) -> Baseline:
    if isinstance(baseline, Erasing) or not any(field.name == "seed" for field in dataclasses.fields(baseline)):
        return baseline
    return dataclasses.replace(baseline, seed=seed)


def run_study(scenario: Scenario, workdir: Path, options: StudyOptions) -> Comparison:
    """Computes what a workdir lacks.

    Args:
        scenario: what.
        workdir: of this scenario.
        options: which methods, and how often.

    Returns:
        What the workdir holds now, earlier calls' methods included.
    """
    study = Study(scenario, workdir, retrain_seeds=options.retrain_seeds)
    plan = study.plan(options.seeds, options.klom)
    write_plan(workdir, plan)
    logger.info("%s: trained, loss %.4f", scenario.name, study.before.result["loss"])
    study.reference()
    between, cut = study.bench.between_retrained, study.bench.problem.examples.num_truncated
    for name, seeds in options.seeds.items():
        for seed in range(seeds):
            study.run(name, seed)
    if options.klom:
        with_klom = [name for name in options.methods if name in options.klom]
        study.measure_klom(with_klom, options.klom_seeds)
    facts = {**plan.facts, **({"Prompts cut to fit": f"{cut} of the training examples'."} if cut else {})}
    write_plan(
        workdir, dataclasses.replace(plan, facts=facts, num_positions=between.num_positions if between else 0)
    )
    return read_comparison(workdir)
