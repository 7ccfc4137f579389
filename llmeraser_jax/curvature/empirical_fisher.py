"""Empirical Fisher products `sum_i c_i g_i (g_i . v)`, without a per-example gradient in memory."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from llmeraser_jax._jaxprs import MATMULS_WITH_MATRICES, set_checkpoints
from llmeraser_jax.curvature.gauss_newton import sandwich
from llmeraser_jax.losses import Objective
from llmeraser_jax.types import Batch, ExampleStack, LoraParams


def empirical_fisher_product(
    objective: Objective, params: LoraParams, batch: Batch, weights: Float[Array, " batch"], v: LoraParams
) -> LoraParams:
    """`sum_i weights_i * g_i (g_i . v)` over one micro-batch, `g_i` the gradient of the data loss alone.

    With `L` the map from the adapter to the examples' losses this is `L' diag(weights) L v`: the tangent gives
    every `g_i . v`, and one transposed pass sums the gradients with them. One primal pass is shared. Positive
    semidefinite where the weights are at least 0. It vanishes where examples are memorised, and it is not
    the Fisher matrix of the model, whose labels are drawn from the predictions (that one is the Gauss-Newton
    matrix of cross entropy).

    `g_i` belongs to an example, not to a token: a sum over tokens of outer products would be another matrix.

    Args:
        objective: the loss.
        params: where the gradients are taken.
        batch: leaves [batch, ...].
        weights: coefficients [batch].
        v: a vector of adapter space.
    """
    _, directional = jax.linearize(lambda p: objective.data_losses(p, batch), params)
    return sandwich(directional, lambda slopes: weights.astype(slopes.dtype) * slopes, v)


def linearise_empirical_fisher(
    objective: Objective, params: LoraParams, stack: ExampleStack
) -> Callable[[LoraParams], LoraParams]:
    """`v -> sum_i weights_i * g_i (g_i . v)` over a whole stack, its forward pass made once, here.

    The linear map is a pytree whose leaves are the values that its products need.

    Args:
        objective: the loss.
        params: where the gradients are taken.
        stack: the data and their coefficients.
    """

    def losses_fn(p):
        return tuple(jax.lax.map(lambda b: objective.data_losses(p, b), batches) for batches in stack.batches)

    _, directional = jax.linearize(set_checkpoints(losses_fn, MATMULS_WITH_MATRICES), params)
    return Partial(sandwich, directional, Partial(_multiply, stack.weights))


def _multiply(weights, slopes):
    return jax.tree.map(lambda w, s: jnp.asarray(w, s.dtype) * s, weights, slopes)
