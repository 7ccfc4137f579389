"""What is measured on a model: each measure is one function, and `measure` takes any of them.

A measure reads a `Bench`, which all models of a comparison share, and one model, and returns a part of the model's
scores, JSON-like. The keys that the summary knows are:

    named, wanted, retained, heldout    of examples, in order: `losses` (nats per response token), `min_k`,
                                        `min_k_plus_plus`, `extraction`
    heldout_kl                          KL of the mean of R - 1 retrained models to this one, averaged over the
                                        model left out (of a retrained model: when it is the one left out)
    task                                `metrics` by name (a `Metric` as a mapping), and TOFU's `truth_ratios`
    forget_loss_4_bit, forget_loss_relearned    mean loss on the forget set after what uncovers hidden knowledge
    answers                             greedy answers to the `named` and to the `wanted` queries
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from llmeraser_jax.data import TokenDataset
from llmeraser_jax.evaluation.forgetting import HeldOutKLResult
from llmeraser_jax.evaluation.robustness import quantise_merged, relearn, retained_only
from llmeraser_jax.evaluation.scoring import answer, heldout_kl_of, score_examples
from llmeraser_jax.evaluation.tasks import Metric
from llmeraser_jax.models import Model
from llmeraser_jax.training import TrainConfig
from llmeraser_jax.types import LoraParams
from llmeraser_jax.unlearning.problem import EditProblem

NUM_RETAINED_SCORED = 100
NUM_RELEARNING_STEPS = 10
RELEARNING_RATE = 1e-3  # or the training's own, where that is lower

Json: TypeAlias = Mapping[str, Any]
Task: TypeAlias = Callable[[Model, LoraParams | None], Json]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Bench:
    """What all models of a comparison are measured on.

    Attributes:
        model: the base.
        problem: the requests as index arrays.
        retrained: adapters of the retrained models.
        heldout: examples that no model was trained on; None leaves out what needs them.
        task: `(model, params) -> scores["task"]`; None where there is none.
        train: how the model before was trained, which relearning repeats for a few steps; None leaves it out.
        quantise, relearn: as `robustness.quantise_merged` and `relearn`; others where `params` is no adapter.
    """

    model: Model
    problem: EditProblem[TokenDataset]
    retrained: tuple[LoraParams, ...] = ()
    heldout: TokenDataset | None = None
    task: Task | None = None
    train: TrainConfig | None = None
    quantise: Callable[..., tuple[Model, Any]] = quantise_merged
    relearn: Callable[..., Any] = relearn

    @functools.cached_property
    def retained(self) -> np.ndarray:
        """Positions of some training examples that stay, the same for all models."""
        rows = self.problem.retained
        size = min(NUM_RETAINED_SCORED, len(rows))
        return np.sort(np.random.default_rng(0).choice(rows, size, replace=False))

    @functools.cached_property
    def between_retrained(self) -> HeldOutKLResult | None:
        """Held-out KL of each retrained model to the others; None with fewer than two."""
        if self.heldout is None or len(self.retrained) < 2:
            return None
        return heldout_kl_of(self.model, self.heldout, {}, self.retrained)


Measure: TypeAlias = Callable[[Bench, Model, LoraParams | None], dict[str, Any]]


def training_examples(bench: Bench, model: Model, params: LoraParams | None) -> dict[str, Any]:
    """Of the forget set as trained on, of the replacements, and of some retained examples."""
    places = {"named": bench.problem.named, "wanted": bench.problem.wanted, "retained": bench.retained}
    return {part: _scores(model, params, bench.problem.examples, rows) for part, rows in places.items()}


def heldout_examples(bench: Bench, model: Model, params: LoraParams | None) -> dict[str, Any]:
    """Of examples that no model was trained on."""
    return {} if bench.heldout is None else {"heldout": _scores(model, params, bench.heldout, None)}


def _scores(model: Model, params: LoraParams | None, data: TokenDataset, rows: np.ndarray | None) -> dict[str, Any]:
    scores = score_examples(model, params, data, rows)
    return {name: getattr(scores, name).tolist() for name in ("losses", "min_k", "min_k_plus_plus", "extraction")}


def heldout_kl(bench: Bench, model: Model, params: LoraParams | None) -> dict[str, Any]:
    """How far predictions are from the retrained models' on held-out prompts."""
    between = bench.between_retrained
    if between is None or bench.heldout is None or params is None:
        return {}
    own = next((k for k, other in enumerate(bench.retrained) if other is params), None)
    if own is not None:
        return {"heldout_kl": between.retrained_left_out[own]}
    return {"heldout_kl": heldout_kl_of(model, bench.heldout, {"": params}, bench.retrained).heldout_kl("")}


def task(bench: Bench, model: Model, params: LoraParams | None) -> dict[str, Any]:
    """The task that the model was tuned for."""
    return {} if bench.task is None else {"task": dict(bench.task(model, params))}


def rounding(bench: Bench, model: Model, params: Any) -> dict[str, Any]:
    """Loss on the forget set once the merged model is rounded to 4 bits."""
    rounded, rest = bench.quantise(model, params)
    losses = score_examples(rounded, rest, bench.problem.examples, bench.problem.named).losses
    return {"forget_loss_4_bit": float(losses.mean())}


def relearned(
    bench: Bench, model: Model, params: Any, num_steps: int = NUM_RELEARNING_STEPS
) -> tuple[Any, int] | None:
    """The adapter after a short training on retained examples, and its number of steps.

    Args:
        bench: its problem and its training.
        model: the base.
        params: where the training starts.
        num_steps: optimiser steps; fewer where there are fewer examples.

    Returns:
        None where the training is not known or no example is retained.
    """
    problem = bench.problem
    gone = np.concatenate([problem.named, np.arange(problem.num_trained, len(problem.examples))])
    unrelated = retained_only(problem.examples, gone)
    if bench.train is None or not len(unrelated):
        return None
    num_steps = min(num_steps, len(unrelated))
    size = min(bench.train.batch_size, len(unrelated) // num_steps)
    microbatch = None if bench.train.microbatch_size is None else min(bench.train.microbatch_size, size)
    rate = min(RELEARNING_RATE, bench.train.learning_rate)
    config = dataclasses.replace(bench.train, batch_size=size, microbatch_size=microbatch, learning_rate=rate)
    return bench.relearn(model, params, unrelated, config, num_steps=num_steps), num_steps


def relearning(bench: Bench, model: Model, params: Any) -> dict[str, Any]:
    """Loss on the forget set after a few steps of training on retained examples, if there are any."""
    again, problem = relearned(bench, model, params), bench.problem
    if again is None:
        return {}
    losses = score_examples(model, again[0], problem.examples, problem.named).losses
    return {"forget_loss_relearned": float(losses.mean())}


def answers(bench: Bench, model: Model, params: LoraParams | None) -> dict[str, Any]:
    """What the model answers to the queries as they were, and to those of the replacements."""
    places = {"named": bench.problem.named, "wanted": bench.problem.wanted}
    return {
        "answers": {
            part: answer(model, params, bench.problem.examples, rows) if len(rows) else []
            for part, rows in places.items()
        }
    }


LOSSES: tuple[Measure, ...] = (training_examples, heldout_examples)
STANDARD: tuple[Measure, ...] = (*LOSSES, heldout_kl, task)
PROBES: tuple[Measure, ...] = (rounding, relearning)


def measure(
    bench: Bench, model: Model, params: LoraParams | None, measures: Sequence[Measure] = STANDARD
) -> dict[str, Any]:
    """The scores of one model.

    Args:
        bench: what it is measured on.
        model: the base, or what reads `params` in its place.
        params: what `model.apply` reads; None is the base alone.
        measures: which.
    """
    scores: dict[str, Any] = {}
    for one in measures:
        scores |= one(bench, model, params)
    return scores


def metrics_as_json(metrics: Sequence[Metric]) -> dict[str, Any]:
    """By name, with the valid ratio."""
    return {m.name: {**dataclasses.asdict(m), "valid_ratio": m.valid_ratio} for m in metrics}
