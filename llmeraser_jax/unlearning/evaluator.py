"""An objective with its data and configuration, as a thing that answers: gradients, operators, solves, losses."""

from __future__ import annotations

import logging
import math
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh

from llmeraser_jax.curvature import CURVATURES, Damped, DatasetCurvature
from llmeraser_jax.losses import Objective, gradient_sum
from llmeraser_jax.parallel import place_stack
from llmeraser_jax.solvers import ConjugateGradients
from llmeraser_jax.types import ExampleSet, ExampleStack, LoraParams, Operator, Solution, Solver
from llmeraser_jax.unlearning.config import EraseConfig
from llmeraser_jax.unlearning.cost import FORWARD, CostMeter
from llmeraser_jax.unlearning.problem import EditProblem, Weighted
from llmeraser_jax.unlearning.steps import BudgetSpent

logger = logging.getLogger(__name__)


@partial(jax.jit, static_argnames="solver")
def _solve(solver: Solver, operator: Operator, rhs: LoraParams) -> Solution:
    return solver.solve(operator, rhs)


@jax.jit
def losses_by_bucket(objective: Objective, params: LoraParams, stack: ExampleStack):
    return tuple(jax.lax.map(partial(objective.data_losses, params), batches) for batches in stack.batches)


class Evaluator:
    """An objective, its data and a mesh: turns coefficient vectors into gradients, operators and losses.

    Host-side; counts what it computes. Stacks are laid out once per set of indices and reweighted afterwards.
    """

    def __init__(
        self,
        objective: Objective,
        problem: EditProblem,
        config: EraseConfig,
        mesh: Mesh | None = None,
        *,
        retrain_cost: float | None = None,
    ):
        self.objective = objective
        self.problem = problem
        self.config = config
        self.mesh = mesh
        self.cost = CostMeter()
        self._kind = "hessian" if config.curvature == "auto" else config.curvature
        self.budget = math.inf
        if config.budget is not None:
            if retrain_cost is None:
                msg = "A budget is a share of a retraining's cost; pass retrain_cost, in gradient equivalents."
                raise ValueError(msg)
            self.budget = config.budget * retrain_cost

    @property
    def sample_size(self) -> int:
        """Examples in a sample of the retained ones."""
        if self.config.sample_size is not None:
            return self.config.sample_size
        return 64 if self.config.method in ("path", "step") else int(np.clip(len(self.problem.named), 96, 256))

    @property
    def curvature_sample(self) -> int | None:
        """The same for the curvature: None where all examples are asked for."""
        return self.sample_size if self.config.curvature_data == "sample" else None

    @property
    def num_steps(self) -> int:
        """K."""
        return self.config.num_steps or {"step": 1, "path": 8}.get(self.config.method, 4)

    def require(self, gradient_equivalents: float) -> None:
        """Sees that the next step can be paid.

        Raises:
            BudgetSpent: it cannot.
        """
        if self.cost.total + gradient_equivalents > self.budget:
            msg = (
                f"The budget of {self.budget:.0f} gradient equivalents is used up: {self.cost.total:.0f} are spent "
                f"and the next step takes about {gradient_equivalents:.0f}."
            )
            raise BudgetSpent(msg)

    def example_losses(self, params: LoraParams, stack: ExampleStack) -> np.ndarray:
        """Data loss of every row of a stack, padding included, in stacking order; counted as a check."""
        losses = losses_by_bucket(self.objective, params, stack)
        self.cost.trust_region += FORWARD * sum(int(np.count_nonzero(np.asarray(w))) for w in stack.weights)
        return np.concatenate([np.asarray(l, np.float64).reshape(-1) for l in losses])

    def stack(self, weighted: Weighted) -> ExampleStack:
        """The problem's examples on the device(s), in micro-batches."""
        return self.place(self.problem.examples, weighted)

    def place(self, examples: ExampleSet, weighted: Weighted) -> ExampleStack:
        """Examples of any set on the device(s), in micro-batches."""
        stack = examples.stack(weighted.indices, weighted.weights, chunk_size=self.config.chunk_size)
        return place_stack(stack, self.mesh)

    def gradient(self, params: LoraParams, weighted: Weighted) -> LoraParams:
        """`sum_i c_i grad l_i`."""
        return gradient_sum(self.objective, params, self.stack(weighted))

    def curvature(self, params: LoraParams, weighted: Weighted) -> Damped:
        """`sum_i c_i C(z_i) + rho I`."""
        kind = CURVATURES[self.kind]
        operator = DatasetCurvature(self.objective, params, self.stack(weighted), kind)
        return Damped(operator, self.config.damping)

    @property
    def kind(self) -> str:
        """Which curvature; with `auto`, the Hessian until a solve has met non-positive curvature."""
        return self._kind

    def solve(self, params: LoraParams, weighted: Weighted, rhs: LoraParams) -> Solution:
        """`(sum_i c_i C(z_i) + rho I)^-1 rhs` by conjugate gradients.

        With `curvature="auto"` a Hessian solve that meets non-positive curvature is thrown away, paid for, and
        repeated with Gauss-Newton, which stays from then on.
        """
        solver = ConjugateGradients(rtol=self.config.cg_rtol, max_steps=self.config.cg_max_steps)
        solution = _solve(solver, self.curvature(params, weighted), rhs)
        # One more product for the true residual, and the one that met negative curvature.
        products = int(solution.num_steps) + 1 + int(solution.negative_curvature)
        self.cost.curvature += products * CURVATURES[self.kind].gradient_equivalents * len(weighted.indices)
        if self.config.curvature == "auto" and self.kind == "hessian" and bool(solution.negative_curvature):
            logger.info("The damped Hessian is indefinite on the Krylov space explored; Gauss-Newton from here on.")
            self._kind = "gauss-newton"
            return self.solve(params, weighted, rhs)
        return solution
