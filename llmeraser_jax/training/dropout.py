"""Owns LoRA dropout, which only training draws: losses, gradients and curvature elsewhere are without it.

As in PEFT, each adapted linear layer zeroes entries of its adapter's input with a mask of its own, and scales the
others up; the base's input is whole. The masks are drawn anew for every micro-batch from the seed, the step, and
the rows' places in the step, so that a training that was restarted ends with the same adapter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llmeraser_jax.losses import Objective, response_cross_entropy
from llmeraser_jax.types import ExampleStack, Key, LoraParams, PyTree, TokenBatch


@flax.struct.dataclass
class PlacedBatch:
    """Token sequences, and each one's place among the rows of its step.

    On a mesh a device sees its own rows only; the first one's place sets its masks apart from those of the others.
    """

    batch: TokenBatch
    places: Int[Array, "*lead batch"]


@dataclasses.dataclass(frozen=True)
class LogitsWithDropout:
    """`outputs_fn` of training with dropout: its frozen part is the base, and the key of the step.

    Attributes:
        apply: `(base, lora, *batch.inputs, dropout_key=key) -> logits`; hashable.
    """

    apply: Callable[..., Array]

    def __call__(self, frozen: PyTree, lora: LoraParams, placed: PlacedBatch) -> Array:
        base, key = frozen
        batch, key = placed.batch, jax.random.fold_in(key, placed.places[0])
        return self.apply(base, lora, *batch.inputs, dropout_key=key)


def placed_cross_entropy(
    logits: Float[Array, "batch response vocab"], placed: PlacedBatch
) -> Float[Array, " batch"]:
    """`losses.response_cross_entropy` of the batch inside."""
    return response_cross_entropy(logits, placed.batch)


def dropout_objective(apply: Callable[..., Array], base: PyTree, key: Key) -> Objective:
    """The data term of one step's loss, with masks drawn from `key`; for stacks that `with_places` made.

    Args:
        apply: see `LogitsWithDropout`.
        base: frozen parameters.
        key: of the step.
    """
    outputs_fn = LogitsWithDropout(apply)
    return Objective(frozen=(base, key), prior=None, outputs_fn=outputs_fn, output_loss_fn=placed_cross_entropy)


def with_places(stack: ExampleStack) -> ExampleStack:
    """The stack with every row's place in it."""
    batches, start = [], 0
    for batch, weights in zip(stack.batches, stack.weights, strict=True):
        places = start + jnp.arange(weights.size, dtype=jnp.int32).reshape(weights.shape)
        batches.append(PlacedBatch(batch=batch, places=places))
        start += weights.size
    return dataclasses.replace(stack, batches=tuple(batches))


def step_key(seed: int, step: int) -> Key:
    """The key of a step's masks.

    Args:
        seed: of the training.
        step: counted from 0 over all epochs.
    """
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _STREAM), step)


_STREAM = 0x64726F70  # sets these draws apart from the initial adapter's, which come from the same seed
