"""Generalised Gauss-Newton products `J' H_out J v`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llmeraser_jax.losses import Objective
from llmeraser_jax.types import Batch, LoraParams


def gauss_newton_product(
    objective: Objective, params: LoraParams, batch: Batch, weights: Float[Array, " batch"], v: LoraParams
) -> LoraParams:
    """`sum_i weights_i * J_i' H_out J_i v` over one micro-batch, without the L2 term.

    `J_i` is the Jacobian of the network outputs and `H_out` the Hessian of the loss with respect to them
    (`diag(p) - p p'` averaged over response tokens, for cross entropy): positive semidefinite where the
    weights are at least 0. One primal pass is shared by the tangent and its transpose.

    Args:
        objective: the loss, convex in the outputs.
        params: where the matrix is taken.
        batch: leaves [batch, ...].
        weights: coefficients [batch].
        v: a vector of adapter space.
    """
    outputs, jacobian_product = jax.linearize(lambda p: objective.outputs(p, batch), params)
    tangent = jacobian_product(v)

    def output_gradient(z):
        return jax.grad(lambda o: jnp.sum(weights * objective.output_loss_fn(o, batch)))(z)

    _, cotangent = jax.jvp(output_gradient, (outputs,), (tangent,))
    (product,) = jax.linear_transpose(jacobian_product, params)(cotangent)
    return product
