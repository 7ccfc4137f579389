"""The trust region: predicted against actual change of the objective that a step minimises."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np

from llmeraser_jax import trees
from llmeraser_jax.curvature import CURVATURES
from llmeraser_jax.losses import Objective, real_rows, stacking_order
from llmeraser_jax.parallel import to_host
from llmeraser_jax.solvers import Status, describe, is_failure
from llmeraser_jax.types import ExampleStack, LoraParams
from llmeraser_jax.unlearning.cost import FORWARD, FORWARD_WITH_TANGENT
from llmeraser_jax.unlearning.evaluator import Evaluator, losses_by_bucket
from llmeraser_jax.unlearning.problem import Weighted
from llmeraser_jax.unlearning.steps import StepRecord, UnlearningError

_MAX_HALVINGS = 6


@jax.jit
def _losses_and_slopes(objective: Objective, params: LoraParams, stack: ExampleStack, direction: LoraParams):
    return jax.jvp(lambda p: losses_by_bucket(objective, p, stack), (params,), (direction,))


class Check:
    """Predicted against actual change of the objective that a step minimises.

    With `delta` from `(C + rho I) delta = b`, the step minimises the tilted objective
    `phi(d) = -b'd + sum_i c_i [l_i(theta + d) - l_i(theta) - g_i'd] + rho/2 ||d||^2`, whose quadratic model
    is `-b'd + 1/2 d'(C + rho I)d`. Left-over gradients drop out of it, as they do from the path. The retained
    examples in it are a probe drawn apart from the curvature's sample: a sample's blind spots show up here.
    """

    def __init__(self, evaluator: Evaluator, probe: np.ndarray):
        self.evaluator = evaluator
        problem = evaluator.problem
        indices = np.concatenate([probe, problem.named, problem.wanted])
        self.stack = evaluator.stack(Weighted(indices, np.ones(len(indices))))
        self.keep = real_rows(self.stack)
        self.order = indices[stacking_order(problem.examples, indices)]
        self.is_forget = np.isin(self.order, problem.named)
        self.is_wanted = np.isin(self.order, problem.wanted)
        self.is_probe = ~self.is_forget & ~self.is_wanted

    def _flat(self, losses) -> np.ndarray:
        return np.concatenate([l.astype(np.float64).reshape(-1) for l in to_host(losses)])[self.keep]

    def losses_and_slopes(self, params: LoraParams, direction: LoraParams) -> tuple[np.ndarray, np.ndarray]:
        """Each example's data loss, and its derivative along `direction`."""
        self.evaluator.cost.spend("trust_region", FORWARD_WITH_TANGENT * len(self.order))
        losses, slopes = _losses_and_slopes(self.evaluator.objective, params, self.stack, direction)
        return self._flat(losses), self._flat(slopes)

    def losses(self, params: LoraParams) -> np.ndarray:
        """Each example's data loss."""
        self.evaluator.cost.spend("trust_region", FORWARD * len(self.order))
        return self._flat(losses_by_bucket(self.evaluator.objective, params, self.stack))

    @property
    def least_cost(self) -> float:
        """Gradient equivalents of looking at one length of a step."""
        return (FORWARD_WITH_TANGENT + FORWARD) * len(self.order)

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


def _trust_region(
    check: Check,
    params: LoraParams,
    delta: LoraParams,
    move: Move,
    coefficients: np.ndarray,
) -> _Accepted | None:
    """The largest of 1, 1/2, 1/4, ... times `delta` (after the limit on its norm) whose actual change agrees.

    Args:
        check: the examples to look at.
        params: adapter before the step.
        delta: the solved step.
        move: what was solved.
        coefficients: `c_i` in the order of `check`.

    Returns:
        What was accepted, or None when even the shortest step disagrees with its prediction.
    """
    config, objective = check.evaluator.config, check.evaluator.objective
    slope = float(trees.tree_vdot(move.rhs, delta))
    delta_norm = float(trees.tree_norm(delta))
    if slope <= 0:
        return None  # against the right-hand side, as a solve with an indefinite matrix may point: no length helps
    # The residual of conjugate gradients is orthogonal to its iterate, so delta'(C + rho I)delta = b'delta; with
    # other solvers that holds as far as they converged.
    limit = config.max_step_ratio * float(trees.tree_norm(params))
    scale = min(1.0, limit / delta_norm) if limit > 0 else 1.0
    start, slopes = check.losses_and_slopes(params, delta)
    quadratic = 0.5 * (objective.l2 * coefficients.sum() * delta_norm**2 + check.evaluator.damping_energy(delta))
    rounding = 64 * np.finfo(np.float32).eps * float(np.abs(coefficients * start).sum())
    for _ in range(_MAX_HALVINGS + 1):
        predicted = slope * (scale - 0.5 * scale**2)
        losses = check.losses(trees.tree_axpy(scale, delta, params))
        remainder = float((coefficients * (losses - start - scale * slopes)).sum())
        actual = slope * scale - remainder - quadratic * scale**2
        if math.isfinite(actual) and actual >= config.min_ratio * predicted - rounding:
            return _Accepted(scale, predicted, actual, losses)
        scale *= 0.5
    return None


def take(
    evaluator: Evaluator, check: Check | None, params: LoraParams, move: Move
) -> tuple[LoraParams, StepRecord]:
    """Solves, guards and applies one move.

    Raises:
        UnlearningError: the solve failed, or no length of its step changes the objective as predicted.
        BudgetSpent: the budget has no room for the solve or for the next length of its step.
    """
    rhs_norm = float(trees.tree_norm(move.rhs))
    solution = evaluator.solve(params, move.curvature, move.rhs)
    status = Status(int(solution.status))
    if is_failure(status):
        msg = f"The solve at weight {move.weight_before:.4g} {describe(status)}."
        raise UnlearningError(msg)
    residual = float(solution.relative_residual)
    kind = evaluator.kind
    # The least eigenvalue that the sampled operator can have; a Hessian's is not known.
    least = evaluator.least_damping + evaluator.objective.l2 * float(move.curvature.weights.sum())
    solved_norm = float(trees.tree_norm(solution.value))
    bounded = CURVATURES[kind].positive_semidefinite and least > 0 and solved_norm > 0
    error_bound = residual * rhs_norm / least / solved_norm if bounded else math.nan
    ritz = tuple(float(x) for x in np.asarray(solution.ritz_extremes))
    scale, predicted, actual, group_losses = 1.0, math.nan, math.nan, (math.nan,) * 3
    if check is not None:
        coefficients = np.select(
            [check.is_probe, check.is_forget], [move.check_retained, move.check_named], move.check_wanted
        )
        accepted = _trust_region(check, params, solution.value, move, coefficients)
        if accepted is None:
            msg = (
                f"At weight {move.weight_before:.4g} no step down to 1/{2**_MAX_HALVINGS} of the solved one "
                "changed the objective as predicted; raise damping or sample_size, or take more steps."
            )
            raise UnlearningError(msg)
        scale, predicted, actual = accepted.scale, accepted.predicted, accepted.actual
        groups = (check.is_forget, check.is_wanted, check.is_probe)
        group_losses = tuple(check.mean(accepted.losses, group) for group in groups)
    delta_norm = scale * float(trees.tree_norm(solution.value))
    if not (math.isfinite(delta_norm) and delta_norm > 0):
        msg = f"The step at weight {move.weight_before:.4g} has norm {delta_norm}; nothing would be forgotten."
        raise UnlearningError(msg)
    history = np.asarray(solution.history)[: int(solution.num_steps)]
    history = history[~np.isnan(history)]  # of a refined solve, the first of its solves
    record = StepRecord(
        weight_before=move.weight_before,
        weight_after=move.weight_before - scale * (move.weight_before - move.weight_target),
        scale=scale,
        rhs_norm=rhs_norm,
        delta_norm=delta_norm,
        status=status,
        iterations=int(solution.num_steps),
        relative_residual=residual,
        negative_curvature=bool(solution.negative_curvature),
        residual_history=tuple(float(r) for r in history),
        predicted_reduction=predicted,
        actual_reduction=actual,
        forget_loss=group_losses[0],
        wanted_loss=group_losses[1],
        probe_loss=group_losses[2],
        curvature=kind,
        ritz_extremes=(ritz[0], ritz[1]),
        error_bound=error_bound,
    )
    return trees.tree_axpy(scale, solution.value, params), record
