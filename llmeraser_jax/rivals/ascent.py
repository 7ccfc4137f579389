"""Gradient ascent on what is to be forgotten: alone, against descent on retained rows, and anchored by a KL term.

Sources: gradient ascent as in Jang et al. 2022 (arXiv 2210.01504); gradient difference of Liu, Liu and Stone 2022
(arXiv 2203.12817) and KL-anchored ascent, both as TOFU states them (Maini et al. 2024, arXiv 2401.06121, section
3). What differs from all: edits, for which the wanted pair is descended on with the same coefficient (see
`descent`); an adapter is moved and not the whole model; averages are over the response only, and over examples,
where TOFU's KL averages over every token of the sequence. `EqualLengthAscent` is the first two with steps of one
length instead of an optimiser's, for comparisons at equal distance: a control that a method with curvature must
beat.
"""

from __future__ import annotations

import dataclasses
import time

import numpy as np

from llmeraser_jax import trees
from llmeraser_jax.losses import gradient_sum
from llmeraser_jax.parallel import replicate
from llmeraser_jax.rivals.descent import Descent, Phase, require_positive
from llmeraser_jax.rivals.terms import CrossEntropy, KLToReference
from llmeraser_jax.types import LoraParams
from llmeraser_jax.unlearning import Cost, Result, UnlearningTask, Weighted, Workspace

_ASCENT = CrossEntropy(sign=-1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientAscent(Descent):
    """Minimises `-l(z)` on S (for edits also `l(z')`). Nothing bounds it: epochs and learning rate decide."""

    def phases(self) -> tuple[Phase, ...]:
        """One, on S alone."""
        return (Phase(epochs=self.epochs, forget=_ASCENT),)

    def teachers(self, task: UnlearningTask) -> tuple[tuple[LoraParams, ...], float]:
        """None."""
        return (), 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientDifference(GradientAscent):
    """Minimises `-l(z)` on S plus `retain_weight * l` on retained rows.

    Attributes:
        retain_weight: coefficient of the retained rows; 1 in the source.
    """

    retain_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "retain_weight")

    def phases(self) -> tuple[Phase, ...]:
        """One, on S and R."""
        return (Phase(epochs=self.epochs, forget=_ASCENT, retain=CrossEntropy(), retain_weight=self.retain_weight),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KLAnchoredAscent(Descent):
    """Minimises `-l(z)` on S plus `retain_weight * KL(trained adapter || theta)` on retained rows.

    Attributes:
        retain_weight: coefficient of the retained rows; 1 in the source.
    """

    retain_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "retain_weight")

    def phases(self) -> tuple[Phase, ...]:
        """One, on S and R."""
        return (
            Phase(epochs=self.epochs, forget=_ASCENT, retain=KLToReference(), retain_weight=self.retain_weight),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EqualLengthAscent:
    """Normalised steps of one length along `b = (1/n) sum_S (g - g')`: influence without curvature.

    Gradient ascent on S (for edits: and descent on the wanted pairs); with `difference` less what retained rows
    object to, with the weight of a row of S each. One step goes exactly as far as stated; of several, whose
    directions turn, the path is as long and its end no further away.

    Attributes:
        length: of all steps together, as a share of the trained adapter's norm.
        num_steps: how many.
        difference: whether to descend on retained rows, as many per step as are named (all, where fewer).
    """

    length: float = 0.05
    num_steps: int = 10
    difference: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "length")
        if not (isinstance(self.num_steps, int) and self.num_steps >= 1):
            msg = f"num_steps is {self.num_steps!r}; it must be a whole number of at least 1."
            raise ValueError(msg)

    def run(self, task: UnlearningTask, workspace: Workspace) -> Result:
        """Moves the task's adapter.

        Raises:
            ValueError: a gradient is zero, or retained rows are needed and every row is named.
        """
        started = time.perf_counter()
        problem, objective = task.problem, task.objective
        rhs, count = problem.influence_rhs(), 0
        direction = workspace.stack(problem.examples, rhs)
        params = before = replicate(task.adapter, task.mesh)
        distance = self.length * float(trees.tree_norm(before))
        rng, size = workspace.rng(), min(len(problem.named), len(problem.retained))
        if self.difference and not size:
            msg = "Every training row is named; there is no retained row to descend on."
            raise ValueError(msg)
        for _ in range(self.num_steps):
            gradient = gradient_sum(objective, params, direction)
            count += len(rhs.indices)
            if self.difference:
                chosen = np.sort(rng.choice(problem.retained, size, replace=False))
                retained = Weighted(chosen, np.full(size, 1 / problem.num_trained))
                gradient = trees.tree_sub(
                    gradient, workspace.gradient(objective, params, problem.examples, retained)
                )
                count += size
            norm = float(trees.tree_norm(gradient))
            if not norm > 0:
                msg = f"The gradient along which the control moves has norm {norm}; it has no direction."
                raise ValueError(msg)
            params = trees.tree_axpy(distance / self.num_steps / norm, gradient, params)
        return Result(
            model=task.base_model,
            params=params,
            before=task.adapter,
            cost=Cost(training=float(count), retraining=task.cost_of_retraining),
            seconds=time.perf_counter() - started,
            details={"distance": distance},
        )
