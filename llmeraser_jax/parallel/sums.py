"""Sums and values of examples that devices share out: each computes with its own, and one reduction adds the sums.

Left to the compiler, a derivative by the replicated adapter is reduced in every layer of every micro-batch, and all
devices wait for each of these small reductions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llmeraser_jax.parallel.mesh import example_axes
from llmeraser_jax.parallel.sharding import (
    exchanged,
    exchanged_spec,
    laid_out,
    replicated,
    share_specs,
    spread_sharding,
)
from llmeraser_jax.types import ExampleStack, PyTree


@flax.struct.dataclass
class Kept:
    """One tree per device; the first axis of each leaf holds the devices' parts one after the other.

    With a separate axis of devices, products of a cached linearisation took 8 % longer on a CPU
    (`experiments/benchmarks`).
    """

    leaves: Any  # tuple of arrays
    structure: Any = flax.struct.field(pytree_node=False)
    scalars: tuple[bool, ...] = flax.struct.field(pytree_node=False)  # leaves that were given an axis

    @classmethod
    def make(cls, tree: PyTree) -> Kept:
        """Of one device's tree."""
        leaves, structure = jax.tree.flatten(tree)
        scalars = tuple(leaf.ndim == 0 for leaf in leaves)
        with_axis = tuple(leaf.reshape(1) if leaf.ndim == 0 else leaf for leaf in leaves)
        return cls(leaves=with_axis, structure=structure, scalars=scalars)

    def of_device(self) -> PyTree:
        """The tree, on the device."""
        leaves = [
            leaf.reshape(()) if scalar else leaf for leaf, scalar in zip(self.leaves, self.scalars, strict=True)
        ]
        return jax.tree.unflatten(self.structure, leaves)


def sum_over_devices(fn: Callable[..., PyTree], stack: ExampleStack, *args: PyTree, kept: PyTree = None) -> PyTree:
    """`fn(stack, *args)`, computed as the sum over devices of `fn` on the examples that each of them holds.

    Args:
        fn: a pure function, additive over examples: its value on a stack is the sum of those on parts of it.
        stack: the examples. Where no devices share them out, `fn` gets it as it is.
        args: arguments that are the same for all examples. Of a base that is shared out over "fsdp", `fn` sees the
            device's share.
        kept: what `keep_on_devices` returned for this stack. Where given, `fn` is called as
            `fn(stack, kept, *args)`.
    """
    mesh, axes = stack.mesh, _axes(stack)
    args = laid_out(args, mesh)
    if not axes:
        return replicated(fn(stack, *args) if kept is None else fn(stack, kept, *args), mesh)

    def local(stack, kept, *args):
        own = () if kept is None else (kept.of_device(),)
        return jax.lax.psum(fn(stack.replace(mesh=None), *own, *args), axes)

    return replicated(_on_devices(local, stack, kept, *args, out=P()), mesh)


def keep_on_devices(fn: Callable[..., PyTree], stack: ExampleStack, *args: PyTree) -> PyTree:
    """`fn(stack, *args)` of each device's examples, kept on that device for `sum_over_devices`.

    Args:
        fn: a pure function that treats its examples alone.
        stack: the examples.
        args: arguments that are the same for all examples.

    Returns:
        What `fn` returns; where devices share the examples, `Kept` of it.
    """
    if not _axes(stack):
        return fn(stack, *args)

    def local(stack, kept, *args):
        return Kept.make(fn(stack.replace(mesh=None), *args))

    return _on_devices(local, stack, None, *args, out=P(_axes(stack)))


def map_over_devices(fn: Callable[..., PyTree], stack: ExampleStack, *args: PyTree) -> PyTree:
    """`fn(stack, *args)`, computed by each device for the examples that it holds.

    Args:
        fn: a pure function that treats its examples alone and returns arrays [chunks, batch, ...].
        stack: the examples.
        args: as in `sum_over_devices`.
    """
    if not _axes(stack):
        return fn(stack, *args)

    def local(stack, kept, *args):
        return fn(stack.replace(mesh=None), *args)

    return _on_devices(local, stack, None, *args, out=P(None, _axes(stack)))


def rows_over_devices(fn: Callable[..., PyTree], stack: ExampleStack, *args: PyTree) -> tuple[PyTree, ...]:
    """`fn(batch, *args)` of every micro-batch, of whose rows each device keeps a share of the numbers.

    Args:
        fn: a pure function of one micro-batch that treats its examples alone and returns rows, leaves [batch, ...].
        stack: the examples.
        args: as in `sum_over_devices`.

    Returns:
        For each bucket leaves [chunks, batch, ...], placed as `spread_sharding` says.
    """
    mesh, axes = stack.mesh, _axes(stack)
    if mesh is None:
        return tuple(jax.lax.map(lambda batch: fn(batch, *args), batches) for batches in stack.batches)
    args = laid_out(args, mesh)

    def local(stack, kept, *args):
        def of_batch(batch):
            return exchanged(fn(batch, *args), mesh, axes) if axes else fn(batch, *args)

        return tuple(jax.lax.map(of_batch, batches) for batches in stack.batches)

    shapes = tuple(jax.eval_shape(fn, jax.tree.map(lambda x: x[0], batches), *args) for batches in stack.batches)
    out = jax.tree.map(lambda row: exchanged_spec(row.shape, mesh, axes), shapes)
    rows = _on_devices(local, stack, None, *args, out=out) if axes else local(stack, None, *args)

    def spread(row, like):
        sharding = spread_sharding(like.shape, mesh)
        spec = P() if sharding is None else P(None, *sharding.spec)
        return jax.lax.with_sharding_constraint(row, NamedSharding(mesh, spec))

    return jax.tree.map(spread, rows, shapes)


def _axes(stack: ExampleStack) -> tuple[str, ...]:
    """The axes that several devices share the examples out over."""
    return () if stack.mesh is None else example_axes(stack.mesh)


def _on_devices(local: Callable[..., PyTree], stack: ExampleStack, kept: Any, *args: PyTree, out: Any) -> PyTree:
    # The axis "model" stays the compiler's. `check_vma` would reduce every derivative by a replicated argument in
    # every layer.
    axes = _axes(stack)
    mapped = jax.shard_map(
        local,
        mesh=stack.mesh,
        in_specs=(P(None, axes), P(axes), *(share_specs(arg, axes) for arg in args)),
        out_specs=out,
        axis_names=set(axes),
        check_vma=False,
    )
    return mapped(stack, kept, *args)
