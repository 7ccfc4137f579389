"""Conjugate gradients (Hestenes and Stiefel 1952) for operators that may turn out indefinite.

Differs from `jax.scipy.sparse.linalg.cg` in that non-positive curvature stops it with a flag and the iterate
reached, that the true residual is recomputed at the end, and that the loop is a parameter:
`jax.lax.while_loop` inside jit, `python_while_loop` over an operator whose products run on streamed data.
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
from llmeraser_jax.solvers.status import Status
from llmeraser_jax.types import LoraParams, Operator, Solution


@flax.struct.dataclass
class CGState:
    """Everything the loop carries; enough to go on from."""

    x: LoraParams  # iterate
    residual: LoraParams  # b - A x by the recurrence
    direction: LoraParams  # A-conjugate to all earlier ones
    residual_sq: Float[Array, ""]  # ||residual||^2
    num_steps: Int[Array, ""]
    running: Bool[Array, ""]
    negative_curvature: Bool[Array, ""]
    non_finite: Bool[Array, ""]
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
        rtol: stop when `||b - A x|| <= rtol * ||b||`, by the recurrence; at least the dtype's epsilon.
        max_steps: stop after so many products; this is not convergence, and the status says so.
        while_loop: `(cond, body, state) -> state`.
    """

    rtol: float = 1e-2
    max_steps: int = 20
    while_loop: Callable[..., Any] = jax.lax.while_loop

    def __post_init__(self) -> None:
        if not 0 <= self.rtol < 1:
            msg = f"rtol is {self.rtol}; it must be in [0, 1)."
            raise ValueError(msg)
        if self.max_steps < 1:
            msg = f"max_steps is {self.max_steps}; it must be at least 1."
            raise ValueError(msg)

    def _tolerance(self, dtype) -> float:
        return max(self.rtol, float(jnp.finfo(dtype).eps))

    def init(self, rhs: LoraParams) -> CGState:
        """The state at x = 0."""
        rhs_sq = trees.tree_vdot(rhs, rhs)
        finite = jnp.isfinite(rhs_sq)
        return CGState(
            x=trees.tree_zeros_like(rhs),
            residual=rhs,
            direction=rhs,
            residual_sq=rhs_sq,
            num_steps=jnp.zeros((), jnp.int32),
            running=finite & (rhs_sq > 0),
            negative_curvature=jnp.zeros((), bool),
            non_finite=~finite,
            history=jnp.full((self.max_steps,), jnp.nan, rhs_sq.dtype),
        )

    def step(self, operator: Operator, state: CGState, rhs_sq: Float[Array, ""]) -> CGState:
        """One product. A step that cannot be taken leaves the iterate as it was."""
        product = operator.mv(state.direction)
        curvature = trees.tree_vdot(state.direction, product)
        negative = curvature <= 0
        alpha = state.residual_sq / jnp.where(negative, 1, curvature)
        residual = trees.tree_axpy(-alpha, product, state.residual)
        residual_sq = trees.tree_vdot(residual, residual)
        x = trees.tree_axpy(alpha, state.direction, state.x)
        finite = jnp.isfinite(curvature) & jnp.isfinite(residual_sq) & trees.tree_all_finite(x)
        taken = finite & ~negative
        beta = residual_sq / state.residual_sq
        direction = trees.tree_axpy(beta, state.direction, residual)
        num_steps = state.num_steps + taken.astype(state.num_steps.dtype)
        relative = jnp.sqrt(residual_sq / rhs_sq)
        return CGState(
            x=trees.tree_where(taken, x, state.x),
            residual=trees.tree_where(taken, residual, state.residual),
            direction=trees.tree_where(taken, direction, state.direction),
            residual_sq=jnp.where(taken, residual_sq, state.residual_sq),
            num_steps=num_steps,
            running=taken & (relative > self._tolerance(relative.dtype)) & (num_steps < self.max_steps),
            negative_curvature=state.negative_curvature | (finite & negative),
            non_finite=state.non_finite | ~finite,
            history=jnp.where(taken, state.history.at[state.num_steps].set(relative), state.history),
        )

    def solve(self, operator: Operator, rhs: LoraParams) -> Solution:
        """Solves `A x = rhs` from x = 0.

        Args:
            operator: symmetric; where it is not positive definite the solution says so.
            rhs: a vector of adapter space, float32 or wider.

        Returns:
            The solution; `relative_residual` is recomputed from the definition, at one more product.
        """
        # In units of its largest entry, so that neither a huge nor a tiny right-hand side leaves the range.
        scale = trees.tree_max_abs(rhs)
        scale = jnp.where(jnp.isfinite(scale) & (scale > 0), scale, 1)
        unit_rhs = trees.tree_scale(1 / scale, rhs)
        start = self.init(unit_rhs)
        rhs_sq = start.residual_sq
        state = self.while_loop(lambda s: s.running, lambda s: self.step(operator, s, rhs_sq), start)
        true_residual = trees.tree_norm(trees.tree_sub(unit_rhs, operator.mv(state.x)))
        positive = jnp.isfinite(rhs_sq) & (rhs_sq > 0)
        relative = jnp.where(positive, true_residual / jnp.sqrt(jnp.where(positive, rhs_sq, 1)), 0.0)
        return Solution(
            value=trees.tree_scale(scale, state.x),
            status=_status(state, rhs_sq, relative, self._tolerance(rhs_sq.dtype)),
            num_steps=state.num_steps,
            relative_residual=relative,
            negative_curvature=state.negative_curvature,
            history=state.history,
        )


def _status(
    state: CGState, rhs_sq: Float[Array, ""], relative_residual: Float[Array, ""], tolerance: float
) -> Int[Array, ""]:
    converged = state.residual_sq <= tolerance**2 * rhs_sq
    # Twice the tolerance: what rounding adds to a recurrence that just met it.
    reached = jnp.where(relative_residual <= 2 * tolerance, Status.CONVERGED, Status.RESIDUAL_DRIFT)
    ended = jnp.where(converged, reached, Status.MAX_STEPS)
    at_start = jnp.where(state.num_steps == 0, Status.NEGATIVE_CURVATURE_AT_START, Status.NEGATIVE_CURVATURE)
    ended = jnp.where(state.negative_curvature, at_start, ended)
    ended = jnp.where(rhs_sq == 0, Status.ZERO_RHS, ended)
    return jnp.where(state.non_finite, Status.NON_FINITE, ended).astype(jnp.int32)
