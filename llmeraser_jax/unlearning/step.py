"""The single step: the paper's, or Newton's on the edited objective; and what the path shares with it."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np

from llmeraser_jax import trees
from llmeraser_jax.checks import check_choice
from llmeraser_jax.solvers import ConjugateGradients
from llmeraser_jax.types import LoraParams, Solver
from llmeraser_jax.unlearning.budget import GRADIENT
from llmeraser_jax.unlearning.inverse import (
    CurvatureSpec,
    InverseCurvature,
    KroneckerPreconditioner,
    check_solver,
    draws_terms,
    half_samples,
    preconditioner_of,
)
from llmeraser_jax.unlearning.judged import run_judged
from llmeraser_jax.unlearning.records import NEGLIGIBLE_WEIGHT, Moved, SolveRecord
from llmeraser_jax.unlearning.result import Result
from llmeraser_jax.unlearning.targets import RowTargets
from llmeraser_jax.unlearning.task import UnlearningTask
from llmeraser_jax.unlearning.trust_region import Check, Move, TrustRegion, take
from llmeraser_jax.unlearning.workspace import Workspace

_LEAST_PLANNED = 4  # iterations of a solve, and steps of a path, that a budget leaves
_MAX_GROWTH = 4  # of a sample whose step has too large a standard error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One influence step, `(C + rho I)^-1 b`. It does not forget what was memorised.

    Attributes:
        rhs: `influence` is `b = (1/n) sum_S (g - g')`; `newton` is minus the gradient of the edited objective,
            which carries along whatever gradient training left over.
        curvature: C.
        solver: of the system.
        trust_region: shortens the step; None takes it as solved.
    """

    rhs: Literal["influence", "newton"] = "influence"
    curvature: CurvatureSpec = CurvatureSpec()
    solver: Solver = ConjugateGradients(rtol=0.05, max_steps=15)
    trust_region: TrustRegion | None = TrustRegion()

    def __post_init__(self) -> None:
        check_choice(self, "rhs", ("influence", "newton"))
        check_solver(self.curvature, self.solver)

    def run(self, task: UnlearningTask, workspace: Workspace) -> Result:
        """Takes the step and judges the result.

        Raises:
            UnlearningError: the solve or its trust region failed, or the budget does not cover it.
        """
        return run_judged(self, task, workspace)

    def move(self, task: UnlearningTask, workspace: Workspace, targets: RowTargets) -> Moved:
        """Takes the step; once more, with a larger sample, where its standard error is too large.

        Raises:
            UnlearningError, BudgetSpent: there is no step.
        """
        problem, budget = task.problem, workspace.budget
        influence = self.rhs == "influence"
        behind = problem.influence_rhs() if influence else problem.edited_mean(None, workspace.rng())
        inverse = InverseCurvature(task, workspace, self.curvature, self.solver)
        check = draw_check(task, workspace, inverse, self.trust_region)
        plan_steps(inverse, check, len(behind.indices), 1)
        budget.reserve(step_price(inverse, check, len(behind.indices)))
        budget.spend("rhs", GRADIENT * len(behind.indices))
        gradient = workspace.gradient(task.objective, task.adapter, problem.examples, behind)
        rhs = trees.tree_scale(1.0 if influence else -1.0, gradient)
        unit, named, wanted = (
            (1 / problem.num_trained, 1.0, 0.0) if influence else (1 / problem.num_edited_total, 0.0, 1.0)
        )
        without = self.curvature.without_forget_rows
        if without:
            named = wanted = 0.0
        mean = problem.trained_mean if influence else problem.edited_mean
        for grown in (False, True):
            move = Move(
                weight_before=1.0,
                weight_target=0.0,
                rhs=rhs,
                curvature=mean(inverse.sample, workspace.rng(1), without_named=without),
                check_retained=(len(problem.retained) if check is None else check.probe_scale) * unit,
                check_named=named * unit,
                check_wanted=wanted * unit,
            )
            moved, record = take(inverse, check, task.adapter, move)
            record, growth = with_standard_error(inverse, task.adapter, moved, move, record)
            if grown or growth == 1 or step_price(inverse, check, 0, growth=growth) > budget.left:
                break
            inverse.sample_size *= growth
        workspace.on_step(record)
        return Moved(
            params=moved,
            steps=(record,),
            left=record.weight_after,
            arrived=record.weight_after <= NEGLIGIBLE_WEIGHT,
            method="step",
            curvature_reason=inverse.reason,
            asymmetry=inverse.asymmetry,
        )


def draw_check(
    task: UnlearningTask, workspace: Workspace, inverse: InverseCurvature, region: TrustRegion | None
) -> Check | None:
    """The rows that a trust region looks at: the request's, and a probe of retained ones."""
    if region is None:
        return None
    probe = task.problem.trained_mean(inverse.sample, workspace.rng(0), without_named=True).indices
    return Check(task, workspace, region, probe)


def step_price(inverse: InverseCurvature, check: Check | None, num_in_rhs: int, *, growth: int = 1) -> float:
    """Gradient equivalents of a step whose solve takes all of its iterations, seen at one length.

    Args:
        inverse: knows the solver.
        check: the trust region; None is none.
        num_in_rhs: examples behind the right-hand side.
        growth: how many times the curvature's sample is to be as large.
    """
    problem = inverse.task.problem
    num_in_curvature = len(problem.named) + len(problem.wanted) + growth * inverse.num_sampled
    looking = check.least_cost if check is not None else 0.0
    return GRADIENT * num_in_rhs + inverse.largest_cost(num_in_curvature) + looking


def plan_steps(inverse: InverseCurvature, check: Check | None, num_in_rhs: int, num_steps: int) -> int:
    """The steps that the budget can pay, with fewer iterations a solve before fewer steps.

    Args:
        inverse: its solver loses iterations where the budget does not cover them.
        check: the trust region; None is none.
        num_in_rhs: examples behind a step's right-hand side.
        num_steps: wanted.
    """
    while num_steps * step_price(inverse, check, num_in_rhs) > inverse.workspace.budget.left:
        if getattr(inverse.solver, "max_steps", 0) > _LEAST_PLANNED:
            inverse.with_fewer_steps()
        elif num_steps > _LEAST_PLANNED:
            num_steps -= 1
        else:
            break
    return num_steps


def with_standard_error(
    inverse: InverseCurvature, params: LoraParams, moved: LoraParams, move: Move, record: SolveRecord
) -> tuple[SolveRecord, int]:
    """A step's record with its standard error, and how many times as large the sample should be.

    1 where the error is at most the allowed one, and where the size of the sample was given.
    """
    delta = trees.tree_scale(1 / record.scale, trees.tree_sub(moved, params))
    error = _standard_error(inverse, params, move, delta)
    record = dataclasses.replace(record, standard_error=error)
    allowed = inverse.spec.max_standard_error
    if inverse.spec.sample_size is not None or not error > allowed:
        return record, 1
    return record, min(math.ceil((error / allowed) ** 2), _MAX_GROWTH)


def _standard_error(inverse: InverseCurvature, params: LoraParams, move: Move, delta: LoraParams) -> float:
    """The standard error of a solve over its norm: half the distance of the steps that two half samples give.

    Counts as a diagnostic; nan where the curvature is no sample.
    """
    retained = inverse.task.problem.retained
    sampled = np.flatnonzero(np.isin(move.curvature.indices, retained))
    is_sample = inverse.sample is not None and inverse.num_sampled < len(retained)
    # A streamed solve has a state on disk, Kronecker factors belong to the adapter and not to a sample.
    keeps_state = inverse.spec.stream or isinstance(preconditioner_of(inverse.solver), KroneckerPreconditioner)
    if not is_sample or len(sampled) < 2 or draws_terms(inverse.solver) or keeps_state:
        return math.nan
    aside = inverse.aside()
    halves = half_samples(move.curvature, sampled)
    steps = [aside.solve(params, half, move.rhs).value for half in halves]
    spent = aside.workspace.budget.cost
    inverse.workspace.budget.spend("diagnostics", spent.total + spent.diagnostics)
    distance = float(trees.tree_norm(trees.tree_sub(*steps)))
    return 0.5 * distance / float(trees.tree_norm(delta))
