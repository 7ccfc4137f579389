"""Gauss-Newton curvature as a thin factor: one row of adapter space per example.

The Gauss-Newton matrix of one example is `J' H_out J`. With `c` random and `E[c c'] = H_out`, the row
`u = J' c` has `E[u u'] = J' H_out J`. So `U'U` with rows `sqrt(c_i) u_i` is an unbiased estimate of
`sum_i c_i G(z_i)`, at one gradient per row. `factorise` inverts it exactly through its Gram matrix, where conjugate
gradients would spend one and a half gradients per example and iteration.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llmeraser_jax import trees
from llmeraser_jax.losses import Objective, weight_sum
from llmeraser_jax.parallel import rows_over_devices
from llmeraser_jax.types import Batch, ExampleStack, Key, LoraParams, Outputs, PyTree


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


RowKind = Literal["loss", "log-odds", "roots"]
ROW_KINDS: tuple[RowKind, ...] = ("loss", "log-odds", "roots")


class ExampleRows(NamedTuple):
    """Examples in stacking order (bucket by bucket, padding included).

    Attributes:
        values: data loss, or its log-odds [m].
        rows: gradients of the values, or curvature rows `J' c`; leaves [m * roots, ...].
    """

    values: Float[Array, " m"]
    rows: PyTree


def example_rows(
    objective: Objective,
    params: LoraParams,
    stack: ExampleStack,
    key: Key,
    kind: RowKind | Int[Array | np.ndarray, ""],
    num_roots: int = 1,
) -> ExampleRows:
    """A row of adapter space for every example, from one forward and one backward pass.

    On a mesh every device ends with a share of the numbers of each row (`parallel.rows_over_devices`).

    Args:
        objective: with an `output_root_fn`, if roots are asked for.
        params: where.
        stack: the examples; its weights do not enter.
        key: of the random roots.
        kind: gradients of the loss or of its log-odds, or random curvature rows. A place in `ROW_KINDS`, traced,
            leaves it open: one program computes all kinds.
        num_roots: random roots per example, at one backward pass each; 1 for gradients.

    Raises:
        ValueError: roots of an objective that has none.
    """
    kinds: tuple[RowKind, ...]
    if isinstance(kind, str):
        kinds, kind = (kind,), np.zeros((), np.int32)
    else:
        kinds = ROW_KINDS if objective.output_root_fn is not None else ROW_KINDS[:2]

    def one(objective: Objective, params: LoraParams, kind: Array | np.ndarray, batch: Batch, key: Key):
        outputs, pull_back = jax.vjp(lambda p: objective.outputs(p, batch), params)
        branches = [partial(output_slopes, objective, k, num_roots) for k in kinds]
        value, cotangents = jax.lax.switch(kind, branches, outputs, batch, key)
        return value, jax.vmap(lambda c: pull_back(c)[0])(cotangents)

    def of_batch(keyed, objective, params, kind):
        return jax.vmap(partial(one, objective, params, kind))(*keyed)

    keyed = tuple(
        # Micro-batches of batches of one, with a key each.
        (jax.tree.map(lambda x: x[:, :, None], batches), keys)
        for batches, keys in zip(stack.batches, example_keys(key, stack), strict=True)
    )
    parts = rows_over_devices(of_batch, dataclasses.replace(stack, batches=keyed), objective, params, kind)
    values = [value.reshape(-1) for value, _ in parts]
    rows = [jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), row) for _, row in parts]
    return ExampleRows(jnp.concatenate(values), trees.concatenate_rows(*rows))


def values_of(objective: Objective, kind: RowKind, outputs: Outputs, batch: Batch) -> Float[Array, " batch"]:
    """What rows of a kind are gradients of; of curvature rows the loss."""
    return (objective.output_log_odds if kind == "log-odds" else objective.output_loss_fn)(outputs, batch)


def output_slopes(
    objective: Objective, kind: RowKind, num_roots: int, outputs: Outputs, batch: Batch, key: Key
) -> tuple[Float[Array, ""], Outputs]:
    """Of a batch of one: its value, and what its rows are pulled back from, on a leading axis of `num_roots`."""
    value_of = partial(values_of, objective, kind)
    value, slope = jax.value_and_grad(lambda o: jnp.sum(value_of(o, batch)))(outputs)
    if kind == "roots":
        return value, roots_of(objective, outputs, batch, key, num_roots)
    return value, jax.tree.map(lambda x: jnp.broadcast_to(x, (num_roots, *x.shape)), slope)


def roots_of(objective: Objective, outputs: Outputs, batch: Batch, key: Key, num_roots: int) -> Outputs:
    """`num_roots` random roots of one example, on a leading axis.

    Raises:
        ValueError: the objective has none.
    """
    root_fn = objective.output_root_fn
    if root_fn is None:
        msg = "This objective has no output_root_fn; its curvature cannot be factored. Use a product instead."
        raise ValueError(msg)
    return jax.vmap(lambda k: root_fn(outputs, batch, k))(jax.random.split(key, num_roots))


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
    rows = example_rows(objective, params, stack, key, "roots", num_roots).rows
    weights = jnp.repeat(stacked_weights(stack) / num_roots, num_roots)
    return FactoredCurvature(rows, weights, damping + objective.l2 * weight_sum(stack))


def example_keys(key: Key, stack: ExampleStack) -> tuple[Key, ...]:
    """A key for every example, [chunks, batch] of each bucket.

    They follow the places of the examples where the stack knows them: another layout draws the same.
    """
    key, start, keys = jax.random.fold_in(key, 0), 0, []
    for position, weights in enumerate(stack.weights):
        running = start + jnp.arange(weights.size, dtype=jnp.int32).reshape(weights.shape)
        numbers = running if stack.places is None else stack.places[position]
        keys.append(jax.vmap(jax.vmap(partial(jax.random.fold_in, key)))(numbers))
        start += weights.size
    return tuple(keys)


def stacked_weights(stack: ExampleStack) -> Float[Array, " m"]:
    """The coefficients in the order of `example_rows`."""
    return jnp.concatenate([w.reshape(-1) for w in stack.weights])
