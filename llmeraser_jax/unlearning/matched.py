"""The matched way: influence steps whose coefficients are solved for, so that every named row arrives.

Influence functions move the adapter by `(C + rho I)^-1 sum_i a_i g_i` with `a_i = 1/n`. How far that takes a
row depends on damping, sample and curvature, and on a memorised row it is hardly ever the right distance. Here
the same directions are kept and the `a_i` are found from where the rows should end: the step is the solution of

    minimise 1/2 d'(C_R + rho I) d   subject to   h_i . d = t_i   for every row i,

`C_R` the Gauss-Newton matrix of retained examples, `h_i` the gradient of row i's log-odds and `t_i` its share of
the way left. In the dual that is `d = C^-1 H' a`, `(H C^-1 H' + kappa I) a = t`, with one gradient per row and
step; C is factored (`curvature.factor`), so that its inverse costs no further pass through the network.

A quadratic model does not see how retained rows bend away from it on the way. After the last of the K steps come
repairs: steps in which freshly drawn retained rows have a target too, the loss that they had under the trained
adapter. Rows bend as well, and repairs drive those that go further on: one that was taken past its end is asked
back to it (measured: `experiments/tofu`). Rows in the sample and rows outside it are harmed and repaired nearly
alike (measured: `experiments/fidelity`), so a fresh sample's mean harm is an unbiased measure of what is left to
repair; when it is negligible the repairs end.

Where rows should end is worked out in `unlearning.targets`.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from llmeraser_jax import trees
from llmeraser_jax.curvature.dual import DualInverse, factorise
from llmeraser_jax.curvature.factor import (
    ExampleRows,
    FactoredCurvature,
    example_rows,
    factored_curvature,
)
from llmeraser_jax.losses import real_rows
from llmeraser_jax.parallel import to_host
from llmeraser_jax.solvers import Status
from llmeraser_jax.types import ExampleStack, LoraParams
from llmeraser_jax.unlearning.cost import BACKWARD, FORWARD, GRADIENT, BudgetSpent
from llmeraser_jax.unlearning.evaluator import Evaluator
from llmeraser_jax.unlearning.problem import Weighted
from llmeraser_jax.unlearning.steps import NoStepError, StepRecord, Unlearned
from llmeraser_jax.unlearning.targets import Role, RowTargets, loss_of

logger = logging.getLogger(__name__)

# Rows this close to their targets (share of the way, in log-odds) have arrived.
ARRIVED = 0.1
_CORRECT_ABOVE = 0.03  # further off than this is worth another step
_HARM_BELOW = 0.02  # nats per token that retained rows may have lost on average before it is worth a repair
_LEAST_GUARDS = 16  # a repair with fewer is not worth its step
_GUARD_RIDGE = 0.1  # how softly guards are held, relative to their mean influence on themselves
_MAX_LOG_ODDS_STEP = 4.0  # a linearisation reaches no further
_MAX_OVERSHOOT = 1.5  # of the predicted move, before a step is shortened
_MAX_HALVINGS = 5
_MAX_STEPS = 12  # that rows far down ask for
_LEAST_GAIN = 0.9  # of the standard error by joining a sample; less is no gain
_MAX_SAMPLES = 4  # curvature samples that the first step may join to lower its standard error


@partial(jax.jit, static_argnames="log_odds")
def _gradient_rows(objective, params, stack, log_odds: bool) -> ExampleRows:
    return example_rows(objective, params, stack, jax.random.key(0), num_roots=0, log_odds=log_odds)


@jax.jit
def _joined(rows: LoraParams, others: LoraParams) -> LoraParams:
    return trees.concatenate_rows(rows, others)


_factored_curvature = jax.jit(factored_curvature, static_argnames="num_roots")


@jax.jit
def _kept_rows(rows: LoraParams, keep: jax.Array) -> LoraParams:
    return jax.tree.map(lambda x: x[keep], rows)


@jax.jit
def _combined(coefficients: jax.Array, rows: LoraParams) -> LoraParams:
    return trees.combine_rows(coefficients, rows)


def _curvature_cost(evaluator: Evaluator) -> float:
    return (FORWARD + evaluator.config.draws * BACKWARD) * evaluator.num_sampled


def retained_curvature(
    evaluator: Evaluator, params: LoraParams, rng: np.random.Generator, earlier: DualInverse | None
) -> DualInverse:
    """The factored Gauss-Newton matrix of a sample of retained examples, damped, and its inverse.

    The normaliser is that of the mean over all trained examples, as along the path.

    Args:
        evaluator: objective, request and configuration.
        params: where.
        rng: of the sample and its roots.
        earlier: of the steps before, whose rows stay: at another adapter, but of other examples, they keep the
            step from harming more of the retained ones than one sample could.

    Raises:
        NoStepError: the damping is too small for float32.
        BudgetSpent: the sample cannot be paid.
    """
    config, objective = evaluator.config, evaluator.objective
    if len(evaluator.problem.retained) == 0:
        none = jax.tree.map(lambda x: jnp.zeros((1, *x.shape), x.dtype), params)
        return factorise(FactoredCurvature(none, jnp.zeros(1), config.damping + objective.l2))
    sample = evaluator.problem.trained_mean(
        evaluator.curvature_sample, rng, without_named=True, similar_share=config.similar_share
    )
    evaluator.cost.spend("curvature", (FORWARD + config.draws * BACKWARD) * len(sample.indices))
    key = jax.random.key(int(rng.integers(2**31)))
    operator = _factored_curvature(
        objective,
        params,
        evaluator.stack(sample),
        key,
        damping=config.damping,
        num_roots=config.draws,
    )
    if earlier is not None:
        before = earlier.operator
        share = len(operator.weights) / (len(operator.weights) + len(before.weights))
        operator = operator.replace(
            rows=trees.concatenate_rows(before.rows, operator.rows),
            weights=jnp.concatenate([(1 - share) * before.weights, share * operator.weights]),
        )
    try:
        return factorise(operator)
    except np.linalg.LinAlgError as error:
        msg = f"Rounding made the damped curvature indefinite ({error}); raise damping."
        raise NoStepError(msg) from error


@dataclasses.dataclass(frozen=True)
class _Point:
    """The targeted rows under one adapter."""

    here: np.ndarray  # log-odds
    normals: LoraParams | None  # gradients of the log-odds; None where only losses were computed


@dataclasses.dataclass(frozen=True)
class _Guards:
    """Retained rows that a repair holds to the loss they had."""

    stack: ExampleStack
    trained: np.ndarray  # losses under the trained adapter
    losses: np.ndarray  # and now
    gradients: LoraParams

    @property
    def harm(self) -> float:
        """Mean rise of the loss, nats per token."""
        return float((self.losses - self.trained).mean())


class _Matching:
    """The rows, their targets, and what is measured about them on the way."""

    def __init__(self, evaluator: Evaluator, trained: LoraParams, targets: RowTargets):
        self.evaluator = evaluator
        self.trained = trained
        self.targets = targets
        self.stack = evaluator.place(targets.examples, Weighted(targets.indices, np.ones(len(targets.indices))))
        self.keep = _kept(self.stack)
        self.way = targets.way
        self.asked = targets.roles != Role.STAYS

    def demand(self, point: _Point) -> np.ndarray:
        """What is asked of every row, in log-odds: what is left of its way, or back where it was taken too far.

        Not asked back are a pair that was past its end as trained, and a wanted one that is known too well.
        """
        left = self.targets.left(point.here)
        goes = self.targets.roles == Role.GOES
        return np.where(goes & (self.way != 0), self.targets.ends - point.here, left)

    def off(self, point: _Point) -> float:
        """How far rows are from their ends, on either side, over the whole way."""
        return float(np.abs(self.demand(point)[self.asked]).sum() / np.abs(self.way).sum())

    def left(self, point: _Point) -> float:
        """The share of the whole way that is left."""
        return float(np.abs(self.targets.left(point.here)[self.asked]).sum() / np.abs(self.way).sum())

    def measure(self, params: LoraParams, *, gradients: bool) -> _Point:
        """The rows under an adapter; gradients come with their log-odds at no further cost.

        Raises:
            BudgetSpent: it cannot be paid.
        """
        evaluator, targets = self.evaluator, self.targets
        if not gradients:
            evaluator.cost.spend("trust_region", FORWARD * len(targets.indices))
            return _Point(evaluator.stack_values(params, self.stack).log_odds, None)
        evaluator.cost.spend("rhs", GRADIENT * len(targets.indices))
        found = _gradient_rows(evaluator.objective, params, self.stack, log_odds=True)
        here = to_host(found.values).astype(np.float64)[np.asarray(self.keep)]
        return _Point(here, _kept_rows(found.gradients, self.keep))

    def draw_guards(self, params: LoraParams, rng: np.random.Generator) -> _Guards:
        """A fresh sample of retained rows, with their losses then and now and their gradients now.

        As many as are asked for, or fewer where the budget is nearly used up.

        Raises:
            BudgetSpent: not even a few can be paid.
        """
        evaluator, num_rows = self.evaluator, len(self.targets.indices)
        evaluator.cost.reserve(_repair_cost(num_rows, least_guards(evaluator)))
        spare = evaluator.cost.left - _repair_cost(num_rows, 0)
        size = min(evaluator.repair_size, int(min(spare / _GUARD_COST, 1e9)))
        chosen = evaluator.problem.trained_mean(size, rng, without_named=True).indices
        stack = evaluator.stack(Weighted(chosen, np.ones(len(chosen))))
        keep = _kept(stack)
        trained = evaluator.example_losses(self.trained, stack)
        evaluator.cost.spend("trust_region", GRADIENT * len(chosen))
        found = _gradient_rows(evaluator.objective, params, stack, log_odds=False)
        losses = to_host(found.values).astype(np.float64)[np.asarray(keep)]
        return _Guards(stack, trained, losses, _kept_rows(found.gradients, keep))


def _kept(stack: ExampleStack) -> jax.Array:
    return jnp.asarray(np.flatnonzero(real_rows(stack)))


@dataclasses.dataclass(frozen=True)
class _Step:
    """A solved step: where it leads, and what it should do."""

    delta: LoraParams
    rhs: LoraParams
    predicted: np.ndarray  # change of the rows' log-odds
    standard_error: float = math.nan  # of the step over its norm, from two halves of the curvature's sample


def _solve(
    curvature: DualInverse, normals: LoraParams, demand: np.ndarray, row_ridge: float, guards: _Guards | None
) -> _Step:
    """The least step, in the metric of the curvature, that moves the rows as demanded and brings guards back.

    Guards are soft: only what they lost is demanded back, and a ridge keeps rows of tiny gradient from asking much.
    """
    count = len(demand)
    if guards is not None:
        normals = _joined(normals, guards.gradients)
        demand = np.concatenate([demand, np.minimum(guards.trained - guards.losses, 0)])
    metric, solved = curvature.metric(normals)
    ridge = np.full(len(demand), row_ridge * float(np.trace(metric[:count, :count])) / count)
    if guards is not None:
        own = metric[count:, count:]
        ridge[count:] = _GUARD_RIDGE * float(np.trace(own)) / len(own)
    try:
        coefficients = np.linalg.solve(metric + np.diag(ridge), demand)
    except np.linalg.LinAlgError as error:
        msg = f"The rows' gradients depend on each other ({error}); give them a row_ridge above 0."
        raise NoStepError(msg) from error
    return _Step(
        delta=curvature.combination(coefficients, normals, solved),
        rhs=_combined(jnp.asarray(coefficients), normals),
        predicted=(metric @ coefficients)[:count],
    )


def _standard_error(
    curvature: DualInverse, num_roots: int, normals: LoraParams, demand: np.ndarray, row_ridge: float, step: _Step
) -> float:
    """The step's standard error over its norm: half the distance of the steps that two half samples give."""
    operator = curvature.operator
    half = np.arange(len(operator.weights)) // num_roots % 2 == 0
    if half.all():
        return math.nan
    steps = []
    for chosen in (half, ~half):
        places = jnp.asarray(np.flatnonzero(chosen))
        part = FactoredCurvature(_kept_rows(operator.rows, places), 2 * operator.weights[places], operator.mu)
        steps.append(_solve(factorise(part), normals, demand, row_ridge, None).delta)
    distance = float(trees.tree_norm(trees.tree_sub(*steps)))
    return 0.5 * distance / float(trees.tree_norm(step.delta))


def unlearn_matched(
    evaluator: Evaluator,
    params: LoraParams,
    targets: RowTargets,
    *,
    on_step: Callable[[StepRecord], None],
) -> Unlearned:
    """Moves the adapter until the named rows are where their targets say, and repairs what that did to others.

    Args:
        evaluator: objective, request and configuration.
        params: the adapter trained on the data as they stood.
        targets: where every row should end.
        on_step: called after every accepted step.

    Returns:
        The outcome; without steps, and the adapter as it was, where no row has anywhere to go.

    Raises:
        UnlearningError: no step moves the rows as predicted.
        BudgetSpent: the budget does not cover the first step.
    """
    config, matching = evaluator.config, _Matching(evaluator, params, targets)
    if not np.any(matching.way):
        return _nothing_to_do(evaluator, params)
    rng = np.random.default_rng([config.seed, 3])
    num_rows = len(targets.indices)
    num_steps = _affordable_steps(evaluator, matching)
    curvature: DualInverse | None = None
    records: list[StepRecord] = []
    stopped = ""
    point: _Point | None = None
    for step in range(num_steps + config.repairs):
        repairing = step >= num_steps
        fresh = curvature is None or (not repairing and step % config.refresh_every == 0)
        try:
            if point is None:
                # A step that cannot be looked at afterwards is not worth its rows.
                evaluator.cost.reserve((FORWARD + GRADIENT) * num_rows + _curvature_cost(evaluator))
                point = matching.measure(params, gradients=True)
            if curvature is None or fresh:
                evaluator.cost.reserve(FORWARD * num_rows + _curvature_cost(evaluator))
                curvature = retained_curvature(evaluator, params, rng, curvature)
            guards = matching.draw_guards(params, rng) if repairing and len(evaluator.problem.retained) else None
            if repairing and matching.off(point) <= _CORRECT_ABOVE and (not guards or guards.harm <= _HARM_BELOW):
                break
            # A repair takes all that is left; the steps before it their share.
            share = 1 / max(num_steps - step, 1)
            demand = np.clip(share * matching.demand(point), -_MAX_LOG_ODDS_STEP, _MAX_LOG_ODDS_STEP)
            solved = _solve(curvature, _normals(point), demand, config.row_ridge, guards)
            if not records and len(evaluator.problem.retained):
                curvature, solved = _settled(matching, params, rng, curvature, point, demand, solved)
            # The rows' gradients after a step check it and begin the next, where there is to be one.
            pending = GRADIENT * num_rows + FORWARD * (len(guards.losses) if guards else 0)
            num_guards = least_guards(evaluator) if step + 1 >= num_steps else 0
            affordable = pending + _repair_cost(num_rows, num_guards) <= evaluator.cost.left
            another = affordable and step + 1 < num_steps + config.repairs
            scale, after = _accepted(matching, params, solved, point, guards, gradients=another)
        except BudgetSpent as spent:
            if not records:
                raise
            stopped = str(spent)
            break
        except NoStepError as error:
            if not records:
                raise
            stopped = str(error)
            break
        evaluator.measure_asymmetry(curvature.operator, params, 0.0)
        params = trees.tree_axpy(scale, solved.delta, params)
        record = _record(matching, curvature, solved, point, after, scale, guards, config.cg_rtol)
        records.append(record)
        on_step(record)
        point = after
        if not affordable and step + 1 < num_steps + config.repairs:
            stopped = f"the budget of {evaluator.cost.budget:.0f} gradient equivalents has no room for another step"
        if not another:
            break
    return Unlearned(
        params=params,
        steps=tuple(records),
        final_weight=records[-1].weight_after,
        complete=records[-1].weight_after <= ARRIVED,
        method="matched",
        cost=evaluator.cost,
        stopped=stopped,
    )


def _settled(
    matching: _Matching,
    params: LoraParams,
    rng: np.random.Generator,
    curvature: DualInverse,
    point: _Point,
    demand: np.ndarray,
    solved: _Step,
) -> tuple[DualInverse, _Step]:
    """The first step with samples joined to its curvature until its standard error is low enough.

    Up to four samples in all, no more than leaves half of the budget for what follows, and none after one that did
    not help.
    """
    evaluator, config = matching.evaluator, matching.evaluator.config
    before = math.inf
    for number in range(1, _MAX_SAMPLES + 1):
        error = _standard_error(curvature, config.draws, _normals(point), demand, config.row_ridge, solved)
        solved = dataclasses.replace(solved, standard_error=error)
        half_spent = evaluator.cost.total + _curvature_cost(evaluator) > 0.5 * evaluator.cost.budget
        enough = not error > config.max_standard_error or error > _LEAST_GAIN * before
        if enough or number == _MAX_SAMPLES or half_spent:
            break
        before = error
        curvature = retained_curvature(evaluator, params, rng, curvature)
        solved = _solve(curvature, _normals(point), demand, config.row_ridge, None)
    return curvature, solved


def _nothing_to_do(evaluator: Evaluator, params: LoraParams) -> Unlearned:
    return Unlearned(
        params=params,
        steps=(),
        final_weight=0.0,
        complete=True,
        method="matched",
        cost=evaluator.cost,
        stopped="no named pair has anywhere to go",
    )


def _normals(point: _Point) -> LoraParams:
    assert point.normals is not None  # measured with gradients
    return point.normals


# A guard's loss as trained, its gradient, and its loss after the step.
_GUARD_COST = GRADIENT + 2 * FORWARD


def _repair_cost(num_rows: int, num_guards: int) -> float:
    """Gradient equivalents of a last repair that is accepted at once; the rows' gradients are there already."""
    return FORWARD * num_rows + _GUARD_COST * num_guards


def least_guards(evaluator: Evaluator) -> int:
    """The fewest retained rows that a repair is made with."""
    return min(_LEAST_GUARDS, evaluator.repair_size, len(evaluator.problem.retained))


def _affordable_steps(evaluator: Evaluator, matching: _Matching) -> int:
    """K: what was asked for; else 4, or more where rows are far down.

    Fewer (2 at least) where the budget would leave no room for a repair.
    """
    if evaluator.config.num_steps is not None:
        return evaluator.config.num_steps
    num_rows = len(matching.targets.indices)
    furthest = math.ceil(float(np.abs(matching.way).max()) / _MAX_LOG_ODDS_STEP)
    wanted = max(evaluator.num_steps, min(furthest, _MAX_STEPS))
    num_guards = min(evaluator.repair_size, len(evaluator.problem.retained)) if evaluator.config.repairs else 0
    for num_steps in range(wanted, 2, -1):
        samples = math.ceil(num_steps / evaluator.config.refresh_every)
        needed = (num_steps + 1) * GRADIENT * num_rows + samples * _curvature_cost(evaluator)
        if needed + _repair_cost(num_rows, num_guards) <= evaluator.cost.left:
            return num_steps
    return 2


def _record(
    matching: _Matching,
    curvature: DualInverse,
    solved: _Step,
    before: _Point,
    after: _Point,
    scale: float,
    guards: _Guards | None,
    rtol: float,
) -> StepRecord:
    rhs_norm, residual, solved_norm = map(float, _norms(curvature.operator, solved.delta, solved.rhs))
    losses, roles = loss_of(after.here), matching.targets.roles
    return StepRecord(
        weight_before=matching.left(before),
        weight_after=matching.left(after),
        scale=scale,
        rhs_norm=rhs_norm,
        delta_norm=scale * solved_norm,
        status=Status.CONVERGED if residual <= rtol * rhs_norm else Status.RESIDUAL_DRIFT,
        iterations=0,
        relative_residual=residual / rhs_norm,
        negative_curvature=False,
        residual_history=(),
        predicted_reduction=float(np.mean(np.abs(solved.predicted))) * scale,
        actual_reduction=float(np.mean(np.sign(solved.predicted) * (after.here - before.here))),
        forget_loss=_mean(losses[roles == Role.GOES]),
        wanted_loss=_mean(losses[roles == Role.WANTED]),
        probe_loss=math.nan if guards is None else float(guards.losses.mean()),
        error_bound=residual / float(curvature.operator.mu) / solved_norm,
        standard_error=solved.standard_error,
    )


@jax.jit
def _norms(operator: FactoredCurvature, delta: LoraParams, rhs: LoraParams) -> tuple[jax.Array, ...]:
    """Of `b`, `C delta - b` and `delta`."""
    residual = trees.tree_sub(operator.mv(delta), rhs)
    return tuple(trees.tree_norm(tree) for tree in (rhs, residual, delta))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _accepted(
    matching: _Matching,
    params: LoraParams,
    solved: _Step,
    before: _Point,
    guards: _Guards | None,
    *,
    gradients: bool,
) -> tuple[float, _Point]:
    """The largest of 1, 1/2, 1/4, ... times the step that does what it should, and the rows there.

    A step must not move the rows far beyond the prediction, nor backwards. A repair must not undo the rows' way or
    harm its guards.

    Raises:
        NoStepError: even the shortest step does not.
    """
    scale, weight = 1.0, np.where(matching.way != 0, np.sign(solved.predicted), 0.0)
    for _ in range(_MAX_HALVINGS + 1):
        trial = trees.tree_axpy(scale, solved.delta, params)
        after = matching.measure(trial, gradients=gradients)
        if guards is None:
            moved, hoped = float(weight @ (after.here - before.here)), scale * float(weight @ solved.predicted)
            good = 0 < moved <= _MAX_OVERSHOOT * hoped
        else:
            losses = matching.evaluator.example_losses(trial, guards.stack)
            harm = float((losses - guards.trained).mean())
            off = matching.off(after)
            good = harm <= max(guards.harm, _HARM_BELOW) and off <= max(matching.off(before), ARRIVED)
        if good and np.all(np.isfinite(after.here)):
            return scale, after
        scale *= 0.5
    msg = "No length of the step moves the named rows as predicted; raise sample_size, damping or num_steps."
    raise NoStepError(msg)
