"""Owns the task's two readings: a score for every candidate, and a generated title matched with the candidates.

Scores read the prompt once into a key/value cache and go on from there, for text and for hybrid prompts alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments.llara.hybrid import ApplyHybrid, embed, split_adapter, split_base
from experiments.llara.prepare import Question, make_example
from llmeraser_jax.data import TokenDataset, encode_examples
from llmeraser_jax.evaluation.tasks import Metric, count_metric, hit_ratio, hit_ratio_of_valid
from llmeraser_jax.models import Model
from llmeraser_jax.models.decoder import Decoder, KVCache, bind, token_positions
from llmeraser_jax.models.generation import empty_cache, make_stale, pad_left
from llmeraser_jax.rivals import Ensemble, ensemble_model
from llmeraser_jax.rivals.ensemble import ApplyEnsemble
from llmeraser_jax.types import LoraParams

_PROMPT_BLOCK = 128  # prompt tokens read at a time
_SLOT_STEP = 64  # the packed titles of a batch are padded to a multiple of this many tokens
HIT_RATIO_SCORED = "HitRatio@1, candidates scored"
HIT_RATIO_GENERATED = "HitRatio@1, generated"
HIT_RATIO_OF_VALID = f"{HIT_RATIO_GENERATED}_of_valid"


@flax.struct.dataclass
class _Packed:
    """The titles of every question one after another, each without its last token, which nothing follows."""

    tokens: Int[Array, "batch slots"]
    owners: Int[Array, "batch slots"]  # which title a token is of; -1 is padding
    places: Int[Array, "batch slots"]  # the token's place in its title
    targets: Int[Array, "batch titles_and_slots"]  # the first token of each title, then what follows each slot
    real: Float[Array, "batch titles_and_slots"]  # 0 for the targets of padding

    @property
    def num_titles(self) -> int:
        return self.targets.shape[1] - self.tokens.shape[1]


def _decoder(apply, base, lora) -> tuple[Decoder, Any]:
    """The decoder and its variables, of text and of hybrid models."""
    if isinstance(apply, ApplyHybrid):
        base, lora = split_base(base)[0], split_adapter(lora)[0]
    return bind(apply.config, base, lora)


def _decode(apply, base, lora, tokens, *call) -> tuple[Any, Any]:
    """`Decoder.decode` of text and of hybrid models: logits and cache."""
    embeds = embed(base, lora, tokens, apply.first_item) if isinstance(apply, ApplyHybrid) else None
    module, variables = _decoder(apply, base, lora)
    return module.apply(variables, tokens, *call, embeds, method=Decoder.decode)


def _grow(cache: KVCache, num_slots: int) -> KVCache:
    return jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, 0), (0, 0), (0, num_slots), (0, 0), (0, 0))), cache)


def _read_prompt(apply, base, lora, tokens, valid) -> tuple[KVCache, Array]:
    """The cache of left-padded prompts, and the logits of the token that follows them [batch, vocab].

    Reads blocks of tokens, each against the keys up to its own end: a pass over all of them at once would compute
    twice the scores, the half that causality hides included, and keep them all at a time.
    """
    batch, time = tokens.shape
    where = token_positions(valid)
    cache: Any = empty_cache(apply.config, _decoder(apply, base, lora)[0].dtype, batch, 0)
    logits: Any = None
    for begin in range(0, time, _PROMPT_BLOCK):
        end = min(begin + _PROMPT_BLOCK, time)
        last = jnp.full((batch, 1), end - begin - 1, jnp.int32)  # padding is on the left
        call = (
            where[:, begin:end],
            where[:, :end],
            valid[:, :end],
            _grow(cache, end - begin),
            jnp.int32(begin),
            last,
        )
        logits, cache = _decode(apply, base, lora, tokens[:, begin:end], *call)
    return cache, logits[:, 0]


def _picked_log_probs(
    apply, base, lora, tokens: Array, valid: Array, packed: _Packed
) -> Float[Array, "batch titles_and_slots"]:
    """Log-probabilities of the targets under one adapter.

    All titles are read in one call: every one starts at the prompt's end, and sees the prompt and itself.
    """
    batch, num_slots = packed.tokens.shape
    time = tokens.shape[1]
    cache, first_logits = _read_prompt(apply, base, lora, tokens, valid)
    where = jnp.sum(valid, axis=1, dtype=jnp.int32)[:, None] + packed.places
    sees_prompt = jnp.broadcast_to(valid[:, None], (batch, num_slots, time))
    sees_title = packed.owners[:, :, None] == packed.owners[:, None, :]
    key_positions = jnp.concatenate([token_positions(valid), where], axis=1)
    key_valid = jnp.concatenate([sees_prompt, sees_title], axis=2)
    call = (where, key_positions, key_valid, _grow(cache, num_slots), jnp.int32(time), None)
    logits, _ = _decode(apply, base, lora, packed.tokens, *call)
    first_targets, targets = jnp.split(packed.targets, [packed.num_titles], axis=1)
    first = jnp.take_along_axis(jax.nn.log_softmax(first_logits, axis=-1), first_targets, axis=1)
    rest = jnp.take_along_axis(logits, targets[..., None], axis=2)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
    return jnp.concatenate([first, rest], axis=1)


@partial(jax.jit, static_argnames="apply")
def _candidate_log_probs(
    apply, base, params, tokens: Int[Array, "batch time"], mask: Int[Array, "batch time"], packed: _Packed
) -> Float[Array, "batch titles"]:
    """`sum_t log p(title_t | prompt, title_<t)`; an ensemble's p is the mean of its members'."""
    valid = mask.astype(bool)
    if isinstance(apply, ApplyEnsemble):

        def add(total, member_and_weight):
            member, log_weight = member_and_weight
            picked = _picked_log_probs(apply.apply, base, member, tokens, valid, packed)
            return jnp.logaddexp(total, log_weight[:, None] + picked), None

        start = jnp.full(packed.targets.shape, -jnp.inf, jnp.float32)
        log_weights = _log_weights(apply, base, params, tokens, mask)
        picked, _ = jax.lax.scan(add, start, (params.members, log_weights.astype(jnp.float32)))
    else:
        picked = _picked_log_probs(apply, base, params, tokens, valid, packed)
    picked = jnp.where(packed.real > 0, picked, 0)
    is_own = packed.owners[:, None, :] == jnp.arange(packed.num_titles)[:, None]
    first, rest = picked[:, : packed.num_titles], picked[:, None, packed.num_titles :]
    return first + jnp.sum(jnp.where(is_own, rest, 0), axis=2)


def _log_weights(apply: ApplyEnsemble, base, params: Ensemble, tokens, mask) -> Array:
    """Log of each member's weight for left-padded prompts [members, batch]."""
    return apply.log_weights(base, params, tokens, mask, jnp.full(tokens.shape[0], tokens.shape[1] - 1, jnp.int32))


def _pack(titles: Sequence[Sequence[np.ndarray]]) -> _Packed:
    """Packs the tokens of the titles of several questions, all with equally many titles."""
    num_titles = len(titles[0])
    longest = max(sum(len(title) - 1 for title in row) for row in titles)
    num_slots = max(-(-longest // _SLOT_STEP), 1) * _SLOT_STEP
    shape = (len(titles), num_slots)
    tokens, places, owners = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    targets = np.zeros((len(titles), num_titles + num_slots), np.int32)
    real = np.zeros(targets.shape, np.float32)
    real[:, :num_titles] = 1
    for k, row in enumerate(titles):
        end = 0
        for c, title in enumerate(row):
            begin, end = end, end + len(title) - 1
            tokens[k, begin:end] = title[:-1]
            owners[k, begin:end] = c
            places[k, begin:end] = np.arange(end - begin)
            targets[k, c] = title[0]
            targets[k, num_titles + begin : num_titles + end] = title[1:]
        real[k, num_titles : num_titles + end] = 1
    return _Packed(*map(jnp.asarray, (tokens, owners, places, targets, real)))


class Scorer:
    """Questions, tokenised once, for any number of adapters of one model.

    Args:
        model: text or hybrid.
        questions: all with equally many titles.
        like: its recipe is used; its tokenization must be separate, so that a title's tokens are the same after
            every prompt.
        batch_size: prompts read together.
    """

    def __init__(self, model: Model, questions: Sequence[Question], like: TokenDataset, *, batch_size: int = 8):
        if not questions or len({len(q.titles) for q in questions}) != 1:
            msg = f"{len(questions)} questions; expected some, all with equally many titles."
            raise ValueError(msg)
        if like.recipe.tokenization != "separate":
            msg = f"tokenization is {like.recipe.tokenization!r}; a title's tokens would depend on its prompt."
            raise ValueError(msg)
        if make_stale(model.config) is not None:
            msg = f"rope_type is {model.config.rope.scaling!r}; a prompt read in blocks would be rotated otherwise."
            raise ValueError(msg)
        self.model, self.questions = model, tuple(questions)
        self.batch_size = min(batch_size, len(questions))

        def encode(examples) -> Any:
            return encode_examples(examples, like.recipe, model.tokenizer).encoded

        self._prompts = [row.prompt.tolist() for row in encode([q.example for q in questions])]
        titles = sorted({title for q in questions for title in q.titles})
        stand_ins = [make_example(str(k), "-", title) for k, title in enumerate(titles)]
        self._response_of = {t: row.response for t, row in zip(titles, encode(stand_ins), strict=True)}

    def _batches(self):
        """Rows of similar length together; the last batch is filled up with its last row."""
        order = sorted(range(len(self.questions)), key=lambda k: len(self._prompts[k]))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            filled = rows + [rows[-1]] * (self.batch_size - len(rows))
            tokens, mask = pad_left([self._prompts[row] for row in filled])
            yield rows, filled, jnp.asarray(tokens), jnp.asarray(mask)

    def _apply(self, params: LoraParams | None) -> Callable[..., Array]:
        return (ensemble_model(self.model) if isinstance(params, Ensemble) else self.model).apply

    def candidate_scores(self, params: LoraParams | None) -> Float[np.ndarray, "questions titles"]:
        """Log-probability of every title as the response, in nats, under an adapter or an ensemble.

        Raises:
            ValueError: an ensemble that averages log-probabilities, whose normaliser needs the whole vocabulary.
        """
        if isinstance(params, Ensemble) and params.aggregation != "probabilities":
            msg = f"aggregation is {params.aggregation!r}; titles are scored under 'probabilities' only."
            raise ValueError(msg)
        out = np.zeros((len(self.questions), len(self.questions[0].titles)))
        for rows, filled, tokens, mask in self._batches():
            packed = _pack([[self._response_of[title] for title in self.questions[row].titles] for row in filled])
            scores = _candidate_log_probs(self._apply(params), self.model.base, params, tokens, mask, packed)
            out[rows] = np.asarray(scores)[: len(rows)]
        return out

    def scored_metric(self, params: LoraParams | None) -> Metric:
        """HitRatio@1 of the most probable title: always valid, since nothing but titles can be answered."""
        chosen = self.candidate_scores(params).argmax(1)
        correct = int(sum(c == q.answer for c, q in zip(chosen.tolist(), self.questions, strict=True)))
        total = len(self.questions)
        return count_metric(HIT_RATIO_SCORED, correct=correct, valid=total, total=total)


def match_answers(generated: Sequence[str], questions: Sequence[Question]) -> tuple[Metric, Metric]:
    """HitRatio@1 of generated texts, matched as LLaRA does: of all questions, and of the valid ones.

    LLaRA reports the latter; ValidRatio is the first one's `valid_ratio`.
    """
    right, titles = [q.titles[q.answer] for q in questions], [q.titles for q in questions]
    metric = hit_ratio(generated, right, titles, name=HIT_RATIO_GENERATED)
    return metric, hit_ratio_of_valid(metric)
