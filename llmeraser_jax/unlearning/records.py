"""What steps leave behind: records, and the errors of methods that find none."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from llmeraser_jax.solvers import Status, describe
from llmeraser_jax.types import LoraParams

# A path that has taken out this much is called complete: what is left of the forget rows' weight is below the last
# step's own error, and a shortened last step would otherwise approach 0 without end.
NEGLIGIBLE_WEIGHT = 0.01
CERTIFIED_BELOW = 0.1


class UnlearningError(RuntimeError):
    """No usable step was found; nothing may be written."""


class NoStepError(UnlearningError):
    """A step was solved for, but no length of it does what it predicts; another method may do better."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolveRecord:
    """What one solve and its trust region did.

    Attributes:
        weight_before, weight_after: weight of the forget rows; 1 is as trained, 0 is gone.
        scale: fraction of the solved step that was taken; 1 where the trust region left it alone.
        rhs_norm, delta_norm: Euclidean norms of the right-hand side and of the step taken.
        status: how the solve ended.
        iterations: of the solver.
        products: of the solve, residuals included.
        relative_residual: true residual over the right-hand side's norm.
        negative_curvature: whether some direction had non-positive curvature.
        residual_history: the recurrence's relative residual after each iteration.
        predicted_reduction, actual_reduction: of the objective that the step minimises.
        forget_loss, wanted_loss, probe_loss: mean data loss after the step of the forget rows as trained, of their
            replacements, and of the retained probe.
        curvature: which matrix was solved with.
        ritz_extremes: least and largest eigenvalue met by the recurrence; nan where the solver has none.
        error_bound: `||residual|| / (lambda + rho) / ||delta||`, a bound on the relative error of the solve for
            this sampled operator where the curvature is positive semidefinite, else nan. Above
            `CERTIFIED_BELOW` it certifies nothing.
        standard_error: of the step over its norm, from the curvature sample's two halves; nan where it was not
            measured (steps after the first, and curvatures that are no sample).

    Losses and reductions are nan without a trust region; so is a loss over no examples.
    """

    weight_before: float
    weight_after: float
    scale: float
    rhs_norm: float
    delta_norm: float
    status: Status
    iterations: int
    products: int
    relative_residual: float
    negative_curvature: bool
    residual_history: tuple[float, ...]
    predicted_reduction: float
    actual_reduction: float
    forget_loss: float
    wanted_loss: float
    probe_loss: float
    curvature: str
    ritz_extremes: tuple[float, float]
    error_bound: float
    standard_error: float = math.nan

    @property
    def progress(self) -> float:
        """How much of the request is done, from 0 to 1."""
        return 1 - self.weight_after

    @property
    def rhs_norm_of_request(self) -> float:
        """The right-hand side's norm, scaled to the whole request."""
        return self.rhs_norm / ((self.weight_before - self.weight_after) / self.scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatchingRecord:
    """What one step of target matching did.

    Attributes:
        way_left_before, way_left_after: share of the rows' way to their targets, in log-odds, that is left.
        scale: fraction of the solved step that was taken.
        rhs_norm, delta_norm: Euclidean norms of the constraint combination `H'a` and of the step taken.
        relative_residual: `||C delta - H'a|| / ||H'a||` with the factored curvature C: rounding of its inverse.
        error_bound: bound on the step's relative error from that residual.
        predicted_move, actual_move: mean change of the rows' log-odds, along the predicted direction.
        restoration: whether retained rows were constrained to their original loss.
        forget_loss, wanted_loss: mean loss after the step of what is to go and of what is wanted; nan without any.
        retained_loss: mean loss of the constrained retained rows before the step; nan without any.
        standard_error: of the first step over its norm; nan of the others.
    """

    way_left_before: float
    way_left_after: float
    scale: float
    rhs_norm: float
    delta_norm: float
    relative_residual: float
    error_bound: float
    predicted_move: float
    actual_move: float
    restoration: bool
    forget_loss: float
    wanted_loss: float
    retained_loss: float
    standard_error: float = math.nan

    @property
    def progress(self) -> float:
        """How much of the request is done, from 0 to 1."""
        return 1 - self.way_left_after

    @property
    def rhs_norm_of_request(self) -> float:
        """The norm of the constraint combination."""
        return self.rhs_norm


StepRecord = SolveRecord | MatchingRecord


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moved:
    """Where a method moved the parameters.

    Attributes:
        params: the new parameters.
        steps: one record per step; none where no row had anywhere to go.
        left: what is left of the forget rows' weight (path, step) or of their way (target matching).
        arrived: whether that counts as nothing.
        method: what was done.
        stopped: why it ended early; empty where it did not.
        num_correctors: how many of `steps`, the last ones, are Newton steps on the edited objective.
        corrected: why those ended; empty where there were none.
        curvature_reason: which curvature it was and why.
        asymmetry: of the first product, `|u'Av - v'Au| / (||u|| ||Av||)`; nan where none was measured.
    """

    params: LoraParams
    steps: tuple[StepRecord, ...]
    left: float
    arrived: bool
    method: str
    stopped: str = ""
    num_correctors: int = 0
    corrected: str = ""
    curvature_reason: str = ""
    asymmetry: float = math.nan


def record_to_mapping(record: StepRecord) -> dict[str, Any]:
    """A JSON-ready dict; numbers that do not exist are null."""
    mapping = dataclasses.asdict(record)
    if isinstance(record, SolveRecord):
        mapping["status"] = describe(record.status)
        mapping["ritz_extremes"] = [None if math.isnan(value) else value for value in record.ritz_extremes]
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value for name, value in mapping.items()
    }
