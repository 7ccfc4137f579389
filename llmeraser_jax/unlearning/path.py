"""The three ways to move an adapter: the single step, the Newton step, and the influence path.

All are the same act, repeated: a right-hand side, a curvature, a solve, and a trust region around its result.
This module knows objectives and coefficient vectors, not language models: on ridge regression it lands on the
closed-form retrained solution, which is its oracle.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh

from llmeraser_jax import trees
from llmeraser_jax.curvature import CURVATURES, Damped, DatasetCurvature
from llmeraser_jax.losses import Objective, gradient_sum
from llmeraser_jax.parallel import place_stack
from llmeraser_jax.solvers import ConjugateGradients, Status, describe, is_failure
from llmeraser_jax.types import ExampleStack, LoraParams, Operator, Solution, Solver
from llmeraser_jax.unlearning.config import EraseConfig
from llmeraser_jax.unlearning.cost import FORWARD, FORWARD_WITH_TANGENT, GRADIENT, CostMeter
from llmeraser_jax.unlearning.problem import EditProblem, Weighted

logger = logging.getLogger(__name__)

_MAX_HALVINGS = 6
# A path that has taken out this much is called complete: what is left of the named examples' weight is below
# the last step's own error, and a shortened last step would otherwise approach 0 without end.
NEGLIGIBLE_WEIGHT = 0.01


class UnlearningError(RuntimeError):
    """No usable step was found; nothing may be written."""


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

    The last two lines' numbers are nan without a trust region; so is a loss over no examples.
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
    probe_loss: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unlearned:
    """The adapter after an erasure and how it got there.

    `final_weight` is what is left of the named examples' weight: 0, or at most `NEGLIGIBLE_WEIGHT` where the last
    step was shortened, when their influence was taken out to the end.
    """

    params: LoraParams
    steps: tuple[StepRecord, ...]
    final_weight: float
    cost: CostMeter


def log_odds_weights(num_steps: int, log_odds_range: float) -> np.ndarray:
    """Weights of the named examples [num_steps + 1]: 1, evenly spaced in log-odds, 0.

    On the exact path a memorised pair's probability follows its weight, so its logit moves like
    `log(w / (1 - w))`: equal steps in that variable are equal steps of the network. The range is at least
    `log(4 num_steps)`, so that the two end steps shrink with the number of steps as the others do.
    """
    bound = max(log_odds_range, math.log(4 * num_steps))
    inner = np.linspace(bound, -bound, num_steps - 1) if num_steps > 2 else np.zeros(num_steps - 1)
    return np.concatenate([[1.0], 1 / (1 + np.exp(-inner)), [0.0]])


def next_weight(schedule: np.ndarray, weight: float) -> float:
    """The weight to aim for from `weight`: one step of the schedule further, measured in log-odds.

    From a weight of the schedule it is the next one; from a weight in between, where a step was cut short, the
    same distance is kept. Not further than the last weight before 0, and from there to 0.

    Args:
        schedule: from `log_odds_weights`.
        weight: above 0, at most 1.
    """
    inner = schedule[1:-1]
    if len(inner) == 0 or weight <= inner[-1] * (1 + 1e-9):
        return 0.0
    if len(inner) == 1 or weight >= 1:
        return float(inner[0])
    log_odds = np.log(inner / (1 - inner))
    step = log_odds[0] - log_odds[1]
    here = min(math.log(weight / (1 - weight)), log_odds[0] + step)
    return max(float(1 / (1 + np.exp(step - here))), float(inner[-1]))


@partial(jax.jit, static_argnames="solver")
def _solve(solver: Solver, operator: Operator, rhs: LoraParams) -> Solution:
    return solver.solve(operator, rhs)


@jax.jit
def _losses(objective: Objective, params: LoraParams, stack: ExampleStack):
    return tuple(jax.lax.map(partial(objective.data_losses, params), batches) for batches in stack.batches)


@jax.jit
def _losses_and_slopes(objective: Objective, params: LoraParams, stack: ExampleStack, direction: LoraParams):
    return jax.jvp(lambda p: _losses(objective, p, stack), (params,), (direction,))


class Evaluator:
    """An objective, its data and a mesh: turns coefficient vectors into gradients, operators and losses.

    Host-side; counts what it computes. Stacks are laid out once per set of indices and reweighted afterwards.
    """

    def __init__(self, objective: Objective, problem: EditProblem, config: EraseConfig, mesh: Mesh | None = None):
        self.objective = objective
        self.problem = problem
        self.config = config
        self.mesh = mesh
        self.cost = CostMeter()

    def stack(self, weighted: Weighted) -> ExampleStack:
        """The examples on the device(s), in micro-batches."""
        stack = self.problem.examples.stack(weighted.indices, weighted.weights, chunk_size=self.config.chunk_size)
        return place_stack(stack, self.mesh)

    def gradient(self, params: LoraParams, weighted: Weighted) -> LoraParams:
        """`sum_i c_i grad l_i`."""
        return gradient_sum(self.objective, params, self.stack(weighted))

    def curvature(self, params: LoraParams, weighted: Weighted) -> Damped:
        """`sum_i c_i C(z_i) + rho I`."""
        kind = CURVATURES[self.config.curvature]
        operator = DatasetCurvature(self.objective, params, self.stack(weighted), kind)
        return Damped(operator, self.config.damping)

    def solve(self, params: LoraParams, weighted: Weighted, rhs: LoraParams) -> Solution:
        """`(sum_i c_i C(z_i) + rho I)^-1 rhs` by conjugate gradients."""
        solver = ConjugateGradients(rtol=self.config.cg_rtol, max_steps=self.config.cg_max_steps)
        solution = _solve(solver, self.curvature(params, weighted), rhs)
        # One more product for the true residual, and the one that met negative curvature.
        products = int(solution.num_steps) + 1 + int(solution.negative_curvature)
        per_example = CURVATURES[self.config.curvature].gradient_equivalents
        self.cost.curvature += products * per_example * len(weighted.indices)
        return solution


class _Check:
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
        buckets = np.array([problem.examples.bucket_of(int(i)) for i in indices])
        self.stack = evaluator.stack(Weighted(indices, np.ones(len(indices))))
        self.order = indices[np.argsort(buckets, kind="stable")]
        self.is_forget = np.isin(self.order, problem.named)
        self.is_wanted = np.isin(self.order, problem.wanted)
        self.is_probe = ~self.is_forget & ~self.is_wanted

    def _flat(self, losses) -> np.ndarray:
        parts = zip(losses, self.stack.weights, strict=True)
        return np.concatenate([np.asarray(l, np.float64)[np.asarray(w) != 0] for l, w in parts])

    def losses_and_slopes(self, params: LoraParams, direction: LoraParams) -> tuple[np.ndarray, np.ndarray]:
        """Each example's data loss, and its derivative along `direction`."""
        losses, slopes = _losses_and_slopes(self.evaluator.objective, params, self.stack, direction)
        self.evaluator.cost.trust_region += FORWARD_WITH_TANGENT * len(self.order)
        return self._flat(losses), self._flat(slopes)

    def losses(self, params: LoraParams) -> np.ndarray:
        """Each example's data loss."""
        self.evaluator.cost.trust_region += FORWARD * len(self.order)
        return self._flat(_losses(self.evaluator.objective, params, self.stack))

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
class _Move:
    """One solve to be made: from `weight_before` to `weight_target`, with these coefficient vectors."""

    weight_before: float
    weight_target: float
    rhs: LoraParams
    curvature: Weighted
    check_retained: float  # coefficient of each retained probe example
    check_named: float
    check_wanted: float


def _trust_region(
    check: _Check,
    params: LoraParams,
    delta: LoraParams,
    move: _Move,
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
    # The residual of conjugate gradients is orthogonal to its iterate, so delta'(C + rho I)delta = b'delta.
    limit = config.max_step_ratio * float(trees.tree_norm(params))
    scale = min(1.0, limit / delta_norm) if limit > 0 else 1.0
    start, slopes = check.losses_and_slopes(params, delta)
    quadratic = 0.5 * (objective.l2 * coefficients.sum() + config.damping) * delta_norm**2
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


def _take(
    evaluator: Evaluator, check: _Check | None, params: LoraParams, move: _Move
) -> tuple[LoraParams, StepRecord]:
    """Solves, guards and applies one move.

    Raises:
        UnlearningError: the solve failed, or no length of its step changes the objective as predicted.
    """
    rhs_norm = float(trees.tree_norm(move.rhs))
    solution = evaluator.solve(params, move.curvature, move.rhs)
    status = Status(int(solution.status))
    if is_failure(status):
        msg = f"The solve at weight {move.weight_before:.4g} {describe(status)}."
        raise UnlearningError(msg)
    residual = float(solution.relative_residual)
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
    )
    return trees.tree_axpy(scale, solution.value, params), record


def unlearn(
    objective: Objective,
    params: LoraParams,
    problem: EditProblem,
    config: EraseConfig,
    *,
    mesh: Mesh | None = None,
    on_step: Callable[[StepRecord], None] = lambda record: None,
) -> Unlearned:
    """Moves the adapter as `config.method` says.

    Args:
        objective: the loss that was trained.
        params: theta_hat, the adapter trained on the data as they stood.
        problem: the request.
        config: how to move.
        mesh: devices; None is one.
        on_step: called after every accepted step.

    Returns:
        The new adapter with the record of every step.

    Raises:
        UnlearningError: a solve or its trust region failed at the first step, so that nothing was done; after
            the first step a failure ends the path early and `final_weight` tells how far it came.
    """
    evaluator = Evaluator(objective, problem, config, mesh)
    sample_size = config.sample_size if config.curvature_data == "sample" else None
    probe = problem.trained_mean(sample_size, np.random.default_rng([config.seed, 0]), without_named=True).indices
    check = _Check(evaluator, probe) if config.trust_region else None
    num_retained = len(problem.retained)
    run = _path if config.method == "path" else _single
    return run(evaluator, check, params, sample_size, num_retained / max(len(probe), 1), on_step)


def _single(evaluator, check, params, sample_size, probe_scale, on_step) -> Unlearned:
    """One solve: the paper's step, or Newton's on the edited objective."""
    problem, config = evaluator.problem, evaluator.config
    rng = np.random.default_rng([config.seed, 1])
    without_named = config.curvature_data == "retained"
    if config.rhs == "influence":
        rhs = evaluator.gradient(params, problem.influence_rhs())
        evaluator.cost.rhs += GRADIENT * (len(problem.named) + len(problem.wanted))
        curvature = problem.trained_mean(sample_size, rng, without_named=without_named)
        unit, named, wanted = 1 / problem.num_trained, 1.0, 0.0
    else:
        everything = problem.edited_mean(None, rng)
        rhs = trees.tree_scale(-1.0, evaluator.gradient(params, everything))
        evaluator.cost.rhs += GRADIENT * len(everything.indices)
        curvature = problem.edited_mean(sample_size, rng, without_named=without_named)
        unit, named, wanted = 1 / problem.num_edited_total, 0.0, 1.0
    move = _Move(
        weight_before=1.0,
        weight_target=0.0,
        rhs=rhs,
        curvature=curvature,
        check_retained=probe_scale * unit,
        check_named=named * unit,
        check_wanted=wanted * unit,
    )
    params, record = _take(evaluator, check, params, move)
    on_step(record)
    return Unlearned(params=params, steps=(record,), final_weight=record.weight_after, cost=evaluator.cost)


def _path(evaluator, check, params, sample_size, probe_scale, on_step) -> Unlearned:
    """The influence path: the weight of S from 1 to 0, re-linearised at every step."""
    problem, config = evaluator.problem, evaluator.config
    n = problem.num_trained
    schedule = log_odds_weights(config.num_steps, config.log_odds_range)
    direction = evaluator.stack(problem.influence_rhs())
    weight, records = 1.0, []
    # A step cut short advances the weight in proportion, and the next aims as far ahead from there.
    for attempt in range(3 * config.num_steps):
        target = next_weight(schedule, weight)
        rhs = gradient_sum(evaluator.objective, params, direction)
        evaluator.cost.rhs += GRADIENT * (len(problem.named) + len(problem.wanted))
        rng = np.random.default_rng([config.seed, 1 + attempt])
        curvature = problem.path_mean(target, sample_size, rng, without_named=config.curvature_data == "retained")
        move = _Move(
            weight_before=weight,
            weight_target=target,
            rhs=trees.tree_scale(weight - target, rhs),
            curvature=curvature,
            check_retained=probe_scale / n,
            check_named=target / n,
            check_wanted=(1 - target) / n,
        )
        try:
            params, record = _take(evaluator, check, params, move)
        except UnlearningError as error:
            if not records:
                raise
            logger.warning("The path ends early, at weight %.4g: %s", weight, error)
            break
        records.append(record)
        on_step(record)
        weight = record.weight_after
        if weight <= 0 or (target == 0 and weight <= NEGLIGIBLE_WEIGHT):
            break
    return Unlearned(params=params, steps=tuple(records), final_weight=weight, cost=evaluator.cost)
