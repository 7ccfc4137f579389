"""What an erasure costs, in gradient equivalents: one forward and backward pass of one example is 1."""

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
    """What comes next costs more than is left of the budget; it was not computed."""


@dataclasses.dataclass
class CostMeter:
    """Running totals, in gradient equivalents. Diagnostics are kept apart from the work itself.

    Attributes:
        rhs, curvature, trust_region, diagnostics: what was spent on each.
        budget: how much `total` may become.
        retraining: what a retraining costs; nan where that is not known.
    """

    rhs: float = 0.0
    curvature: float = 0.0
    trust_region: float = 0.0
    diagnostics: float = 0.0
    budget: float = math.inf
    retraining: float = math.nan

    @classmethod
    def of(cls, budget: float | None, retraining: float | None) -> CostMeter:
        """With a budget that is a share of a retraining: 1 where its cost is known and nothing else is said.

        Raises:
            ValueError: a budget without the cost of a retraining.
        """
        if retraining is not None:
            return cls(budget=(1.0 if budget is None else budget) * retraining, retraining=retraining)
        if budget is not None:
            msg = "A budget is a share of a retraining's cost; pass retrain_cost, in gradient equivalents."
            raise ValueError(msg)
        return cls()

    @property
    def total(self) -> float:
        """Everything but the diagnostics."""
        return self.rhs + self.curvature + self.trust_region

    @property
    def left(self) -> float:
        """What may still be spent."""
        return self.budget - self.total

    def reserve(self, gradient_equivalents: float) -> None:
        """Makes sure that so much can be spent.

        Raises:
            BudgetSpent: it cannot.
        """
        if gradient_equivalents > self.left + _ROUNDING:
            msg = (
                f"The budget of {self.budget:.0f} gradient equivalents, {self.budget / self.retraining:.3g} "
                f"retrainings, has no room for the next step: {self.total:.0f} are spent, the next step takes up "
                f"to {gradient_equivalents:.0f}."
            )
            raise BudgetSpent(msg)

    def spend(
        self, on: Literal["rhs", "curvature", "trust_region", "diagnostics"], gradient_equivalents: float
    ) -> None:
        """Books a cost, before or after what it is for; diagnostics are outside the budget.

        Raises:
            BudgetSpent: there is not so much left; nothing is booked.
        """
        if on != "diagnostics":
            self.reserve(gradient_equivalents)
        setattr(self, on, getattr(self, on) + gradient_equivalents)
