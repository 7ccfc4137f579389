"""Costs in gradient equivalents, and budgets of them: one forward and backward pass of one example is 1."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

FORWARD = 1 / 3
FORWARD_WITH_TANGENT = 2 / 3
BACKWARD = 2 / 3
GRADIENT = 1.0

_ROUNDING = 1e-6  # gradient equivalents that sums of thirds may be off by


class BudgetSpent(Exception):
    """The next step costs more than is left of the budget; it was not computed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What a method cost, in gradient equivalents.

    Attributes:
        rhs: gradients of the forget rows, and their targets.
        curvature: products, factors and estimates of eigenvalues.
        trust_region: losses and slopes that accept or shorten steps.
        training: steps of an optimiser.
        diagnostics: what only reports; not in `total`.
        preparation: what had to be computed before any request; not in `total`.
        retraining: what a retraining costs; None where that is not known.
    """

    rhs: float = 0.0
    curvature: float = 0.0
    trust_region: float = 0.0
    training: float = 0.0
    diagnostics: float = 0.0
    preparation: float = 0.0
    retraining: float | None = None

    @property
    def total(self) -> float:
        """What carrying out the requests cost, without diagnostics and preparation."""
        return self.rhs + self.curvature + self.trust_region + self.training

    @property
    def share_of_retraining(self) -> float | None:
        """`total / retraining`; None where that is not known."""
        return None if self.retraining is None else self.total / self.retraining

    def to_mapping(self) -> dict[str, float | None]:
        """The fields with `total` and `share_of_retraining`."""
        return {
            **dataclasses.asdict(self),
            "total": self.total,
            "share_of_retraining": self.share_of_retraining,
        }


class Budget:
    """A limit on `Cost.total`, and what has been spent of it.

    Attributes:
        limit: gradient equivalents.
        cost: what has been spent.
    """

    def __init__(self, limit: float = math.inf, *, retraining: float | None = None):
        self.limit = limit
        self.cost = Cost(retraining=retraining)

    @classmethod
    def of_share(cls, share: float | None, retraining: float | None) -> Budget:
        """A budget that is a share of a retraining: 1 where its cost is known and no share is given.

        Raises:
            ValueError: a share that is not above 0, or one without the cost of a retraining.
        """
        if share is not None and not share > 0:
            msg = f"budget is {share}; it must be above 0 (inf lifts the limit)."
            raise ValueError(msg)
        if retraining is not None:
            return cls((1.0 if share is None else share) * retraining, retraining=retraining)
        if share is not None:
            msg = "A budget is a share of a retraining's cost; give the task's retraining_cost."
            raise ValueError(msg)
        return cls()

    @property
    def left(self) -> float:
        """What may still be spent."""
        return self.limit - self.cost.total

    def reserve(self, gradient_equivalents: float) -> None:
        """Makes sure that so much can be spent.

        Raises:
            BudgetSpent: it cannot.
        """
        if gradient_equivalents > self.left + _ROUNDING:
            retraining = self.cost.retraining
            share = "" if retraining is None else f", {self.limit / retraining:.3g} retrainings,"
            msg = (
                f"The budget of {self.limit:.0f} gradient equivalents{share} has no room for the next step: "
                f"{self.cost.total:.0f} are spent, the next step takes up to {gradient_equivalents:.0f}."
            )
            raise BudgetSpent(msg)

    def spend(
        self,
        on: Literal["rhs", "curvature", "trust_region", "training", "diagnostics", "preparation"],
        gradient_equivalents: float,
    ) -> None:
        """Books a cost. Diagnostics and preparation are outside of the limit.

        Raises:
            BudgetSpent: there is not so much left; nothing is booked.
        """
        if on not in ("diagnostics", "preparation"):
            self.reserve(gradient_equivalents)
        self.cost = dataclasses.replace(self.cost, **{on: getattr(self.cost, on) + gradient_equivalents})
