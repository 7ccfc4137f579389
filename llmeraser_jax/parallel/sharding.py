"""Where arrays live on a mesh.

| array | over "data" | over "fsdp" | over "model" |
|---|---|---|---|
| kernels and embedding of the base, as stored | copies | shared out, gathered layer by layer | shared out |
| norms, biases, routers, most scales of quantised kernels | copies | copies | as the kernels, or copies |
| adapter, gradients, Adam's moments, vectors and states of solvers | copies | copies | copies |
| examples, their outputs, caches of linearisations | shared out | shared out | as the compiler chooses |
| stored rows of examples: the numbers of each | shared out | shared out | shared out |
| Gram matrices, random projections and coefficients of rows | copies | copies | copies |

Rules for the base are an ordered list of (regular expression over a leaf's path, partition spec): the first match
decides, and a leaf that no rule matches is an error, so that a new parameter cannot be replicated by accident.
Devices on "fsdp" hold different examples. Under `sums.sum_over_devices` and `sums.map_over_devices`
each of them sees its own share of the base, and the model asks for whole matrices with `gathered`. Scores and
generation are left to the compiler: devices multiply with their shares and exchange activations.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from llmeraser_jax.parallel.processes import to_host
from llmeraser_jax.types import BaseParams, Batch, ExampleStack, PyTree

_RULES: Sequence[tuple[str, P]] = (
    # Kernels are [layers, in, out]. Column-parallel shares out the outputs, row-parallel the inputs.
    (r"layers/(q|k|v|qkv|gate|up|gate_up)_proj/kernel", P(None, "fsdp", "model")),
    (r"layers/(q|k|v|qkv|gate|up|gate_up)_proj/bias", P(None, "model")),
    (r"layers/(o|down)_proj/kernel", P(None, "model", "fsdp")),
    (r"layers/(o|down)_proj/bias", P()),
    # Quantised kernels are [layers, out, in], the inputs in blocks or not, with scales beside them.
    (r"layers/(q|k|v|qkv|gate|up|gate_up)_proj/kernel/codes", P(None, "model", "fsdp")),
    (r"layers/(q|k|v|qkv|gate|up|gate_up)_proj/kernel/absmax", P(None, "model")),
    (r"layers/(o|down)_proj/kernel/codes", P(None, "fsdp", "model")),
    (r"layers/(o|down)_proj/kernel/absmax", P(None, "fsdp")),
    (r"layers/.*_proj/kernel/nested_(absmax|offset)", P()),
    (r"layers/experts/(gate|up)_proj", P(None, None, "fsdp", "model")),
    (r"layers/experts/down_proj", P(None, None, "model", "fsdp")),
    (r"layers/experts/router", P()),
    (r"embed_tokens/embedding", P("model", "fsdp")),
    (r"lm_head/kernel", P("fsdp", "model")),
    (r"projector/linear_1/kernel", P(None, "model")),
    (r"projector/linear_1/bias", P("model")),
    (r"projector/linear_2/kernel", P("model", None)),
    (r"projector/linear_2/bias", P()),
    (r"vision/.*", P()),
    (r".*norm/scale", P()),
)


EXAMPLES = P(("data", "fsdp"))  # of an array [batch, ...]
_COPIES = "copies"  # of base leaves, in an adapter: whole on every device as the rest of it


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
        axes = axis if isinstance(axis, tuple) else () if axis is None else (axis,)
        ways = math.prod(mesh.shape[one] for one in axes)
        if dim % ways:
            along = " x ".join(one for one in axes if mesh.shape[one] > 1)
            msg = f"{what} of shape {shape} cannot be split {ways} ways along {along!r}: {dim} is no multiple."
            raise ValueError(msg)


def sharding_for(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Where the leaf at `path` lives on the mesh.

    Raises:
        ValueError: no rule matches, or a dimension that its mesh axis does not divide.
    """
    spec = spec_for(path)
    _check_divisible(f"Parameter {path!r}", shape, spec, mesh)
    return NamedSharding(mesh, spec)


def _rule_of(path: str) -> P | None:
    """The spec of the base's leaf at `path`, which may begin above the base; None of any other leaf."""
    if _COPIES in path.split("/"):
        return None
    for pattern, spec in _RULES:
        if re.fullmatch(f"(?:.*/)?(?:{pattern})", path):
            return spec
    return None


def share_specs(tree: PyTree, axes: Sequence[str]) -> PyTree:
    """The specs of arguments to a function that `axes` of the mesh are manual in: base leaves shared out, or whole.

    Args:
        tree: any; its base leaves are known by the ends of their paths.
        axes: whose places see different arguments.
    """

    def spec(path, leaf):
        rule = _rule_of(_path_name(path)) if "fsdp" in axes else None
        return P() if rule is None else P(*(name if name == "fsdp" else None for name in rule))

    return jax.tree_util.tree_map_with_path(spec, tree)


def shares_base() -> bool:
    """Whether the code that is being traced sees its device's share of the base over "fsdp"."""
    return "fsdp" in jax.sharding.get_abstract_mesh().manual_axes


@flax.struct.dataclass
class Whole:
    """A matrix that stands in the place of a base's, and that every device on "fsdp" holds whole."""

    value: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape


def held_whole(leaves: PyTree) -> PyTree:
    """Leaves in the place of a base's that every device has; matrices are marked, where the code sees shares."""

    def mark(path, leaf):
        return Whole(leaf) if "fsdp" in spec_for(_path_name(path)) else leaf

    return jax.tree_util.tree_map_with_path(mark, leaves) if shares_base() else leaves


def gathered_shapes(base: BaseParams) -> BaseParams:
    """Shapes of the base's leaves, whole over "fsdp"."""

    def whole(path, leaf):
        return jax.eval_shape(partial(gathered, path, axes_before=0), leaf)

    leaves: dict[str, Any] = flatten_dict(base, sep="/")
    return unflatten_dict({path: whole(path, leaf) for path, leaf in leaves.items()}, sep="/")


def gathered(path: str, parameter: PyTree, *, axes_before: int = 1) -> PyTree:
    """A matrix of the base, whole over "fsdp", in its storage dtype; itself where the code sees it whole already.

    Args:
        path: of the parameter in the base.
        parameter: an array or a quantised kernel; of one layer, where the base stacks layers.
        axes_before: axes of a layer's stack that the parameter has no more.
    """
    if isinstance(parameter, Whole):
        return parameter.value
    if not shares_base():
        return parameter
    before = axes_before if path.startswith("layers/") else 0

    def whole(place, leaf):
        spec = _rule_of("/".join(filter(None, (path, _path_name(place)))))
        if spec is None or "fsdp" not in spec:
            return leaf
        axis = spec.index("fsdp") - before
        gather = partial(jax.lax.all_gather, axis_name="fsdp", axis=axis, tiled=True)
        return _on_model_shares(gather, P(*(name if name == "model" else None for name in spec[before:])), leaf)

    return jax.tree_util.tree_map_with_path(whole, parameter)


def _on_model_shares(exchange: Callable[[jax.Array], jax.Array], spec: P, array: jax.Array) -> jax.Array:
    """An exchange over other axes, by each device of "model" with its share, which XLA would gather first.

    Args:
        exchange: of one array, that leaves its axes where they are.
        spec: where the array is and shall be over "model".
        array: seen whole over "model".
    """
    if jax.sharding.get_abstract_mesh().shape["model"] == 1:
        return exchange(array)
    mapped = jax.shard_map(exchange, in_specs=spec, out_specs=spec, axis_names={"model"}, check_vma=False)
    return mapped(array)


def looked_up(table: jax.Array | Whole, tokens: jax.Array) -> jax.Array:
    """Rows of the embedding [vocab, width] for tokens [batch, time]; devices on "fsdp" exchange shares of rows."""
    if isinstance(table, Whole):
        return jnp.take(table.value, tokens, axis=0)
    if not shares_base():
        return jnp.take(table, tokens, axis=0)
    rows = jnp.take(table, jax.lax.all_gather(tokens, "fsdp", tiled=True), axis=0)
    return jax.lax.all_to_all(rows, "fsdp", split_axis=0, concat_axis=2, tiled=True)


def shard_base(base: BaseParams, mesh: Mesh) -> BaseParams:
    """Places the base on the mesh, each leaf as its rule says.

    Raises:
        ValueError: a leaf without a rule, or with a dimension that its mesh axis does not divide.
    """

    def place(path, leaf):
        return put(leaf, sharding_for(_path_name(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, base)


def replicate(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """A copy of the tree on every device of the mesh; unchanged where `mesh` is None."""
    return tree if mesh is None else _put_tree(tree, NamedSharding(mesh, P()))


def replicated(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Traced values, the same on every device; unchanged where `mesh` is None.

    Left to the compiler, a vector of adapter space is split over "model" as the kernels beside it, and programs
    that take it as an adapter compile again.
    """
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P()))


def laid_out(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Traced values of which all that is no base leaf is the same on every device; unchanged where `mesh` is None.

    A solver's vectors are laid out by what its products take and give.
    """
    if mesh is None:
        return tree

    def leaf_of(path, leaf):
        return leaf if _rule_of(_path_name(path)) is not None else replicated(leaf, mesh)

    return jax.tree_util.tree_map_with_path(leaf_of, tree)


def spread_sharding(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding | None:
    """Where rows [rows, ...] live: of each row every device has a share of the numbers, the first axis left whole.

    The longest axis that it divides is shared out over "model", as gradients are beside the kernels, and the
    longest of the others over "data" and "fsdp". Without such a pair one axis is, over all; None without that.
    """
    spec = _spread_spec(shape, mesh)
    return None if spec is None else NamedSharding(mesh, spec)


def _spread_spec(shape: tuple[int, ...], mesh: Mesh) -> P | None:
    def longest(ways: int, *taken: int) -> int | None:
        fitting = [axis for axis in range(1, len(shape)) if shape[axis] % ways == 0 and axis not in taken]
        return max(fitting, key=shape.__getitem__) if fitting else None

    examples, model = tuple(axis for axis in mesh.axis_names if axis != "model"), mesh.shape["model"]
    inner = longest(model)
    if model > 1 and inner is not None and (outer := longest(mesh.size // model, inner)) is not None:
        places: dict[int, Any] = {inner: "model", outer: examples}
    elif (only := longest(mesh.size)) is not None:
        places = {only: (*examples, "model")}
    else:
        return None
    return P(*(places.get(axis) for axis in range(len(shape))))


def exchanged(rows: PyTree, mesh: Mesh, axes: tuple[str, ...]) -> PyTree:
    """Rows that devices computed of their own examples; of all rows each device ends with a share of the numbers.

    For code in which `axes` are manual. Left to the compiler, devices exchange the activations that rows are
    computed from. A leaf without an axis to share out is whole on every device.

    Args:
        rows: leaves [rows of this device, ...].
        mesh: all devices.
        axes: that share out the examples.

    Returns:
        Leaves [all rows, ...], with places over `axes` as `exchanged_spec` says.
    """

    def exchange(leaf):
        spec = _spread_spec(leaf.shape, mesh)
        if spec is None:
            return jax.lax.all_gather(leaf, axes, tiled=True)
        axis = _axis_of_examples(spec)
        swap = partial(jax.lax.all_to_all, axis_name=axes, split_axis=axis, concat_axis=0, tiled=True)
        within = P(*("model" if name == "model" else None for name in spec))
        return _on_model_shares(swap, within, leaf) if "model" in within else swap(leaf)

    return jax.tree.map(exchange, rows)


def _axis_of_examples(spec: P) -> int:
    return next(axis for axis, name in enumerate(spec) if isinstance(name, tuple))


def exchanged_spec(shape: tuple[int, ...], mesh: Mesh, axes: tuple[str, ...]) -> P:
    """Where `exchanged` leaves rows of `shape` [rows, ...], with an axis of micro-batches put in front."""
    spec = _spread_spec(shape, mesh)
    return P() if spec is None else P(*(None,) * (_axis_of_examples(spec) + 1), axes)


def place_stack(stack: ExampleStack, mesh: Mesh | None) -> ExampleStack:
    """Shares each micro-batch of a stack out over "data" and "fsdp"; unchanged where `mesh` is None.

    Raises:
        ValueError: the micro-batch size is no multiple of the devices that share it out.
    """
    return _place(stack, mesh, P(None, *EXAMPLES)).replace(mesh=mesh)


def place_batch(batch: Batch, mesh: Mesh | None) -> Batch:
    """Shares one micro-batch out over "data" and "fsdp"; unchanged where `mesh` is None.

    Raises:
        ValueError: the micro-batch size is no multiple of the devices that share it out.
    """
    return _place(batch, mesh, EXAMPLES)


def _place(tree: PyTree, mesh: Mesh | None, spec: P) -> PyTree:
    if mesh is None:
        return tree
    for leaf in jax.tree.leaves(tree):
        _check_divisible("A micro-batch", leaf.shape, spec, mesh)
    return _put_tree(tree, NamedSharding(mesh, spec))


def _put_tree(tree: PyTree, sharding: NamedSharding) -> PyTree:
    return jax.tree.map(lambda leaf: put(leaf, sharding), tree)


def put(leaf: Any, sharding: Sharding) -> jax.Array:
    """A leaf that every process has whole, or that is where it should be already, on the devices of all of them."""
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
        return leaf
    # `device_put` would compare the arrays of all processes number by number.
    whole = to_host(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
