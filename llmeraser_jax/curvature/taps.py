"""K-FAC's factors of a language model's adapter: sums over tokens, collected without a change to the network.

Linen's method interception adds a zero ("tap") to the output of every adapted linear layer and keeps its input; the
derivative with respect to the tap is that layer's pseudo-gradient per token.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llmeraser_jax.curvature.kfac import KroneckerFactors, sum_over_chunks
from llmeraser_jax.lora import Lora, low_rank_updates
from llmeraser_jax.losses import LogitsAtResponse, Objective
from llmeraser_jax.models import ApplyDecoder, Linear, ModelConfig, bind
from llmeraser_jax.types import ExampleStack, Key, TokenBatch

_EXACT = jax.lax.Precision.HIGHEST


def _outputs_and_inputs(apply: ApplyDecoder, base, lora: Lora, taps, batch: TokenBatch):
    """Logits at the response, and the inputs [layers, batch, time, in] of every adapted linear layer.

    Of the projector, one layer whose "time" are the vectors of all pictures of a row.
    """
    module, variables = bind(apply.config, base, lora)
    adapted = {
        group: {
            name: {**leaves, "tap": taps[group][name] if group == "layers" else taps[group][name][0]}
            for name, leaves in modules.items()
        }
        for group, modules in variables["lora"].items()
    }

    def intercept(call, args, kwargs, context):
        out, linear = call(*args, **kwargs), context.module
        is_layer = isinstance(linear, Linear) and context.method_name == "__call__"
        if is_layer and linear.has_variable("lora", "tap"):
            linear.put_variable("lora", "input", args[0])
            out = out + linear.get_variable("lora", "tap")
        return out

    with nn.intercept_methods(intercept):
        logits, changed = module.apply(
            {**variables, "lora": adapted},
            batch.tokens,
            batch.attention_mask,
            batch.positions,
            images=batch.images,
            mutable=["lora"],
        )
    inputs: dict[str, Any] = {
        group: {
            name: leaves["input"] if group == "layers" else leaves["input"][None]
            for name, leaves in modules.items()
        }
        for group, modules in changed["lora"].items()
    }
    return logits, inputs


def _real(config: ModelConfig, batch: TokenBatch, group: str, dtype):
    """Which tokens, or which vectors of pictures, an example has [batch, time]."""
    if group == "layers":
        return batch.attention_mask.astype(dtype)
    assert batch.images is not None and config.vision is not None
    used = jnp.sum(batch.tokens == config.vision.image_token, axis=1, keepdims=True)
    _, images, features, _ = batch.images.shape
    return (jnp.arange(images * features) < used).astype(dtype)


def token_factors(objective: Objective, lora: Lora, stack: ExampleStack, key: Key) -> KroneckerFactors:
    """Sums over examples and real tokens, weighted as the examples are.

    With `x` a token's input of a linear layer and `g` its pseudo-gradient at the output, A's factors are those of
    `B' g` and `x`, B's those of `g` and `A x`.

    Args:
        objective: of a language model, with an `output_root_fn`.
        lora: where.
        stack: the examples and their coefficients, at least 0.
        key: of the random roots, one per example.

    Raises:
        ValueError: the objective is not this package's decoder, or has no root.
    """
    outputs_fn, root_fn = objective.outputs_fn, objective.output_root_fn
    decoder = outputs_fn.apply if isinstance(outputs_fn, LogitsAtResponse) else None
    if not isinstance(decoder, ApplyDecoder) or root_fn is None:
        msg = "Token factors need a decoder's objective with an output_root_fn; use kfac.example_factors instead."
        raise ValueError(msg)
    apply = decoder

    def gram(rows, weights):
        return jnp.einsum("lbtm,lbtn,b->lmn", rows, rows, weights, precision=_EXACT)

    def chunk_sum(chunk):
        batch, weights, key = chunk
        if "projector" in lora.params and batch.images is None:  # texts, which none of its vectors come from
            shape = (len(batch.tokens), 1, 1, apply.config.projector_shapes["linear_1"][0])
            batch = dataclasses.replace(batch, images=jnp.zeros(shape))
        times = {group: _real(apply.config, batch, group, jnp.float32).shape for group in lora.params}
        taps = {
            group: {
                name: jnp.zeros((len(leaves["b"]), *times[group], leaves["b"].shape[1]), leaves["b"].dtype)
                for name, leaves in modules.items()
            }
            for group, modules in lora.params.items()
        }
        logits, pull_back, inputs = jax.vjp(
            lambda t: _outputs_and_inputs(apply, objective.frozen, lora, t, batch), taps, has_aux=True
        )
        (slopes,) = pull_back(root_fn(logits, batch, key))
        left, right = ({group: {} for group in lora.params} for _ in range(2))
        for group, name, leaves in low_rank_updates(lora):
            real = _real(apply.config, batch, group, logits.dtype)[None, :, :, None]
            x, g = inputs[group][name] * real, slopes[group][name]
            # A's rows are read times their layers' scales, and so are the columns of B in A's derivative.
            a, b_t = (lora.config.scaled_rows(name, m) for m in (leaves["a"], jnp.swapaxes(leaves["b"], 1, 2)))
            inner_x = jnp.einsum("lbtn,lrn->lbtr", x, a, precision=_EXACT)
            inner_g = jnp.einsum("lbtm,lrm->lbtr", g, b_t, precision=_EXACT)
            left[group][name] = {"a": gram(inner_g, weights), "b": gram(g, weights)}
            right[group][name] = {"a": gram(x, weights), "b": gram(inner_x, weights)}
        return KroneckerFactors(*(Lora(params=side, config=lora.config) for side in (left, right)))

    parts = [
        (batches, weights, jax.random.split(jax.random.fold_in(key, position), len(weights)))
        for position, (batches, weights) in enumerate(zip(stack.batches, stack.weights, strict=True))
    ]
    return sum_over_chunks(chunk_sum, parts)
