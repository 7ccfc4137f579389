"""The trust region: predicted against actual change of the objective that a step minimises."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np

from llmeraser_jax import trees
from llmeraser_jax.checks import check_at_least
from llmeraser_jax.curvature import CURVATURES
from llmeraser_jax.losses import Objective, data_losses, per_example
from llmeraser_jax.solvers import Status, describe, is_failure
from llmeraser_jax.types import Batch, LoraParams, Solution
from llmeraser_jax.unlearning.budget import FORWARD, FORWARD_WITH_TANGENT
from llmeraser_jax.unlearning.inverse import InverseCurvature
from llmeraser_jax.unlearning.problem import Weighted
from llmeraser_jax.unlearning.records import SolveRecord, UnlearningError
from llmeraser_jax.unlearning.task import UnlearningTask
from llmeraser_jax.unlearning.workspace import Workspace

_MAX_HALVINGS = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrustRegion:
    """Compares each step's predicted with its actual change, and shortens it where they disagree.

    Attributes:
        min_ratio: a step is accepted when actual / predicted reduction is at least this.
        max_step_ratio: a step is at most this fraction of the adapter's norm; 0 sets no limit.
    """

    min_ratio: float = 0.25
    max_step_ratio: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.min_ratio < 1:
            msg = f"min_ratio is {self.min_ratio}; it must lie between 0 and 1."
            raise ValueError(msg)
        check_at_least(self, max_step_ratio=0)


def _losses_and_slopes(objective: Objective, params: LoraParams, direction: LoraParams, batch: Batch):
    return jax.jvp(lambda p: objective.data_losses(p, batch), (params,), (direction,))


class Check:
    """Predicted against actual change of the objective that a step minimises.

    With `delta` from `(C + rho I) delta = b`, the step minimises the tilted objective
    `phi(d) = -b'd + sum_i c_i [l_i(theta + d) - l_i(theta) - g_i'd] + rho/2 ||d||^2`, whose quadratic model
    is `-b'd + 1/2 d'(C + rho I)d`. Left-over gradients drop out of it, as they do from the path. The retained
    examples in it are a probe drawn apart from the curvature's sample: a sample's blind spots show up here.
    """

    def __init__(self, task: UnlearningTask, workspace: Workspace, region: TrustRegion, probe: np.ndarray):
        self.task, self.workspace, self.region = task, workspace, region
        problem = task.problem
        self.rows = np.concatenate([probe, problem.named, problem.wanted])
        self.stack = workspace.stack(problem.examples, self.rows)
        self.is_forget = np.isin(self.rows, problem.named)
        self.is_wanted = np.isin(self.rows, problem.wanted)
        self.is_probe = ~self.is_forget & ~self.is_wanted

    @property
    def probe_scale(self) -> float:
        """How many retained rows each one of the probe stands for."""
        return len(self.task.problem.retained) / max(int(self.is_probe.sum()), 1)

    def losses_and_slopes(self, params: LoraParams, direction: LoraParams) -> tuple[np.ndarray, np.ndarray]:
        """Each example's data loss, and its derivative along `direction`."""
        self.workspace.budget.spend("trust_region", FORWARD_WITH_TANGENT * len(self.rows))
        return per_example(_losses_and_slopes, self.stack, self.task.objective, params, direction)

    def losses(self, params: LoraParams) -> np.ndarray:
        """Each example's data loss."""
        self.workspace.budget.spend("trust_region", FORWARD * len(self.rows))
        return per_example(data_losses, self.stack, self.task.objective, params)

    @property
    def least_cost(self) -> float:
        """Gradient equivalents of looking at one length of a step."""
        return (FORWARD_WITH_TANGENT + FORWARD) * len(self.rows)

    def mean(self, losses: np.ndarray, which: np.ndarray) -> float:
        """Mean over a group; nan where it is empty."""
        return float(losses[which].mean()) if which.any() else math.nan


@dataclasses.dataclass(frozen=True)
class _Accepted:
    scale: float
    predicted: float
    actual: float
    losses: np.ndarray


@dataclasses.dataclass(frozen=True)
class Move:
    """One solve to be made: from `weight_before` to `weight_target`, with these coefficient vectors."""

    weight_before: float
    weight_target: float
    rhs: LoraParams
    curvature: Weighted
    check_retained: float  # coefficient of each retained probe example
    check_named: float
    check_wanted: float


def _shorten(
    check: Check,
    inverse: InverseCurvature,
    params: LoraParams,
    delta: LoraParams,
    move: Move,
    coefficients: np.ndarray,
) -> _Accepted | None:
    """The largest of 1, 1/2, 1/4, ... times `delta` (after the limit on its norm) whose actual change agrees.

    Args:
        check: the examples to look at.
        inverse: what the step was solved with.
        params: adapter before the step.
        delta: the solved step.
        move: what was solved.
        coefficients: `c_i` in the order of `check`.

    Returns:
        What was accepted, or None when even the shortest step disagrees with its prediction.
    """
    region, objective = check.region, check.task.objective
    slope = float(trees.tree_vdot(move.rhs, delta))
    delta_norm = float(trees.tree_norm(delta))
    if slope <= 0:
        return None  # against the right-hand side, as a solve with an indefinite matrix may point: no length helps
    # The residual of conjugate gradients is orthogonal to its iterate, so delta'(C + rho I)delta = b'delta; with
    # other solvers that holds as far as they converged.
    limit = region.max_step_ratio * float(trees.tree_norm(params))
    scale = min(1.0, limit / delta_norm) if limit > 0 else 1.0
    start, slopes = check.losses_and_slopes(params, delta)
    quadratic = 0.5 * (objective.l2 * coefficients.sum() * delta_norm**2 + inverse.damping_energy(delta))
    rounding = 64 * np.finfo(np.float32).eps * float(np.abs(coefficients * start).sum())
    for _ in range(_MAX_HALVINGS + 1):
        predicted = slope * (scale - 0.5 * scale**2)
        losses = check.losses(trees.tree_axpy(scale, delta, params))
        remainder = float((coefficients * (losses - start - scale * slopes)).sum())
        actual = slope * scale - remainder - quadratic * scale**2
        if math.isfinite(actual) and actual >= region.min_ratio * predicted - rounding:
            return _Accepted(scale, predicted, actual, losses)
        scale *= 0.5
    return None


def take(
    inverse: InverseCurvature, check: Check | None, params: LoraParams, move: Move
) -> tuple[LoraParams, SolveRecord]:
    """Solves, checks and applies one move.

    Raises:
        UnlearningError: the solve failed, or no length of its step changes the objective as predicted.
        BudgetSpent: the budget has no room for the solve or for the next length of its step.
    """
    solution = inverse.solve(params, move.curvature, move.rhs)
    status = Status(int(solution.status))
    if is_failure(status):
        msg = f"The solve at weight {move.weight_before:.4g} {describe(status)}."
        raise UnlearningError(msg)
    scale, predicted, actual, group_losses = 1.0, math.nan, math.nan, (math.nan,) * 3
    if check is not None:
        coefficients = np.select(
            [check.is_probe, check.is_forget], [move.check_retained, move.check_named], move.check_wanted
        )
        accepted = _shorten(check, inverse, params, solution.value, move, coefficients)
        if accepted is None:
            msg = (
                f"At weight {move.weight_before:.4g} no step down to 1/{2**_MAX_HALVINGS} of the solved one "
                "changed the objective as predicted; raise damping or sample_size, or take more steps."
            )
            raise UnlearningError(msg)
        scale, predicted, actual = accepted.scale, accepted.predicted, accepted.actual
        groups = (check.is_forget, check.is_wanted, check.is_probe)
        group_losses = tuple(check.mean(accepted.losses, group) for group in groups)
    solved_norm = float(trees.tree_norm(solution.value))
    if not (math.isfinite(solved_norm) and solved_norm > 0):
        msg = f"The step at weight {move.weight_before:.4g} has norm {solved_norm}; nothing would be forgotten."
        raise UnlearningError(msg)
    history = np.asarray(solution.history)[: int(solution.num_steps)]
    history = history[~np.isnan(history)]  # of a refined solve, the first of its solves
    least_ritz, largest_ritz = (float(x) for x in np.asarray(solution.ritz_extremes))
    rhs_norm = float(trees.tree_norm(move.rhs))
    record = SolveRecord(
        weight_before=move.weight_before,
        weight_after=move.weight_before - scale * (move.weight_before - move.weight_target),
        scale=scale,
        rhs_norm=rhs_norm,
        delta_norm=scale * solved_norm,
        status=status,
        iterations=int(solution.num_steps),
        products=int(solution.num_products),
        relative_residual=float(solution.relative_residual),
        negative_curvature=bool(solution.negative_curvature),
        residual_history=tuple(float(r) for r in history),
        predicted_reduction=predicted,
        actual_reduction=actual,
        forget_loss=group_losses[0],
        wanted_loss=group_losses[1],
        probe_loss=group_losses[2],
        curvature=inverse.kind,
        ritz_extremes=(least_ritz, largest_ritz),
        error_bound=_error_bound(inverse, move, solution, rhs_norm, solved_norm),
    )
    return trees.tree_axpy(scale, solution.value, params), record


def _error_bound(
    inverse: InverseCurvature, move: Move, solution: Solution, rhs_norm: float, solved_norm: float
) -> float:
    """Bound on the relative error of the solve; nan for a curvature whose least eigenvalue is not known."""
    least = inverse.least_damping + inverse.objective.l2 * float(move.curvature.weights.sum())
    if not CURVATURES[inverse.kind].positive_semidefinite or least <= 0:
        return math.nan
    return float(solution.relative_residual) * rhs_norm / least / solved_norm
