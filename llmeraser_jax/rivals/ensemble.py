"""Owns predictions by several adapters at once: the ensemble as a pytree, its gate, and a model that reads it.

An `Ensemble` goes where an adapter goes, with `EnsembleModel` in the place of its model: `apply` returns normalised
log-probabilities, which as logits mean the same distribution, so that losses, KL and AUC need no second code path.
The members run one after the other; memory is one member's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llmeraser_jax.models import ModelConfig
from llmeraser_jax.models.decoder import Decoder, bind, token_positions
from llmeraser_jax.types import BaseParams, LoraParams

AGGREGATIONS = ("probabilities", "log-probabilities")


@dataclasses.dataclass(frozen=True)
class MeanHiddenState:
    """Embeds a prompt as the mean, over its tokens, of the base model's last hidden state; hashable.

    Attributes:
        config: the base model's.
    """

    config: ModelConfig

    def __call__(
        self,
        base: BaseParams,
        tokens: Int[Array, "batch time"],
        attention_mask: Int[Array, "batch time"] | Bool[Array, "batch time"],
        last: Int[Array, " batch"],
        images: Float[Array, "batch images features size"] | None = None,
    ) -> Float[Array, "batch width"]:
        """Embeddings of the tokens up to and including index `last`; causality hides all later ones."""
        module, variables = bind(self.config, base, None)
        valid = jnp.asarray(attention_mask).astype(bool)
        where = token_positions(valid)
        call = (tokens, where, where, valid, None, None)
        hidden: Any = module.apply(variables, *call, images=images, method=Decoder._hidden)
        inside = (valid & (jnp.arange(tokens.shape[1]) <= last[:, None]))[..., None]
        return jnp.sum(jnp.where(inside, hidden[0], 0), axis=1) / jnp.sum(inside, axis=1)


@flax.struct.dataclass
class AttentionGate:
    """Weights of the members for a prompt: `softmax_k h' relu(W e + V c_k + b)`.

    Attributes:
        centre, scale: what embeddings are standardised with.
        centroids: c_k, the mean standardised embedding of each member's examples.
        query: W.
        key: V.
        bias: b.
        out: h.
        embed: `(base, tokens, attention_mask, last, *pictures) -> [batch, width]`; hashable.
    """

    centre: Float[Array, " width"]
    scale: Float[Array, ""]
    centroids: Float[Array, "members width"]
    query: Float[Array, "hidden width"]
    key: Float[Array, "hidden width"]
    bias: Float[Array, " hidden"]
    out: Float[Array, " hidden"]
    embed: Callable[..., Array] = flax.struct.field(pytree_node=False)

    def log_weights(self, embeddings: Float[Array, "batch width"]) -> Float[Array, "batch members"]:
        """Log of each member's weight; the weights of an example sum to 1."""
        standard = (embeddings - self.centre) / self.scale
        queries = jnp.einsum("bd,hd->bh", standard, self.query)
        keys = jnp.einsum("md,hd->mh", self.centroids, self.key)
        hidden = jax.nn.relu(queries[:, None] + keys + self.bias)
        return jax.nn.log_softmax(jnp.einsum("bmh,h->bm", hidden, self.out), axis=-1)


@flax.struct.dataclass
class Ensemble:
    """Several adapters that predict together.

    Attributes:
        members: adapters stacked: leaves [members, ...].
        gate: weighs the members by the prompt; None weighs them equally.
        aggregation: of predictions at each response position: the weighted mean of `probabilities`, or of
            `log-probabilities`, normalised again.
    """

    members: LoraParams
    gate: AttentionGate | None = None
    aggregation: Literal["probabilities", "log-probabilities"] = flax.struct.field(
        pytree_node=False, default="probabilities"
    )

    @property
    def num_members(self) -> int:
        """How many adapters there are."""
        return jax.tree.leaves(self.members)[0].shape[0]

    def member(self, k: int) -> LoraParams:
        """The k-th adapter."""
        return jax.tree.map(lambda leaf: leaf[k], self.members)

    def nothing_added(self, shape: Sequence[int], dtype: Any) -> Array:
        """What `add` begins with."""
        return jnp.full(shape, -jnp.inf if self.aggregation == "probabilities" else 0.0, dtype)

    def add(
        self,
        total: Float[Array, "batch any_time vocab"],
        log_weight: Float[Array, " batch"],
        log_probs: Float[Array, "batch any_time vocab"],
    ) -> Float[Array, "batch any_time vocab"]:
        """One member's share of the prediction, added to those before; of all, `log_softmax` is the ensemble's."""
        log_weight = log_weight[:, None, None]
        if self.aggregation == "probabilities":
            return jnp.logaddexp(total, log_weight + log_probs)
        return total + jnp.exp(log_weight) * log_probs


def make_ensemble(
    members: Sequence[LoraParams], *, gate: AttentionGate | None = None, aggregation: str = "probabilities"
) -> Ensemble:
    """Stacks adapters of one shape.

    Raises:
        ValueError: no member, an unknown aggregation, or a gate for another number of members.
    """
    if not members:
        msg = "An ensemble needs at least one member."
        raise ValueError(msg)
    if aggregation not in AGGREGATIONS:
        msg = f"aggregation is {aggregation!r}; it must be one of {', '.join(AGGREGATIONS)}."
        raise ValueError(msg)
    if gate is not None and len(gate.centroids) != len(members):
        msg = f"The gate weighs {len(gate.centroids)} members; the ensemble has {len(members)}."
        raise ValueError(msg)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    return Ensemble(members=stacked, gate=gate, aggregation=aggregation)  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass(frozen=True)
class ApplyEnsemble:
    """`(base, params, tokens, attention_mask, positions, *pictures) -> logits` of adapters and ensembles; hashable.

    Attributes:
        apply: the same for one adapter.
    """

    apply: Callable[..., Array]

    def __call__(
        self,
        base: BaseParams,
        params: Any,
        tokens: Int[Array | np.ndarray, "batch time"],
        attention_mask: Int[Array | np.ndarray, "batch time"] | Bool[Array | np.ndarray, "batch time"],
        positions: Int[Array | np.ndarray, "batch response"] | None = None,
        *pictures: Float[Array | np.ndarray, "batch images features size"],
    ) -> Float[Array, "batch any_time vocab"]:
        """An adapter's logits, or an ensemble's log-probabilities.

        A gated ensemble reads the prompt that it weighs its members by off `positions`: it ends at the first of
        them, as in every batch whose loss is on the response alone.

        Raises:
            ValueError: a gated ensemble without positions.
        """
        if not isinstance(params, Ensemble):
            return self.apply(base, params, tokens, attention_mask, positions, *pictures)
        tokens, attention_mask = jnp.asarray(tokens), jnp.asarray(attention_mask)
        if params.gate is not None and positions is None:
            msg = "A gated ensemble needs positions; the first of each row says where its prompt ends."
            raise ValueError(msg)
        last = jnp.zeros(tokens.shape[0], jnp.int32) if positions is None else jnp.asarray(positions)[:, 0]
        log_weights = self.log_weights(base, params, tokens, attention_mask, last, *pictures)
        return self.mixed_log_probs(base, params, log_weights, tokens, attention_mask, positions, *pictures)

    def log_weights(
        self, base: BaseParams, params: Ensemble, tokens: Array, attention_mask: Array, last: Array, *pictures: Any
    ) -> Float[Array, "members batch"]:
        """Log of each member's weight, for prompts that end at index `last`."""
        if params.gate is None:
            return jnp.full((params.num_members, tokens.shape[0]), -jnp.log(params.num_members))
        return params.gate.log_weights(params.gate.embed(base, tokens, attention_mask, last, *pictures)).T

    def mixed_log_probs(
        self,
        base: BaseParams,
        params: Ensemble,
        log_weights: Float[Array, "members batch"],
        tokens: Array,
        attention_mask: Array,
        positions: Any,
        *pictures: Any,
    ) -> Float[Array, "batch any_time vocab"]:
        """The members' weighted mean, one member at a time."""

        def member_log_probs(member):
            logits = self.apply(base, member, tokens, attention_mask, positions, *pictures)
            return jax.nn.log_softmax(logits, axis=-1)

        def add(total, member_and_weight):
            member, log_weight = member_and_weight
            return params.add(total, log_weight, member_log_probs(member)), None

        shape = jax.eval_shape(member_log_probs, params.member(0))
        start = params.nothing_added(shape.shape, shape.dtype)
        total, _ = jax.lax.scan(add, start, (params.members, log_weights.astype(shape.dtype)))
        return jax.nn.log_softmax(total, axis=-1)
