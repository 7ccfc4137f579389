"""Hessian-vector products of the data loss, forward over reverse."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llmeraser_jax import trees
from llmeraser_jax._jaxprs import MATMULS, MATMULS_WITH_MATRICES, set_checkpoints
from llmeraser_jax.losses import Objective, chunk_gradient_sum, scan_weighted_sum
from llmeraser_jax.types import Batch, ExampleStack, LoraParams


def hessian_product(
    objective: Objective, params: LoraParams, batch: Batch, weights: Float[Array, " batch"], v: LoraParams
) -> LoraParams:
    """`sum_i weights_i * hess(data loss_i) v` over one micro-batch, without the L2 term.

    Forward over reverse (jvp of grad): one pass of tangents through the gradient's program, so that it
    inherits the gradient's rematerialisation. Indefinite in general.

    Args:
        objective: the loss.
        params: where the Hessian is taken.
        batch: leaves [batch, ...].
        weights: coefficients [batch].
        v: a vector of adapter space.
    """
    gradient = partial(chunk_gradient_sum, objective, batch=batch, weights=weights)
    return jax.jvp(gradient, (params,), (v,))[1]


def linearise_hessian(
    objective: Objective, params: LoraParams, stack: ExampleStack
) -> Callable[[LoraParams], LoraParams]:
    """`v -> sum_i weights_i * hess(data loss_i) v` over a whole stack, its gradient computed once, here.

    The linear map is a pytree whose leaves are the values that products need. Of one micro-batch it stores nearly
    all of them. Of several it stores the results of matmuls, and each product recomputes the rest: a third of the
    memory, for about the same time.

    Args:
        objective: the loss.
        params: where the Hessian is taken.
        stack: the data and their coefficients.
    """
    several = sum(len(weights) for weights in stack.weights) > 1

    def gradient(p):
        def chunk_gradient(batch, weights):
            def loss(q):
                return jnp.sum(weights * objective.data_losses(q, batch))

            # Set before differentiation: a gradient that rematerialises holds the forward pass twice, and every
            # product would compute its tangents twice. Only matmuls are stored: each value that goes from the
            # forward to the backward pass has a tangent, which every product writes and reads.
            stored = jax.grad(set_checkpoints(loss, MATMULS))
            if several:
                stored = jax.checkpoint(stored, policy=MATMULS_WITH_MATRICES, prevent_cse=False)
            return stored(p)

        return scan_weighted_sum(chunk_gradient, stack, trees.tree_zeros_like(p))

    _, product = jax.linearize(gradient, params)
    return product
