"""A small random model and adapters for tests."""

import jax
import jax.numpy as jnp
import numpy as np

from llmeraser_jax.lora import LoraConfig
from llmeraser_jax.models import Model, ModelConfig, init_base


def tiny_config(**changes):
    """Two layers, width 16, grouped heads."""
    values = {
        "vocab_size": 29,
        "width": 16,
        "mlp_width": 24,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 6,
        "initializer_range": 0.3,
        "eos_token_ids": (2,),
    }
    return ModelConfig(**(values | changes))


def tiny_model(seed=0, dtype="float32", **changes):
    """A model with a random base and no tokenizer."""
    config = tiny_config(**changes)
    return Model(config=config, base=init_base(config, jax.random.key(seed), dtype))


TOKENS = jax.random.randint(jax.random.key(7), (3, 9), 3, 29)
MASK = jnp.arange(9) < jnp.array([[9], [6], [4]])


apply = jax.jit(lambda apply, *args, **kwargs: apply(*args, **kwargs), static_argnums=0)


def random_lora(model, seed=5, scale=0.2, dtype="float32", **changes):
    """An adapter whose B is not zero."""
    config = LoraConfig(**({"target_modules": "all-linear", "rank": 3} | changes))
    shapes = jax.eval_shape(lambda: model.init_lora(jax.random.key(0), config))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(scale * rng.standard_normal(x.shape), dtype), shapes)
