"""The influence path: re-linearised steps that take the weight of the forget rows from 1 to 0.

Knows objectives and coefficient vectors, not language models: on ridge regression it lands on the closed-form
retrained solution, which is its oracle.
"""

from __future__ import annotations

import dataclasses
import logging
import math

import numpy as np

from llmeraser_jax import trees
from llmeraser_jax.checks import check_at_least
from llmeraser_jax.losses import gradient_sum
from llmeraser_jax.solvers import ConjugateGradients
from llmeraser_jax.types import Solver
from llmeraser_jax.unlearning.budget import GRADIENT, BudgetSpent
from llmeraser_jax.unlearning.inverse import (
    CurvatureSpec,
    InverseCurvature,
    check_moves,
    check_solver,
)
from llmeraser_jax.unlearning.judged import run_judged
from llmeraser_jax.unlearning.records import NEGLIGIBLE_WEIGHT, Moved, UnlearningError
from llmeraser_jax.unlearning.result import Result
from llmeraser_jax.unlearning.step import draw_check, plan_steps, step_price, with_standard_error
from llmeraser_jax.unlearning.targets import RowTargets
from llmeraser_jax.unlearning.task import UnlearningTask
from llmeraser_jax.unlearning.trust_region import Move, TrustRegion, take
from llmeraser_jax.unlearning.workspace import Workspace

logger = logging.getLogger(__name__)

_MAX_LOG_ODDS_RANGE = 16.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Path:
    """The influence path: the weight of the forget rows goes from 1 to 0 in K steps.

    Attributes:
        num_steps: K.
        log_odds_range: weights are 1, then evenly spaced in log(w / (1 - w)) from this number down to its negative,
            then 0 (the range is widened to log(4 num_steps) where that is more).
        curvature: of every step.
        solver: of every step.
        trust_region: shortens steps; None takes them as solved.
    """

    num_steps: int = 8
    log_odds_range: float = 4.0
    curvature: CurvatureSpec = CurvatureSpec()
    solver: Solver = ConjugateGradients(rtol=0.05, max_steps=15)
    trust_region: TrustRegion | None = TrustRegion()

    def __post_init__(self) -> None:
        check_at_least(self, num_steps=1)
        if not 0 < self.log_odds_range <= _MAX_LOG_ODDS_RANGE:
            msg = (
                f"log_odds_range is {self.log_odds_range}; it must be above 0 and at most {_MAX_LOG_ODDS_RANGE:g}, "
                "beyond which weights next to 1 round to 1."
            )
            raise ValueError(msg)
        check_solver(self.curvature, self.solver)
        check_moves(self.solver)

    def run(self, task: UnlearningTask, workspace: Workspace) -> Result:
        """Goes along the path and judges the result.

        Raises:
            UnlearningError: the first step failed, or the budget does not cover it.
        """
        return run_judged(self, task, workspace)

    def move(self, task: UnlearningTask, workspace: Workspace, targets: RowTargets) -> Moved:
        """Goes along the path; a step that fails after the first ends it early.

        Raises:
            UnlearningError, BudgetSpent: at the first step.
        """
        problem, budget = task.problem, workspace.budget
        inverse = InverseCurvature(task, workspace, self.curvature, self.solver)
        check = draw_check(task, workspace, inverse, self.trust_region)
        num_edited = len(problem.named) + len(problem.wanted)
        num_steps = plan_steps(inverse, check, num_edited, self.num_steps)
        n, probe_scale = problem.num_trained, len(problem.retained) if check is None else check.probe_scale
        without = self.curvature.without_forget_rows
        schedule = log_odds_weights(num_steps, self.log_odds_range)
        direction = workspace.stack(problem.examples, problem.influence_rhs())
        params, weight, records, stopped = task.adapter, 1.0, [], ""
        # A step cut short advances the weight in proportion, and the next aims as far ahead from there.
        for attempt in range(3 * num_steps):
            target = next_weight(schedule, weight)
            try:
                budget.reserve(step_price(inverse, check, num_edited))
                budget.spend("rhs", GRADIENT * num_edited)
                rhs = gradient_sum(task.objective, params, direction)
                named, wanted = (0.0, 0.0) if without else (target, 1 - target)
                move = Move(
                    weight_before=weight,
                    weight_target=target,
                    rhs=trees.tree_scale(weight - target, rhs),
                    curvature=problem.path_mean(
                        target, inverse.sample, workspace.rng(1 + attempt), without_named=without
                    ),
                    check_retained=probe_scale / n,
                    check_named=named / n,
                    check_wanted=wanted / n,
                )
                moved, record = take(inverse, check, params, move)
            except (UnlearningError, BudgetSpent) as error:
                if not records:
                    raise
                stopped = str(error)
                logger.warning("The path ends early, at weight %.4g: %s", weight, error)
                break
            if not records:
                record, growth = with_standard_error(inverse, params, moved, move, record)
                ahead = (num_steps - 1) * step_price(inverse, check, num_edited, growth=growth)
                if growth > 1 and ahead <= budget.left:
                    inverse.sample_size *= growth
            params = moved
            records.append(record)
            workspace.on_step(record)
            weight = record.weight_after
            if weight <= 0 or (target == 0 and weight <= NEGLIGIBLE_WEIGHT):
                break
        return Moved(
            params=params,
            steps=tuple(records),
            left=weight,
            arrived=weight <= NEGLIGIBLE_WEIGHT,
            method="path",
            stopped=stopped,
            curvature_reason=inverse.reason,
            asymmetry=inverse.asymmetry,
        )


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
