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

Where rows should end, without an oracle: a removed pair should look like one that was never trained on, so its
target is the mean loss of held-out examples. A replacement should look like a trained pair, so its target is the
mean loss of retained examples. And an edit is an exchange: after it the pair as it was trained is to the model
what the replacement is now, a variation of a trained pair that was not trained itself; so its target is the mean
loss of the replacements now. That holds for another query to the same response and for another response to the
same query, and asks for no held-out examples (measured: `experiments/fidelity`). Where pairs that are hard
before the exchange are hard after it, which shows in the pairs' correlation with their replacements, each row's
target follows its own partner. Where the exchange would change nothing, neither does this module.

Log-odds of a loss `l` (nats per token) are `log(exp(l) - 1)`, those against a token of probability `exp(-l)`: on
the way from memorised to unknown they move evenly, where the loss first does not move at all and then runs.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from llmeraser_jax import trees
from llmeraser_jax.curvature.dual import DualInverse, factorise
from llmeraser_jax.curvature.factor import (
    ExampleRows,
    FactoredCurvature,
    combine,
    concatenate_rows,
    example_rows,
    factored_curvature,
)
from llmeraser_jax.losses import real_rows
from llmeraser_jax.parallel import to_host
from llmeraser_jax.solvers import Status
from llmeraser_jax.types import ExampleStack, LoraParams
from llmeraser_jax.unlearning.cost import BACKWARD, FORWARD, GRADIENT
from llmeraser_jax.unlearning.evaluator import Evaluator
from llmeraser_jax.unlearning.problem import EditProblem, Weighted
from llmeraser_jax.unlearning.steps import (
    BudgetSpent,
    NoStepError,
    StepRecord,
    TargetLosses,
    Unlearned,
    UnlearningError,
)

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
_LEAST_LOSS = 1e-6  # below it a loss is float32 rounding
_LEAST_PAIRS = 3  # fewer show no correlation
_NEGLIGIBLE_WAY = 0.1  # log-odds that edited pairs may be from their ends on average and count as there already


def log_odds(losses: np.ndarray | float) -> np.ndarray:
    """`log(exp(l) - 1)` of losses in nats."""
    return np.asarray(np.log(np.expm1(np.maximum(losses, _LEAST_LOSS))))


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The rows that have a target, in the order of their stack."""

    indices: np.ndarray
    goes: np.ndarray  # whether it is a pair that goes; else one that is wanted
    edits: tuple[tuple[np.ndarray, np.ndarray], ...]  # per kind: places of the pairs as trained, of replacements


def _targeted_rows(problem: EditProblem, modified: np.ndarray) -> _Rows:
    """The named pairs and all replacements, bucket by bucket."""
    indices = np.concatenate([problem.named, problem.wanted]).astype(np.int64)
    buckets = np.array([problem.examples.bucket_of(int(i)) for i in indices])
    indices = indices[np.argsort(buckets, kind="stable")]
    place = {int(index): position for position, index in enumerate(indices)}
    edits = []
    for kind in (modified, ~modified):
        of_kind = kind & (problem.replacements >= 0)
        if of_kind.any():
            old, new = problem.named[of_kind], problem.replacements[of_kind]
            edits.append((np.array([place[int(i)] for i in old]), np.array([place[int(i)] for i in new])))
    return _Rows(indices, ~np.isin(indices, problem.wanted), tuple(edits))


@jax.jit
def _gradient_rows(objective, params, stack) -> ExampleRows:
    return example_rows(objective, params, stack, jax.random.key(0), num_roots=0)


@jax.jit
def _joined(rows: LoraParams, others: LoraParams) -> LoraParams:
    return concatenate_rows(rows, others)


_factored_curvature = jax.jit(factored_curvature, static_argnames="num_roots")


@jax.jit
def _scaled(rows: LoraParams, keep: jax.Array, factors: jax.Array) -> LoraParams:
    return jax.tree.map(lambda x: jnp.einsum("m,m...->m...", factors.astype(x.dtype), x[keep]), rows)


@jax.jit
def _combined(coefficients: jax.Array, rows: LoraParams) -> LoraParams:
    return combine(coefficients, rows)


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
    """
    config = evaluator.config
    sample = evaluator.problem.trained_mean(
        evaluator.curvature_sample, rng, without_named=True, similar_share=config.similar_share
    )
    key = jax.random.key(int(rng.integers(2**31)))
    operator = _factored_curvature(
        evaluator.objective,
        params,
        evaluator.stack(sample),
        key,
        damping=config.damping,
        num_roots=config.draws,
    )
    evaluator.cost.curvature += (FORWARD + config.draws * BACKWARD) * len(sample.indices)
    if earlier is not None:
        before = earlier.operator
        share = len(operator.weights) / (len(operator.weights) + len(before.weights))
        operator = operator.replace(
            rows=concatenate_rows(before.rows, operator.rows),
            weights=jnp.concatenate([(1 - share) * before.weights, share * operator.weights]),
        )
    try:
        return factorise(operator)
    except np.linalg.LinAlgError as error:
        msg = f"Rounding made the damped curvature indefinite ({error}); raise damping."
        raise NoStepError(msg) from error


def _ends(rows: _Rows, targets: TargetLosses, here: np.ndarray) -> np.ndarray:
    """Log-odds that every row should end at; those it has where an edit is without effect.

    Args:
        rows: which.
        targets: mean losses of what is known and unknown.
        here: their log-odds now.
    """
    ends = np.full(len(here), math.nan if targets.unknown is None else float(log_odds(targets.unknown)))
    for old, new in rows.edits:
        persistence = 0.0
        if len(old) >= _LEAST_PAIRS and np.ptp(here[old]) > 0 and np.ptp(here[new]) > 0:
            persistence = max(float(np.corrcoef(here[old], here[new])[0, 1]), 0.0)
        known = here[old].mean() if targets.known is None else float(log_odds(targets.known))
        ends[new] = known + persistence * (here[old] - known)
        ends[old] = here[new].mean() + persistence * (here[new] - here[new].mean())
        if max((ends[old] - here[old]).mean(), (here[new] - ends[new]).mean()) <= _NEGLIGIBLE_WAY:
            ends[old], ends[new] = here[old], here[new]
    return ends


def _demand(rows: _Rows, here: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """What is left of every row's way; 0 for a row that is past its end."""
    left = ends - here
    return np.where(rows.goes, np.maximum(left, 0), np.minimum(left, 0))


@dataclasses.dataclass(frozen=True)
class _Point:
    """The targeted rows under one adapter."""

    here: np.ndarray  # log-odds
    normals: LoraParams | None  # gradients of the log-odds; None where only losses were computed


@dataclasses.dataclass(frozen=True)
class _Guards:
    """Retained rows that a repair holds to the loss they had."""

    stack: ExampleStack
    keep: jax.Array
    trained: np.ndarray  # losses under the trained adapter
    losses: np.ndarray  # and now
    gradients: LoraParams

    @property
    def harm(self) -> float:
        """Mean rise of the loss, nats per token."""
        return float((self.losses - self.trained).mean())


class _Matching:
    """The rows, their targets, and what is measured about them on the way."""

    def __init__(self, evaluator: Evaluator, trained: LoraParams, targets: TargetLosses, modified: np.ndarray):
        self.evaluator = evaluator
        self.trained = trained
        self.targets = targets
        self.rows = _targeted_rows(evaluator.problem, modified)
        self.stack = evaluator.stack(Weighted(self.rows.indices, np.ones(len(self.rows.indices))))
        self.keep = _kept(self.stack)
        self.start = np.zeros(0)
        self.ends = np.zeros(0)
        self.way = np.zeros(0)

    def begin(self, point: _Point) -> bool:
        """Sets the rows' ends; whether any row has a way to go."""
        self.start = point.here
        self.ends = _ends(self.rows, self.targets, point.here)
        self.way = _demand(self.rows, self.start, self.ends)
        return bool(np.any(self.way))

    @property
    def asked(self) -> float:
        """How far the mean loss of rows that go, or of wanted ones, is to move; the larger, in nats per token."""
        moves = np.abs(np.logaddexp(0, self.start + self.way) - np.logaddexp(0, self.start))
        return max(float(moves[group].mean()) for group in (self.rows.goes, ~self.rows.goes) if group.any())

    def demand(self, point: _Point) -> np.ndarray:
        """What is asked of every row, in log-odds: what is left of its way, or back where it was taken too far.

        Not asked back are a pair that was past its end as trained, and a wanted one that is known too well.
        """
        left = _demand(self.rows, point.here, self.ends)
        return np.where(self.rows.goes & (self.way != 0), self.ends - point.here, left)

    def off(self, point: _Point) -> float:
        """How far rows are from their ends, on either side, over the whole way."""
        return float(np.abs(self.demand(point)).sum() / np.abs(self.way).sum())

    def left(self, point: _Point) -> float:
        """The share of the whole way that is left."""
        return float(np.abs(_demand(self.rows, point.here, self.ends)).sum() / np.abs(self.way).sum())

    def measure(self, params: LoraParams, *, gradients: bool) -> _Point:
        """The rows under an adapter; gradients come with their losses at no further cost."""
        cost = self.evaluator.cost
        if not gradients:
            losses = self.evaluator.example_losses(params, self.stack)[np.asarray(self.keep)]
            return _Point(log_odds(losses), None)
        found = _gradient_rows(self.evaluator.objective, params, self.stack)
        cost.rhs += GRADIENT * len(self.rows.indices)
        losses = to_host(found.losses).astype(np.float64)[np.asarray(self.keep)]
        # d log(exp(l) - 1) = dl / (1 - exp(-l))
        factors = jnp.asarray(1 / -np.expm1(-np.maximum(losses, _LEAST_LOSS)))
        return _Point(log_odds(losses), _scaled(found.gradients, self.keep, factors))

    def draw_guards(self, params: LoraParams, rng: np.random.Generator) -> _Guards:
        """A fresh sample of retained rows, with their losses then and now and their gradients now.

        As many as are asked for, or fewer where the budget is nearly used up.

        Raises:
            BudgetSpent: not even a few can be paid.
        """
        evaluator = self.evaluator
        evaluator.require(_repair_cost(len(self.rows.indices), least_guards(evaluator)))
        spare = evaluator.budget - evaluator.cost.total - _repair_cost(len(self.rows.indices), 0)
        size = min(evaluator.repair_size, int(min(spare / _GUARD_COST, 1e9)))
        chosen = evaluator.problem.trained_mean(size, rng, without_named=True).indices
        stack = evaluator.stack(Weighted(chosen, np.ones(len(chosen))))
        keep = _kept(stack)
        trained = evaluator.example_losses(self.trained, stack)[np.asarray(keep)]
        found = _gradient_rows(evaluator.objective, params, stack)
        evaluator.cost.trust_region += GRADIENT * len(chosen)
        losses = to_host(found.losses).astype(np.float64)[np.asarray(keep)]
        return _Guards(stack, keep, trained, losses, _scaled(found.gradients, keep, jnp.ones(len(chosen))))


def _kept(stack: ExampleStack) -> jax.Array:
    return jnp.asarray(np.flatnonzero(real_rows(stack)))


@dataclasses.dataclass(frozen=True)
class _Step:
    """A solved step: where it leads, and what it should do."""

    delta: LoraParams
    rhs: LoraParams
    predicted: np.ndarray  # change of the rows' log-odds


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


def unlearn_matched(
    evaluator: Evaluator,
    params: LoraParams,
    targets: TargetLosses,
    modified: np.ndarray,
    *,
    on_step: Callable[[StepRecord], None],
) -> Unlearned:
    """Moves the adapter until the named rows are where their targets say, and repairs what that did to others.

    Args:
        evaluator: objective, request and configuration.
        params: the adapter trained on the data as they stood.
        targets: where rows should end; `unknown` is needed where rows are removed.
        modified: for each named example, whether its query is what changes: pairs of either kind are like each
            other, and the two kinds are not.
        on_step: called after every accepted step.

    Returns:
        The outcome; without steps, and the adapter as it was, where no row has anywhere to go.

    Raises:
        UnlearningError: the budget does not cover the first step, or no step moves the rows as predicted.
    """
    config, matching = evaluator.config, _Matching(evaluator, params, targets, modified)
    rng = np.random.default_rng([config.seed, 3])
    num_rows = len(matching.rows.indices)
    num_steps = _affordable_steps(evaluator, num_rows)
    curvature: DualInverse | None = None
    records: list[StepRecord] = []
    stopped = ""
    point: _Point | None = None
    for step in range(num_steps + config.repairs):
        repairing = step >= num_steps
        fresh = curvature is None or (not repairing and step % config.refresh_every == 0)
        try:
            evaluator.require(
                (FORWARD + GRADIENT * (point is None)) * num_rows + _curvature_cost(evaluator) * fresh
            )
            if point is None:
                point = matching.measure(params, gradients=True)
                if not matching.begin(point):
                    return _nothing_to_do(evaluator, params, targets)
            if curvature is None or fresh:
                curvature = retained_curvature(evaluator, params, rng, curvature)
            guards = matching.draw_guards(params, rng) if repairing and len(evaluator.problem.retained) else None
            if repairing and matching.off(point) <= _CORRECT_ABOVE and (not guards or guards.harm <= _HARM_BELOW):
                break
            # A repair takes all that is left; the steps before it their share.
            share = 1 / max(num_steps - step, 1)
            demand = np.clip(share * matching.demand(point), -_MAX_LOG_ODDS_STEP, _MAX_LOG_ODDS_STEP)
            solved = _solve(curvature, _normals(point), demand, config.row_ridge, guards)
            # The rows' gradients after a step check it and begin the next, where there is to be one.
            pending = GRADIENT * num_rows + FORWARD * (len(guards.losses) if guards else 0)
            affordable = (
                evaluator.cost.total + pending + _repair_cost(num_rows, least_guards(evaluator)) <= evaluator.budget
            )
            another = affordable and step + 1 < num_steps + config.repairs
            scale, after = _accepted(matching, params, solved, point, guards, gradients=another)
        except BudgetSpent as spent:
            if not records:
                raise UnlearningError(str(spent)) from spent
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
        if not affordable:
            stopped = f"the budget of {evaluator.budget:.0f} gradient equivalents has no room for another step"
        if not another:
            break
    return Unlearned(
        params=params,
        steps=tuple(records),
        final_weight=records[-1].weight_after,
        complete=records[-1].weight_after <= ARRIVED,
        method="matched",
        cost=evaluator.cost,
        targets=targets,
        asked=matching.asked,
        stopped=stopped,
    )


def _nothing_to_do(evaluator: Evaluator, params: LoraParams, targets: TargetLosses) -> Unlearned:
    return Unlearned(
        params=params,
        steps=(),
        final_weight=0.0,
        complete=True,
        method="matched",
        cost=evaluator.cost,
        targets=targets,
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


def _affordable_steps(evaluator: Evaluator, num_rows: int) -> int:
    """K: what was asked for; else 4, or fewer (2 at least) where the budget would leave no room for a repair."""
    if evaluator.config.num_steps is not None:
        return evaluator.config.num_steps
    num_guards = min(evaluator.repair_size, len(evaluator.problem.retained)) if evaluator.config.repairs else 0
    for num_steps in range(evaluator.num_steps, 2, -1):
        samples = math.ceil(num_steps / evaluator.config.refresh_every)
        needed = (num_steps + 1) * GRADIENT * num_rows + samples * _curvature_cost(evaluator)
        if evaluator.cost.total + needed + _repair_cost(num_rows, num_guards) <= evaluator.budget:
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
    losses, goes = np.log1p(np.exp(after.here)), matching.rows.goes
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
        forget_loss=_mean(losses[goes]),
        wanted_loss=_mean(losses[~goes]),
        probe_loss=math.nan if guards is None else float(guards.losses.mean()),
        error_bound=residual / float(curvature.operator.mu) / solved_norm,
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
    scale, weight = 1.0, np.sign(solved.predicted)
    for _ in range(_MAX_HALVINGS + 1):
        trial = trees.tree_axpy(scale, solved.delta, params)
        after = matching.measure(trial, gradients=gradients)
        if guards is None:
            moved, hoped = float(weight @ (after.here - before.here)), scale * float(weight @ solved.predicted)
            good = 0 < moved <= _MAX_OVERSHOOT * hoped
        else:
            losses = matching.evaluator.example_losses(trial, guards.stack)[np.asarray(guards.keep)]
            harm = float((losses - guards.trained).mean())
            off = matching.off(after)
            good = harm <= max(guards.harm, _HARM_BELOW) and off <= max(matching.off(before), ARRIVED)
        if good and np.all(np.isfinite(after.here)):
            return scale, after
        scale *= 0.5
    msg = "No length of the step moves the named rows as predicted; raise sample_size, damping or num_steps."
    raise NoStepError(msg)
