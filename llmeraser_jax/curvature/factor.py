"""Gauss-Newton curvature as a thin factor: one row of adapter space per example.

The Gauss-Newton matrix of one example is `J' H_out J`. With `c` random and `E[c c'] = H_out`, the row
`u = J' c` has `E[u u'] = J' H_out J`. So `U'U` with rows `sqrt(c_i) u_i` is an unbiased estimate of
`sum_i c_i G(z_i)`, at one gradient per row. `factorise` inverts it exactly through its Gram matrix, where conjugate
gradients would spend one and a half gradients per example and iteration.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llmeraser_jax import trees
from llmeraser_jax.losses import Objective, weight_sum
from llmeraser_jax.parallel import rows_over_devices
from llmeraser_jax.types import Batch, ExampleStack, Key, LoraParams, PyTree


@flax.struct.dataclass
class FactoredCurvature:
    """`sum_j w_j u_j u_j' + mu I`, an operator whose inverse is cheap.

    Attributes:
        rows: `u_j`, leaves [m, ...].
        weights: `w_j` [m], at least 0.
        mu: above 0: the share of the L2 term and the damping.
    """

    rows: LoraParams
    weights: Float[Array, " m"]
    mu: Float[Array, ""] | float

    @property
    def positive_semidefinite(self) -> bool:
        return True

    def mv(self, v: LoraParams) -> LoraParams:
        """The product with `v`."""
        coefficients = self.weights * trees.rows_vdot(self.rows, v)
        return jax.tree.map(
            lambda a, b: a + (self.mu * b).astype(a.dtype), trees.combine_rows(coefficients, self.rows), v
        )


@flax.struct.dataclass
class ExampleRows:
    """Examples in stacking order (bucket by bucket, padding included with weight 0).

    Attributes:
        values: data loss, or its log-odds [m].
        gradients: of the values, leaves [m, ...]; None where not asked for.
        roots: `J' c` of each example, leaves [m, roots, ...]; None where not asked for.
    """

    values: Float[Array, " m"]
    gradients: PyTree | None
    roots: PyTree | None


def example_rows(
    objective: Objective,
    params: LoraParams,
    stack: ExampleStack,
    key: Key,
    *,
    gradients: bool = True,
    num_roots: int = 1,
    log_odds: bool = False,
) -> ExampleRows:
    """Loss, gradient and curvature rows of every example, from one forward pass each.

    On a mesh every device ends with a share of the numbers of each row (`parallel.rows_over_devices`).

    Args:
        objective: with an `output_root_fn`, if roots are asked for.
        params: where.
        stack: the examples; its weights do not enter.
        key: of the random roots.
        gradients: whether to compute them, at one backward pass.
        num_roots: random roots per example, at one backward pass each.
        log_odds: whether values and gradients are those of the log-odds `log(exp(l) - 1)` of the loss `l`.

    Raises:
        ValueError: roots of an objective that has none.
    """
    if num_roots and objective.output_root_fn is None:
        msg = "This objective has no output_root_fn; its curvature cannot be factored. Use a product instead."
        raise ValueError(msg)

    value_fn = objective.output_log_odds if log_odds else objective.output_loss_fn

    def one(objective: Objective, params: LoraParams, batch: Batch, key: Key):
        outputs, pull_back = jax.vjp(lambda p: objective.outputs(p, batch), params)
        value, slope = jax.value_and_grad(lambda o: jnp.sum(value_fn(o, batch)))(outputs)
        gradient = pull_back(slope)[0] if gradients else None
        roots = None
        root_fn = objective.output_root_fn
        if num_roots and root_fn is not None:
            roots = jax.vmap(lambda k: pull_back(root_fn(outputs, batch, k))[0])(jax.random.split(key, num_roots))
        return value, gradient, roots

    def of_batch(keyed, objective, params):
        return jax.vmap(partial(one, objective, params))(*keyed)

    keyed = tuple(
        # Micro-batches of batches of one, with a key each.
        (
            jax.tree.map(lambda x: x[:, :, None], batches),
            jax.random.split(jax.random.fold_in(key, position), weights.shape),
        )
        for position, (batches, weights) in enumerate(zip(stack.batches, stack.weights, strict=True))
    )
    rows = rows_over_devices(of_batch, dataclasses.replace(stack, batches=keyed), objective, params)
    parts = [jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), part) for part in rows]
    return ExampleRows(*jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts))


def factored_curvature(
    objective: Objective,
    params: LoraParams,
    stack: ExampleStack,
    key: Key,
    *,
    damping: float | Float[Array, ""],
    num_roots: int = 1,
) -> FactoredCurvature:
    """An unbiased estimate of `sum_i c_i G(z_i) + damping I`, with the L2 term's share in `mu`.

    Args:
        objective: with an `output_root_fn`.
        params: where.
        stack: the examples and their coefficients `c_i`.
        key: of the random roots.
        damping: rho.
        num_roots: rows per example; more of them lower the variance where responses have several tokens.
    """
    found = example_rows(objective, params, stack, key, gradients=False, num_roots=num_roots)
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found.roots)
    weights = jnp.repeat(stacked_weights(stack) / num_roots, num_roots)
    return FactoredCurvature(rows, weights, damping + objective.l2 * weight_sum(stack))


def stacked_weights(stack: ExampleStack) -> Float[Array, " m"]:
    """The coefficients in the order of `example_rows`."""
    return jnp.concatenate([w.reshape(-1) for w in stack.weights])
