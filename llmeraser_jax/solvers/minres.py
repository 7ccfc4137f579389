"""MINRES (Paige and Saunders 1975) for symmetric operators of any definiteness.

The Lanczos recurrence with Givens rotations: every step minimises `||b - A x||` over the Krylov space, so negative
eigenvalues do not break it. The solution of an indefinite system is a stationary point of the quadratic and not its
minimum; negative Ritz values show that.

Differs from `scipy.sparse.linalg.minres` in three ways. It stops on the residual relative to `||b||` alone; it
detects a least-squares end by the operator's image of the residual, at rounding level; it returns Ritz values.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llmeraser_jax import trees
from llmeraser_jax.checks import check_at_least
from llmeraser_jax.solvers import common
from llmeraser_jax.solvers.status import Status
from llmeraser_jax.types import LoraParams, Operator, Solution


@flax.struct.dataclass
class MinresState:
    """What the loop carries, in units of `||b||`; the letters are those of the paper."""

    x: LoraParams
    v: LoraParams  # Lanczos vector of this step
    earlier_v: LoraParams
    w: LoraParams  # search direction of the last step
    earlier_w: LoraParams
    beta: Float[Array, ""]  # couples v to earlier_v
    cosine: Float[Array, ""]  # of the last rotation
    sine: Float[Array, ""]
    delta_bar: Float[Array, ""]
    epsilon: Float[Array, ""]
    phi_bar: Float[Array, ""]  # norm of the residual
    norm_sq: Float[Array, ""]  # squared Frobenius norm of the Lanczos matrix
    num_steps: Int[Array, ""]
    num_products: Int[Array, ""]  # num_steps and those of steps that could not be taken
    running: Bool[Array, ""]
    least_squares: Bool[Array, ""]
    non_finite: Bool[Array, ""]
    alphas: Float[Array, " max_steps"]  # Lanczos matrix: diagonal
    betas: Float[Array, " max_steps"]  # and next to it
    history: Float[Array, " max_steps"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Minres:
    """The solver: hyper-parameters only.

    Attributes:
        rtol: stop when `||b - A x|| <= rtol * ||b||`, by the recurrence; at least the dtype's epsilon.
        max_steps: stop after so many products; this is not convergence, and the status says so.
    """

    rtol: float = 1e-2
    max_steps: int = 20

    def __post_init__(self) -> None:
        check_at_least(self, max_steps=1)
        common.check_rtol(self)

    @property
    def max_products(self) -> int:
        """The most products that a solve takes, the true residual's among them."""
        return self.max_steps + 1

    def solve(self, operator: Operator, rhs: LoraParams) -> Solution:
        """Solves `A x = rhs` from x = 0.

        Args:
            operator: symmetric, indefinite or singular as it may be.
            rhs: a vector of adapter space, float32 or wider.

        Returns:
            The solution. `negative_curvature` says that some Ritz value is negative beyond rounding. Where no
            exact solution exists the status is `LEAST_SQUARES` (not the shortest of them), and
            `NEGATIVE_CURVATURE_AT_START` where the operator maps the right-hand side to zero, so that there is
            no step.
        """
        unit_rhs, unit = common.to_units(rhs)
        norm = trees.tree_norm(unit_rhs)
        finite = jnp.isfinite(norm)
        positive = finite & (norm > 0)
        safe_norm = jnp.where(positive, norm, 1)
        tolerance = common.effective_tolerance(self.rtol, norm.dtype)
        zeros = trees.tree_zeros_like(rhs)
        zero, one = jnp.zeros_like(norm), jnp.ones_like(norm)
        nothing = jnp.full((self.max_steps,), jnp.nan, norm.dtype)
        start = MinresState(
            x=zeros,
            v=trees.tree_scale(1 / safe_norm, unit_rhs),
            earlier_v=zeros,
            w=zeros,
            earlier_w=zeros,
            beta=zero,
            cosine=-one,
            sine=zero,
            delta_bar=zero,
            epsilon=zero,
            phi_bar=one,
            norm_sq=zero,
            num_steps=jnp.zeros((), jnp.int32),
            num_products=jnp.zeros((), jnp.int32),
            running=positive,
            least_squares=jnp.zeros((), bool),
            non_finite=~finite,
            alphas=nothing,
            betas=nothing,
            history=nothing,
        )
        state = jax.lax.while_loop(lambda s: s.running, lambda s: self._step(operator, s, tolerance), start)
        x = trees.tree_scale(safe_norm, state.x)
        relative = common.true_relative_residual(operator, unit_rhs, x)
        ritz = common.tridiagonal_extremes(state.alphas, state.betas, ~jnp.isnan(state.alphas))
        rounding = self.max_steps * jnp.finfo(norm.dtype).eps * jnp.max(jnp.abs(ritz))
        value, status = common.from_units(x, unit, _status(state, norm, relative, tolerance))
        return Solution(
            value=value,
            status=status,
            num_steps=state.num_steps,
            num_products=state.num_products + 1,
            relative_residual=relative,
            negative_curvature=ritz[0] < -rounding,
            history=state.history,
            ritz_extremes=ritz,
        )

    def _step(self, operator: Operator, state: MinresState, tolerance: float) -> MinresState:
        eps = float(jnp.finfo(state.beta.dtype).eps)
        product = operator.mv(state.v)
        alpha = trees.tree_vdot(state.v, product)
        next_v = trees.tree_axpy(-alpha, state.v, trees.tree_axpy(-state.beta, state.earlier_v, product))
        beta = trees.tree_norm(next_v)
        norm_sq = state.norm_sq + alpha**2 + state.beta**2 + beta**2

        delta = state.cosine * state.delta_bar + state.sine * alpha
        gamma_bar = state.sine * state.delta_bar - state.cosine * alpha
        delta_bar = -state.cosine * beta
        # ||A r|| / ||r|| at the iterate reached: at rounding level there is nothing left to reduce, and the next
        # direction would be divided by it.
        image = jnp.hypot(gamma_bar, delta_bar)
        least_squares = image <= eps**0.75 * jnp.sqrt(norm_sq)
        gamma = jnp.hypot(gamma_bar, beta)
        gamma = jnp.where(least_squares, 1, gamma)
        cosine, sine = gamma_bar / gamma, beta / gamma
        w = trees.tree_axpy(-state.epsilon, state.earlier_w, state.v)
        w = trees.tree_scale(1 / gamma, trees.tree_axpy(-delta, state.w, w))
        x = trees.tree_axpy(cosine * state.phi_bar, w, state.x)
        phi_bar = sine * state.phi_bar

        finite = jnp.isfinite(norm_sq) & trees.tree_all_finite(x)
        taken = finite & ~least_squares
        exhausted = beta <= eps * jnp.sqrt(norm_sq)  # the Krylov space is invariant: no next vector
        num_steps = state.num_steps + taken.astype(state.num_steps.dtype)
        at = state.num_steps
        return MinresState(
            x=trees.tree_where(taken, x, state.x),
            v=trees.tree_where(taken, trees.tree_scale(1 / jnp.where(beta > 0, beta, 1), next_v), state.v),
            earlier_v=state.v,
            w=trees.tree_where(taken, w, state.w),
            earlier_w=state.w,
            beta=beta,
            cosine=cosine,
            sine=sine,
            delta_bar=delta_bar,
            epsilon=state.sine * beta,
            phi_bar=jnp.where(taken, phi_bar, state.phi_bar),
            norm_sq=norm_sq,
            num_steps=num_steps,
            num_products=state.num_products + 1,
            running=taken & ~exhausted & (phi_bar > tolerance) & (num_steps < self.max_steps),
            least_squares=state.least_squares | (finite & least_squares),
            non_finite=state.non_finite | ~finite,
            alphas=state.alphas.at[at].set(jnp.where(finite, alpha, jnp.nan)),
            betas=state.betas.at[at].set(beta),
            history=jnp.where(taken, state.history.at[at].set(phi_bar), state.history),
        )


def _status(
    state: MinresState, norm: Float[Array, ""], relative: Float[Array, ""], tolerance: float
) -> Int[Array, ""]:
    reached = jnp.where(relative <= 2 * tolerance, Status.CONVERGED, Status.RESIDUAL_DRIFT)
    unsolvable = jnp.where(state.num_steps == 0, Status.NEGATIVE_CURVATURE_AT_START, Status.LEAST_SQUARES)
    ended = jnp.where(state.least_squares, unsolvable, Status.MAX_STEPS)
    ended = jnp.where(state.phi_bar <= tolerance, reached, ended)
    ended = jnp.where(norm == 0, Status.ZERO_RHS, ended)
    return jnp.where(state.non_finite, Status.NON_FINITE, ended).astype(jnp.int32)
