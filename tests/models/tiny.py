"""A small random model and adapters for tests."""

import jax
import jax.numpy as jnp
import numpy as np

from llmeraser_jax.lora import LoraConfig
from llmeraser_jax.models import Model, ModelConfig, RopeConfig, init_base


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


# Changes of `tiny_config` that go through the parts of the decoder that not every family has. Texts of nine tokens
# are longer than the windows, and than the contexts beyond which rotations change.
_GEMMA = {
    "activation": "gelu_tanh",
    "norm_offset": True,
    "output_norms": True,
    "embedding_multiplier": 4.0,
    "attention_scale": 0.6,
    "sliding_window": 3,
}
VARIED = {
    "gemma2": {
        **_GEMMA,
        "model_type": "gemma2",
        "windowed_layers": (True, False),
        "attention_softcap": 2.0,
        "logit_softcap": 3.0,
    },
    "gemma3": {
        **_GEMMA,
        "model_type": "gemma3_text",
        "windowed_layers": (False, True),
        "qk_norm": True,
        "local_rope": RopeConfig(theta=20.0),
    },
    "phi3": {
        "model_type": "phi3",
        "fused_projections": True,
        "sliding_window": 4,
        "head_dim": 8,
        "rope": RopeConfig(
            scaling="longrope",
            original_max_position=7,
            attention_factor=1.3,
            short_factor=(1.0, 1.5, 2.0),
            long_factor=(2.0, 3.0, 9.0),
            rotated_share=0.75,
        ),
    },
    "dynamic": {"rope": RopeConfig(scaling="dynamic", factor=6.0, original_max_position=7), "max_position": 7},
    "olmo2": {
        "model_type": "olmo2",
        "input_norms": False,
        "output_norms": True,
        "qk_norm": True,
        "qk_norm_joint": True,
    },
    "smollm3": {"model_type": "smollm3", "unrotated_layers": (False, True)},
    "mixtral": {"model_type": "mixtral", "num_experts": 3, "experts_per_token": 2, "normalised_routing": True},
}


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
