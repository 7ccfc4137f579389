"""Owns hybrid prompts: tokens whose input embedding is a projected item embedding.

Items are tokens of their own, numbered after the model's vocabulary, so that texts, requests, batches and the whole
of the library stay as they are; only `apply` knows that the embedding of token `first_item + i` is
`projector(item_embeddings[i])`. The projector is trained with LoRA. It stands in the adapter's `params` beside
"layers", so that right-hand sides, curvatures and changes cover it like any other number of the adapter.

As in LLaRA the projector is a linear layer, GELU and a linear layer, and item embeddings are those of a frozen
sequential recommender. Differs from LLaRA: projector and LoRA are trained together from the first step on, where
LLaRA trains on placeholders and on embeddings in turn, with a growing share of the latter; that curriculum would
make the objective depend on the step, and so no sum over examples.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments.llara.prepare import item_text
from llmeraser_jax.lora import Lora
from llmeraser_jax.models import Model, ModelConfig
from llmeraser_jax.models.decoder import bind
from llmeraser_jax.models.layers import PRECISION
from llmeraser_jax.parallel import replicate
from llmeraser_jax.types import BaseParams, Key

PROJECTOR = "projector"
ITEMS = "item_embeddings"


def load_item_embeddings(path: Path, num_items: int) -> Float[np.ndarray, "items size"]:
    """The table of item embeddings in an `.npz` with one array, without its padding row.

    Args:
        path: the file; arrays of objects, which only pickle could read, are refused.
        num_items: rows needed; a row after them is the padding item's and is dropped.

    Raises:
        ValueError: another suffix, several arrays, or a table of another size.
    """
    if path.suffix != ".npz":
        msg = f"{path}: item embeddings are read from .npz files only (other kinds would have to be unpickled)."
        raise ValueError(msg)
    with np.load(path, allow_pickle=False) as archive:
        if len(archive.files) != 1:
            msg = f"{path} holds {', '.join(archive.files)}; expected one array."
            raise ValueError(msg)
        table = np.asarray(archive[archive.files[0]], np.float32)
    if table.ndim != 2 or len(table) not in (num_items, num_items + 1) or not np.all(np.isfinite(table)):
        msg = (
            f"{path}: the table has shape {table.shape}; expected {num_items} finite rows, or one more for padding."
        )
        raise ValueError(msg)
    return table[:num_items]


def with_item_tokens(tokenizer: Any, num_items: int) -> tuple[Any, int]:
    """A copy of a tokenizer that reads every `prompts.item_text` as one token, and the first such token.

    Raises:
        ValueError: the tokenizer has such tokens already, or numbers them with gaps.
    """
    extended = copy.deepcopy(tokenizer)
    first = len(extended)
    added = extended.add_tokens([item_text(item) for item in range(num_items)])
    ids = extended.convert_tokens_to_ids([item_text(0), item_text(num_items - 1)])
    if added != num_items or ids != [first, first + num_items - 1]:
        msg = f"{added} of {num_items} item tokens could be added to the tokenizer, as {ids}; expected {first} on."
        raise ValueError(msg)
    return extended, first


def init_projector(key: Key, item_size: int, width: int) -> dict[str, dict[str, Array]]:
    """Two linear layers, `item_size -> width -> width`, with PyTorch's uniform(-1/sqrt(in), 1/sqrt(in))."""
    params = {}
    for name, size, layer_key in zip(("in", "out"), (item_size, width), jax.random.split(key), strict=True):
        kernel_key, bias_key = jax.random.split(layer_key)
        bound = 1 / math.sqrt(size)
        params[name] = {
            "kernel": jax.random.uniform(kernel_key, (size, width), jnp.float32, -bound, bound),
            "bias": jax.random.uniform(bias_key, (width,), jnp.float32, -bound, bound),
        }
    return params


def project_items(projector: Any, embeddings: Float[Array, "*lead size"]) -> Float[Array, "*lead width"]:
    """`out(gelu(in(x)))`, GELU exact as PyTorch's default."""

    def linear(x, layer):
        dtype = jnp.promote_types(x.dtype, layer["kernel"].dtype)
        x = jnp.einsum("...n,nm->...m", x.astype(dtype), layer["kernel"].astype(dtype), precision=PRECISION)
        return x + layer["bias"]

    return linear(jax.nn.gelu(linear(embeddings, projector["in"]), approximate=False), projector["out"])


def split_base(base: BaseParams) -> tuple[BaseParams, Array]:
    """The decoder's base, and the table of item embeddings."""
    return {name: leaf for name, leaf in base.items() if name != ITEMS}, base[ITEMS]


def split_adapter(adapter: Lora) -> tuple[Lora, Any]:
    """The decoder's LoRA, and the projector."""
    layers = {name: leaves for name, leaves in adapter.params.items() if name != PROJECTOR}
    return dataclasses.replace(adapter, params=layers), adapter.params[PROJECTOR]


def embed(
    base: BaseParams, adapter: Lora, tokens: Int[Array, "batch time"], first_item: int
) -> Float[Array, "batch time width"]:
    """Input embeddings: the base's for tokens below `first_item`, projected item embeddings from there on."""
    decoder_base, items = split_base(base)
    table = decoder_base["embed_tokens"]["embedding"]
    is_item = tokens >= first_item
    words = jnp.take(table, jnp.where(is_item, 0, tokens), axis=0)
    projected = project_items(
        adapter.params[PROJECTOR], jnp.take(items, jnp.where(is_item, tokens - first_item, 0), axis=0)
    )
    return jnp.where(is_item[..., None], projected, words.astype(projected.dtype))


@dataclasses.dataclass(frozen=True)
class ApplyHybrid:
    """`models.ApplyDecoder` for prompts with item tokens; hashable, equal for equal models.

    Attributes:
        config: the decoder.
        first_item: the token of item 0.
    """

    config: ModelConfig
    first_item: int

    def __call__(
        self,
        base: BaseParams,
        lora: Lora,
        tokens: Int[Array | np.ndarray, "batch time"],
        attention_mask: Int[Array | np.ndarray, "batch time"],
        positions: Int[Array | np.ndarray, "batch response"] | None = None,
    ) -> Float[Array, "batch any_time vocab"]:
        """Next-token logits over the base's own vocabulary: items are read, never generated."""
        tokens = jnp.asarray(tokens)
        decoder_base, _ = split_base(base)
        module, variables = bind(self.config, decoder_base, split_adapter(lora)[0])
        positions = None if positions is None else jnp.asarray(positions)
        embeds = embed(base, lora, tokens, self.first_item)
        return cast(Array, module.apply(variables, tokens, attention_mask, positions, embeds))


@dataclasses.dataclass(frozen=True)
class MeanItemEmbedding:
    """Embeds a prompt as the mean frozen embedding of its history's items; what RecEraser divides rows by.

    Hashable, equal for equal models. Nearer to the source than the text's embedding: it divides by embeddings of a
    recommender trained for that. Every template names the history before the candidates, which are drawn at random
    and would be most of a mean over all items.

    Attributes:
        first_item: the token of item 0.
        num_candidates: so many items at a prompt's end are no history.
    """

    first_item: int
    num_candidates: int

    def __call__(
        self,
        base: BaseParams,
        tokens: Int[Array, "batch time"],
        attention_mask: Int[Array, "batch time"],
        last: Int[Array, " batch"],
    ) -> Float[Array, "batch size"]:
        """Means over the history's items up to index `last`; zeros for a prompt that shows none."""
        items = base[ITEMS]
        before = jnp.arange(tokens.shape[1]) <= last[:, None]
        named = before & (tokens >= self.first_item) & (attention_mask > 0)
        from_the_end = jnp.cumsum(named[:, ::-1], axis=1)[:, ::-1]
        history = (named & (from_the_end > self.num_candidates))[..., None]
        found = jnp.take(items, jnp.maximum(tokens - self.first_item, 0), axis=0)
        return jnp.sum(jnp.where(history, found, 0), axis=1) / jnp.maximum(jnp.sum(history, axis=1), 1)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class HybridModel(Model):
    """A base with a frozen table of item embeddings under `item_embeddings`, and item tokens in its tokenizer.

    Attributes:
        first_item: the token of item 0.
    """

    first_item: int

    @property
    def apply(self) -> Any:
        """An `ApplyHybrid`."""
        return ApplyHybrid(self.config, self.first_item)

    @property
    def adapter_extras(self) -> tuple[str, ...]:
        """The projector."""
        return (PROJECTOR,)

    def init_lora(self, key: Key, config: Any) -> Lora:
        """A fresh LoRA with a fresh projector beside its layers."""
        lora_key, projector_key = jax.random.split(key)
        lora = super().init_lora(lora_key, config)
        projector = init_projector(projector_key, self.base[ITEMS].shape[1], self.config.width)
        return dataclasses.replace(lora, params={**lora.params, PROJECTOR: projector})


def make_hybrid(model: Model, item_embeddings: Float[np.ndarray, "items size"]) -> HybridModel:
    """A model that reads the items of a table.

    Args:
        model: a text model with its tokenizer.
        item_embeddings: one row for each item, no padding row.
    """
    tokenizer, first_item = with_item_tokens(model.tokenizer, len(item_embeddings))
    items = replicate(jnp.asarray(item_embeddings, jnp.float32), model.mesh)
    return HybridModel(
        config=model.config,
        base={**model.base, ITEMS: items},
        tokenizer=tokenizer,
        path=model.path,
        mesh=model.mesh,
        first_item=first_item,
    )
