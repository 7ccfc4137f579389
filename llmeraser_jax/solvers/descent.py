"""The loop of solvers that descend on the quadratic with an optax optimiser and mini-batch products."""

from __future__ import annotations

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from llmeraser_jax import trees
from llmeraser_jax.solvers import common
from llmeraser_jax.solvers.status import Status
from llmeraser_jax.types import FiniteSum, LoraParams, Operator, Solution

# A relative residual beyond this, before numbers leave the range, means divergence and not a broken product.
GROWN = 1e6


def require_finite_sum(operator: Operator, solver: object) -> FiniteSum:
    """The operator itself, if it is a mean of terms.

    Raises:
        TypeError: it has no terms to draw from.
    """
    if not isinstance(operator, FiniteSum):
        msg = (
            f"{type(solver).__name__} draws mini-batch products, so it needs an operator with num_terms and "
            f"term_mv; {type(operator).__name__} has none. Use conjugate gradients, or a FiniteSum."
        )
        raise TypeError(msg)
    return operator


def mean_of_terms(operator: FiniteSum, terms: Int[Array, " batch_terms"], v: LoraParams) -> LoraParams:
    """The mean of the products of these terms with `v`, one term in memory at a time."""

    def add(total, k):
        return trees.tree_add(total, operator.term_mv(k, v)), None

    total, _ = jax.lax.scan(add, trees.tree_zeros_like(v), terms)
    return trees.tree_scale(1 / terms.shape[0], total)


@flax.struct.dataclass
class DescentState:
    """What the loop carries."""

    x: LoraParams  # the last finite iterate
    optimiser: optax.OptState
    num_steps: Int[Array, ""]
    num_gradients: Int[Array, ""]  # num_steps and that of a step that could not be taken
    running: Bool[Array, ""]
    non_finite: Bool[Array, ""]
    diverged: Bool[Array, ""]
    history: Float[Array, " max_steps"]


def descend(
    optimiser: optax.GradientTransformation,
    gradient: Callable[[Array, LoraParams], LoraParams],
    start: LoraParams,
    rhs: LoraParams,
    num_steps: int,
) -> DescentState:
    """A fixed number of optimiser steps; a step that is not finite ends them, with the last finite iterate.

    Args:
        optimiser: the update rule.
        gradient: `(step, x) -> gradient estimate`.
        start: first iterate.
        rhs: gradient norms are recorded relative to its norm; a zero or non-finite one makes no step.
        num_steps: how many.
    """
    unit_rhs, unit = common.to_units(rhs)
    norm = trees.tree_norm(unit_rhs)

    def body(state: DescentState) -> DescentState:
        slope = gradient(state.num_steps, state.x)
        relative = trees.tree_norm(trees.tree_scale(1 / unit, slope)) / norm
        updates, optimiser_state = optimiser.update(slope, state.optimiser, state.x)
        x = trees.tree_add(state.x, updates)
        finite = jnp.isfinite(relative) & trees.tree_all_finite(x)
        num = state.num_steps + finite.astype(jnp.int32)
        before = state.history[jnp.maximum(state.num_steps - 1, 0)]
        grown = (before > GROWN) | (jnp.isfinite(relative) & (relative > GROWN))
        return DescentState(
            x=trees.tree_where(finite, x, state.x),
            optimiser=trees.tree_where(finite, optimiser_state, state.optimiser),
            num_steps=num,
            num_gradients=state.num_gradients + 1,
            running=finite & (num < num_steps),
            non_finite=~finite & ~grown,
            diverged=~finite & grown,
            history=jnp.where(finite, state.history.at[state.num_steps].set(relative), state.history),
        )

    never = jnp.zeros((), bool)
    state = DescentState(
        x=start,
        optimiser=optimiser.init(start),
        num_steps=jnp.zeros((), jnp.int32),
        num_gradients=jnp.zeros((), jnp.int32),
        running=jnp.isfinite(norm) & (norm > 0),
        non_finite=~jnp.isfinite(norm),
        diverged=never,
        history=jnp.full((num_steps,), jnp.nan, norm.dtype),
    )
    return jax.lax.while_loop(lambda s: s.running, body, state)


def conclude(
    operator: Operator,
    rhs: LoraParams,
    value: LoraParams,
    rtol: float,
    *,
    num_steps: Int[Array, ""],
    num_products: Int[Array, ""],
    non_finite: Bool[Array, ""],
    diverged: Bool[Array, ""],
    history: Float[Array, " max_steps"],
    worse_than_nothing_diverged: bool,
) -> Solution:
    """The `Solution` of a stochastic solver's last iterate, at one full product.

    Args:
        operator: the whole operator.
        rhs: the right-hand side.
        value: the iterate; zero is returned in its place for a zero or non-finite right-hand side.
        rtol: the true relative residual up to which the solution is called converged.
        num_steps: steps taken.
        num_products: products so far, in the unit of the solver, and that of the residual computed here.
        non_finite: a product was not finite.
        diverged: the iteration was seen to diverge.
        history: mini-batch estimates of the relative residual.
        worse_than_nothing_diverged: report divergence where both the quadratic and the residual are above those of
            a zero step, or the residual is far above.
    """
    unit_rhs, unit = common.to_units(rhs)
    norm = trees.tree_norm(unit_rhs)
    usable = jnp.isfinite(norm) & (norm > 0)
    value = trees.tree_where(usable, value, trees.tree_zeros_like(value))
    x = trees.tree_scale(1 / unit, value)
    product = operator.mv(x)
    relative = common.relative_to(trees.tree_sub(unit_rhs, product), norm)
    curvature = trees.tree_vdot(x, product)
    if worse_than_nothing_diverged:
        worse = (relative > 1) & (curvature / 2 - trees.tree_vdot(unit_rhs, x) > 0)
        # Down a direction of negative curvature the quadratic falls without end.
        diverged = diverged | worse | (jnp.isfinite(relative) & (relative > GROWN))
    status = jnp.where(relative <= rtol, Status.CONVERGED, Status.MAX_STEPS)
    status = jnp.where(usable & ~jnp.isfinite(relative), Status.NON_FINITE, status)
    status = jnp.where(diverged, Status.DIVERGED, status)
    status = jnp.where(norm == 0, Status.ZERO_RHS, status)
    return Solution(
        value=value,
        status=jnp.where(non_finite, Status.NON_FINITE, status).astype(jnp.int32),
        num_steps=num_steps,
        num_products=num_products,
        relative_residual=relative,
        negative_curvature=(trees.tree_max_abs(x) > 0) & (curvature <= 0),
        history=history,
        ritz_extremes=jnp.full((2,), jnp.nan, norm.dtype),
    )
