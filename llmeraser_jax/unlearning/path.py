"""The single step and the influence path: re-linearised steps that take the weight of the named rows to 0.

Each is a right-hand side, a curvature, a solve, and a trust region around its result. This module knows
objectives and coefficient vectors, not language models: on ridge regression both land on the closed-form
retrained solution, which is their oracle.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections.abc import Callable

import numpy as np

from llmeraser_jax import trees
from llmeraser_jax.losses import gradient_sum
from llmeraser_jax.types import LoraParams
from llmeraser_jax.unlearning.cost import GRADIENT, BudgetSpent, CostMeter
from llmeraser_jax.unlearning.evaluator import Evaluator
from llmeraser_jax.unlearning.problem import Weighted
from llmeraser_jax.unlearning.steps import (
    NEGLIGIBLE_WEIGHT,
    StepRecord,
    Unlearned,
    UnlearningError,
)
from llmeraser_jax.unlearning.trust_region import Check, Move, take

logger = logging.getLogger(__name__)

_LEAST_PLANNED = 4  # conjugate-gradient steps of a solve, and steps of a path, that a budget leaves
_MAX_GROWTH = 4  # of a sample whose step has too large a standard error


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


def _probe_scale(evaluator: Evaluator, check: Check | None) -> float:
    """How many retained examples each one of the probe stands for."""
    num_probed = 1 if check is None else max(int(check.is_probe.sum()), 1)
    return len(evaluator.problem.retained) / num_probed


def _step_price(evaluator: Evaluator, check: Check | None, num_in_rhs: int, *, growth: int = 1) -> float:
    """Gradient equivalents of a step whose solve takes all of its iterations, seen at one length.

    Args:
        evaluator: knows the solver.
        check: the trust region; None is none.
        num_in_rhs: examples behind the right-hand side.
        growth: how many times the curvature's sample is to be as large.
    """
    problem = evaluator.problem
    num_in_curvature = len(problem.named) + len(problem.wanted) + growth * evaluator.num_sampled
    looking = check.least_cost if check is not None else 0.0
    return GRADIENT * num_in_rhs + evaluator.largest_solve_cost(num_in_curvature) + looking


def _plan(evaluator: Evaluator, check: Check | None, num_in_rhs: int) -> None:
    """Lowers the conjugate-gradient steps of each solve, and then the steps of a path, to what the budget can pay.

    Not below 4 of either: less is no solve, and no path.
    """
    while evaluator.num_steps * _step_price(evaluator, check, num_in_rhs) > evaluator.cost.left:
        config = evaluator.config
        if config.cg_max_steps > _LEAST_PLANNED:
            change = {"cg_max_steps": config.cg_max_steps - 1}
        elif evaluator.num_steps > _LEAST_PLANNED:
            change = {"num_steps": evaluator.num_steps - 1}
        else:
            return
        evaluator.config = dataclasses.replace(config, **change)


def _standard_error(
    evaluator: Evaluator, params: LoraParams, curvature: Weighted, rhs: LoraParams, delta: LoraParams
) -> float:
    """The standard error of a solve over its norm: half the distance of the steps that two half samples give.

    Counts as a diagnostic; nan where the curvature is no sample.
    """
    config = evaluator.config
    sampled = np.flatnonzero(np.isin(curvature.indices, evaluator.problem.retained))
    is_sample = evaluator.curvature_sample is not None and evaluator.num_sampled < len(evaluator.problem.retained)
    if not is_sample or len(sampled) < 2 or config.solver not in ("cg", "minres") or config.stream:
        return math.nan
    # Another evaluator: what its solves meet and count is not the method's.
    aside, steps = copy.copy(evaluator), []
    aside.cost = CostMeter()
    for chosen, other in ((sampled[::2], sampled[1::2]), (sampled[1::2], sampled[::2])):
        weights = curvature.weights.copy()
        weights[chosen] *= len(sampled) / len(chosen)
        weights[other] = 0.0  # as padding, so that the programs are those of the whole sample
        steps.append(aside.solve(params, Weighted(curvature.indices, weights), rhs).value)
    evaluator.cost.spend("diagnostics", aside.cost.total + aside.cost.diagnostics)
    distance = float(trees.tree_norm(trees.tree_sub(*steps)))
    return 0.5 * distance / float(trees.tree_norm(delta))


def _with_standard_error(
    evaluator: Evaluator, params: LoraParams, moved: LoraParams, move: Move, record: StepRecord
) -> tuple[StepRecord, int]:
    """A step's record with its standard error, and how many times as large the sample should be.

    1 where the error is at most the allowed one, and where the size of the sample was given.
    """
    delta = trees.tree_scale(1 / record.scale, trees.tree_sub(moved, params))
    error = _standard_error(evaluator, params, move.curvature, move.rhs, delta)
    record = dataclasses.replace(record, standard_error=error)
    allowed = evaluator.config.max_standard_error
    if evaluator.config.sample_size is not None or not error > allowed:
        return record, 1
    return record, min(math.ceil((error / allowed) ** 2), _MAX_GROWTH)


def single_step(
    evaluator: Evaluator,
    check: Check | None,
    params: LoraParams,
    on_step: Callable[[StepRecord], None],
) -> Unlearned:
    """One solve: the paper's step, or Newton's on the edited objective.

    Where its standard error is too large it is solved once more, with a larger sample.
    """
    problem, config = evaluator.problem, evaluator.config
    influence = config.rhs == "influence"
    behind = problem.influence_rhs() if influence else problem.edited_mean(None, np.random.default_rng())
    _plan(evaluator, check, len(behind.indices))
    evaluator.cost.reserve(_step_price(evaluator, check, len(behind.indices)))
    evaluator.cost.spend("rhs", GRADIENT * len(behind.indices))
    rhs = trees.tree_scale(1.0 if influence else -1.0, evaluator.gradient(params, behind))
    unit, named, wanted = (
        (1 / problem.num_trained, 1.0, 0.0) if influence else (1 / problem.num_edited_total, 0.0, 1.0)
    )
    if evaluator.without_named:
        named = wanted = 0.0
    for grown in (False, True):
        rng = np.random.default_rng([config.seed, 1])
        sampled, without_named = evaluator.curvature_sample, evaluator.without_named
        if influence:
            curvature = problem.trained_mean(
                sampled, rng, without_named=without_named, similar_share=config.similar_share
            )
        else:
            curvature = problem.edited_mean(sampled, rng, without_named=without_named)
        move = Move(
            weight_before=1.0,
            weight_target=0.0,
            rhs=rhs,
            curvature=curvature,
            check_retained=_probe_scale(evaluator, check) * unit,
            check_named=named * unit,
            check_wanted=wanted * unit,
        )
        moved, record = take(evaluator, check, params, move)
        record, growth = _with_standard_error(evaluator, params, moved, move, record)
        if grown or growth == 1 or _step_price(evaluator, check, 0, growth=growth) > evaluator.cost.left:
            break
        evaluator.grow_sample(growth)
    on_step(record)
    return Unlearned(
        params=moved,
        steps=(record,),
        final_weight=record.weight_after,
        complete=record.weight_after <= NEGLIGIBLE_WEIGHT,
        method="step",
        cost=evaluator.cost,
    )


def influence_path(
    evaluator: Evaluator,
    check: Check | None,
    params: LoraParams,
    on_step: Callable[[StepRecord], None],
) -> Unlearned:
    """The influence path: the weight of S from 1 to 0, re-linearised at every step."""
    problem, config = evaluator.problem, evaluator.config
    num_edited = len(problem.named) + len(problem.wanted)
    _plan(evaluator, check, num_edited)
    n, probe_scale = problem.num_trained, _probe_scale(evaluator, check)
    schedule = log_odds_weights(evaluator.num_steps, config.log_odds_range)
    direction = evaluator.stack(problem.influence_rhs())
    weight, records, stopped = 1.0, [], ""
    # A step cut short advances the weight in proportion, and the next aims as far ahead from there.
    for attempt in range(3 * evaluator.num_steps):
        target = next_weight(schedule, weight)
        try:
            evaluator.cost.reserve(_step_price(evaluator, check, num_edited))
        except BudgetSpent as spent:
            if not records:
                raise
            stopped = str(spent)
            break
        evaluator.cost.spend("rhs", GRADIENT * num_edited)
        rhs = gradient_sum(evaluator.objective, params, direction)
        rng = np.random.default_rng([config.seed, 1 + attempt])
        curvature = problem.path_mean(
            target,
            evaluator.curvature_sample,
            rng,
            without_named=evaluator.without_named,
            similar_share=config.similar_share,
        )
        named, wanted = (0.0, 0.0) if evaluator.without_named else (target, 1 - target)
        move = Move(
            weight_before=weight,
            weight_target=target,
            rhs=trees.tree_scale(weight - target, rhs),
            curvature=curvature,
            check_retained=probe_scale / n,
            check_named=named / n,
            check_wanted=wanted / n,
        )
        try:
            moved, record = take(evaluator, check, params, move)
        except (UnlearningError, BudgetSpent) as error:
            if not records:
                raise
            stopped = str(error)
            logger.warning("The path ends early, at weight %.4g: %s", weight, error)
            break
        if not records:
            record, growth = _with_standard_error(evaluator, params, moved, move, record)
            ahead = (evaluator.num_steps - 1) * _step_price(evaluator, check, num_edited, growth=growth)
            if growth > 1 and ahead <= evaluator.cost.left:
                evaluator.grow_sample(growth)
        params = moved
        records.append(record)
        on_step(record)
        weight = record.weight_after
        if weight <= 0 or (target == 0 and weight <= NEGLIGIBLE_WEIGHT):
            break
    return Unlearned(
        params=params,
        steps=tuple(records),
        final_weight=weight,
        complete=weight <= NEGLIGIBLE_WEIGHT,
        method="path",
        cost=evaluator.cost,
        stopped=stopped,
    )
