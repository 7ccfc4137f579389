"""Iterative refinement: solves with a cheap approximate operator, corrected by residuals of the exact one.

Wilkinson's scheme with an iterative inner solver, as in mixed-precision refinement (Carson and Higham,
"Accelerating the solution of linear systems by iterative refinement in three precisions", SIAM J. Sci. Comput.
2018).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from llmeraser_jax import trees
from llmeraser_jax.solvers import common
from llmeraser_jax.solvers.status import Status
from llmeraser_jax.types import LoraParams, Operator, Solution, Solver

MAX_CORRECTIONS = 4
_INNER_FLOOR = 0.05  # see `inner_tolerance`
_LEAST_GAIN = 0.5  # a correction that leaves more of the residual than this is the last


def inner_tolerance(rtol: float) -> float:
    """The common tolerance, at least 0.05, of inner solves that together reduce a residual by `rtol`.

    A lower one wastes steps, because the exact residual stops following the recurrence's. On the single step of the
    demo's requests to 1e-3, bfloat16 inner solves to 1e-3 take 158 steps, those to 0.1 take 64, float32 takes 45.
    """
    rtol = common.effective_tolerance(rtol, jnp.float32)
    num_solves = max(1, math.ceil(math.log(rtol) / math.log(_INNER_FLOOR)))
    return rtol ** (1 / num_solves)


@flax.struct.dataclass
class RefinedSolution(Solution):
    """A `Solution` by the exact operator.

    `num_steps` and `num_products` are those of all inner solves together, with the exact products counted in the
    latter; `history` and `ritz_extremes` are those of the first inner solve.
    """

    num_exact_products: Int[Array, ""] = flax.struct.field(kw_only=True)  # one for each inner solve


@flax.struct.dataclass
class _Refined:
    solution: Solution  # all inner solves together, in units of the right-hand side
    residual: LoraParams  # b - A x with the exact A
    num_solves: Int[Array, ""]
    running: Bool[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refined:
    """The solver: an inner solver on an approximation, corrected by residuals of the operator itself.

    Residuals are solved for again while they exceed twice the tolerance (as `ConjugateGradients` judges a
    recurrence that has converged) and each correction at least halves them. A correction that makes the residual
    worse is discarded.

    Attributes:
        solver: of the inner solves.
        approximation: maps the operator to a cheaper one that is close to it, such as `curvature.Bfloat16Products`.
        rtol: of the whole, by the exact residual; at least the dtype's epsilon.
    """

    solver: Solver
    approximation: Callable[[Operator], Operator]
    rtol: float = 1e-2

    def __post_init__(self) -> None:
        common.check_rtol(self)

    @property
    def max_products(self) -> int:
        """The most products that a solve takes, with the approximation and with the operator together."""
        return (1 + MAX_CORRECTIONS) * (self.solver.max_products + 1)

    def solve(self, operator: Operator, rhs: LoraParams) -> RefinedSolution:
        """Solves `operator x = rhs` with products of the approximation, and one of `operator` for each residual.

        Args:
            operator: symmetric positive definite.
            rhs: a vector of adapter space, float32 or wider.

        Returns:
            The solution. Where the first inner solve did not converge, its status is that one's and there are no
            corrections.
        """
        unit_rhs, unit = common.to_units(rhs)
        rhs_norm = trees.tree_norm(unit_rhs)
        approximate = self.approximation(operator)
        tolerance = 2 * common.effective_tolerance(self.rtol, rhs_norm.dtype)

        def correct(state: _Refined) -> _Refined:
            before, is_first = state.solution, state.num_solves == 0
            inner = self.solver.solve(approximate, state.residual)
            x = trees.tree_add(before.value, inner.value)
            residual = trees.tree_sub(unit_rhs, operator.mv(x))
            relative = common.relative_to(residual, rhs_norm)
            kept = is_first | (relative < before.relative_residual)
            solution = dataclasses.replace(
                trees.tree_where(is_first, inner, before),
                value=trees.tree_where(kept, x, before.value),
                num_steps=before.num_steps + inner.num_steps,
                num_products=before.num_products + inner.num_products + 1,
                relative_residual=jnp.where(kept, relative, before.relative_residual),
                negative_curvature=before.negative_curvature | inner.negative_curvature,
            )
            gained = is_first | (relative <= _LEAST_GAIN * before.relative_residual)
            num_solves = state.num_solves + 1
            more = (relative > tolerance) & (num_solves <= MAX_CORRECTIONS)
            return _Refined(
                solution=solution,
                residual=trees.tree_where(kept, residual, state.residual),
                num_solves=num_solves,
                running=_met_its_tolerance(inner.status) & gained & more,
            )

        start = _Refined(
            solution=_blank(self.solver, approximate, unit_rhs),
            residual=unit_rhs,
            num_solves=jnp.zeros((), jnp.int32),
            running=jnp.ones((), bool),
        )
        state = jax.lax.while_loop(lambda s: s.running, correct, start)
        solution = state.solution
        reached = jnp.where(solution.relative_residual <= tolerance, Status.CONVERGED, Status.RESIDUAL_DRIFT)
        status = jnp.where(_met_its_tolerance(solution.status), reached, solution.status).astype(jnp.int32)
        value, status = common.from_units(solution.value, unit, status)
        found = vars(dataclasses.replace(solution, value=value, status=status))
        return RefinedSolution(**found, num_exact_products=state.num_solves)


def _blank(solver: Solver, operator: Operator, rhs: LoraParams) -> Solution:
    """A solution of zeros, so that the compiled loop holds the only copy of the inner solve."""
    structures = []

    def leaves_of_solve(b: LoraParams) -> list[Array]:
        leaves, structure = jax.tree.flatten(solver.solve(operator, b))
        structures.append(structure)
        return leaves

    shapes = jax.eval_shape(leaves_of_solve, rhs)
    return jax.tree.unflatten(structures[0], [jnp.zeros(x.shape, x.dtype) for x in shapes])


def _met_its_tolerance(status: Int[Array, ""]) -> Bool[Array, ""]:
    """Whether the recurrence met its tolerance; the approximate operator's true residual is not of interest."""
    return (status == Status.CONVERGED) | (status == Status.RESIDUAL_DRIFT)
