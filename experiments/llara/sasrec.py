"""Owns SASRec, the sequential recommender whose item embeddings hybrid prompts read.

Kang and McAuley, *Self-Attentive Sequential Recommendation* (ICDM 2018): causal self-attention over item and
position embeddings, scored against the item embeddings themselves, trained to tell the next item from a random one
by binary cross entropy. LLaRA's own SASRec has one layer, a separate output layer and one prediction per sequence.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

logger = logging.getLogger("study")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SasrecConfig:
    """The network and its training.

    Attributes:
        num_items: items 0 to num_items - 1; num_items itself is padding.
        width: of the embeddings; 64 in LLaRA.
        num_layers: blocks.
        num_heads: of attention.
        max_length: items of a history at most.
        dropout: of embeddings, attention and feed-forward, in training.
        epochs: passes over the histories.
        batch_size: histories per step.
        learning_rate: of Adam.
        seed: of initialisation, order, negatives and dropout.
    """

    num_items: int
    width: int = 64
    num_layers: int = 2
    num_heads: int = 1
    max_length: int = 10
    dropout: float = 0.2
    epochs: int = 20
    batch_size: int = 256
    learning_rate: float = 1e-3
    seed: int = 0


class Block(nn.Module):
    """Attention to earlier items and a position-wise feed-forward, each behind a norm and added to its input."""

    config: SasrecConfig

    @nn.compact
    def __call__(self, x, mask, deterministic):
        config = self.config
        drop = nn.Dropout(config.dropout, deterministic=deterministic)
        attention = nn.MultiHeadDotProductAttention(
            num_heads=config.num_heads, dropout_rate=config.dropout, deterministic=deterministic
        )
        x = x + drop(attention(nn.LayerNorm()(x), mask=mask))
        h = nn.Dense(config.width)(nn.LayerNorm()(x))
        return x + drop(nn.Dense(config.width)(nn.relu(h)))


class Sasrec(nn.Module):
    """States after each item; the score of item i there is its product with i's embedding."""

    config: SasrecConfig

    def setup(self):
        config = self.config
        init = nn.initializers.normal(config.width**-0.5)
        self.items = nn.Embed(config.num_items + 1, config.width, embedding_init=init)
        self.positions = nn.Embed(config.max_length, config.width, embedding_init=init)
        self.blocks = [Block(config) for _ in range(config.num_layers)]
        self.norm = nn.LayerNorm()
        self.drop = nn.Dropout(config.dropout)

    def __call__(self, items: Int[Array, "batch time"], deterministic: bool = True) -> Float[Array, "batch time d"]:
        """States [batch, time, width] of right-padded items."""
        real = items != self.config.num_items
        x = self.items(items) * self.config.width**0.5 + self.positions(jnp.arange(items.shape[1]))
        x = self.drop(x, deterministic=deterministic)
        mask = nn.make_causal_mask(items) * nn.make_attention_mask(jnp.ones_like(real), real)
        for block in self.blocks:
            x = block(x, mask, deterministic)
        return self.norm(x)


def _pad(histories: Sequence[Sequence[int]], config: SasrecConfig) -> Int[np.ndarray, "n time"]:
    """The last `max_length` items of each history, right-padded."""
    table = np.full((len(histories), config.max_length), config.num_items, np.int32)
    for row, history in enumerate(histories):
        kept = history[-config.max_length :]
        table[row, : len(kept)] = kept
    return table


def bce_loss(module: Sasrec, params: Any, inputs, targets, negatives, dropout_key=None) -> Float[Array, ""]:
    """`-log sigmoid(s_target) - log(1 - sigmoid(s_negative))`, averaged over positions that have a target."""
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    states: Any = module.apply({"params": params}, inputs, dropout_key is None, rngs=rngs)
    table = params["items"]["embedding"]
    positive, negative = (jnp.sum(states * table[items], axis=-1) for items in (targets, negatives))
    real = targets != module.config.num_items
    losses = jax.nn.softplus(-positive) + jax.nn.softplus(negative)
    return jnp.sum(jnp.where(real, losses, 0)) / jnp.maximum(jnp.sum(real), 1)


@partial(jax.jit, static_argnames="module")
def _step(module, params, state, inputs, targets, negatives, key):
    loss, gradient = jax.value_and_grad(
        lambda p: bce_loss(module, p, inputs, targets, negatives, key if module.config.dropout else None)
    )(params)
    updates, state = optax.adam(module.config.learning_rate).update(gradient, state, params)
    return optax.apply_updates(params, updates), state, loss


def train_sasrec(sequences: Sequence[Sequence[int]], config: SasrecConfig) -> tuple[Any, list[float]]:
    """Trains on sequences: every item but the first is a target.

    Returns:
        The parameters, and the mean loss of each epoch.

    Raises:
        ValueError: nothing to train on, or items outside the range.
    """
    sequences = [tuple(sequence) for sequence in sequences if len(sequence) > 1]
    if not sequences:
        msg = "No sequence has two items; there is nothing to train SASRec on."
        raise ValueError(msg)
    outside = [item for sequence in sequences for item in sequence if not 0 <= item < config.num_items]
    if outside:
        msg = f"Item {outside[0]} is outside 0 to {config.num_items - 1}."
        raise ValueError(msg)
    kept = [sequence[-config.max_length - 1 :] for sequence in sequences]
    inputs, targets = _pad([sequence[:-1] for sequence in kept], config), _pad([s[1:] for s in kept], config)
    module = Sasrec(config)
    key, init_key = jax.random.split(jax.random.key(config.seed))
    params = module.init(init_key, jnp.asarray(inputs[:1]))["params"]
    state = optax.adam(config.learning_rate).init(params)
    rng = np.random.default_rng(config.seed)
    size = min(config.batch_size, len(kept))
    history = []
    for epoch in range(config.epochs):
        order, losses = rng.permutation(len(kept)), []
        # The rows that do not fill a batch wait for the next epoch's order, so that there is one shape.
        for start in range(0, len(kept) - size + 1, size):
            rows = order[start : start + size]
            negatives = _negatives(rng, inputs[rows], targets[rows], config)
            key, dropout_key = jax.random.split(key)
            params, state, loss = _step(module, params, state, inputs[rows], targets[rows], negatives, dropout_key)
            losses.append(loss)
        history.append(float(np.mean([float(loss) for loss in losses])))
        logger.info("SASRec epoch %d of %d: loss %.4f", epoch + 1, config.epochs, history[-1])
    return params, history


def _negatives(
    rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray, config: SasrecConfig
) -> np.ndarray:
    """One item for each target that the sequence does not hold."""
    drawn = rng.integers(0, config.num_items, targets.shape, np.int32)
    own = np.concatenate([inputs, targets], axis=1)
    for _ in range(100):
        clash = (drawn[:, :, None] == own[:, None, :]).any(-1)
        if not clash.any():
            return drawn
        drawn[clash] = rng.integers(0, config.num_items, int(clash.sum()), np.int32)
    msg = f"The sequences hold nearly all of the {config.num_items} items; no negatives could be drawn."
    raise ValueError(msg)


def rank_next(
    params: Any, config: SasrecConfig, histories: Sequence[Sequence[int]]
) -> Float[np.ndarray, "n items"]:
    """Scores of all items after each history."""
    states: Any = Sasrec(config).apply({"params": params}, jnp.asarray(_pad(histories, config)))
    last = np.array([min(len(h), config.max_length) - 1 for h in histories])
    return np.asarray(states[np.arange(len(last)), last] @ params["items"]["embedding"][:-1].T)
