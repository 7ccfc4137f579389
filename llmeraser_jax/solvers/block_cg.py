"""Block conjugate gradients (O'Leary 1980): several right-hand sides that share one Krylov space.

Each step costs one product per right-hand side, with one primal pass for all, and minimises every quadratic over
the directions of all residuals. So it takes fewer steps than separate solves.

Uses Dubrulle's recurrence (ETNA 12, 2001, "Retooling the method of block conjugate gradients"): residuals are
stored as `R = Q S` with an orthonormal block `Q` and a small matrix `S`, so dependent right-hand sides, and those
that converge early, only make `S` singular. Differs from it in two ways. Columns that depend on earlier ones
to rounding are dropped, which covers equal and zero right-hand sides; and `Q` comes from Gram-Schmidt, twice, on
pytrees, never from one gathered matrix.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llmeraser_jax import trees
from llmeraser_jax.checks import check_at_least
from llmeraser_jax.solvers import common
from llmeraser_jax.solvers.status import Status
from llmeraser_jax.types import LoraParams, Operator, Solution, mv_many

_EXACT = jax.lax.Precision.HIGHEST


@flax.struct.dataclass
class BlockCGState:
    """What the loop carries; `k` right-hand sides, leaves of vectors begin with that axis."""

    x: LoraParams  # [k, ...], in units of ||b||
    basis: LoraParams  # [k, ...] Q: orthonormal; zero where the residuals have lower rank
    coefficients: Float[Array, "k k"]  # S: residual j is sum_i Q_i S_ij
    directions: LoraParams  # [k, ...], A-conjugate to the earlier ones
    relative: Float[Array, " k"]  # ||residual|| / ||b||; 0 for columns without a system
    num_steps: Int[Array, ""]
    num_products: Int[Array, ""]  # block products: num_steps and that of a step that could not be taken
    running: Bool[Array, ""]
    negative_curvature: Bool[Array, ""]
    non_finite: Bool[Array, ""]
    history: Float[Array, "k max_steps"]


@flax.struct.dataclass
class BlockSolution(Solution):
    """A `Solution` per right-hand side: every field, and every leaf of `value`, has the leading axis `k`."""

    status: Int[Array, " k"]
    num_steps: Int[Array, " k"]  # block steps; 0 for a zero or non-finite right-hand side
    num_products: Int[Array, " k"]  # products with single vectors; equal for all, since a block holds every column
    relative_residual: Float[Array, " k"]
    negative_curvature: Bool[Array, " k"]
    history: Float[Array, "k max_steps"]
    ritz_extremes: Float[Array, "k 2"] = flax.struct.field(kw_only=True)  # nan


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConjugateGradients:
    """The solver: hyper-parameters only.

    Attributes:
        rtol: stop when every right-hand side has `||b - A x|| <= rtol * ||b||`, by the recurrence.
        max_steps: stop after so many block products.
    """

    rtol: float = 1e-2
    max_steps: int = 20

    def __post_init__(self) -> None:
        check_at_least(self, max_steps=1)
        common.check_rtol(self)

    @property
    def max_products(self) -> int:
        """The most products that a solve takes with each right-hand side, the true residual's among them."""
        return self.max_steps + 1

    def solve(self, operator: Operator, rhs: LoraParams) -> BlockSolution:
        """Solves `A x_i = rhs_i` for all i from x = 0.

        Args:
            operator: symmetric; a combination of directions with non-positive curvature stops the whole block,
                with the iterates reached.
            rhs: right-hand sides; every leaf begins with the axis `k`.

        Returns:
            One solution per right-hand side. A zero or non-finite one does not disturb the others.

        Raises:
            ValueError: the leaves of `rhs` have no common leading axis.
        """
        lengths = {leaf.shape[:1] for leaf in jax.tree.leaves(rhs)}
        if len(lengths) != 1 or lengths == {()}:
            msg = (
                f"The leaves of the right-hand sides begin with axes {sorted(lengths)}, expected one axis `k` "
                f"common to all; for a single right-hand side add an axis of length 1."
            )
            raise ValueError(msg)
        unit_rhs, units = jax.vmap(common.to_units)(rhs)
        norms = jax.vmap(trees.tree_norm)(unit_rhs)
        broken = ~jnp.isfinite(norms)
        active = ~broken & (norms > 0)
        norms = jnp.where(active, norms, 1)
        # Columns of length one: every column counts the same, and residuals are relative as they stand.
        unit_columns = jax.vmap(trees.tree_scale)(1 / norms, unit_rhs)
        unit_columns = jax.vmap(trees.tree_where, in_axes=(0, 0, None))(
            active, unit_columns, trees.tree_zeros_like(jax.tree.map(lambda x: x[0], rhs))
        )
        tolerance = common.effective_tolerance(self.rtol, norms.dtype)
        products = partial(mv_many, operator)

        def body(state: BlockCGState) -> BlockCGState:
            return self._step(state, products(state.directions), tolerance)

        basis, coefficients = _orthonormalise(unit_columns, jnp.ones_like(norms))
        sound = trees.tree_all_finite(basis)
        start = BlockCGState(
            x=trees.tree_zeros_like(unit_columns),
            basis=basis,
            coefficients=coefficients,
            directions=basis,
            relative=active.astype(norms.dtype),
            num_steps=jnp.zeros((), jnp.int32),
            num_products=jnp.zeros((), jnp.int32),
            running=jnp.any(active) & sound,
            negative_curvature=jnp.zeros((), bool),
            non_finite=~sound,
            history=jnp.full((len(norms), self.max_steps), jnp.nan, norms.dtype),
        )
        state = jax.lax.while_loop(lambda s: s.running, body, start)
        true_residual = trees.tree_sub(unit_columns, products(state.x))
        relative = jnp.where(active, jax.vmap(common.relative_to)(true_residual, jnp.ones_like(norms)), 0)
        in_rhs_units = jax.vmap(trees.tree_scale)(norms, state.x)
        value, status = jax.vmap(common.from_units)(
            in_rhs_units, units, _status(state, broken, active, relative, tolerance)
        )
        return BlockSolution(
            value=value,
            status=status,
            num_steps=jnp.where(active, state.num_steps, 0),
            num_products=jnp.full((len(norms),), state.num_products + 1),
            relative_residual=relative,
            negative_curvature=state.negative_curvature & active,
            history=jnp.where(active[:, None], state.history, jnp.nan),
            ritz_extremes=jnp.full((len(norms), 2), jnp.nan, norms.dtype),
        )

    def _step(self, state: BlockCGState, products: LoraParams, tolerance: float) -> BlockCGState:
        curvature = trees.rows_gram(state.directions, products)  # P'AP
        inverse, negative = _positive_inverse((curvature + curvature.T) / 2, _present(state.directions))
        x = trees.tree_add(state.x, trees.combine_rows(_matmul(inverse, state.coefficients), state.directions))
        reduction = trees.combine_rows(inverse, products)
        size = 1 + jax.vmap(trees.tree_norm)(reduction)
        basis, factor = _orthonormalise(trees.tree_sub(state.basis, reduction), size)
        coefficients = _matmul(factor, state.coefficients)
        directions = trees.tree_add(basis, trees.combine_rows(factor.T, state.directions))
        relative = jax.vmap(trees.tree_norm)(trees.combine_rows(coefficients, basis))

        finite = (
            jnp.all(jnp.isfinite(curvature))
            & jnp.all(jnp.isfinite(relative))
            & trees.tree_all_finite(x)
            & trees.tree_all_finite(directions)
        )
        taken = finite & ~negative
        num_steps = state.num_steps + taken.astype(state.num_steps.dtype)
        unfinished = taken & jnp.any(relative > tolerance) & (num_steps < self.max_steps)
        return BlockCGState(
            x=trees.tree_where(taken, x, state.x),
            basis=trees.tree_where(taken, basis, state.basis),
            coefficients=jnp.where(taken, coefficients, state.coefficients),
            directions=trees.tree_where(taken, directions, state.directions),
            relative=jnp.where(taken, relative, state.relative),
            num_steps=num_steps,
            num_products=state.num_products + 1,
            running=unfinished & jnp.any(_present(directions)),
            negative_curvature=state.negative_curvature | (finite & negative),
            non_finite=state.non_finite | ~finite,
            history=jnp.where(taken, state.history.at[:, state.num_steps].set(relative), state.history),
        )


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=_EXACT)


def _present(vectors: LoraParams) -> Bool[Array, " k"]:
    """True for columns that are not zero."""
    return jax.vmap(trees.tree_max_abs)(vectors) > 0


def _orthonormalise(vectors: LoraParams, size: Float[Array, " k"]) -> tuple[LoraParams, Float[Array, "k k"]]:
    """`vectors = Q C` with orthonormal `Q`, up to dropped columns: zero where a vector depends on earlier ones.

    Args:
        vectors: [k, ...].
        size: [k], the size of what each vector was computed from. A remainder at that level's rounding is dropped,
            because as a direction it would be noise.

    Returns:
        `Q`, and the upper triangular `C`.
    """
    threshold = 100 * float(jnp.finfo(size.dtype).eps) * size

    def project(basis, v):
        overlaps = jax.vmap(trees.tree_vdot, in_axes=(0, None))(basis, v)
        v = trees.tree_sub(v, trees.combine_rows(overlaps, basis))
        return v, overlaps, trees.tree_norm(v)

    def add_column(j, carry):
        basis, coefficients = carry
        v, first, remaining = project(basis, jax.tree.map(lambda x: x[j], vectors))
        scale = jnp.where(remaining <= threshold[j], 0, 1 / jnp.where(remaining > 0, remaining, 1))
        v, second, length = project(basis, trees.tree_scale(scale, v))
        again = 1 / jnp.where(length > 0, length, 1)
        kept = jnp.where(scale == 0, 0, remaining)
        column = (first + kept * second).at[j].set(kept * length)
        basis = jax.tree.map(lambda t, x: t.at[j].set((again * x).astype(t.dtype)), basis, v)
        return basis, coefficients.at[:, j].set(column)

    k = len(size)
    start = (trees.tree_zeros_like(vectors), jnp.zeros((k, k), size.dtype))
    return jax.lax.fori_loop(0, k, add_column, start)


def _positive_inverse(
    matrix: Float[Array, "k k"], present: Bool[Array, " k"]
) -> tuple[Float[Array, "k k"], Bool[Array, ""]]:
    """Pseudo-inverse of the block of present rows, and whether that block has non-positive curvature.

    Curvature within rounding of zero is left out of the inverse where the block has positive curvature too.
    """
    largest = jnp.max(jnp.abs(matrix))
    finite = jnp.isfinite(largest)
    padded = jnp.where(finite, matrix, 0) + jnp.diag(jnp.where(present, 0, jnp.where(finite, largest, 0)))
    eigenvalues, basis = jnp.linalg.eigh(padded)
    threshold = len(matrix) * jnp.finfo(matrix.dtype).eps * jnp.max(jnp.abs(eigenvalues))
    usable = eigenvalues > threshold
    inverse = _matmul(basis * jnp.where(usable, 1 / jnp.where(usable, eigenvalues, 1), 0), basis.T)
    return inverse, jnp.any(eigenvalues < -threshold) | ~jnp.any(usable)


def _status(
    state: BlockCGState,
    broken: Bool[Array, " k"],
    active: Bool[Array, " k"],
    relative_residual: Float[Array, " k"],
    tolerance: float,
) -> Int[Array, " k"]:
    reached = jnp.where(relative_residual <= 2 * tolerance, Status.CONVERGED, Status.RESIDUAL_DRIFT)
    at_start = jnp.where(state.num_steps == 0, Status.NEGATIVE_CURVATURE_AT_START, Status.NEGATIVE_CURVATURE)
    stopped = jnp.where(state.negative_curvature, at_start, Status.MAX_STEPS)
    stopped = jnp.where(state.non_finite, Status.NON_FINITE, stopped)
    ended = jnp.where(state.relative <= tolerance, reached, stopped)
    ended = jnp.where(active, ended, Status.ZERO_RHS)
    return jnp.where(broken, Status.NON_FINITE, ended).astype(jnp.int32)
