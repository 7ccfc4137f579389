"""Owns the comparison of all ways to forget on one request: training, retraining, rivals, measures.

A `Scenario` says what is trained, what is to go, and how the task is measured; `run_study` computes what its
workdir lacks and returns everything. What a workdir holds of measures, and how they are read, is
`llmeraser_jax.evaluation.study`'s; besides, before/ and retrained/seed_*/ are run directories, and results.json is
all of it together.

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
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from experiments.study.options import SHARDED, StudyOptions
from experiments.workdirs import claim_settings
from llmeraser_jax import files, trees
from llmeraser_jax.baselines import BASELINES, Baseline, Fitted, Setting, retrain, setting_of_run
from llmeraser_jax.baselines.descent import Descent
from llmeraser_jax.baselines.erasing import Erasing
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
from llmeraser_jax.evaluation.model_tables import MetricMeaning
from llmeraser_jax.evaluation.robustness import quantise_merged, relearn, retained_only
from llmeraser_jax.evaluation.scoring import ExampleScores, heldout_kl_of, make_task_metrics, score_examples
from llmeraser_jax.evaluation.study import BEFORE, PARTS, RETRAINED, StudyManifest, read_study, write_manifest
from llmeraser_jax.evaluation.study import Study as StudyResults
from llmeraser_jax.evaluation.tasks import Metric
from llmeraser_jax.lora import Lora, LoraConfig
from llmeraser_jax.models import Model
from llmeraser_jax.runs import Run
from llmeraser_jax.training import TrainConfig
from llmeraser_jax.training.job import finetune_run
from llmeraser_jax.types import LoraParams
from llmeraser_jax.unlearning import EraseConfig, UnlearningError
from llmeraser_jax.unlearning.problem import EditProblem

logger = logging.getLogger("study")

FIRST_KLOM_SEED = 1000  # after the training's own; retrained models have those that follow it
LEARNING_RATES = (1e-4, 1e-3, 4e-3)
NUM_DESCENT_STEPS = 20  # at least: where S is a batch or two, the descents take more than their own epochs
NUM_RETAINED_SCORED = 100
NUM_RELEARNING_STEPS = 10
RELEARNING_RATE = 1e-3  # or the training's own, where that is lower

Encode = Callable[[Sequence[Example]], TokenDataset]


class Task(Protocol):
    """Measures a model on the task that it was tuned for."""

    def __call__(self, model: Model, params: LoraParams | None) -> Mapping[str, Any]:
        """`metrics`: name -> `Metric` as a mapping; TOFU's `truth_ratios` give its forget quality when read."""
        ...


def held_out_task(base: Model, encode: Encode, examples: Sequence[Example]) -> Task:
    """Accuracy and AUC of yes/no questions, else exact match, on held-out examples."""
    task = make_task_metrics(base, encode(examples))

    def measure(model: Model, params: LoraParams | None) -> Mapping[str, Any]:
        return {"metrics": metrics_as_json(dataclasses.replace(task, model=model)(params))}

    return measure


def metrics_as_json(metrics: Sequence[Metric]) -> dict[str, Any]:
    """By name, with the valid ratio."""
    return {m.name: {**dataclasses.asdict(m), "valid_ratio": m.valid_ratio} for m in metrics}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Scenario:
    """One request on one trained adapter.

    Attributes:
        name: a directory's name.
        model: the base, loaded.
        recipe: how examples become tokens.
        lora, train: the adapter and its training.
        erase: what the package's own ways share; each then states what is its own.
        examples: as trained on.
        requests: what is to go.
        shown: examples of the same kind that were not trained on and that methods are shown: where erasing by
            matching looks up how removed rows should end.
        heldout: that no model and no method saw: held-out KL, and non-members of membership inference, which must
            not be those that a method takes as its target.
        make_task: `(model, encode) -> Task`.
        users: id -> user, where examples have one.
        learning_rates: that the descents are offered.
        baselines: by name, in the place of `BASELINES`' own: methods that are told something about the data.
        num_task_seeds: so many seeds of a method are measured on the task, which may take longer than forgetting
            does; losses, held-out KL and membership inference are of all seeds. None is all.
        question: what is asked, in a sentence or two for a reader who did not run it.
        metrics: what the task's metrics mean, where the library does not know them.
        settings: JSON-like: what else the workdir must have been made with.
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
    make_task: Callable[[Model, Encode], Task]
    users: Mapping[str, str] | None = None
    learning_rates: tuple[float, ...] = LEARNING_RATES
    baselines: Mapping[str, Baseline] = dataclasses.field(default_factory=dict)
    num_task_seeds: int | None = None
    question: str = ""
    metrics: Mapping[str, MetricMeaning] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Study:
    """The models of a scenario, made or loaded when first needed, and their scores.

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
        """Writes the rows and the requests, or finds them as they were.

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
        """Held-out KL, and the rates chosen for descents, are of the retrained models there were at that time."""
        path = self.workdir / "scores" / "heldout_kl.json"
        found = len(files.read_json(path)["seed_floors"]) if path.exists() else self.retrain_seeds
        if found != self.retrain_seeds:
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
            self.workdir / "before",
            recipe=scenario.recipe,
            lora=scenario.lora,
            config=scenario.train,
        )

    @functools.cached_property
    def requests(self) -> tuple[Request, ...]:
        """As files hold them, validated."""
        return load_requests(self.data / "requests.jsonl", self.before.load_examples())

    @functools.cached_property
    def retrained(self) -> tuple[Run, ...]:
        """Trained on the edited data, one per seed."""
        return retrain(
            self.before, self.requests, self.workdir / "retrained", seeds=self.retrain_seeds, model=self.model
        )

    @functools.cached_property
    def retrained_loras(self) -> tuple[Lora, ...]:
        """Their adapters."""
        return tuple(run.load_adapter(self.model) for run in self.retrained)

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
            heldout=self.scenario.shown,
            users=self.scenario.users,
            workdir=workdir,
        )

    @functools.cached_property
    def dataset(self) -> TokenDataset:
        """The training set as it stood, encoded once."""
        return self.setting().dataset

    @functools.cached_property
    def problem(self) -> EditProblem[TokenDataset]:
        """The requests as index arrays."""
        return self.setting().problem

    @functools.cached_property
    def _heldout(self) -> TokenDataset:
        return self.encode(self.scenario.heldout)

    @functools.cached_property
    def _task(self) -> Task:
        return self.scenario.make_task(self.model, self.encode)

    @functools.cached_property
    def _retained(self) -> np.ndarray:
        """Positions of some retained rows, the same for all models."""
        rows = self.problem.retained
        size = min(NUM_RETAINED_SCORED, len(rows))
        return np.sort(np.random.default_rng(0).choice(rows, size, replace=False))

    def example_scores(self, model: Model, params: LoraParams) -> dict[str, ExampleScores]:
        """Of S as trained, of the wanted pairs, and of some retained rows."""
        problem = self.problem
        places = {"named": problem.named, "wanted": problem.wanted, "retained": self._retained}
        return {part: score_examples(model, params, problem.examples, rows) for part, rows in places.items()}

    def losses(self, model: Model, params: LoraParams) -> dict[str, float | None]:
        """Their mean losses in nats per response token; None of what there is not."""
        return _mean_losses(self.example_scores(model, params))

    def score(self, model: Model, params: LoraParams, *, with_task: bool = True) -> dict[str, Any]:
        """Everything about one adapter or ensemble that needs no other model, JSON-like."""
        scores = self.example_scores(model, params)
        named = scores["named"]
        unseen = score_examples(model, params, self._heldout)
        return {
            **_mean_losses(scores),
            "wanted_losses": scores["wanted"].losses.tolist(),
            "forget_probability": float(np.exp(-named.losses).mean()),
            "extraction_strength": float(named.extraction.mean()),
            "named": _arrays(named),
            "unseen": _arrays(unseen),
            **({"task": dict(self._task(model, params))} if with_task else {}),
        }

    def _microbatch_size(self, batch_size: int) -> int | None:
        """The training's, in batches of another size."""
        size = self.scenario.train.microbatch_size
        return None if size is None else min(size, batch_size)

    def probe(self, model: Model, params: LoraParams) -> dict[str, float]:
        """Loss on S after 4-bit rounding of the merged model, and after training on retained rows, if any."""
        problem, train = self.problem, self.scenario.train
        rounded, rest = quantise_merged(model, params)
        rounded_loss = score_examples(rounded, rest, problem.examples, problem.named).losses.mean()
        unrelated = retained_only(self.dataset, problem.named)
        if not len(unrelated):
            return {"forget_loss_4_bit": float(rounded_loss)}
        num_steps = min(NUM_RELEARNING_STEPS, len(unrelated))
        size = min(train.batch_size, len(unrelated) // num_steps)
        rate = min(RELEARNING_RATE, train.learning_rate)
        config = dataclasses.replace(
            train, batch_size=size, microbatch_size=self._microbatch_size(size), learning_rate=rate
        )
        again = relearn(model, params, unrelated, config, num_steps=num_steps)
        relearned = score_examples(model, again, problem.examples, problem.named).losses.mean()
        return {"forget_loss_4_bit": float(rounded_loss), "forget_loss_relearned": float(relearned)}

    def _kept(self, path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is in a file, or is computed and then kept there."""
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            started = time.perf_counter()
            result = files.finite_json(compute())
            files.atomic_write_json(path, result)
            logger.info("%s: %s, %.0f s", self.scenario.name, path.stem, time.perf_counter() - started)
        return files.read_json(path)

    def reference(self) -> dict[str, Any]:
        """Before and retrained, measured once."""

        def of(run: Run, lora: Lora) -> dict[str, Any]:
            cost = {name: run.result[name] for name in ("gradient_equivalents", "seconds", "loss")}
            return {**self.score(self.model, lora), **self.probe(self.model, lora), **cost}

        scores = self.workdir / "scores"
        before = self._kept(scores / "before.json", lambda: of(self.before, self.lora))
        retrained = [
            self._kept(scores / f"{run.path.name}.json", functools.partial(of, run, lora))
            for run, lora in zip(self.retrained, self.retrained_loras, strict=True)
        ]

        def kl():
            found = heldout_kl_of(self.model, self._heldout, {"before": self.lora}, self.retrained_loras)
            return {"before": found.heldout_kl("before"), "seed_floors": list(found.retrained_left_out)}

        return {"before": before, "retrained": retrained, "kl": self._kept(scores / "heldout_kl.json", kl)}

    def _distance(self, fitted: Fitted) -> float:
        """Sum of the differences of the mean losses from the retrained models', in nats: the descents' oracle."""
        losses, retrained = self.losses(fitted.model, fitted.params), self.reference()["retrained"]
        gaps = [
            abs(value - np.mean([scores[name] for scores in retrained]))
            for name, value in losses.items()
            if value is not None
        ]
        return float(sum(gaps)) if np.isfinite(gaps).all() else np.inf

    def _listed(self, name: str) -> Any:
        """A method as the scenario or else the library has it.

        Descents take `NUM_DESCENT_STEPS` or more, in the training's micro-batches.
        """
        baseline = self.scenario.baselines.get(name, BASELINES[name])
        if not isinstance(baseline, Descent):
            return baseline
        steps_per_epoch = math.ceil(len(self.problem.named) / baseline.batch_size)
        epochs = max(baseline.epochs, math.ceil(NUM_DESCENT_STEPS / steps_per_epoch))
        microbatch = self._microbatch_size(baseline.batch_size)
        return dataclasses.replace(baseline, epochs=epochs, microbatch_size=microbatch)

    def _tuned(self, descent: Descent) -> tuple[Descent, Fitted, dict[str, Any]]:
        """A descent at the rate of the grid that comes nearest to retraining, fitted there, and what was tried."""
        found: dict[float, float | str] = {}
        nearest, least = None, np.inf
        for rate in self.scenario.learning_rates:
            baseline: Any = dataclasses.replace(descent, learning_rate=rate)
            try:
                fitted = baseline.fit(self.setting())
                found[rate] = distance = self._distance(fitted)
            except FloatingPointError as error:
                found[rate] = str(error)
                continue
            if distance < least:
                nearest, least = (baseline, fitted), distance
        if nearest is None:
            msg = f"No learning rate of {self.scenario.learning_rates} ended in finite losses."
            raise FloatingPointError(msg)
        chosen, fitted = nearest
        tried = {f"{rate:g}": value for rate, value in found.items()}
        return chosen, fitted, {"learning_rate": chosen.learning_rate, "distances_of_learning_rates": tried}

    def baseline(
        self, name: str, seed: int, tuned: Mapping[str, Any] | None = None
    ) -> tuple[Baseline, dict[str, Any], Fitted | None]:
        """A method with a seed, what was chosen for it, and what it fitted where a rate was searched for."""
        chosen: dict[str, Any] = {}
        fitted: Fitted | None = None
        baseline: Any = self._listed(name)
        if isinstance(baseline, Erasing):
            own = {k: v for k, v in _changed(baseline.config).items() if k not in ("l2", "seed")}
            config = dataclasses.replace(self.scenario.erase, **own, seed=seed)
            return dataclasses.replace(baseline, config=config), chosen, None
        if any(field.name == "seed" for field in dataclasses.fields(baseline)):
            baseline = dataclasses.replace(baseline, seed=seed)
        if isinstance(baseline, Descent):
            if tuned is None:
                baseline, fitted, chosen = self._tuned(baseline)
            else:
                chosen = {"learning_rate": tuned["learning_rate"]}
                baseline = dataclasses.replace(baseline, learning_rate=tuned["learning_rate"])
        return baseline, chosen, fitted

    def _chosen(self, name: str) -> dict[str, Any] | None:
        """What the first seed of a method has chosen, where there is one."""
        first = self.workdir / "methods" / f"{name}-seed_0.json"
        return files.read_json(first).get("chosen") if first.exists() else None

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """One method with one seed, or its file. One that finds no step is a result too: `failed`, the reason."""
        path = self.workdir / "methods" / f"{name}-seed_{seed}.json"
        kl = self.reference()["kl"]

        def compute() -> dict[str, Any]:
            try:
                baseline, chosen, fitted = self.baseline(name, seed, self._chosen(name) if seed else None)
                checkpoints = self.workdir / "checkpoints" / f"{name}-seed_{seed}"
                if fitted is None:
                    fitted = baseline.fit(self.setting(checkpoints if name in SHARDED else None))
            except (UnlearningError, FloatingPointError) as error:
                return {"method": name, "seed": seed, "failed": str(error)}
            single = fitted.model is self.model
            num_task_seeds = self.scenario.num_task_seeds
            with_task = num_task_seeds is None or seed < num_task_seeds
            judged = heldout_kl_of(fitted.model, self._heldout, {"after": fitted.params}, self.retrained_loras)
            details = {k: v for k, v in fitted.details.items() if k != "loss_terms"}
            return {
                "method": name,
                "seed": seed,
                "chosen": chosen,
                "heldout_kl": judged.heldout_kl("after"),
                "kl_over_floor": judged.heldout_kl("after") / float(np.mean(kl["seed_floors"])),
                **self.score(fitted.model, fitted.params, with_task=with_task),
                **(self.probe(fitted.model, fitted.params) if seed == 0 else {}),
                **({} if single else {"own_before": self.losses(fitted.model, fitted.before)}),
                **{
                    key: getattr(fitted, key)
                    for key in (
                        "gradient_equivalents",
                        "seconds",
                        "preparation_gradient_equivalents",
                        "preparation_seconds",
                    )
                },
                "delta_norm": float(trees.tree_norm(trees.tree_sub(fitted.params, self.lora))) if single else None,
                "details": details,
            }

        return self._kept(path, compute)

    def measure_klom(self, methods: Sequence[str], num_models: int) -> None:
        """Losses of models that each have a seed of training of their own: what KLOM compares.

        Args:
            methods: each forgets from every one of them.
            num_models: trained as `before` was, with other seeds; as many retrained ones, or all that there are.
        """
        first = self.scenario.train.seed + FIRST_KLOM_SEED
        trained = retrain(
            self.before,
            (),
            self.workdir / "trained_again",
            seeds=range(first, first + num_models),
            model=self.model,
        )

        def keep(name: str, seed: int, fit: Callable[[], tuple[Model, LoraParams]]) -> None:
            def compute() -> dict[str, Any]:
                try:
                    model, params = fit()
                except (UnlearningError, FloatingPointError) as error:
                    return {"failed": str(error)}
                unseen = score_examples(model, params, self._heldout)
                found = {**self.example_scores(model, params), "unseen": unseen}
                return {"losses": {part: found[part].losses.tolist() for part in PARTS}}

            self._kept(self.workdir / "klom" / f"{name}-seed_{seed}.json", compute)

        retrained = retrain(
            self.before,
            self.requests,
            self.workdir / "retrained",
            seeds=max(num_models, self.retrain_seeds),
            model=self.model,
        )
        for seed, run in enumerate(retrained):
            keep(RETRAINED, seed, lambda run=run: (self.model, run.load_adapter(self.model)))
        for seed, run in enumerate(trained):
            keep(BEFORE, seed, lambda run=run: (self.model, run.load_adapter(self.model)))
            for name in methods:

                def fit(name=name, seed=seed, run=run) -> tuple[Model, LoraParams]:
                    baseline, *_ = self.baseline(name, seed, self._chosen(name))
                    fitted = baseline.fit(self.setting(run=run))
                    return fitted.model, fitted.params

                keep(name, seed, fit)


def _mean_losses(scores: Mapping[str, ExampleScores]) -> dict[str, float | None]:
    names = {"named": "forget_loss", "wanted": "wanted_loss", "retained": "retained_loss"}
    losses = {name: scores[part].losses for part, name in names.items()}
    return {name: float(values.mean()) if len(values) else None for name, values in losses.items()}


def _changed(config: EraseConfig) -> dict[str, Any]:
    """The fields of a configuration that are not its defaults, and its method."""
    default = EraseConfig()
    names = [field.name for field in dataclasses.fields(config)]
    changed = {name: getattr(config, name) for name in names if getattr(config, name) != getattr(default, name)}
    return {**changed, "method": config.method}


def _arrays(scores: ExampleScores) -> dict[str, list[float]]:
    return {name: getattr(scores, name).tolist() for name in ("losses", "min_k", "min_k_plus_plus")}


def run_study(scenario: Scenario, workdir: Path, options: StudyOptions) -> StudyResults:
    """Computes what a workdir lacks.

    Args:
        scenario: what.
        workdir: of this scenario.
        options: which methods, and how often.

    Returns:
        What the workdir holds now, earlier calls' methods included.
    """
    study = Study(scenario, workdir, retrain_seeds=options.retrain_seeds)
    manifest = StudyManifest(
        name=scenario.name,
        question=scenario.question,
        base=Path(scenario.model.path).name,
        num_examples=len(scenario.examples),
        named=dict(Counter(request.action.value for request in scenario.requests)),
        num_unseen=len(scenario.heldout),
        num_heldout=len(scenario.heldout),
        num_shown=len(scenario.shown),
        retrain_seeds=options.retrain_seeds,
        methods=options.seeds,
        klom=options.klom,
        metrics=scenario.metrics,
        devices=describe_devices(),
        versions=library_versions(),
    )
    write_manifest(workdir, manifest)
    logger.info("%s: trained, loss %.4f", scenario.name, study.before.result["loss"])
    study.reference()
    for name, seeds in options.seeds.items():
        for seed in range(seeds):
            study.run(name, seed)
    if options.klom:
        with_klom = [name for name in options.methods if name in options.klom]
        study.measure_klom(with_klom, options.klom_seeds)
    write_manifest(workdir, dataclasses.replace(manifest, num_truncated=study.dataset.num_truncated))
    results = read_study(workdir)
    files.atomic_write_json(workdir / "results.json", results.to_mapping())
    return results
