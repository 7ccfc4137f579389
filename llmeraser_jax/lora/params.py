"""The adapter: a float32 pytree, separate from the base.

Every vector of adapter space (a gradient, a step, a conjugate direction) is a `Lora` too, so that tree maps
and inner products need no conversion.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from llmeraser_jax import trees
from llmeraser_jax.convert import dequantized
from llmeraser_jax.lora.config import LoraConfig, adaptable_stacks, adapted_modules, resolve_config
from llmeraser_jax.lora.copies import COPIES, check_copies, fresh_copies, with_copies
from llmeraser_jax.parallel import to_host
from llmeraser_jax.text import short_repr
from llmeraser_jax.types import AdaptableConfig, BaseParams, Key


@flax.struct.dataclass
class Lora:
    """An adapter, or any vector of its space.

    Attributes:
        params: `{"layers": {module: {"a": [layers, rank, in], "b": [layers, out, rank]}}}`; of a model that sees
            pictures also `{"projector": {module: ...}}`, with one layer; and where the configuration has
            `modules_to_save` their trained copies, `{"copies": ...}` with paths of the base.
        config: static; its `target_modules` are written out. A layer of lower rank than its module's highest has
            rows of A and columns of B that nothing reads; they are zero.
    """

    params: Any
    config: LoraConfig = flax.struct.field(pytree_node=False)

    def __repr__(self) -> str:
        numbers = sum(getattr(leaf, "size", 0) for leaf in jax.tree.leaves(self.params))
        return short_repr(self, rank=self.config.rank, modules=self.config.target_modules, numbers=numbers)


def init_lora(key: Key, config: LoraConfig, model_config: AdaptableConfig, base: BaseParams | None = None) -> Lora:
    """A fresh adapter that leaves the base's function unchanged.

    A is uniform in +-1/sqrt(in) and B zero, as in PEFT.

    Args:
        key: random key.
        config: rank, scale and targets; `target_modules` is resolved against the model.
        model_config: the base model.
        base: its parameters, which `modules_to_save` are copied from.

    Raises:
        ValueError: `target_modules` or `modules_to_save` cannot be honoured; see `resolve_config` and
            `copies.copied_leaves`.
    """
    config = resolve_config(config, model_config)
    names, stacks = adapted_modules(config, model_config), adaptable_stacks(model_config)
    params: dict[str, Any] = {"layers": {}}
    for name, module_key in zip(names, jax.random.split(key, len(names)), strict=True):
        stack = stacks[name]
        bound, rank = 1 / math.sqrt(stack.inputs), config.stack_rank(name, stack.count)
        a = jax.random.uniform(module_key, (stack.count, rank, stack.inputs), jnp.float32, -bound, bound)
        scales = config.row_scales(name, stack.count)
        params.setdefault(stack.group, {})[name] = {
            "a": a if scales is None else jnp.where(scales[..., None] == 0, 0, a),
            "b": jnp.zeros((stack.count, stack.outputs, rank), jnp.float32),
        }
    if config.modules_to_save:
        if base is None:
            msg = f"modules_to_save is {config.modules_to_save!r}, which needs the base to copy from; give it."
            raise ValueError(msg)
        params[COPIES] = fresh_copies(config, model_config, base)
    return Lora(params=params, config=config)


def low_rank_updates(lora: Lora) -> Iterator[tuple[str, str, dict[str, jax.Array]]]:
    """Group, module and leaves of every low-rank update of an adapter; what else it holds is passed over."""
    for group, modules in lora.params.items():
        for name, leaves in modules.items():
            if isinstance(leaves, dict) and set(leaves) == {"a", "b"}:
                yield group, name, leaves


def untrained(lora: Lora, model_config: AdaptableConfig, base: BaseParams) -> Lora:
    """The adapter with B zero and the base's own modules for trained copies, which changes nothing of the base.

    Args:
        lora: an adapter; its A stays.
        model_config: the base model.
        base: its parameters.
    """
    params = {group: dict(modules) for group, modules in lora.params.items()}
    for group, name, leaves in low_rank_updates(lora):
        params[group][name] = {**leaves, "b": jnp.zeros_like(leaves["b"])}
    if COPIES in params:
        params[COPIES] = fresh_copies(lora.config, model_config, base)
    return Lora(params=params, config=lora.config)


def check_lora(config: AdaptableConfig, lora: Lora, base: BaseParams) -> None:
    """Refuses an adapter that does not fit: linen ignores module names that it does not know.

    Args:
        config: the model.
        lora: the adapter.
        base: the model's parameters; read where the adapter has trained copies.

    Raises:
        ValueError: an unknown module, or a shape that does not match the model's; the message names it.
    """
    check_copies(lora.config, config, base, lora.params.get(COPIES, {}))
    stacks = adaptable_stacks(config)
    groups = dict.fromkeys(["layers", *(stack.group for stack in stacks.values())])
    stray = [group for group in lora.params if group not in (*groups, COPIES)]
    modules = {f"{group}/{name}": leaves for group in groups for name, leaves in lora.params.get(group, {}).items()}
    known = {f"{stack.group}/{name}" for name, stack in stacks.items()}
    stray += [path for path in modules if path not in known]
    stray += [f"{path}/{leaf}" for path in modules for leaf in modules[path] if leaf not in ("a", "b")]
    if stray:
        msg = f"The adapter holds {', '.join(stray)}, which no layer of this model reads."
        raise ValueError(msg)
    for path, leaves in modules.items():
        name = path.split("/")[1]
        num_layers, width_in, width_out = stacks[name].count, stacks[name].inputs, stacks[name].outputs
        rank = lora.config.stack_rank(name, num_layers)
        expected = {"a": (num_layers, rank, width_in), "b": (num_layers, width_out, rank)}
        for leaf, shape in expected.items():
            if leaf not in leaves or leaves[leaf].shape != shape:
                got = leaves[leaf].shape if leaf in leaves else "missing"
                msg = f"Adapter leaf {path}/{leaf} is {got}; this model and rank {rank} need {shape}."
                raise ValueError(msg)


def add_delta(lora: Lora, delta: Lora) -> Lora:
    """The adapter moved by `delta`, a vector of its space.

    Raises:
        ValueError: the two have different modules, shapes or configurations.
    """
    if jax.tree.structure(lora) != jax.tree.structure(delta):
        msg = f"The delta's structure is {jax.tree.structure(delta)}, the adapter's {jax.tree.structure(lora)}."
        raise ValueError(msg)
    return trees.tree_add(lora, delta)


def merge_lora(base: BaseParams, lora: Lora) -> BaseParams:
    """The base with `scaling * B A` added to each targeted kernel, and trained copies in place of its own leaves.

    Everything has the dtype that the base has it in: one narrower than float32 rounds the sum; a quantised kernel
    is dequantised first, and its sum is not quantised again. The adapter itself is not changed.

    Raises:
        ValueError: the base lacks a targeted module.
    """
    copied = with_copies(base, lora.params.get(COPIES, {}), as_stored=True)
    merged = {**copied, "layers": dict(copied["layers"])}
    for group, name, leaves in low_rank_updates(lora):
        merged[group] = dict(merged.get(group, {}))
        if name not in merged[group]:
            msg = f"The adapter targets {group}/{name}, which the base lacks."
            raise ValueError(msg)
        kernel = dequantized(merged[group][name]["kernel"])
        a = lora.config.scaled_rows(name, leaves["a"])
        product = jnp.einsum("lri,lor->lio", a, leaves["b"], precision=jax.lax.Precision.HIGHEST)
        product = product.reshape(kernel.shape)
        dtype = jnp.promote_types(kernel.dtype, product.dtype)
        total = kernel.astype(dtype) + lora.config.scaling * product.astype(dtype)
        merged[group][name] = dict(merged[group][name], kernel=total.astype(kernel.dtype))
    return merged


def product_norms(lora: Lora, delta: Lora) -> tuple[float, float]:
    """Frobenius norms of `scaling * B A` over all modules, and of its change when the adapter moves by `delta`.

    The network sees `B A` only, which `(A, B) -> (M A, B M^-1)` does not change. The change is computed as
    `dB (A + dA) + B dA`, without cancellation, and each norm from r x r Gram matrices, on the host in float64.
    Trained copies are no part.

    Returns:
        The norm of the change, and that of the product before.
    """

    def squared(bs, as_):
        """`||sum_k B_k A_k||^2` over layers, for lists of factors."""
        b, a = np.concatenate(bs, axis=2), np.concatenate(as_, axis=1)
        return float(np.sum((b.transpose(0, 2, 1) @ b) * (a @ a.transpose(0, 2, 1))))

    def factors(name, leaves):
        b, a = (to_host(leaves[side]).astype(np.float64) for side in ("b", "a"))
        scales = lora.config.row_scales(name, len(a))
        return b, a if scales is None else a * scales[..., None]

    change = product = 0.0
    for group, name, leaves in low_rank_updates(lora):
        (b, a), (step_b, step_a) = factors(name, leaves), factors(name, delta.params[group][name])
        change += squared((step_b, b), (a + step_a, step_a))
        product += squared((b,), (a,))
    scaling = lora.config.scaling
    return scaling * math.sqrt(max(change, 0.0)), scaling * math.sqrt(max(product, 0.0))
