"""The matched way: influence steps whose coefficients are solved for, so that every named row arrives.

Influence functions move the adapter by `(C + rho I)^-1 sum_i a_i g_i` with `a_i = 1/n`. How far that takes a
row depends on damping, sample and curvature, and on a memorised row it is hardly ever the right distance. Here
the same directions are kept and the `a_i` are found from where the rows should end: the step is the solution of

    minimise 1/2 d'(C_R + rho I) d   subject to   h_i . d = t_i   for every row i,

`C_R` the Gauss-Newton matrix of retained examples, `h_i` the gradient of row i's log-odds and `t_i` its share of
the way left. In the dual that is `d = C^-1 H' a`, `(H C^-1 H' + kappa I) a = t`, with one gradient per row and
step; C is factored (`curvature.factor`), so that its inverse costs no further pass through the network.

Where rows should end, without an oracle: a pair that goes should look like one that was never trained on, so its
target is the mean loss of held-out examples; a pair that is wanted should look like a trained one, so its target
is the mean loss of retained examples. An edited pair as it was trained goes too, but what its replacement teaches
speaks for it (another query with the same response) or against it (another response to the same query): its
target is unknown log-odds plus their regression on its replacement's, in the metric of `C^-1`. Without held-out
examples corrected pairs get no target of their own: the right response drives them out.

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
    concatenate_rows,
    example_rows,
    factored_curvature,
    stacked_weights,
)
from llmeraser_jax.solvers import Status
from llmeraser_jax.types import LoraParams
from llmeraser_jax.unlearning.cost import BACKWARD, FORWARD, GRADIENT
from llmeraser_jax.unlearning.evaluator import Evaluator
from llmeraser_jax.unlearning.problem import EditProblem, Weighted
from llmeraser_jax.unlearning.steps import BudgetSpent, StepRecord, TargetLosses, Unlearned, UnlearningError

logger = logging.getLogger(__name__)

# Rows this close to their targets (share of the way left, in log-odds) have arrived.
ARRIVED = 0.1
_CORRECT_ABOVE = 0.03  # more than this is worth another step
_MAX_LOG_ODDS_STEP = 4.0  # a linearisation reaches no further
_MAX_OVERSHOOT = 1.5  # of the predicted move, before a step is shortened
_MAX_HALVINGS = 5
_LEAST_LOSS = 1e-6  # below it a loss is float32 rounding


def log_odds(losses: np.ndarray | float) -> np.ndarray:
    """`log(exp(l) - 1)` of losses in nats."""
    return np.asarray(np.log(np.expm1(np.maximum(losses, _LEAST_LOSS))))


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The rows that have a target, in the order of their stack."""

    indices: np.ndarray
    goes: np.ndarray  # whether it is a pair that goes; else one that is wanted
    partner: np.ndarray  # of a modified pair that goes, the place of its replacement; else -1


def _targeted_rows(problem: EditProblem, *, with_named: bool) -> _Rows:
    """The named pairs, if they have targets, and all replacements, bucket by bucket."""
    named = problem.named if with_named else problem.named[:0]
    replacement_of = dict(zip(problem.named.tolist(), problem.replacements.tolist(), strict=True))
    indices = np.concatenate([named, problem.wanted]).astype(np.int64)
    buckets = np.array([problem.examples.bucket_of(int(i)) for i in indices])
    indices = indices[np.argsort(buckets, kind="stable")]
    place = {int(index): position for position, index in enumerate(indices)}
    partner = np.array([place.get(replacement_of.get(int(i), -1), -1) for i in indices], np.int64)
    return _Rows(indices, ~np.isin(indices, problem.wanted), partner)


@jax.jit
def _gradient_rows(objective, params, stack) -> ExampleRows:
    return example_rows(objective, params, stack, jax.random.key(0), num_roots=0)


_factored_curvature = jax.jit(factored_curvature, static_argnames="num_roots")


@jax.jit
def _scaled(rows: LoraParams, keep: jax.Array, factors: jax.Array) -> LoraParams:
    return jax.tree.map(lambda x: jnp.einsum("m,m...->m...", factors.astype(x.dtype), x[keep]), rows)


@jax.jit
def _combined(coefficients: jax.Array, rows: LoraParams) -> LoraParams:
    return jax.tree.map(lambda x: jnp.einsum("m,m...->...", coefficients.astype(x.dtype), x), rows)


def _curvature_cost(evaluator: Evaluator) -> float:
    sampled = min(evaluator.curvature_sample or len(evaluator.problem.retained), len(evaluator.problem.retained))
    return (FORWARD + evaluator.config.draws * BACKWARD) * sampled


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
    """
    config = evaluator.config
    sample = evaluator.problem.trained_mean(evaluator.curvature_sample, rng, without_named=True)
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
    return factorise(operator)


def _targets(rows: _Rows, targets: TargetLosses, metric: np.ndarray) -> np.ndarray:
    """Log-odds that every row should end at."""
    known = float(log_odds(targets.known))
    if targets.unknown is None:
        return np.full(len(rows.indices), known)
    unknown = float(log_odds(targets.unknown))
    ends = np.where(rows.goes, unknown, known)
    for row in np.flatnonzero(rows.partner >= 0):
        partner = rows.partner[row]
        likeness = np.clip(metric[row, partner] / metric[partner, partner], 0.0, 1.0)
        ends[row] = unknown + likeness * (known - unknown)
    return ends


def _demand(rows: _Rows, here: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """What is left of every row's way; 0 for a row that is past its end."""
    left = ends - here
    return np.where(rows.goes, np.maximum(left, 0), np.minimum(left, 0))


def unlearn_matched(
    evaluator: Evaluator,
    params: LoraParams,
    targets: TargetLosses,
    *,
    on_step: Callable[[StepRecord], None],
) -> Unlearned:
    """Moves the adapter until the named rows are where their targets say.

    Args:
        evaluator: objective, request and configuration.
        params: the adapter trained on the data as they stood.
        targets: where rows should end.
        on_step: called after every accepted step.

    Raises:
        UnlearningError: no row has anywhere to go, or no step moves the rows as predicted.
    """
    config, problem = evaluator.config, evaluator.problem
    rows = _targeted_rows(problem, with_named=targets.unknown is not None)
    stack = evaluator.stack(Weighted(rows.indices, np.ones(len(rows.indices))))
    keep = jnp.asarray(np.flatnonzero(np.asarray(stacked_weights(stack))))
    rng = np.random.default_rng([config.seed, 3])
    curvature: DualInverse | None = None
    records: list[StepRecord] = []
    ends = way = None
    num_steps = evaluator.num_steps
    stopped = ""
    # Half as many corrector steps again, each for all that is left, with the last curvature sample.
    for step in range(num_steps + math.ceil(num_steps / 2)):
        fresh = curvature is None or (step < num_steps and step % config.refresh_every == 0)
        try:
            rows_cost = (GRADIENT + FORWARD) * len(rows.indices)
            evaluator.require(rows_cost + _curvature_cost(evaluator) * fresh)
        except BudgetSpent as spent:
            if not records:
                raise UnlearningError(str(spent)) from spent
            stopped = str(spent)
            break
        found = _gradient_rows(evaluator.objective, params, stack)
        evaluator.cost.rhs += GRADIENT * len(rows.indices)
        if curvature is None or fresh:
            curvature = retained_curvature(evaluator, params, rng, curvature)
        losses = np.asarray(found.losses, np.float64)[np.asarray(keep)]
        here = log_odds(losses)
        # d log(exp(l) - 1) = dl / (1 - exp(-l))
        factors = jnp.asarray(1 / -np.expm1(-np.maximum(losses, _LEAST_LOSS)))
        normals = _scaled(found.gradients, keep, factors)
        metric, solved = curvature.metric(normals)
        if ends is None or way is None:
            ends = _targets(rows, targets, metric)
            way = _demand(rows, here, ends)
            if not np.any(way):
                msg = "Every named row is already at its target; there is nothing to forget."
                raise UnlearningError(msg)
        demand = np.clip(
            _demand(rows, here, ends) / max(num_steps - step, 1), -_MAX_LOG_ODDS_STEP, _MAX_LOG_ODDS_STEP
        )
        kappa = config.row_ridge * float(np.trace(metric)) / len(metric)
        coefficients = np.linalg.solve(metric + kappa * np.eye(len(metric)), demand)
        delta = curvature.combination(coefficients, normals, solved)
        predicted = metric @ coefficients
        try:
            scale, after = _shortened(evaluator, params, delta, stack, keep, here, demand, predicted)
        except UnlearningError as error:
            if not records:
                raise
            stopped = str(error)
            break
        left = np.abs(_demand(rows, after, ends)).sum() / np.abs(way).sum()
        before = np.abs(_demand(rows, here, ends)).sum() / np.abs(way).sum()
        params = trees.tree_axpy(scale, delta, params)
        rhs = _combined(jnp.asarray(coefficients), normals)
        rhs_norm = float(trees.tree_norm(rhs))
        residual = float(trees.tree_norm(trees.tree_sub(curvature.operator.mv(delta), rhs)))
        solved_norm = float(trees.tree_norm(delta))
        after_losses = np.log1p(np.exp(after))
        record = StepRecord(
            weight_before=float(before),
            weight_after=float(left),
            scale=scale,
            rhs_norm=rhs_norm,
            delta_norm=scale * solved_norm,
            status=Status.CONVERGED,
            iterations=0,
            relative_residual=residual / rhs_norm,
            negative_curvature=False,
            residual_history=(),
            predicted_reduction=float(np.mean(np.abs(predicted))) * scale,
            actual_reduction=float(np.mean(np.sign(predicted) * (after - here))),
            forget_loss=_mean(after_losses[rows.goes]),
            wanted_loss=_mean(after_losses[~rows.goes]),
            error_bound=residual / float(curvature.operator.mu) / solved_norm,
        )
        records.append(record)
        on_step(record)
        if left <= _CORRECT_ABOVE:
            break
    return Unlearned(
        params=params,
        steps=tuple(records),
        final_weight=records[-1].weight_after,
        complete=records[-1].weight_after <= ARRIVED,
        method="matched",
        cost=evaluator.cost,
        targets=targets,
        stopped=stopped,
    )


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _shortened(
    evaluator: Evaluator, params, delta, stack, keep, here: np.ndarray, demand: np.ndarray, predicted: np.ndarray
) -> tuple[float, np.ndarray]:
    """The largest of 1, 1/2, 1/4, ... times `delta` that does not move the rows far beyond the prediction.

    Returns:
        The scale, and the rows' log-odds there.

    Raises:
        UnlearningError: even the shortest step does not move them as predicted.
    """
    scale = 1.0
    weight = np.sign(demand)
    for _ in range(_MAX_HALVINGS + 1):
        losses = evaluator.example_losses(trees.tree_axpy(scale, delta, params), stack)[np.asarray(keep)]
        after = log_odds(losses)
        moved, hoped = float(weight @ (after - here)), scale * float(weight @ predicted)
        if np.all(np.isfinite(losses)) and 0 < moved <= _MAX_OVERSHOOT * hoped:
            return scale, after
        scale *= 0.5
    msg = "No length of the step moves the named rows as predicted; raise sample_size, damping or num_steps."
    raise UnlearningError(msg)
