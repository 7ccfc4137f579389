"""What an erasure costs, in gradient equivalents: one forward and backward pass of one example is 1."""

from __future__ import annotations

import dataclasses

FORWARD = 1 / 3
FORWARD_WITH_TANGENT = 2 / 3
BACKWARD = 2 / 3
GRADIENT = 1.0


@dataclasses.dataclass
class CostMeter:
    """Running totals, in gradient equivalents. Diagnostics are kept apart from the work itself."""

    rhs: float = 0.0
    curvature: float = 0.0
    trust_region: float = 0.0
    diagnostics: float = 0.0

    @property
    def total(self) -> float:
        """Everything but the diagnostics."""
        return self.rhs + self.curvature + self.trust_region
