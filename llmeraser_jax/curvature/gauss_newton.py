"""Generalised Gauss-Newton products `J' H_out J v`."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from llmeraser_jax._jaxprs import MATMULS_WITH_MATRICES, set_checkpoints
from llmeraser_jax.losses import Objective
from llmeraser_jax.types import Batch, ExampleStack, LoraParams


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


def linearise_gauss_newton(
    objective: Objective, params: LoraParams, stack: ExampleStack
) -> Callable[[LoraParams], LoraParams]:
    """`v -> sum_i weights_i * J_i' H_out J_i v` over a whole stack, its forward pass made once, here.

    The linear map is a pytree whose leaves are the values that its products need. A product holds the
    tangents of all examples' outputs at once.

    Args:
        objective: the loss, convex in the outputs.
        params: where the matrix is taken.
        stack: the data and their coefficients.
    """

    def outputs_fn(p):
        return tuple(jax.lax.map(lambda b: objective.outputs(p, b), batches) for batches in stack.batches)

    def weighted_loss(outputs):
        losses = [jax.vmap(objective.output_loss_fn)(o, b) for o, b in zip(outputs, stack.batches, strict=True)]
        return sum(jnp.sum(w * l) for w, l in zip(stack.weights, losses, strict=True))

    outputs, jacobian_product = jax.linearize(set_checkpoints(outputs_fn, MATMULS_WITH_MATRICES), params)
    _, output_hessian_product = jax.linearize(jax.grad(weighted_loss), outputs)
    return Partial(sandwich, jacobian_product, output_hessian_product)


def sandwich(jacobian_product: Callable, middle: Callable, v: LoraParams) -> LoraParams:
    """`J' M J v`, with `J'` the transpose of the linear map `jacobian_product`."""
    (product,) = jax.linear_transpose(jacobian_product, v)(middle(jacobian_product(v)))
    return product
