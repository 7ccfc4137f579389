"""A language model of two matrices, small enough that its loss is a few lines of numpy-like code."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from llmeraser_jax.data import BucketShape, EncodedExample, Recipe, TokenDataset

VOCAB, WIDTH = 11, 5


@flax.struct.dataclass
class ToyLora:
    """`a` [rank, width], `b` [vocab, rank]."""

    params: dict


@dataclasses.dataclass(frozen=True)
class ApplyToy:
    """Logits of the next token from the present one alone: `(W + B A) embedding`."""

    def __call__(self, base, lora, tokens, attention_mask, positions=None):
        if positions is not None:
            tokens = jnp.take_along_axis(tokens, positions, axis=1)
        weight = base["head"] + lora.params["b"] @ lora.params["a"]
        return jnp.einsum("btd,vd->btv", base["embedding"][tokens], weight)


@dataclasses.dataclass(frozen=True)
class ToyModel:
    """What `finetune` needs of a model."""

    base: dict
    apply: Any = ApplyToy()
    mesh: Any = None


def toy_model(mesh=None) -> ToyModel:
    rng = np.random.default_rng(0)
    base = {"embedding": rng.normal(size=(VOCAB, WIDTH)), "head": rng.normal(size=(VOCAB, WIDTH))}
    return ToyModel(base=jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), base), mesh=mesh)


def toy_lora(rank=2, scale=0.3) -> ToyLora:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(rank, WIDTH)), rng.normal(size=(VOCAB, rank))
    return ToyLora(params={"a": jnp.asarray(scale * a, jnp.float32), "b": jnp.asarray(scale * b, jnp.float32)})


def toy_dataset(n=10, buckets=((6, 3), (12, 6))) -> TokenDataset:
    """Random sequences, the loss on the last 1 to 3 tokens; the longest need the second bucket."""
    rng = np.random.default_rng(2)
    encoded = []
    for i in range(n):
        length, response = (5 + i % 7), 1 + i % 3
        encoded.append(
            EncodedExample(
                id=str(i),
                tokens=rng.integers(0, VOCAB, length).astype(np.int32),
                response_start=length - response,
                loss_mask=np.arange(length) >= length - response,
            )
        )
    recipe = Recipe(template="plain", response_prefix="", add_bos=False)
    return TokenDataset(encoded, recipe, buckets=[BucketShape(time=t, response=r) for t, r in buckets])


def dense_loss(model: ToyModel, lora: ToyLora, dataset: TokenDataset, indices, l2: float):
    """`(1/B) sum of l(z_i)` example by example, without padding, batching or masks."""
    weight = model.base["head"] + lora.params["b"] @ lora.params["a"]
    total = 0.0
    for i in indices:
        example = dataset.encoded[int(i)]
        before = example.tokens[example.loss_start - 1 : -1]
        log_probs = jax.nn.log_softmax(model.base["embedding"][before] @ weight.T, axis=-1)
        total += -jnp.mean(log_probs[jnp.arange(len(before)), example.response])
    norm = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(lora))
    return total / len(indices) + 0.5 * l2 * norm
