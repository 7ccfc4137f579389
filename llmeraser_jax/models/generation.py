"""Owns greedy text generation with a key/value cache."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llmeraser_jax.models.config import ModelConfig
from llmeraser_jax.models.decoder import Decoder, KVCache, bind, token_positions
from llmeraser_jax.models.loading import Model
from llmeraser_jax.parallel import to_host
from llmeraser_jax.types import BaseParams, LoraParams

_log = logging.getLogger(__name__)

# Prompt lengths are rounded up to a multiple of this, so that few shapes are compiled.
_LENGTH_STEP = 32


def generate(
    model: Model,
    lora: LoraParams | None,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    batch_size: int = 16,
    stop_ids: Sequence[int] | None = None,
    images: Sequence[np.ndarray] | np.ndarray | None = None,
) -> list[list[int]]:
    """Greedy decoding until a stop token or `max_new_tokens`.

    Args:
        model: base and configuration.
        lora: a `lora.Lora`, or None for the base alone.
        prompts: token ids, of any lengths.
        max_new_tokens: the most tokens to add to each prompt.
        batch_size: prompts computed together; results do not depend on it beyond rounding.
        stop_ids: tokens that end a text; None is the model's end-of-sequence tokens.
        images: features [images, features, size] of each prompt's pictures, see `models.vision`; None: no prompt
            has any.

    Returns:
        New tokens of each prompt, in the order given, without the stop token.

    Raises:
        ValueError: an empty prompt, a token outside the vocabulary, a count below 1, or pictures that do not fill
            the image tokens of their prompt.
    """

    def decode(tokens, mask, stops, *pictures):
        return greedy_decode(model.config, model.base, lora, tokens, mask, stops, max_new_tokens, *pictures)

    return generate_batches(
        decode, model.config, prompts, max_new_tokens, batch_size=batch_size, stop_ids=stop_ids, images=images
    )


def generate_batches(
    decode: Callable[..., tuple[Array, Array]],
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    batch_size: int,
    stop_ids: Sequence[int] | None,
    images: Sequence[np.ndarray] | np.ndarray | None = None,
) -> list[list[int]]:
    """`generate` for any decoding function.

    Args:
        decode: `(tokens, mask, stop_ids, *pictures) -> (new, lengths)`, as `greedy_decode` with the rest given.
        config: the model's.
        prompts, max_new_tokens, batch_size, stop_ids, images: see `generate`.

    Raises:
        ValueError: see `generate`.
    """
    if max_new_tokens < 1 or batch_size < 1:
        msg = f"max_new_tokens is {max_new_tokens} and batch_size {batch_size}; both must be at least 1."
        raise ValueError(msg)
    for index, prompt in enumerate(prompts):
        outside = [token for token in prompt if not 0 <= token < config.vocab_size]
        if not prompt or outside:
            found = f"holds {outside[:3]} outside the vocabulary" if outside else "is empty"
            msg = f"Prompt {index} {found}; every prompt needs tokens from 0 to {config.vocab_size - 1}."
            raise ValueError(msg)
    _check_images(config, prompts, images)
    most = max((len(pictures) for pictures in images), default=0) if images is not None else 0
    longest = max((len(prompt) for prompt in prompts), default=0) + max_new_tokens
    if longest > config.max_position:
        _log.warning("Texts may reach %d tokens; the model was made for %d.", longest, config.max_position)
    stops = np.asarray(config.eos_token_ids if stop_ids is None else list(stop_ids), np.int32)
    batch_size = min(batch_size, len(prompts))
    # Similar lengths together: a batch is as long as its longest prompt.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    out: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size or 1):
        indices = order[start : start + batch_size]
        rows = [list(prompts[index]) for index in indices]
        rows += [rows[-1]] * (batch_size - len(rows))  # one shape for all batches
        tokens, mask = pad_left(rows)
        pictures = ()
        if most:
            assert images is not None
            chosen = [images[index] for index in indices]
            pictures = (_pad_images(chosen + [chosen[-1]] * (batch_size - len(chosen)), most),)
        new, lengths = to_host(decode(tokens, mask, stops, *pictures))
        for row, index in enumerate(indices):
            out[index] = new[row, : lengths[row]].tolist()
    return out


def _check_images(
    config: ModelConfig, prompts: Sequence[Sequence[int]], images: Sequence[np.ndarray] | np.ndarray | None
) -> None:
    """Refuses pictures that do not fill the image tokens of their prompts."""
    vision = config.vision
    if images is not None and (vision is None or len(images) != len(prompts)):
        what = f"pictures of {len(images)} prompts" if vision else f"{len(images)} sets of pictures"
        msg = f"There are {len(prompts)} prompts of a {'LLaVA' if vision else 'text'} model, and {what}."
        raise ValueError(msg)
    if vision is None:
        return
    size = (vision.num_features, vision.feature_width)
    for index, prompt in enumerate(prompts):
        shape = (0, *size) if images is None else np.shape(images[index])
        wanted, filled = sum(token == vision.image_token for token in prompt), int(np.prod(shape[:2]))
        # An array with one entry for each place may hold zeros after a prompt's last picture.
        if shape[1:] != size or wanted % size[0] or wanted > filled:
            msg = (
                f"Prompt {index} has {wanted} image tokens and pictures of shape {list(shape)}; expected "
                f"{list(size)} for each {size[0]} tokens {vision.image_token}."
            )
            raise ValueError(msg)


def _pad_images(images: Sequence[np.ndarray], count: int) -> np.ndarray:
    """Each prompt's pictures, and zeros up to `count` of them."""
    return np.stack([np.pad(here, ((0, count - len(here)), (0, 0), (0, 0))) for here in images])


def pad_left(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows as one array with padding on the left, and the mask of real tokens."""
    time = -(-max(len(row) for row in rows) // _LENGTH_STEP) * _LENGTH_STEP
    tokens = np.zeros((len(rows), time), np.int32)
    mask = np.zeros((len(rows), time), bool)
    for index, row in enumerate(rows):
        tokens[index, time - len(row) :] = row
        mask[index, time - len(row) :] = True
    return tokens, mask


@functools.partial(jax.jit, static_argnames=("config", "max_new_tokens"))
def greedy_decode(
    config: ModelConfig,
    base: BaseParams,
    lora: LoraParams | None,
    tokens: Int[Array | np.ndarray, "batch time"],
    attention_mask: Int[Array | np.ndarray, "batch time"] | Bool[Array | np.ndarray, "batch time"],
    stop_ids: Int[Array | np.ndarray, " stops"],
    max_new_tokens: int,
    images: Float[Array | np.ndarray, "batch images features size"] | None = None,
) -> tuple[Int[Array, "batch new"], Int[Array, " batch"]]:
    """Greedy continuation of padded prompts; padding may stand on either side.

    Args:
        config: the model.
        base: frozen parameters.
        lora: adapter or None.
        tokens: padded prompts.
        attention_mask: nonzero for a real token; each row has at least one.
        stop_ids: tokens that end a text.
        max_new_tokens: the most tokens to add.
        images: features of each prompt's pictures; None for prompts of text.

    Returns:
        New tokens (0 after the end), and how many each row has, the stop token not counted.
    """
    return greedy_search(
        functools.partial(append, config, base, lora, images=images),
        functools.partial(empty_cache, config, bind(config, base, lora)[0].dtype),
        tokens,
        attention_mask,
        stop_ids,
        max_new_tokens,
        make_stale(config),
    )


def make_stale(config: ModelConfig) -> Callable[[Array], Array] | None:
    """`stale` of `greedy_search`: whether rotary positions change at a text's length."""
    ropes = [rope for rope in config.ropes if rope is not None and rope.depends_on_length]
    if not ropes:
        return None
    return lambda lengths: functools.reduce(jnp.logical_or, (rope.changes_at(lengths) for rope in ropes))


def empty_cache(config: ModelConfig, dtype: Any, batch: int, slots: int) -> KVCache:
    """An empty cache."""
    shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
    return KVCache(keys=jnp.zeros(shape, dtype), values=jnp.zeros(shape, dtype))


def append(
    config: ModelConfig,
    base: BaseParams,
    lora: LoraParams | None,
    cache: KVCache,
    *call: Any,
    images: Float[Array | np.ndarray, "batch images features size"] | None = None,
) -> tuple[Array, KVCache]:
    """Reads more tokens into a cache.

    Args:
        config: the model.
        base: frozen parameters.
        lora: adapter or None.
        cache: keys and values of the tokens read before.
        call: tokens, where, key_positions, key_valid, write_at and positions of `Decoder.decode`.
        images: features of the texts' pictures, which a text that is read from its beginning shows; a single token
            is a new one, and none of a picture's.

    Returns:
        Logits [batch, len(positions), vocab], and the cache.
    """
    module, variables = bind(config, base, lora)
    tokens, where, key_positions, key_valid, write_at, positions = call
    shown = None if images is None or tokens.shape[1] == 1 else jnp.asarray(images)
    inputs = (tokens, where, key_positions, key_valid, cache, write_at, positions)
    read: Any = module.apply(variables, *inputs, images=shown, method=Decoder.decode)
    return read


def greedy_search(
    append: Callable[..., tuple[Array, Any]],
    make_cache: Callable[[int, int], Any],
    tokens: Int[Array | np.ndarray, "batch time"],
    attention_mask: Int[Array | np.ndarray, "batch time"] | Bool[Array | np.ndarray, "batch time"],
    stop_ids: Int[Array | np.ndarray, " stops"],
    max_new_tokens: int,
    stale: Callable[[Array], Array] | None = None,
) -> tuple[Int[Array, "batch new"], Int[Array, " batch"]]:
    """`greedy_decode` for any function that reads tokens into a cache; pure, to be jitted by the caller.

    Args:
        append: `(cache, *call) -> (scores [batch, 1, vocab], cache)`, see `append`; the highest score is next.
        make_cache: `(batch, slots) -> empty cache`.
        tokens, attention_mask, stop_ids, max_new_tokens: see `greedy_decode`.
        stale: `lengths [batch] -> [batch]`: whether a text that reaches this length invalidates the cache, so that
            it is read again from the beginning; None is never.

    Returns:
        See `greedy_decode`.
    """
    valid = jnp.asarray(attention_mask).astype(bool)
    batch, time = valid.shape
    lengths = jnp.sum(valid, axis=1, dtype=jnp.int32)
    where = token_positions(valid)
    # The slots after the prompt hold the new tokens. A slot not written yet has a later position than any
    # query, so causality hides it and the mask need not change from step to step.
    ahead = jnp.arange(max_new_tokens, dtype=jnp.int32)
    key_positions = jnp.concatenate([where, lengths[:, None] + ahead], axis=1)
    key_valid = jnp.concatenate([valid, jnp.ones((batch, max_new_tokens), bool)], axis=1)

    def best_next(cache, new, new_where, write_at, positions):
        scores, cache = append(cache, new, new_where, key_positions, key_valid, write_at, positions)
        return jnp.argmax(scores[:, 0], axis=-1).astype(jnp.int32), cache

    def record(out, counts, done, token, step):
        done = done | jnp.isin(token, stop_ids)
        out = out.at[:, step].set(jnp.where(done, 0, token))
        return out, counts + ~done, done

    last = (time - 1 - jnp.argmax(valid[:, ::-1], axis=1)).astype(jnp.int32)
    empty = make_cache(batch, time + max_new_tokens)
    token, cache = best_next(empty, jnp.asarray(tokens), where, jnp.int32(0), last[:, None])
    out, counts, done = record(
        jnp.zeros((batch, max_new_tokens), jnp.int32),
        jnp.zeros((batch,), jnp.int32),
        jnp.zeros((batch,), bool),
        token,
        0,
    )

    def unfinished(state):
        step, _, _, _, _, done = state
        return (step < max_new_tokens) & ~jnp.all(done)

    def advance(state):
        step, token, cache, out, counts, done = state
        place = (lengths + step - 1)[:, None]
        first = jnp.zeros((batch, 1), jnp.int32)

        def read_one(cache):
            return best_next(cache, token[:, None], place, time + step - 1, first)

        def read_all(cache):
            # Unwritten slots take the last token's position, so that they do not lengthen the text.
            texts = jnp.concatenate([tokens, out], axis=1).astype(jnp.int32)
            return best_next(cache, texts, jnp.minimum(key_positions, place), jnp.int32(0), first + time + step - 1)

        if stale is None:
            token, cache = read_one(cache)
        else:
            token, cache = jax.lax.cond(jnp.any(stale(place[:, 0] + 1) & ~done), read_all, read_one, cache)
        out, counts, done = record(out, counts, done, token, step)
        return step + 1, token, cache, out, counts, done

    state = jax.lax.while_loop(unfinished, advance, (jnp.int32(1), token, cache, out, counts, done))
    return state[3], state[4]
