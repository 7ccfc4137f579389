"""Newton steps on the edited objective after another method, each with a trust region.

`delta = -(C' + rho I)^-1 grad L'(theta)`, where `L'` is the edited objective with its retained part estimated from
one sample that stays the same, so that the steps descend on one function. They carry along whatever gradient
training itself left over. They stop where the norm of the edited objective's gradient is back at that of the
trained objective at the trained adapter, on the same sample: a stopping rule that needs no retraining.
"""

from __future__ import annotations

import dataclasses
import logging

from llmeraser_jax import trees
from llmeraser_jax.checks import check_at_least
from llmeraser_jax.solvers import ConjugateGradients
from llmeraser_jax.types import Solver
from llmeraser_jax.unlearning.budget import GRADIENT, BudgetSpent
from llmeraser_jax.unlearning.inverse import (
    CurvatureSpec,
    InverseCurvature,
    check_moves,
    check_solver,
)
from llmeraser_jax.unlearning.judged import Mover, run_judged
from llmeraser_jax.unlearning.matching import TargetMatching
from llmeraser_jax.unlearning.problem import Weighted
from llmeraser_jax.unlearning.records import Moved, UnlearningError
from llmeraser_jax.unlearning.result import Result
from llmeraser_jax.unlearning.step import draw_check
from llmeraser_jax.unlearning.targets import RowTargets
from llmeraser_jax.unlearning.task import UnlearningTask
from llmeraser_jax.unlearning.trust_region import Move, TrustRegion, take
from llmeraser_jax.unlearning.workspace import Workspace

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corrected:
    """A method followed by Newton steps on the edited objective.

    Attributes:
        method: what moves first: `Step`, `Path` or `TargetMatching`.
        max_steps: at most so many Newton steps.
        curvature: of these.
        solver: of these.
        trust_region: of these.
    """

    method: Mover = TargetMatching()
    max_steps: int = 3
    curvature: CurvatureSpec = CurvatureSpec()
    solver: Solver = ConjugateGradients(rtol=0.05, max_steps=15)
    trust_region: TrustRegion = TrustRegion()

    def __post_init__(self) -> None:
        check_at_least(self, max_steps=1)
        check_solver(self.curvature, self.solver)
        check_moves(self.solver)

    def run(self, task: UnlearningTask, workspace: Workspace) -> Result:
        """Moves, corrects, and judges the result.

        Raises:
            UnlearningError: the method found no step.
        """
        return run_judged(self, task, workspace)

    @property
    def needs_targets(self) -> bool:
        """Whether the first method does."""
        return getattr(self.method, "needs_targets", False)

    def move(self, task: UnlearningTask, workspace: Workspace, targets: RowTargets) -> Moved:
        """Moves and corrects; what ends the correction early is no failure.

        Raises:
            UnlearningError, BudgetSpent: the method found no step.
        """
        inverse = InverseCurvature(task, workspace, self.curvature, self.solver)
        check = draw_check(task, workspace, inverse, self.trust_region)
        assert check is not None  # there is a trust region
        moved = self.method.move(task, workspace, targets)
        if not moved.steps:
            return moved
        problem, budget, objective = task.problem, workspace.budget, task.objective
        after_total = problem.num_edited_total
        # The same retained rows in both objectives.
        before = _nonzero(problem.path_mean(1.0, inverse.sample, workspace.rng(6)))
        after = _nonzero(
            problem.path_mean(0.0, inverse.sample, workspace.rng(6)), problem.num_trained / after_total
        )
        params, records, reason = moved.params, [], f"all {self.max_steps} Newton steps were taken"

        def gradient(params, weighted):
            budget.spend("rhs", GRADIENT * len(weighted.indices))
            return workspace.gradient(objective, params, problem.examples, weighted)

        try:
            left_over = float(trees.tree_norm(gradient(task.adapter, before)))
            for _ in range(self.max_steps):
                step_cost = inverse.largest_cost(len(after.indices)) + check.least_cost
                budget.reserve(GRADIENT * len(after.indices) + step_cost)
                rhs = trees.tree_scale(-1.0, gradient(params, after))
                norm = float(trees.tree_norm(rhs))
                if norm <= left_over:
                    reason = f"the edited gradient norm is back at {norm:.3g} of {left_over:.3g}"
                    break
                move = Move(
                    weight_before=moved.left,
                    weight_target=moved.left,
                    rhs=rhs,
                    curvature=after,
                    check_retained=check.probe_scale / after_total,
                    check_named=0.0,
                    check_wanted=1 / after_total,
                )
                params, record = take(inverse, check, params, move)
                records.append(record)
                workspace.on_step(record)
        except (BudgetSpent, UnlearningError) as error:
            logger.warning("The Newton steps end: %s", error)
            reason = str(error)
        return dataclasses.replace(
            moved,
            params=params,
            steps=(*moved.steps, *records),
            method=f"{moved.method}, corrected",
            num_correctors=len(records),
            corrected=reason,
        )


def _nonzero(weighted: Weighted, scale: float = 1.0) -> Weighted:
    keep = weighted.weights != 0
    return Weighted(weighted.indices[keep], scale * weighted.weights[keep])
