"""Preconditioned conjugate gradients (Hestenes and Stiefel 1952) for operators that may turn out indefinite.

Differs from `jax.scipy.sparse.linalg.cg` in four ways. Non-positive curvature stops it with a flag and the iterate
reached; the true residual is recomputed at the end; the recurrence's coefficients give the operator's extreme Ritz
values; and the loop is a parameter: `jax.lax.while_loop` inside jit, `python_while_loop` for an operator that
cannot be traced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llmeraser_jax import trees
from llmeraser_jax.checks import check_at_least
from llmeraser_jax.solvers import common
from llmeraser_jax.solvers.status import Status
from llmeraser_jax.types import LoraParams, Operator, Preconditioner, Solution


@flax.struct.dataclass
class CGState:
    """Everything the loop carries; enough to go on from."""

    x: LoraParams  # iterate
    residual: LoraParams  # b - A x by the recurrence
    direction: LoraParams  # A-conjugate to all earlier ones
    residual_sq: Float[Array, ""]  # ||residual||^2
    residual_dot: Float[Array, ""]  # residual' P^-1 residual; residual_sq without a preconditioner
    num_steps: Int[Array, ""]
    num_products: Int[Array, ""]  # num_steps and those of steps that could not be taken
    running: Bool[Array, ""]
    negative_curvature: Bool[Array, ""]
    non_finite: Bool[Array, ""]
    indefinite_preconditioner: Bool[Array, ""]
    # Coefficients of the recurrence, nan where there was no such step. The inverse of alpha, because that stays
    # finite at zero curvature, and it is kept for a direction of negative curvature too.
    inverse_alphas: Float[Array, " max_steps"]  # p'Ap / r'P^-1 r
    betas: Float[Array, " max_steps"]
    history: Float[Array, " max_steps"]


def python_while_loop(cond: Callable[[Any], Any], body: Callable[[Any], Any], state: Any) -> Any:
    """`jax.lax.while_loop` as an ordinary loop, for products that cannot be traced as one program."""
    while cond(state):
        state = body(state)
    return state


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConjugateGradients:
    """The solver: hyper-parameters only.

    Attributes:
        rtol: stop when `||b - A x|| <= rtol * ||b||`, by the recurrence; at least the dtype's epsilon. The norm is
            Euclidean with and without a preconditioner.
        max_steps: stop after so many products; this is not convergence, and the status says so.
        preconditioner: states the preconditioner of an influence step (`unlearning.inverse`), which is made where
            the operator is; `solve` takes the one made.
        while_loop: `(cond, body, state) -> state`.
    """

    rtol: float = 1e-2
    max_steps: int = 20
    preconditioner: Any = None
    while_loop: Callable[..., Any] = jax.lax.while_loop

    def __post_init__(self) -> None:
        check_at_least(self, max_steps=1)
        common.check_rtol(self)

    @property
    def max_products(self) -> int:
        """The most products that a solve takes, the true residual's among them."""
        return self.max_steps + 1

    def _tolerance(self, dtype) -> float:
        return common.effective_tolerance(self.rtol, dtype)

    def init(self, rhs: LoraParams, preconditioner: Preconditioner | None = None) -> CGState:
        """The state at x = 0."""
        rhs_sq = trees.tree_vdot(rhs, rhs)
        direction = rhs if preconditioner is None else preconditioner.solve(rhs)
        rhs_dot = rhs_sq if preconditioner is None else trees.tree_vdot(rhs, direction)
        finite = jnp.isfinite(rhs_sq) & jnp.isfinite(rhs_dot)
        positive = rhs_sq > 0
        never = jnp.zeros((), bool)
        nothing = jnp.full((self.max_steps,), jnp.nan, rhs_sq.dtype)
        return CGState(
            x=trees.tree_zeros_like(rhs),
            residual=rhs,
            direction=direction,
            residual_sq=rhs_sq,
            residual_dot=rhs_dot,
            num_steps=jnp.zeros((), jnp.int32),
            num_products=jnp.zeros((), jnp.int32),
            running=finite & positive & (rhs_dot > 0),
            negative_curvature=never,
            non_finite=~finite,
            indefinite_preconditioner=finite & positive & (rhs_dot <= 0),
            inverse_alphas=nothing,
            betas=nothing,
            history=nothing,
        )

    def advance(
        self,
        state: CGState,
        product: LoraParams,
        rhs_sq: Float[Array, ""],
        preconditioner: Preconditioner | None = None,
    ) -> CGState:
        """The recurrence after the product `A direction`. A step that cannot be taken leaves the iterate as it was.

        Args:
            state: where the recurrence stands.
            product: `A state.direction`.
            rhs_sq: `||b||^2`, in the units of the state.
            preconditioner: the one that `init` had.
        """
        direction = state.direction
        curvature = trees.tree_vdot(direction, product)
        negative = curvature <= 0
        alpha = state.residual_dot / jnp.where(negative, 1, curvature)
        x = trees.tree_axpy(alpha, direction, state.x)
        residual = trees.tree_axpy(-alpha, product, state.residual)
        residual_sq = trees.tree_vdot(residual, residual)
        finite = jnp.isfinite(curvature) & jnp.isfinite(residual_sq) & trees.tree_all_finite(x)
        taken = finite & ~negative
        relative = jnp.sqrt(residual_sq / rhs_sq)
        num_steps = state.num_steps + taken.astype(state.num_steps.dtype)
        running = taken & (relative > self._tolerance(relative.dtype)) & (num_steps < self.max_steps)

        preconditioned = residual if preconditioner is None else preconditioner.solve(residual)
        residual_dot = residual_sq if preconditioner is None else trees.tree_vdot(residual, preconditioned)
        beta = residual_dot / state.residual_dot
        new_direction = trees.tree_axpy(beta, direction, preconditioned)
        useless = running & ~(residual_dot > 0)
        non_finite_dot = running & ~jnp.isfinite(residual_dot)

        at = state.num_steps
        inverse_alpha = jnp.where(finite, curvature / state.residual_dot, jnp.nan)
        return CGState(
            x=trees.tree_where(taken, x, state.x),
            residual=trees.tree_where(taken, residual, state.residual),
            direction=trees.tree_where(taken, new_direction, direction),
            residual_sq=jnp.where(taken, residual_sq, state.residual_sq),
            residual_dot=jnp.where(taken, residual_dot, state.residual_dot),
            num_steps=num_steps,
            num_products=state.num_products + 1,
            running=running & ~useless & ~non_finite_dot,
            negative_curvature=state.negative_curvature | (finite & negative),
            non_finite=state.non_finite | ~finite | non_finite_dot,
            indefinite_preconditioner=state.indefinite_preconditioner | (useless & ~non_finite_dot),
            inverse_alphas=state.inverse_alphas.at[at].set(inverse_alpha),
            betas=state.betas.at[at].set(jnp.where(taken, beta, jnp.nan)),
            history=jnp.where(taken, state.history.at[at].set(relative), state.history),
        )

    def solve(self, operator: Operator, rhs: LoraParams, preconditioner: Preconditioner | None = None) -> Solution:
        """Solves `A x = rhs` from x = 0.

        Args:
            operator: symmetric; where it is not positive definite the solution says so.
            rhs: a vector of adapter space, float32 or wider.
            preconditioner: symmetric positive definite; where a residual shows that it is not, the status says so.

        Returns:
            The solution; `relative_residual` is recomputed from the definition, at one more product.
            `ritz_extremes` are those of `A`, and with a preconditioner those of `P^-1 A` (equally of
            `P^-1/2 A P^-1/2`); a direction of non-positive curvature that stopped the solve is in them.

        Raises:
            ValueError: a preconditioner is stated and none is given.
        """
        if self.preconditioner is not None and preconditioner is None:
            msg = f"{type(self.preconditioner).__name__} is stated; make it and pass it to solve, or state none."
            raise ValueError(msg)
        unit_rhs, unit = common.to_units(rhs)
        start = self.init(unit_rhs, preconditioner)
        rhs_sq = start.residual_sq

        def body(state: CGState) -> CGState:
            return self.advance(state, operator.mv(state.direction), rhs_sq, preconditioner)

        return self.finish(operator, unit_rhs, unit, rhs_sq, self.while_loop(lambda s: s.running, body, start))

    def finish(
        self,
        operator: Operator,
        unit_rhs: LoraParams,
        unit: Float[Array, ""],
        rhs_sq: Float[Array, ""],
        state: CGState,
    ) -> Solution:
        """The solution that a stopped loop stands for, at one more product."""
        relative = common.true_relative_residual(operator, unit_rhs, state.x)
        status = _status(state, rhs_sq, relative, self._tolerance(rhs_sq.dtype))
        value, status = common.from_units(state.x, unit, status)
        return Solution(
            value=value,
            status=status,
            num_steps=state.num_steps,
            num_products=state.num_products + 1,
            relative_residual=relative,
            negative_curvature=state.negative_curvature,
            history=state.history,
            ritz_extremes=_ritz_extremes(state.inverse_alphas, state.betas),
        )


def _ritz_extremes(inverse_alphas: Float[Array, " n"], betas: Float[Array, " n"]) -> Float[Array, 2]:
    """Extremes of the Lanczos matrix: `T_kk = 1/alpha_k + beta_k-1/alpha_k-1`, `T_k,k+1 = sqrt(beta_k)/alpha_k`.

    Golub and Van Loan, Matrix Computations, section on the conjugate gradient and Lanczos connection.
    """
    earlier = jnp.concatenate([jnp.zeros_like(betas[:1]), (betas * inverse_alphas)[:-1]])
    off_diagonal = jnp.sqrt(jnp.maximum(betas, 0)) * inverse_alphas
    return common.tridiagonal_extremes(inverse_alphas + earlier, off_diagonal, ~jnp.isnan(inverse_alphas))


def _status(
    state: CGState, rhs_sq: Float[Array, ""], relative_residual: Float[Array, ""], tolerance: float
) -> Int[Array, ""]:
    converged = state.residual_sq <= tolerance**2 * rhs_sq
    # Twice the tolerance: what rounding adds to a recurrence that just met it.
    reached = jnp.where(relative_residual <= 2 * tolerance, Status.CONVERGED, Status.RESIDUAL_DRIFT)
    ended = jnp.where(converged, reached, Status.MAX_STEPS)
    at_start = jnp.where(state.num_steps == 0, Status.NEGATIVE_CURVATURE_AT_START, Status.NEGATIVE_CURVATURE)
    ended = jnp.where(state.negative_curvature, at_start, ended)
    ended = jnp.where(state.indefinite_preconditioner, Status.INDEFINITE_PRECONDITIONER, ended)
    ended = jnp.where(rhs_sq == 0, Status.ZERO_RHS, ended)
    return jnp.where(state.non_finite, Status.NON_FINITE, ended).astype(jnp.int32)
