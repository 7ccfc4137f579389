"""Owns the table of methods: a name and how it moves the trained adapter. Adding one is one line in `METHODS`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from llmeraser_jax import trees
from llmeraser_jax.baselines import (
    ControlResult,
    finetune_edited,
    gradient_ascent,
    gradient_difference,
    scaled_rhs,
)
from llmeraser_jax.data import Request, TokenDataset
from llmeraser_jax.lora import Lora
from llmeraser_jax.losses import lm_objective
from llmeraser_jax.models import Model
from llmeraser_jax.training import TrainConfig
from llmeraser_jax.types import ExampleStack
from llmeraser_jax.unlearning import EraseConfig, erase
from llmeraser_jax.unlearning.problem import EditProblem

# Lengths that an oracle chooses from, as shares of the adapter's norm.
LENGTHS = tuple(np.geomspace(0.01, 0.64, 10).tolist())
NUM_CONTROL_STEPS = 10
REFERENCE_METHOD = "matched"
PAPER_EPOCHS = 5
PAPER_SHARE = 1 / 31  # of a retraining: the cost that the paper states


class NotYetError(LookupError):
    """A method needs the result of another that is not there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What a method is given.

    Attributes:
        model: the base.
        lora: the trained adapter.
        dataset: the training set as it stood, encoded.
        edited: after the requests, encoded.
        unseen: held-out rows of the same kind as the training rows, encoded.
        requests: what is to be erased.
        problem: the same as index arrays.
        train: how the adapter was trained.
        erase: what all methods of the library share.
        distance_to_retraining: judges an adapter against the retrained ones, 0 is best: the oracle. Only methods
            that say so may use it.
        distance_of: how far a method of this cell moved the adapter.
    """

    model: Model
    lora: Lora
    dataset: TokenDataset
    edited: TokenDataset
    unseen: TokenDataset
    requests: tuple[Request, ...]
    problem: EditProblem[TokenDataset]
    train: TrainConfig
    erase: EraseConfig
    distance_to_retraining: Callable[[Lora], float]
    distance_of: Callable[[str], float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moved:
    """What a method returns.

    Attributes:
        lora: the new adapter.
        seconds: wall-clock time, compilation included.
        gradient_equivalents: cost, without diagnostics.
        outcome: in words.
        chosen_with_oracle: whether some choice was made by comparing with the retrained models.
        details: JSON-like, for the record.
    """

    lora: Lora
    seconds: float
    gradient_equivalents: float
    outcome: str
    chosen_with_oracle: bool = False
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


Method = Callable[[Setting], Moved]


def erasing(*, share_of_5_epochs: float | None = None, **changes: Any) -> Method:
    """`erase` with the task's settings but for `changes`, fields of `EraseConfig`.

    Args:
        share_of_5_epochs: a budget: this share of the gradient equivalents of a retraining of five epochs.
        changes: what differs.
    """

    def run(setting: Setting) -> Moved:
        config = dataclasses.replace(setting.erase, **changes)
        retrain_cost = float(setting.train.epochs * len(setting.edited))
        if share_of_5_epochs is not None:
            config = dataclasses.replace(config, budget=share_of_5_epochs * PAPER_EPOCHS / setting.train.epochs)
        result = erase(
            setting.model,
            setting.lora,
            setting.dataset,
            setting.requests,
            config,
            heldout=setting.unseen,
            retrain_cost=retrain_cost,
        )
        receipt = result.receipt
        return Moved(
            lora=result.lora,
            seconds=receipt.seconds,
            gradient_equivalents=receipt.gradient_equivalents.total,
            outcome=receipt.outcome,
            details={"receipt": {k: v for k, v in receipt.to_mapping().items() if k not in ("named", "versions")}},
        )

    return run


Control = Callable[[Setting, float], ControlResult]


def _direction(setting: Setting) -> tuple[Any, ExampleStack, int]:
    weighted = setting.problem.influence_rhs()
    stack = setting.problem.examples.stack(weighted.indices, weighted.weights, chunk_size=setting.erase.chunk_size)
    objective = lm_objective(setting.model.apply, setting.model.base, l2=setting.train.l2)
    return objective, stack, len(weighted.indices)


def _scaled_rhs(setting: Setting, distance: float) -> ControlResult:
    objective, stack, count = _direction(setting)
    return scaled_rhs(objective, setting.lora, stack, distance=distance, num_examples=count)


def _gradient_ascent(setting: Setting, distance: float) -> ControlResult:
    objective, stack, count = _direction(setting)
    return gradient_ascent(
        objective, setting.lora, stack, distance=distance, num_examples=count, num_steps=NUM_CONTROL_STEPS
    )


def _gradient_difference(setting: Setting, distance: float) -> ControlResult:
    objective, stack, count = _direction(setting)
    problem = setting.problem
    rng = np.random.default_rng([setting.erase.seed, 7])
    size = min(len(problem.named), len(problem.retained))
    weights = np.full(size, 1 / problem.num_trained)
    retained = [
        problem.examples.stack(
            np.sort(rng.choice(problem.retained, size, replace=False)), weights, chunk_size=setting.erase.chunk_size
        )
        for _ in range(NUM_CONTROL_STEPS)
    ]
    return gradient_difference(
        objective, setting.lora, stack, retained, distance=distance, num_examples=count + size
    )


def as_far_as(other: str, control: Control) -> Method:
    """A control that is given the distance which another method of the same cell moved."""

    def run(setting: Setting) -> Moved:
        distance = setting.distance_of(other)
        result = control(setting, distance)
        return Moved(
            lora=result.params,
            seconds=result.seconds,
            gradient_equivalents=result.gradient_equivalents,
            outcome=f"moved as far as {other}",
        )

    return run


def best_length(control: Control) -> Method:
    """A control at the length that comes nearest to retraining: an upper bound, as no user could choose it.

    Its cost is that of the length chosen; the others are not counted.
    """

    def run(setting: Setting) -> Moved:
        norm = float(trees.tree_norm(setting.lora))
        tried = [(length, control(setting, length * norm)) for length in LENGTHS]
        distances = [setting.distance_to_retraining(result.params) for _, result in tried]
        best = int(np.argmin(distances))
        length, result = tried[best]
        return Moved(
            lora=result.params,
            seconds=result.seconds,
            gradient_equivalents=result.gradient_equivalents,
            outcome=f"length {length:.3g} of the adapter's norm, chosen with the oracle",
            chosen_with_oracle=True,
            details={"lengths": LENGTHS, "distances_to_retraining": distances},
        )

    return run


def fine_tune(epochs: int) -> Method:
    """Ordinary fine-tuning on the edited data, from the trained adapter."""

    def run(setting: Setting) -> Moved:
        started = time.perf_counter()
        result = finetune_edited(setting.model, setting.lora, setting.edited, setting.train, epochs=epochs)
        return Moved(
            lora=result.params,
            seconds=result.seconds,
            gradient_equivalents=result.gradient_equivalents,
            outcome=f"{epochs} epoch(s) on the edited data",
            details={"seconds_with_measuring": time.perf_counter() - started},
        )

    return run


METHODS: Mapping[str, Method] = {
    "matched": erasing(method="matched"),
    "matched-no-repairs": erasing(method="matched", repairs=0),
    "matched-budget": erasing(method="matched", share_of_5_epochs=PAPER_SHARE),
    "path": erasing(method="path"),
    "paper-step": erasing(method="step", curvature="hessian", curvature_data="all", trust_region=False),
    "paper-step-sample": erasing(method="step", curvature="hessian", trust_region=False),
    "step-gauss-newton": erasing(method="step", trust_region=False),
    "ekfac": erasing(method="step", solver="ekfac", sample_size=256, trust_region=False),
    "newton": erasing(method="step", rhs="newton"),
    "newton-correctors": erasing(method="step", rhs="newton", correctors=3),
    "reference-compat": erasing(
        method="step", curvature="hessian", solver="reference-compat", curvature_data="all", trust_region=False
    ),
    "fine-tune-1-epoch": fine_tune(1),
    "cb-as-matched": as_far_as(REFERENCE_METHOD, _scaled_rhs),
    "cb-best": best_length(_scaled_rhs),
    "ascent-as-matched": as_far_as(REFERENCE_METHOD, _gradient_ascent),
    "ascent-best": best_length(_gradient_ascent),
    "difference-as-matched": as_far_as(REFERENCE_METHOD, _gradient_difference),
    "difference-best": best_length(_gradient_difference),
}
