"""Hessian-vector products of the data loss, forward over reverse."""

from __future__ import annotations

from functools import partial

import jax
from jaxtyping import Array, Float

from llmeraser_jax.losses import Objective, chunk_gradient_sum
from llmeraser_jax.types import Batch, LoraParams


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
