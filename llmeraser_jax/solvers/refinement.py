"""Iterative refinement: solves with a cheap approximate operator, corrected by residuals of the exact one.

Wilkinson's scheme with an iterative inner solver, as in mixed-precision refinement (Carson and Higham,
"Accelerating the solution of linear systems by iterative refinement in three precisions", SIAM J. Sci. Comput.
2018): what the cheap operator gets wrong shows in the exact residual, and is solved for again.
"""

from __future__ import annotations

import dataclasses
import math

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from llmeraser_jax import trees
from llmeraser_jax.solvers import common
from llmeraser_jax.solvers.status import Status
from llmeraser_jax.types import LoraParams, Operator, Solution, Solver

MAX_CORRECTIONS = 4
_INNER_FLOOR = 0.05  # an inner solve gains no more at bfloat16's precision, see `inner_tolerance`
_LEAST_GAIN = 0.5  # a correction that leaves more of the residual than this is the last


def inner_tolerance(rtol: float) -> float:
    """The tolerance of equal inner solves, none below 0.05, that together reduce a residual by `rtol`.

    With bfloat16 operands inner solves to 1e-3 take 158 iterations to get there (the single step of the demo's
    requests), and those to 0.1 take 64, where float32 takes 45: the exact residual does not follow the recurrence's
    that far.
    """
    rtol = common.effective_tolerance(rtol, jnp.float32)
    num_solves = max(1, math.ceil(math.log(rtol) / math.log(_INNER_FLOOR)))
    return rtol ** (1 / num_solves)


@flax.struct.dataclass
class _Refined:
    solution: Solution  # all inner solves together, in units of the right-hand side
    residual: LoraParams  # b - A x with the exact A
    num_solves: Int[Array, ""]
    running: Bool[Array, ""]


def solve_refined(
    solver: Solver, approximate: Operator, exact: Operator, rhs: LoraParams, *, rtol: float
) -> tuple[Solution, Int[Array, ""]]:
    """Solves `exact x = rhs` with products of `approximate`, and one of `exact` for each residual.

    Residuals are solved for again while they exceed twice the tolerance (as `ConjugateGradients` judges a
    recurrence that has converged) and each correction at least halves them; one that makes the residual worse is
    not added.

    Args:
        solver: of the inner solves.
        approximate: close to `exact`.
        exact: symmetric positive definite.
        rhs: a vector of adapter space, float32 or wider.
        rtol: of the whole, by the exact residual; at least the dtype's epsilon.

    Returns:
        The solution, its `relative_residual` that of `exact`, its history and Ritz values those of the first inner
        solve, its steps and products those of all; and how many inner solves there were, each with one product of
        `exact`, which `num_products` includes. Where the first inner solve did not converge, that is its status
        and there are no corrections.
    """
    unit_rhs, unit = common.to_units(rhs)
    rhs_norm = trees.tree_norm(unit_rhs)
    tolerance = 2 * common.effective_tolerance(rtol, rhs_norm.dtype)

    def correct(state: _Refined) -> _Refined:
        before, is_first = state.solution, state.num_solves == 0
        inner = solver.solve(approximate, state.residual)
        x = trees.tree_add(before.value, inner.value)
        residual = trees.tree_sub(unit_rhs, exact.mv(x))
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
        solution=_blank(solver, approximate, unit_rhs),
        residual=unit_rhs,
        num_solves=jnp.zeros((), jnp.int32),
        running=jnp.ones((), bool),
    )
    state = jax.lax.while_loop(lambda s: s.running, correct, start)
    solution = state.solution
    reached = jnp.where(solution.relative_residual <= tolerance, Status.CONVERGED, Status.RESIDUAL_DRIFT)
    status = jnp.where(_met_its_tolerance(solution.status), reached, solution.status).astype(jnp.int32)
    value, status = common.from_units(solution.value, unit, status)
    return dataclasses.replace(solution, value=value, status=status), state.num_solves


def _blank(solver: Solver, operator: Operator, rhs: LoraParams) -> Solution:
    """A solution of zeros, so that the loop holds the only copy of the program of a solve."""
    structures = []

    def leaves_of_solve(b: LoraParams) -> list[Array]:
        leaves, structure = jax.tree.flatten(solver.solve(operator, b))
        structures.append(structure)
        return leaves

    shapes = jax.eval_shape(leaves_of_solve, rhs)
    return jax.tree.unflatten(structures[0], [jnp.zeros(x.shape, x.dtype) for x in shapes])


def _met_its_tolerance(status: Int[Array, ""]) -> Bool[Array, ""]:
    """Whether the recurrence did; what the approximate operator calls the true residual says nothing more."""
    return (status == Status.CONVERGED) | (status == Status.RESIDUAL_DRIFT)
