"""Owns greedy generation by an ensemble: every new token is the most probable one under all members together.

There is no key/value cache: each new token is a forward pass of every member over the whole text. A gated ensemble
is weighed once, by the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from llmeraser_jax.baselines.ensemble import ApplyEnsemble, Ensemble, EnsembleModel
from llmeraser_jax.types import BaseParams

_LENGTH_STEP = 32  # text lengths are rounded up to a multiple of this, so that few shapes are compiled


def generate_ensemble(
    model: EnsembleModel,
    ensemble: Ensemble,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    batch_size: int = 16,
    stop_ids: Sequence[int] | None = None,
) -> list[list[int]]:
    """What `models.generate` is for one adapter.

    Args:
        model: the base, reading ensembles.
        ensemble: the adapters.
        prompts: token ids, of any lengths.
        max_new_tokens: the most tokens to add to each prompt.
        batch_size: prompts computed together.
        stop_ids: tokens that end a text; None is the model's end-of-sequence tokens.

    Returns:
        New tokens of each prompt, in the order given, without the stop token.

    Raises:
        ValueError: an empty prompt, or a count below 1.
    """
    if max_new_tokens < 1 or batch_size < 1:
        msg = f"max_new_tokens is {max_new_tokens} and batch_size {batch_size}; both must be at least 1."
        raise ValueError(msg)
    empty = [index for index, prompt in enumerate(prompts) if not len(prompt)]
    if empty:
        msg = f"Prompt {empty[0]} is empty; every prompt needs a token."
        raise ValueError(msg)
    stops = np.asarray(model.config.eos_token_ids if stop_ids is None else list(stop_ids), np.int32)
    longest = max((len(prompt) for prompt in prompts), default=0) + max_new_tokens
    time = -(-longest // _LENGTH_STEP) * _LENGTH_STEP
    out: list[list[int]] = []
    for start in range(0, len(prompts), batch_size):
        rows = prompts[start : start + batch_size]
        tokens = np.zeros((batch_size, time), np.int32)
        lengths = np.ones(batch_size, np.int32)  # rows that pad the batch hold one token and are dropped
        for k, row in enumerate(rows):
            tokens[k, : len(row)], lengths[k] = row, len(row)
        new, counts = jax.device_get(
            _decode(model.apply, model.base, ensemble, tokens, lengths, stops, max_new_tokens=max_new_tokens)
        )
        out.extend(new[k, : counts[k]].tolist() for k in range(len(rows)))
    return out


@partial(jax.jit, static_argnames=("apply", "max_new_tokens"))
def _decode(
    apply: ApplyEnsemble,
    base: BaseParams,
    ensemble: Ensemble,
    tokens: Int[Array | np.ndarray, "batch time"],
    lengths: Int[Array | np.ndarray, " batch"],
    stop_ids: Int[Array | np.ndarray, " stops"],
    *,
    max_new_tokens: int,
) -> tuple[Int[Array, "batch new"], Int[Array, " batch"]]:
    """New tokens (0 after the end), and how many each row has, the stop token not counted."""
    tokens, lengths = jnp.asarray(tokens), jnp.asarray(lengths)
    rows = jnp.arange(tokens.shape[0])

    def mask_of(count):
        return jnp.arange(tokens.shape[1]) < (lengths + count)[:, None]

    log_weights = apply.log_weights(base, ensemble, tokens, mask_of(0), lengths - 1)

    def unfinished(state):
        step, _, _, _, done = state
        return (step < max_new_tokens) & ~jnp.all(done)

    def advance(state):
        step, text, out, counts, done = state
        last = lengths + step - 1
        log_probs = apply.mixed_log_probs(base, ensemble, log_weights, text, mask_of(step), last[:, None])
        token = jnp.argmax(log_probs[:, 0], axis=-1).astype(jnp.int32)
        done = done | jnp.isin(token, stop_ids)
        token = jnp.where(done, 0, token)
        text = text.at[rows, last + 1].set(token)
        return step + 1, text, out.at[:, step].set(token), counts + ~done, done

    out = jnp.zeros((tokens.shape[0], max_new_tokens), jnp.int32)
    counts, done = jnp.zeros_like(lengths), jnp.zeros(tokens.shape[0], bool)
    state = jax.lax.while_loop(unfinished, advance, (jnp.int32(0), tokens, out, counts, done))
    return state[2], state[3]
