"""A tiny language model with an adapter and random examples: every numerical path on a real decoder."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from llmeraser_jax import trees
from llmeraser_jax.lora import Lora, LoraConfig, init_lora
from llmeraser_jax.losses import Objective, lm_objective
from llmeraser_jax.models import ApplyDecoder, ModelConfig, init_base
from llmeraser_jax.types import ExampleStack, TokenBatch

VOCAB = 32


def small_config(**changes) -> ModelConfig:
    """Two layers, grouped heads, sizes that 2 x 4 devices divide."""
    sizes = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }
    return ModelConfig.from_hf({**sizes, **changes})


def small_lora(
    config: ModelConfig, dtype: str, *, rank: int = 2, targets: tuple[str, ...] | str = "all-linear"
) -> Lora:
    """An adapter away from its initialisation, so that both factors matter."""
    lora = init_lora(jax.random.key(1), LoraConfig(rank=rank, alpha=4.0, target_modules=targets), config)
    lora = jax.tree.map(lambda x: x.astype(dtype), lora)
    return trees.tree_axpy(0.3, trees.tree_random_normal(jax.random.key(2), lora), lora)


def small_objective(config: ModelConfig, dtype: str, l2: float = 1e-3) -> Objective:
    """Response cross entropy over a random base, with widened weights so that predictions are not uniform."""
    base = jax.tree.map(lambda x: 2.0 * x, init_base(config, jax.random.key(0), dtype))
    return lm_objective(ApplyDecoder(config), base, l2=l2)


def random_stack(num_chunks: int, batch: int, dtype: str, *, time: int = 12, response: int = 3) -> ExampleStack:
    """Random prompts of several lengths, right-padded, with responses at their ends; unequal weights."""
    rng = np.random.default_rng(7)
    shape = (num_chunks, batch)
    lengths = rng.integers(6, time + 1, shape)
    tokens = rng.integers(0, VOCAB, (*shape, time))
    mask = np.arange(time) < lengths[..., None]
    positions = lengths[..., None] - 1 - response + np.arange(response)
    targets = np.take_along_axis(tokens, positions + 1, -1)
    real = rng.random((*shape, response)) < 0.8
    real[..., 0] = True
    batches = TokenBatch(
        tokens=jnp.asarray(np.where(mask, tokens, 0), jnp.int32),
        attention_mask=jnp.asarray(mask, jnp.int32),
        positions=jnp.asarray(positions, jnp.int32),
        targets=jnp.asarray(targets, jnp.int32),
        target_weights=jnp.asarray(real / real.sum(-1, keepdims=True), dtype),
    )
    weights = rng.uniform(0.5, 1.5, shape) / (num_chunks * batch)
    places = jnp.arange(num_chunks * batch, dtype=jnp.int32).reshape(shape)
    return ExampleStack((batches,), (jnp.asarray(weights, dtype),), (places,))
