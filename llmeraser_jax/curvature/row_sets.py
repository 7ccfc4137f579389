"""Rows of examples that are never stored: computed when they are summed up or multiplied, and known by sketches.

A row is the gradient of one example's loss or log-odds, or a random curvature row `J'c`. A million-parameter
adapter has rows of 4 MB each, a 7-billion-parameter base's of 80. `RowSet` keeps what they are computed from.
Their linear combination is one weighted backward pass, their products with a vector are one forward pass with a
tangent, and random projections of each leaf (as LoGra, arXiv 2405.13954, and TrackStar, arXiv 2410.17413, use
them) give inner products approximately: a sketch's Gram matrix is within a factor of the exact one in every
direction, whatever its conditioning, so that it serves as a preconditioner.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from llmeraser_jax import trees
from llmeraser_jax.curvature.factor import RowKind, example_keys, output_slopes, roots_of, values_of
from llmeraser_jax.losses import Objective, sum_over_examples
from llmeraser_jax.parallel import map_over_devices
from llmeraser_jax.types import Batch, ExampleStack, Key, LoraParams

_EXACT = jax.lax.Precision.HIGHEST

ROW_MEMORY_BYTES = 2**33  # per device, for rows that are stored
SKETCH_WIDTH = 64  # numbers that the longest axis of each leaf's rows is projected to


def rows_fit(num_rows: int, like: LoraParams, mesh: Mesh | None, memory_bytes: int = ROW_MEMORY_BYTES) -> bool:
    """Whether so many stored rows fit, each device holding its share of their numbers.

    Args:
        num_rows: how many.
        like: a vector of adapter space.
        mesh: the devices; None is one.
        memory_bytes: for rows, per device.
    """
    row_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like))
    return num_rows * row_bytes <= memory_bytes * (1 if mesh is None else mesh.size)


@flax.struct.dataclass
class RowSet:
    """The rows of a stack's examples, in its order, padding included: [examples * roots].

    Attributes:
        objective: with an `output_root_fn` for kind `roots`.
        params: where.
        stack: the examples; its weights do not enter.
        key: of the random roots.
        kind: `loss` and `log-odds` are gradients, `roots` curvature rows.
        num_roots: rows of each example; 1 of gradients.
    """

    objective: Objective
    params: LoraParams
    stack: ExampleStack
    key: Key
    kind: RowKind = flax.struct.field(pytree_node=False)
    num_roots: int = flax.struct.field(pytree_node=False, default=1)

    @property
    def num_rows(self) -> int:
        """How many rows there are, padding included."""
        return sum(weights.size for weights in self.stack.weights) * self.num_roots

    def _keyed_batches(self) -> tuple[Any, ...]:
        """Each bucket's batches with a key for every example, [chunks, batch]."""
        return tuple(zip(self.stack.batches, example_keys(self.key, self.stack), strict=True))

    def _rows_of_example(self, objective: Objective, params: LoraParams, batch: Batch, key: Key):
        """The value of a batch of one, and its rows, leaves [roots, ...]."""
        outputs, pull_back = jax.vjp(lambda p: objective.outputs(p, batch), params)
        value, cotangents = output_slopes(objective, self.kind, self.num_roots, outputs, batch, key)
        return value, jax.vmap(lambda c: pull_back(c)[0])(cotangents)

    def _alone(self) -> tuple[Any, ...]:
        """`_keyed_batches` as micro-batches of batches of one."""
        return tuple(
            (jax.tree.map(lambda x: x[:, :, None], batches), keys) for batches, keys in self._keyed_batches()
        )

    def sketch(
        self, key: Key, width: int, scale: LoraParams | None = None
    ) -> tuple[Float[Array, " examples"], Float[Array, "rows size"]]:
        """Values (loss or log-odds) of the examples, and random projections of the rows; a backward pass each.

        Args:
            key: of the projections; equal for all row sets whose inner products are wanted.
            width: numbers that the longest axis of each leaf is projected to.
            scale: what every row is multiplied by, number by number.
        """

        def of_example(objective, params, projections, scale, batch: Batch, key: Key):
            value, rows = self._rows_of_example(objective, params, batch, key)
            if scale is not None:
                rows = trees.tree_multiply(rows, scale)
            return value, jax.vmap(partial(_project, axes, projections))(rows)

        def of_stack(stack, *args):
            return [
                jax.lax.map(lambda keyed: jax.vmap(partial(of_example, *args))(*keyed), b) for b in stack.batches
            ]

        axes, projections = _projections(self.params, key, width)
        stack = dataclasses.replace(self.stack, batches=self._alone())
        parts = map_over_devices(of_stack, stack, self.objective, self.params, projections, scale)
        rows = [sketch.reshape(-1, sketch.shape[-1]) for _, sketch in parts]
        return jnp.concatenate([value.reshape(-1) for value, _ in parts]), jnp.concatenate(rows)

    def squares(self) -> LoraParams:
        """`sum_i w_i row_i^2`, number by number, with the stack's weights, shared out among roots."""

        def chunk(objective, params, keyed, weights):
            rows = jax.vmap(lambda b, k: self._rows_of_example(objective, params, b, k)[1])(*keyed)
            squares = jax.tree.map(lambda x: jnp.sum(x * x, axis=1), rows)
            return trees.combine_rows(weights / self.num_roots, squares)

        stack = dataclasses.replace(self.stack, batches=self._alone())
        zero = trees.tree_zeros_like(self.params)
        return sum_over_examples(chunk, stack, self.objective, self.params, zero=zero)[1]

    def combine(self, coefficients: Float[Array, " rows"]) -> LoraParams:
        """`sum_i a_i row_i`: one weighted backward pass."""
        parts, start = [], 0
        for weights in self.stack.weights:
            size = weights.size * self.num_roots
            parts.append(coefficients[start : start + size].reshape(*weights.shape, self.num_roots))
            start += size
        batches = tuple((*keyed, part) for keyed, part in zip(self._keyed_batches(), parts, strict=True))
        stack = dataclasses.replace(self.stack, batches=batches)
        chunk = partial(_combine_chunk, self.kind, self.num_roots)
        zero = trees.tree_zeros_like(self.params)
        return sum_over_examples(chunk, stack, self.objective, self.params, zero=zero)[1]

    def products(self, v: LoraParams) -> Float[Array, " rows"]:
        """`row_i . v` of every row: one forward pass with a tangent."""

        def of_chunk(objective, params, v, chunk):
            batch, keys = chunk
            outputs, tangent = jax.jvp(lambda p: objective.outputs(p, batch), (params,), (v,))
            if self.kind == "roots":
                roots = _roots_of_batch(objective, outputs, batch, keys, self.num_roots)
                return _inner_products(roots, tangent)
            values = partial(values_of, objective, self.kind)
            return jax.jvp(lambda o: values(o, batch), (outputs,), (tangent,))[1][:, None]

        def of_stack(stack, *args):
            return [jax.lax.map(partial(of_chunk, *args), part) for part in stack.batches]

        stack = dataclasses.replace(self.stack, batches=self._keyed_batches())
        parts = map_over_devices(of_stack, stack, self.objective, self.params, v)
        return jnp.concatenate([part.reshape(-1) for part in parts])


def _roots_of_batch(objective: Objective, outputs, batch: Batch, keys: Key, num_roots: int):
    """Roots of each example of a micro-batch, leaves [batch, roots, ...]."""

    def of_example(outputs, batch, key):
        return jax.tree.map(lambda x: x[:, 0], roots_of(objective, outputs, batch, key, num_roots))

    outputs, batch = (jax.tree.map(lambda x: x[:, None], tree) for tree in (outputs, batch))  # batches of one
    return jax.vmap(of_example)(outputs, batch, keys)


def _inner_products(roots, tangent) -> Float[Array, "batch roots"]:
    def leaf(r, x):
        return jnp.einsum("bkx,bx->bk", r.reshape(*r.shape[:2], -1), x.reshape(len(x), -1), precision=_EXACT)

    return sum(jax.tree.leaves(jax.tree.map(leaf, roots, tangent)), start=jnp.zeros(()))


def _combine_chunk(
    kind: RowKind,
    num_roots: int,
    objective: Objective,
    params: LoraParams,
    keyed: tuple[Batch, Key, Float[Array, "batch roots"]],
    weights: Float[Array, " batch"],
) -> LoraParams:
    batch, keys, coefficients = keyed
    outputs, pull_back = jax.vjp(lambda p: objective.outputs(p, batch), params)
    if kind == "roots":
        roots = _roots_of_batch(objective, outputs, batch, keys, num_roots)
        cotangent = jax.tree.map(
            lambda r: jnp.einsum("bk,bk...->b...", coefficients.astype(r.dtype), r, precision=_EXACT), roots
        )
    else:
        cotangent = jax.grad(lambda o: jnp.sum(coefficients[:, 0] * values_of(objective, kind, o, batch)))(outputs)
    return pull_back(cotangent)[0]


def _projections(like: LoraParams, key: Key, width: int) -> tuple[list[int | None], list[Array]]:
    """For each leaf the axis that is projected, None of one that is short already; the others' matrices of signs.

    Leaves stacked over layers [layers, ., .] have a matrix for each layer: the same one would add up the same
    errors.
    """
    axes, matrices = [], []
    for place, leaf in enumerate(jax.tree.leaves(like)):
        stacked = leaf.ndim == 3
        inside = leaf.shape[1:] if stacked else leaf.shape
        axis = max(range(len(inside)), key=inside.__getitem__)
        axes.append(axis if inside[axis] > width else None)
        if inside[axis] > width:
            shape = (leaf.shape[0] if stacked else 1, inside[axis], width)
            signs = jax.random.rademacher(jax.random.fold_in(key, place), shape, leaf.dtype)
            matrices.append(signs / jnp.sqrt(jnp.asarray(width, leaf.dtype)))
    return axes, matrices


def _project(axes: list[int | None], matrices: list[Array], row: LoraParams) -> Float[Array, " size"]:
    parts, remaining = [], iter(matrices)
    for axis, leaf in zip(axes, jax.tree.leaves(row), strict=True):
        if axis is not None:
            leaf = jnp.moveaxis(leaf if leaf.ndim == 3 else leaf[None], axis + 1, -1)
            leaf = jnp.einsum("l...d,ldk->l...k", leaf, next(remaining), precision=_EXACT)
        parts.append(leaf.reshape(-1))
    return jnp.concatenate(parts)
