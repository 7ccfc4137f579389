"""Owns the table of methods: a name and how it moves the trained adapter. Adding one is one line in `METHODS`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from llmeraser_jax.baselines import EqualLengthAscent
from llmeraser_jax.baselines.erasing import Erasing
from llmeraser_jax.baselines.finetune_edited import FinetuneEdited

from experiments.study import Nearest, Study
from llmeraser_jax import trees
from llmeraser_jax.evaluation.closure import gap_closure, seed_mean
from llmeraser_jax.unlearning import EraseConfig

# Lengths that an oracle chooses from, as shares of the adapter's norm.
LENGTHS = tuple(np.geomspace(0.01, 0.64, 10).tolist())
NUM_CONTROL_STEPS = 10
REFERENCE_METHOD = "matched"
PAPER_EPOCHS = 5
PAPER_SHARE = 1 / 31  # of a retraining: the cost that the paper states


def erasing(**changes: Any) -> Erasing:
    """`erase` with the task's settings but for `changes`, fields of `EraseConfig`. Its cost is a result."""
    return Erasing(config=EraseConfig(**{"budget": math.inf, **changes}))


def within_paper_share(study: Study) -> Erasing:
    """Target matching with a budget: the paper's share of a retraining of five epochs."""
    return erasing(method="matched", budget=PAPER_SHARE * PAPER_EPOCHS / study.scenario.train.epochs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Control:
    """Normalised steps along the right-hand side, with a length from elsewhere.

    Attributes:
        as_far_as: a method of the same cell whose distance it is given; None takes the best of `LENGTHS`, an upper
            bound, as no user could choose it. Its cost is that of the length chosen alone.
        num_steps: that are so long together.
        difference: whether to descend on retained examples too.
    """

    as_far_as: str | None = None
    num_steps: int = NUM_CONTROL_STEPS
    difference: bool = False

    def __call__(self, study: Study) -> Any:
        """The control, or its candidates, for one cell."""
        whole = EqualLengthAscent(
            num_steps=self.num_steps, difference=self.difference, chunk_size=study.scenario.erase.chunk_size
        )
        if self.as_far_as is not None:
            share = study.distance_moved(self.as_far_as) / float(trees.tree_norm(study.lora))
            return dataclasses.replace(whole, length=share)
        return Nearest(candidates={n: dataclasses.replace(whole, length=n) for n in LENGTHS}, chosen_as="length")


METHODS: Mapping[str, Any] = {
    "matched": erasing(method="matched"),
    "matched-no-repairs": erasing(method="matched", repairs=0),
    "matched-budget": within_paper_share,
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
    "fine-tune-1-epoch": FinetuneEdited(epochs=1),
    "cb-as-matched": Control(as_far_as=REFERENCE_METHOD, num_steps=1),
    "cb-best": Control(num_steps=1),
    "ascent-as-matched": Control(as_far_as=REFERENCE_METHOD),
    "ascent-best": Control(),
    "difference-as-matched": Control(as_far_as=REFERENCE_METHOD, difference=True),
    "difference-best": Control(difference=True),
}


def distance_left(before: Mapping[str, Any], losses: Mapping[str, Any], retrained: Any) -> float:
    """The largest of `1 - closure` over the losses on the forget set and on replacements; undefined ones count
    last.

    Args:
        before: losses of the trained model.
        losses: of the model that is judged.
        retrained: of each retrained model.
    """
    defined, others = [], []
    for name in ("forget_loss", "wanted_loss"):
        if (value := losses[name]) is None:
            continue
        targets = [scores[name] for scores in retrained]
        left = abs(value - seed_mean(targets)) / max(abs(before[name] - seed_mean(targets)), 1e-6)
        is_defined = gap_closure(before[name], before[name], targets).value is not None
        (defined if is_defined else others).append(left)
    worst = max(defined or others)
    return worst if np.isfinite(worst) else 1e30  # what diverged is last, and JSON has no infinity
