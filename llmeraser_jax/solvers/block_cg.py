"""Block conjugate gradients (O'Leary 1980): several right-hand sides that share one Krylov space.

Each step costs one product per right-hand side, with one primal pass for all of them, and minimises every
quadratic over the directions that all residuals found, so that fewer steps are needed than one by one.

Differs from O'Leary's recurrence as Dubrulle's does (ETNA 12, 2001, "Retooling the method of block conjugate
gradients"): the residuals are kept as `R = Q S` with an orthonormal block `Q` and a small matrix `S`, so that
right-hand sides that become dependent, or converge at different times, make `S` singular and nothing else.
Differs from his in that columns that depend on earlier ones to rounding are left out (equal and zero right-hand
sides need no other treatment), in a preconditioner, whose inner product then orthonormalises `Q`, and in
Gram-Schmidt done twice on pytrees, never a factorisation of one gathered matrix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial, reduce
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llmeraser_jax import trees
from llmeraser_jax.curvature.operators import mv_many
from llmeraser_jax.solvers import common
from llmeraser_jax.solvers.status import Status
from llmeraser_jax.types import LoraParams, Operator, Preconditioner, Solution

_EXACT = jax.lax.Precision.HIGHEST
_Precondition = Callable[[LoraParams], LoraParams] | None


@flax.struct.dataclass
class BlockCGState:
    """What the loop carries; `k` right-hand sides, leaves of vectors begin with that axis."""

    x: LoraParams  # [k, ...], in units of ||b||
    basis: LoraParams  # [k, ...] Q: orthonormal under P^-1; zero where the residuals have lower rank
    coefficients: Float[Array, "k k"]  # S: residual j is sum_i Q_i S_ij
    directions: LoraParams  # [k, ...], A-conjugate to the earlier ones
    relative: Float[Array, " k"]  # ||residual|| / ||b||; 0 for columns without a system
    num_steps: Int[Array, ""]
    num_products: Int[Array, ""]  # block products: num_steps and that of a step that could not be taken
    running: Bool[Array, ""]
    negative_curvature: Bool[Array, ""]
    non_finite: Bool[Array, ""]
    indefinite_preconditioner: Bool[Array, ""]
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
        common.check_hyper_parameters(self, at_least_one=("max_steps",))

    @property
    def max_products(self) -> int:
        """The most products that a solve takes with each right-hand side, the true residual's among them."""
        return self.max_steps + 1

    def solve(
        self, operator: Operator, rhs: LoraParams, preconditioner: Preconditioner | None = None
    ) -> BlockSolution:
        """Solves `A x_i = rhs_i` for all i from x = 0.

        Args:
            operator: symmetric; a combination of directions with non-positive curvature stops the whole block,
                with the iterates reached.
            rhs: right-hand sides; every leaf begins with the axis `k`.
            preconditioner: symmetric positive definite, applied to each residual.

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
        precondition = None if preconditioner is None else jax.vmap(preconditioner.solve)

        def body(state: BlockCGState) -> BlockCGState:
            return self._step(state, products(state.directions), precondition, tolerance)

        factors = _orthonormalise(unit_columns, jnp.ones_like(norms), precondition)
        sound = trees.tree_all_finite(factors.dual)
        indefinite = sound & factors.indefinite
        start = BlockCGState(
            x=trees.tree_zeros_like(unit_columns),
            basis=factors.basis,
            coefficients=factors.coefficients,
            directions=factors.dual,
            relative=active.astype(norms.dtype),
            num_steps=jnp.zeros((), jnp.int32),
            num_products=jnp.zeros((), jnp.int32),
            running=jnp.any(active) & sound & ~indefinite,
            negative_curvature=jnp.zeros((), bool),
            non_finite=~sound,
            indefinite_preconditioner=indefinite,
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

    def _step(
        self, state: BlockCGState, products: LoraParams, precondition: _Precondition, tolerance: float
    ) -> BlockCGState:
        curvature = _gram(state.directions, products)  # P'AP
        inverse, negative = _positive_inverse((curvature + curvature.T) / 2, _present(state.directions))
        x = trees.tree_add(state.x, _combine(_matmul(inverse, state.coefficients), state.directions))
        reduction = _combine(inverse, products)
        size = 1 + jax.vmap(trees.tree_norm)(reduction)
        factors = _orthonormalise(trees.tree_sub(state.basis, reduction), size, precondition)
        coefficients = _matmul(factors.coefficients, state.coefficients)
        directions = trees.tree_add(factors.dual, _combine(factors.coefficients.T, state.directions))
        relative = jax.vmap(trees.tree_norm)(_combine(coefficients, factors.basis))

        finite = (
            jnp.all(jnp.isfinite(curvature))
            & jnp.all(jnp.isfinite(relative))
            & trees.tree_all_finite(x)
            & trees.tree_all_finite(directions)
        )
        taken = finite & ~negative
        num_steps = state.num_steps + taken.astype(state.num_steps.dtype)
        unfinished = taken & jnp.any(relative > tolerance) & (num_steps < self.max_steps)
        indefinite = unfinished & factors.indefinite
        return BlockCGState(
            x=trees.tree_where(taken, x, state.x),
            basis=trees.tree_where(taken, factors.basis, state.basis),
            coefficients=jnp.where(taken, coefficients, state.coefficients),
            directions=trees.tree_where(taken, directions, state.directions),
            relative=jnp.where(taken, relative, state.relative),
            num_steps=num_steps,
            num_products=state.num_products + 1,
            running=unfinished & ~indefinite & jnp.any(_present(directions)),
            negative_curvature=state.negative_curvature | (finite & negative),
            non_finite=state.non_finite | ~finite,
            indefinite_preconditioner=indefinite,
            history=jnp.where(taken, state.history.at[:, state.num_steps].set(relative), state.history),
        )


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=_EXACT)


def _gram(a: LoraParams, b: LoraParams) -> Float[Array, "k k"]:
    """Inner products `a_i' b_j`, accumulated in at least float32."""

    def leaf_gram(x, y):
        dtype = jnp.promote_types(jnp.promote_types(x.dtype, y.dtype), jnp.float32)
        axes = tuple(range(1, x.ndim))
        return jnp.tensordot(x.astype(dtype), y.astype(dtype), axes=(axes, axes), precision=_EXACT)

    return reduce(jnp.add, jax.tree.leaves(jax.tree.map(leaf_gram, a, b)))


def _combine(coefficients: Float[Array, "k j"], vectors: LoraParams) -> LoraParams:
    """Column `j` of the result is `sum_i coefficients_ij vectors_i`."""
    return jax.tree.map(
        lambda x: jnp.tensordot(coefficients.T, x, axes=(1, 0), precision=_EXACT).astype(x.dtype), vectors
    )


def _present(vectors: LoraParams) -> Bool[Array, " k"]:
    """True for columns that are not zero."""
    return jax.vmap(trees.tree_max_abs)(vectors) > 0


class _Factors(NamedTuple):
    basis: LoraParams  # Q
    dual: LoraParams  # P^-1 Q
    coefficients: Float[Array, "k k"]  # upper triangular C with Q C = the vectors, up to what was left out
    indefinite: Bool[Array, ""]  # some v'P^-1 v was negative


def _orthonormalise(vectors: LoraParams, size: Float[Array, " k"], precondition: _Precondition) -> _Factors:
    """`vectors = Q C` with `Q'P^-1 Q = I`; a column of `Q` is zero where a vector depends on earlier ones.

    Args:
        vectors: [k, ...].
        size: [k], the size of what each vector was computed from: what is left of it at that level's rounding is
            left out, because as a direction it would be noise.
        precondition: `P^-1` on [k, ...]; None for the identity.
    """
    duals = vectors if precondition is None else precondition(vectors)
    lengths_sq = jax.vmap(trees.tree_vdot)(vectors, duals)
    # The same level in the norm of P^-1.
    euclidean = jax.vmap(trees.tree_norm)(vectors)
    ratio = jnp.sqrt(jnp.maximum(lengths_sq, 0)) / jnp.where(euclidean > 0, euclidean, 1)
    threshold = 100 * float(jnp.finfo(size.dtype).eps) * size * ratio

    def project(basis, dual_basis, v, dual):
        overlaps = jax.vmap(trees.tree_vdot, in_axes=(0, None))(dual_basis, v)
        v = _subtract(v, overlaps, basis)
        dual = v if precondition is None else _subtract(dual, overlaps, dual_basis)
        return v, dual, overlaps, jnp.sqrt(jnp.maximum(trees.tree_vdot(v, dual), 0))

    def add_column(j, carry):
        basis, dual_basis, coefficients = carry
        v, dual = jax.tree.map(lambda x: x[j], (vectors, duals))
        v, dual, first, remaining = project(basis, dual_basis, v, dual)
        scale = jnp.where(remaining <= threshold[j], 0, 1 / jnp.where(remaining > 0, remaining, 1))
        v, dual = trees.tree_scale(scale, v), trees.tree_scale(scale, dual)
        v, dual, second, length = project(basis, dual_basis, v, dual)
        again = 1 / jnp.where(length > 0, length, 1)
        kept = jnp.where(scale == 0, 0, remaining)
        column = (first + kept * second).at[j].set(kept * length)

        def put(target, value):
            return jax.tree.map(lambda t, x: t.at[j].set((again * x).astype(t.dtype)), target, value)

        basis = put(basis, v)
        dual_basis = basis if precondition is None else put(dual_basis, dual)
        return basis, dual_basis, coefficients.at[:, j].set(column)

    k = len(size)
    empty = trees.tree_zeros_like(vectors)
    start = (empty, empty, jnp.zeros((k, k), size.dtype))
    basis, dual_basis, coefficients = jax.lax.fori_loop(0, k, add_column, start)
    return _Factors(basis, dual_basis, coefficients, jnp.any(lengths_sq < 0))


def _subtract(v: LoraParams, overlaps: Float[Array, " k"], basis: LoraParams) -> LoraParams:
    """`v - sum_i overlaps_i basis_i`."""
    return jax.tree.map(
        lambda x, p: (x - jnp.tensordot(overlaps, p, axes=(0, 0), precision=_EXACT)).astype(x.dtype), v, basis
    )


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
    stopped = jnp.where(state.indefinite_preconditioner, Status.INDEFINITE_PRECONDITIONER, stopped)
    stopped = jnp.where(state.non_finite, Status.NON_FINITE, stopped)
    ended = jnp.where(state.relative <= tolerance, reached, stopped)
    ended = jnp.where(active, ended, Status.ZERO_RHS)
    return jnp.where(broken, Status.NON_FINITE, ended).astype(jnp.int32)
