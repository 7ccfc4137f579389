"""A gate with drawn numbers, whose weights are far from equal."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from llmeraser_jax.models import ModelConfig
from llmeraser_jax.rivals.ensemble import AttentionGate, MeanHiddenState


def drawn_gate(config: ModelConfig, count: int) -> AttentionGate:
    """Weighs `count` members by the mean hidden state of a prompt."""
    rng = np.random.default_rng(3)
    width, hidden = config.width, 5
    shapes = {"centre": (width,), "centroids": (count, width), "query": (hidden, width), "key": (hidden, width)}
    shapes |= {"bias": (hidden,), "out": (hidden,)}
    leaves = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    return AttentionGate(scale=jnp.float32(0.7), embed=MeanHiddenState(config), **leaves)
