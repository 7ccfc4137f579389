"""Where arrays live on a mesh.

Rules are an ordered list of (regular expression over a leaf's path, partition spec): the first match decides,
and a leaf that no rule matches is an error, so that a new parameter cannot be replicated by accident.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llmeraser_jax.parallel.processes import to_host
from llmeraser_jax.types import BaseParams, Batch, ExampleStack, PyTree

_RULES: Sequence[tuple[str, P]] = (
    # Kernels are [layers, in, out]. Column-parallel shares out the outputs, row-parallel the inputs.
    (r"layers/(q|k|v|qkv|gate|up|gate_up)_proj/kernel", P(None, None, "model")),
    (r"layers/(q|k|v|qkv|gate|up|gate_up)_proj/bias", P(None, "model")),
    (r"layers/(o|down)_proj/kernel", P(None, "model", None)),
    (r"layers/(o|down)_proj/bias", P()),
    # Quantised kernels are [layers, out, in], the inputs in blocks or not, with scales beside them.
    (r"layers/(q|k|v|qkv|gate|up|gate_up)_proj/kernel/(codes|absmax)", P(None, "model")),
    (r"layers/(o|down)_proj/kernel/codes", P(None, None, "model")),
    (r"layers/(o|down)_proj/kernel/absmax", P()),
    (r"layers/.*_proj/kernel/nested_(absmax|offset)", P()),
    (r"layers/experts/(gate|up)_proj", P(None, None, None, "model")),
    (r"layers/experts/down_proj", P(None, None, "model", None)),
    (r"layers/experts/router", P()),
    (r"embed_tokens/embedding", P("model", None)),
    (r"lm_head/kernel", P(None, "model")),
    (r"projector/linear_1/kernel", P(None, "model")),
    (r"projector/linear_1/bias", P("model")),
    (r"projector/linear_2/kernel", P("model", None)),
    (r"projector/linear_2/bias", P()),
    (r"vision/.*", P()),
    (r".*norm/scale", P()),
)


def spec_for(path: str) -> P:
    """The partition spec of the first rule whose expression matches the whole of `path`.

    Raises:
        ValueError: no rule matches.
    """
    for pattern, spec in _RULES:
        if re.fullmatch(pattern, path):
            return spec
    msg = f"No sharding rule matches the parameter {path!r}; add one to parallel/sharding.py."
    raise ValueError(msg)


def _path_name(path) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def _check_divisible(what: str, shape: tuple[int, ...], spec: P, mesh: Mesh) -> None:
    for dim, axis in zip(shape, spec, strict=False):
        if axis is not None and dim % mesh.shape[axis]:
            ways = mesh.shape[axis]
            msg = f"{what} of shape {shape} cannot be split {ways} ways along {axis!r}: {dim} is no multiple."
            raise ValueError(msg)


def sharding_for(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Where the leaf at `path` lives on the mesh.

    Raises:
        ValueError: no rule matches, or a dimension that its mesh axis does not divide.
    """
    spec = spec_for(path)
    _check_divisible(f"Parameter {path!r}", shape, spec, mesh)
    return NamedSharding(mesh, spec)


def shard_base(base: BaseParams, mesh: Mesh) -> BaseParams:
    """Places the base on the mesh, each leaf as its rule says.

    Raises:
        ValueError: a leaf without a rule, or with a dimension that its mesh axis does not divide.
    """

    def place(path, leaf):
        return _put(leaf, sharding_for(_path_name(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, base)


def replicate(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """A copy of the tree on every device of the mesh; unchanged where `mesh` is None."""
    return tree if mesh is None else _put_tree(tree, NamedSharding(mesh, P()))


def spread_sharding(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding | None:
    """Where `spread` puts an array: its longest axis that all devices divide is shared out, the first left whole.

    None where there is no such axis.
    """
    fitting = [axis for axis in range(1, len(shape)) if shape[axis] % mesh.size == 0]
    if not fitting:
        return None
    longest = max(fitting, key=shape.__getitem__)
    return NamedSharding(
        mesh, P(*(tuple(mesh.axis_names) if axis == longest else None for axis in range(len(shape))))
    )


def spread(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Shares each leaf out over all devices along its longest axis that they divide, the first axis left whole.

    For traced values, such as rows of gradients [rows, ...]: of many rows each device holds a share of the numbers.
    A leaf without such an axis is left to the compiler; so is all where `mesh` is None.
    """
    if mesh is None:
        return tree

    def constrained(leaf: jax.Array) -> jax.Array:
        sharding = spread_sharding(leaf.shape, mesh)
        return leaf if sharding is None else jax.lax.with_sharding_constraint(leaf, sharding)

    return jax.tree.map(constrained, tree)


def place_stack(stack: ExampleStack, mesh: Mesh | None) -> ExampleStack:
    """Shares each micro-batch of a stack out over the data axis; unchanged where `mesh` is None.

    Raises:
        ValueError: the micro-batch size is no multiple of the data axis.
    """
    return _place(stack, mesh, P(None, "data")).replace(mesh=mesh)


def place_batch(batch: Batch, mesh: Mesh | None) -> Batch:
    """Shares one micro-batch out over the data axis; unchanged where `mesh` is None.

    Raises:
        ValueError: the micro-batch size is no multiple of the data axis.
    """
    return _place(batch, mesh, P("data"))


def _place(tree: PyTree, mesh: Mesh | None, spec: P) -> PyTree:
    if mesh is None:
        return tree
    for leaf in jax.tree.leaves(tree):
        _check_divisible("A micro-batch", leaf.shape, spec, mesh)
    return _put_tree(tree, NamedSharding(mesh, spec))


def _put_tree(tree: PyTree, sharding: NamedSharding) -> PyTree:
    return jax.tree.map(lambda leaf: _put(leaf, sharding), tree)


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """A leaf that every process has whole, or that is where it should be already, on the devices of all of them."""
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
        return leaf
    # `device_put` would compare the arrays of all processes number by number.
    whole = to_host(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
