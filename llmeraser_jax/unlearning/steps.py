"""What a step and a whole erasure leave behind: records, outcomes, errors."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from llmeraser_jax.solvers import Status
from llmeraser_jax.types import LoraParams
from llmeraser_jax.unlearning.cost import CostMeter

if TYPE_CHECKING:
    from llmeraser_jax.unlearning.targets import RowTargets
    from llmeraser_jax.unlearning.validity import ValidityCheck

# A path that has taken out this much is called complete: what is left of the named examples' weight is below
# the last step's own error, and a shortened last step would otherwise approach 0 without end.
NEGLIGIBLE_WEIGHT = 0.01
CERTIFIED_BELOW = 0.1


class UnlearningError(RuntimeError):
    """No usable step was found; nothing may be written."""


class NoStepError(UnlearningError):
    """A step was solved for, but no length of it does what it predicts; another way may do better."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What one solve and its trust region did.

    Attributes:
        weight_before, weight_after: weight of the named examples; 1 is as trained, 0 is gone.
        scale: fraction of the solved step that was taken; 1 where the trust region left it alone.
        rhs_norm, delta_norm: Euclidean norms of the right-hand side and of the step taken.
        status: how the solve ended.
        iterations: products of the solve, the one for the true residual not counted.
        relative_residual: true residual over the right-hand side's norm.
        negative_curvature: whether some direction had non-positive curvature.
        residual_history: the recurrence's relative residual after each iteration.
        predicted_reduction, actual_reduction: of the objective that the step minimises.
        forget_loss, wanted_loss, probe_loss: mean data loss after the step on the named examples as trained,
            on their replacements, and on the retained probe.
        curvature: which matrix was solved with.
        ritz_extremes: least and largest eigenvalue met by the recurrence; nan where the solver has none.
        error_bound: `||residual|| / (lambda + rho) / ||delta||`, a bound on the relative error of the solve for
            this sampled operator where the curvature is positive semidefinite, else nan. Above
            `CERTIFIED_BELOW` it certifies nothing.
        standard_error: of the step over its norm, from the curvature sample's two halves; nan where it was not
            measured (steps after the first, and curvatures that are no sample).

    A matched step (`unlearning.matched`) predicts moves of rows in log-odds, and its weights are the share of
    their way that is left. Losses and reductions are nan without a trust region; so is a loss over no examples.
    """

    weight_before: float
    weight_after: float
    scale: float
    rhs_norm: float
    delta_norm: float
    status: Status
    iterations: int
    relative_residual: float
    negative_curvature: bool
    residual_history: tuple[float, ...]
    predicted_reduction: float
    actual_reduction: float
    forget_loss: float
    wanted_loss: float
    probe_loss: float = math.nan
    curvature: str = "gauss-newton"
    ritz_extremes: tuple[float, float] = (math.nan, math.nan)
    error_bound: float = math.nan
    standard_error: float = math.nan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unlearned:
    """The adapter after an erasure and how it got there.

    Attributes:
        params: the new adapter.
        steps: one record per step.
        final_weight: what is left of the named examples' weight (path, step) or of their way (matched).
        complete: whether that counts as nothing (at most `NEGLIGIBLE_WEIGHT`, or `matched.ARRIVED`), and after the
            check whether the validity check says so too.
        method: what was done: path, step or matched.
        cost: what it took.
        targets: where rows were to end.
        stopped: why it ended early; empty where it did not.
        validity: what the whole change did, row by row.
        num_correctors: how many of `steps`, the last ones, are correctors.
        corrected: why the correctors ended; empty where there were none.
        attempts: outcomes of ways that were tried before this one and given up.
        curvature_reason: which curvature it was and why.
        asymmetry: of the first product, `|u'Av - v'Au| / (||u|| ||Av||)`; nan where none was measured.
    """

    params: LoraParams
    steps: tuple[StepRecord, ...]
    final_weight: float
    complete: bool
    method: str
    cost: CostMeter
    targets: RowTargets | None = None
    stopped: str = ""
    validity: ValidityCheck | None = None
    num_correctors: int = 0
    corrected: str = ""
    attempts: tuple[str, ...] = ()
    curvature_reason: str = ""
    asymmetry: float = math.nan
