"""The adapter: a float32 pytree, separate from the base.

Every vector of adapter space (a gradient, a step, a conjugate direction) is a `Lora` too, so that tree maps
and inner products need no conversion.
"""

from __future__ import annotations

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from llmeraser_jax import trees
from llmeraser_jax.convert import dequantized
from llmeraser_jax.lora.config import LoraConfig, adapted_modules, resolve_config
from llmeraser_jax.types import AdaptableConfig, BaseParams, Key


@flax.struct.dataclass
class Lora:
    """An adapter, or any vector of its space.

    Attributes:
        params: `{"layers": {module: {"a": [layers, rank, in], "b": [layers, out, rank]}}}`.
        config: static; its `target_modules` are written out. A layer of lower rank than its module's highest has
            rows of A and columns of B that nothing reads; they are zero.
    """

    params: Any
    config: LoraConfig = flax.struct.field(pytree_node=False)


def init_lora(key: Key, config: LoraConfig, model_config: AdaptableConfig) -> Lora:
    """A fresh adapter that leaves the base's function unchanged.

    A is uniform in +-1/sqrt(in) and B zero, as in PEFT.

    Args:
        key: random key.
        config: rank, scale and targets; `target_modules` is resolved against the model.
        model_config: the base model.

    Raises:
        ValueError: `target_modules` cannot be honoured; see `resolve_config`.
    """
    config = resolve_config(config, model_config)
    names, num_layers = adapted_modules(config, model_config), model_config.num_layers
    modules = {}
    for name, module_key in zip(names, jax.random.split(key, len(names)), strict=True):
        width_in, width_out = model_config.linear_shapes[name]
        bound, rank = 1 / math.sqrt(width_in), config.stack_rank(name, num_layers)
        a = jax.random.uniform(module_key, (num_layers, rank, width_in), jnp.float32, -bound, bound)
        scales = config.row_scales(name, num_layers)
        modules[name] = {
            "a": a if scales is None else jnp.where(scales[..., None] == 0, 0, a),
            "b": jnp.zeros((num_layers, width_out, rank), jnp.float32),
        }
    return Lora(params={"layers": modules}, config=config)


def check_lora(config: AdaptableConfig, lora: Lora) -> None:
    """Refuses an adapter that does not fit: linen ignores module names that it does not know.

    Raises:
        ValueError: an unknown module, or a shape that does not match the model's; the message names it.
    """
    stray = [name for name in lora.params if name != "layers"]
    modules = lora.params.get("layers", {})
    stray += [f"layers/{name}" for name in modules if name not in config.linear_shapes]
    stray += [f"layers/{name}/{leaf}" for name in modules for leaf in modules[name] if leaf not in ("a", "b")]
    if stray:
        msg = f"The adapter holds {', '.join(stray)}, which no layer of this model reads."
        raise ValueError(msg)
    for name, leaves in modules.items():
        num_layers, (width_in, width_out) = config.num_layers, config.linear_shapes[name]
        rank = lora.config.stack_rank(name, num_layers)
        expected = {"a": (num_layers, rank, width_in), "b": (num_layers, width_out, rank)}
        for leaf, shape in expected.items():
            if leaf not in leaves or leaves[leaf].shape != shape:
                got = leaves[leaf].shape if leaf in leaves else "missing"
                msg = f"Adapter leaf layers/{name}/{leaf} is {got}; this model and rank {rank} need {shape}."
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
    """The base with `scaling * B A` added to each targeted kernel, in the kernel's own dtype.

    A base narrower than float32 rounds the sum; a quantised kernel is dequantised first, and its sum is not
    quantised again. The adapter itself is not changed.

    Raises:
        ValueError: the base lacks a targeted module.
    """
    merged = dict(base, layers=dict(base["layers"]))
    for name, leaves in lora.params["layers"].items():
        if name not in merged["layers"]:
            msg = f"The adapter targets layers/{name}, which the base lacks."
            raise ValueError(msg)
        kernel = dequantized(merged["layers"][name]["kernel"])
        a = lora.config.scaled_rows(name, leaves["a"])
        product = jnp.einsum("lri,lor->lio", a, leaves["b"], precision=jax.lax.Precision.HIGHEST)
        dtype = jnp.promote_types(kernel.dtype, product.dtype)
        total = kernel.astype(dtype) + lora.config.scaling * product.astype(dtype)
        merged["layers"][name] = dict(merged["layers"][name], kernel=total.astype(kernel.dtype))
    return merged


def product_norms(lora: Lora, delta: Lora) -> tuple[jax.Array, jax.Array]:
    """Frobenius norms of `scaling * B A` over all modules, and of its change when the adapter moves by `delta`.

    The network sees `B A` only, which `(A, B) -> (M A, B M^-1)` does not change. The change is computed as
    `dB (A + dA) + B dA`, without cancellation, and each norm from r x r Gram matrices.

    Returns:
        The norm of the change, and that of the product before.
    """

    def squared(bs, as_):
        """`||sum_k B_k A_k||^2` over layers, for lists of factors."""
        b, a = jnp.concatenate(bs, axis=2), jnp.concatenate(as_, axis=1)
        gram_b, gram_a = jnp.einsum("lor,los->lrs", b, b), jnp.einsum("lri,lsi->lrs", a, a)
        return jnp.maximum(jnp.sum(gram_b * gram_a), 0)

    change = product = jnp.zeros(())
    for name, leaves in lora.params["layers"].items():
        step = delta.params["layers"][name]
        a, step_a = (lora.config.scaled_rows(name, x["a"]) for x in (leaves, step))
        change += squared((step["b"], leaves["b"]), (a + step_a, step_a))
        product += squared((leaves["b"],), (a,))
    return lora.config.scaling * jnp.sqrt(change), lora.config.scaling * jnp.sqrt(product)
