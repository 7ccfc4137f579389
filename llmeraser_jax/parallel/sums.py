"""Sums over examples that are sharded over devices: each device sums its own, and one reduction adds the sums.

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
        stack: the examples. Without a mesh, or with one device on its axis "data", `fn` gets it as it is.
        args: arguments that are the same for all examples; a base may be sharded over the axis "model".
        kept: what `keep_on_devices` returned for this stack. Where given, `fn` is called as
            `fn(stack, kept, *args)`.
    """
    if not _shared(stack):
        return _replicated(fn(stack, *args) if kept is None else fn(stack, kept, *args), stack)

    def local(stack, kept, *args):
        own = () if kept is None else (kept.of_device(),)
        return jax.lax.psum(fn(stack.replace(mesh=None), *own, *args), "data")

    return _replicated(_on_devices(local, stack, kept, *args, out=P()), stack)


def _replicated(tree: PyTree, stack: ExampleStack) -> PyTree:
    """Left to the compiler, a sum is split over "model", and programs that take it as an adapter compile again."""
    return tree if stack.mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(stack.mesh, P()))


def keep_on_devices(fn: Callable[..., PyTree], stack: ExampleStack, *args: PyTree) -> PyTree:
    """`fn(stack, *args)` of each device's examples, kept on that device for `sum_over_devices`.

    Args:
        fn: a pure function that treats its examples alone.
        stack: the examples.
        args: arguments that are the same for all examples.

    Returns:
        What `fn` returns; where devices share the examples, `Kept` of it.
    """
    if not _shared(stack):
        return fn(stack, *args)

    def local(stack, kept, *args):
        return Kept.make(fn(stack.replace(mesh=None), *args))

    return _on_devices(local, stack, None, *args, out=P("data"))


def _shared(stack: ExampleStack) -> bool:
    """Whether several devices share the examples out."""
    return stack.mesh is not None and stack.mesh.shape["data"] > 1


def _on_devices(local: Callable[..., PyTree], stack: ExampleStack, kept: Any, *args: PyTree, out: P) -> PyTree:
    # The axis "model" stays the compiler's. `check_vma` would reduce every derivative by a replicated argument in
    # every layer.
    mapped = jax.shard_map(
        local,
        mesh=stack.mesh,
        in_specs=(P(None, "data"), P("data"), *(P() for _ in args)),
        out_specs=out,
        axis_names={"data"},
        check_vma=False,
    )
    return mapped(stack, kept, *args)
