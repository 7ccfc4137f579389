"""Owns the task's two readings: a score for every candidate, and a generated title matched with the candidates.

Both read the prompt once into a key/value cache and go on from there, for text and for hybrid prompts alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from llmeraser_jax.baselines import Ensemble, ensemble_model
from llmeraser_jax.baselines.ensemble import ApplyEnsemble
from llmeraser_jax.baselines.ensemble_generation import greedy_search_of_members

from experiments.llara.hybrid import ApplyHybrid, embed, split_adapter, split_base
from experiments.llara.prompts import make_response
from llmeraser_jax.data import Example, TokenDataset, encode_examples
from llmeraser_jax.evaluation.tasks import Metric, count_metric, hit_ratio, hit_ratio_of_valid
from llmeraser_jax.models import Model
from llmeraser_jax.models.decoder import Decoder, KVCache, bind, token_positions
from llmeraser_jax.models.generation import empty_cache, greedy_search, make_stale, pad_left
from llmeraser_jax.types import LoraParams

_PROMPT_BLOCK = 128  # prompt tokens read at a time
_SLOT_STEP = 64  # the packed titles of a batch are padded to a multiple of this many tokens
HIT_RATIO_SCORED = "HitRatio@1, candidates scored"
HIT_RATIO_GENERATED = "HitRatio@1, generated"
HIT_RATIO_OF_VALID = f"{HIT_RATIO_GENERATED}_of_valid"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt with the titles to choose from; `example.response` is the right one."""

    example: Example
    titles: tuple[str, ...]

    def __post_init__(self):
        if [make_response(title) for title in self.titles].count(self.example.response) != 1:
            msg = f"Question {self.example.id!r}: {self.example.response!r} must be one of its titles, once."
            raise ValueError(msg)

    @property
    def answer(self) -> int:
        """Which of the titles is right."""
        return [make_response(title) for title in self.titles].index(self.example.response)


@flax.struct.dataclass
class _Packed:
    """The titles of every question one after another, each without its last token, which nothing follows."""

    tokens: Int[Array, "batch slots"]
    owners: Int[Array, "batch slots"]  # which title a token is of; -1 is padding
    places: Int[Array, "batch slots"]  # the token's place in its title
    targets: Int[Array, "batch titles_and_slots"]  # the first token of each title, then what follows each slot
    weights: Float[Array, "batch titles_and_slots"]  # of the targets; 0 for those of padding

    @property
    def num_titles(self) -> int:
        return self.targets.shape[1] - self.tokens.shape[1]


@dataclasses.dataclass(frozen=True)
class _Start:
    """What a prompt leaves behind, with room in the cache for what follows."""

    cache: KVCache
    first_logits: Array  # [batch, vocab]: of the token after the prompt
    where: Array  # [batch, time]
    valid: Array  # [batch, time]
    lengths: Array  # [batch]


def _bound(apply, base, lora) -> tuple[Decoder, Any]:
    """The decoder and its variables, of text and of hybrid models."""
    if isinstance(apply, ApplyHybrid):
        base, lora = split_base(base)[0], split_adapter(lora)[0]
    return bind(apply.config, base, lora)


def _embeds(apply, base, lora, tokens) -> Array | None:
    """Input embeddings where some are no words'."""
    return embed(base, lora, tokens, apply.first_item) if isinstance(apply, ApplyHybrid) else None


def _read_prompt(apply, base, lora, tokens, mask, num_new: int) -> tuple[Decoder, Any, _Start]:
    """Fills a cache with left-padded prompts and leaves room for `num_new` tokens.

    Reads blocks of tokens, each against the keys up to its own end: a pass over all of them at once would compute
    twice the scores, the half that causality hides included, and keep them all at a time.
    """
    embeds = _embeds(apply, base, lora, tokens)
    module, variables = _bound(apply, base, lora)
    batch, time = tokens.shape
    valid = mask.astype(bool)
    where = token_positions(valid)
    cache: Any = empty_cache(apply.config, module.dtype, batch, 0)
    logits = None
    for begin in range(0, time, _PROMPT_BLOCK):
        end = min(begin + _PROMPT_BLOCK, time)
        logits, cache = module.apply(
            variables,
            tokens[:, begin:end],
            where[:, begin:end],
            where[:, :end],
            valid[:, :end],
            _grow(cache, end - begin),
            jnp.int32(begin),
            jnp.full((batch, 1), end - begin - 1, jnp.int32),  # padding is on the left
            None if embeds is None else embeds[:, begin:end],
            method=Decoder.decode,
        )
    assert logits is not None
    lengths = jnp.sum(valid, axis=1, dtype=jnp.int32)
    return module, variables, _Start(_grow(cache, num_new), logits[:, 0], where, valid, lengths)


def _grow(cache: KVCache, num_slots: int) -> KVCache:
    return jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, 0), (0, 0), (0, num_slots), (0, 0), (0, 0))), cache)


@partial(jax.jit, static_argnames="apply")
def _candidate_log_probs(
    apply, base, params, tokens: Int[Array, "batch time"], mask: Int[Array, "batch time"], packed: _Packed
) -> Float[Array, "batch titles"]:
    """`sum_t weights_t log p(title_t | prompt, title_<t)`; an ensemble's p is the mean of its members'."""
    if isinstance(apply, ApplyEnsemble):
        last = jnp.full(tokens.shape[0], tokens.shape[1] - 1, jnp.int32)
        log_weights = apply.log_weights(base, params, tokens, mask, last)

        def add(total, member_and_weight):
            member, log_weight = member_and_weight
            picked = _picked_log_probs(apply.apply, base, member, tokens, mask, packed)
            return jnp.logaddexp(total, log_weight[:, None] + picked), None

        start = jnp.full(packed.targets.shape, -jnp.inf, jnp.float32)
        picked, _ = jax.lax.scan(add, start, (params.members, log_weights.astype(jnp.float32)))
    else:
        picked = _picked_log_probs(apply, base, params, tokens, mask, packed)
    weighted = jnp.where(packed.weights > 0, picked * packed.weights, 0)
    titles = jnp.arange(packed.num_titles)
    is_own = packed.owners[:, None, :] == titles[:, None]
    first, rest = weighted[:, : packed.num_titles], weighted[:, None, packed.num_titles :]
    return first + jnp.sum(jnp.where(is_own, rest, 0), axis=2)


def _picked_log_probs(
    apply, base, lora, tokens: Array, mask: Array, packed: _Packed
) -> Float[Array, "batch titles_and_slots"]:
    """Log-probabilities of the targets under one adapter.

    All titles are read in one call: every one starts at the prompt's end, and sees the prompt and itself.
    """
    batch, num_slots = packed.tokens.shape
    time = tokens.shape[1]
    module, variables, start = _read_prompt(apply, base, lora, tokens, mask, num_slots)
    where = start.lengths[:, None] + packed.places
    sees_prompt = jnp.broadcast_to(start.valid[:, None], (batch, num_slots, time))
    sees_title = packed.owners[:, :, None] == packed.owners[:, None, :]
    logits, _ = module.apply(
        variables,
        packed.tokens,
        where,
        jnp.concatenate([start.where, where], axis=1),
        jnp.concatenate([sees_prompt, sees_title], axis=2),
        start.cache,
        jnp.int32(time),
        None,
        method=Decoder.decode,
    )
    first_targets, targets = jnp.split(packed.targets, [packed.num_titles], axis=1)
    first = jnp.take_along_axis(jax.nn.log_softmax(start.first_logits, axis=-1), first_targets, axis=1)
    rest = jnp.take_along_axis(logits, targets[..., None], axis=2)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
    return jnp.concatenate([first, rest], axis=1)


def _pack(titles: Sequence[Sequence[np.ndarray]], per_token: bool) -> _Packed:
    """Packs the tokens of the titles of several questions, all with equally many titles."""
    num_titles = len(titles[0])
    longest = max(sum(len(title) - 1 for title in row) for row in titles)
    num_slots = max(-(-longest // _SLOT_STEP), 1) * _SLOT_STEP
    shape = (len(titles), num_slots)
    tokens, places, owners = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    targets = np.zeros((len(titles), num_titles + num_slots), np.int32)
    weights = np.zeros(targets.shape, np.float32)
    for k, row in enumerate(titles):
        end = 0
        for c, title in enumerate(row):
            begin, end = end, end + len(title) - 1
            weight = 1 / len(title) if per_token else 1
            tokens[k, begin:end] = title[:-1]
            owners[k, begin:end] = c
            places[k, begin:end] = np.arange(end - begin)
            targets[k, c] = title[0]
            targets[k, num_titles + begin : num_titles + end] = title[1:]
            weights[k, c] = weight
            weights[k, num_titles + begin : num_titles + end] = weight
    return _Packed(*map(jnp.asarray, (tokens, owners, places, targets, weights)))


@partial(jax.jit, static_argnames=("apply", "num_new"))
def _greedy(apply, base, params, tokens, mask, num_new: int) -> Int[Array, "batch new"]:
    """Greedy continuations of an adapter or, where `apply` reads ensembles, of an ensemble; nothing ends a text."""
    member_apply = apply.apply if isinstance(apply, ApplyEnsemble) else apply

    def append(lora, cache, *call) -> Any:
        module, variables = _bound(member_apply, base, lora)
        new, where, key_positions, key_valid, write_at, positions = call
        embeds = _embeds(member_apply, base, lora, new)
        return module.apply(
            variables,
            new,
            where,
            key_positions,
            key_valid,
            cache,
            write_at,
            positions,
            embeds,
            method=Decoder.decode,
        )

    first = params.member(0) if isinstance(apply, ApplyEnsemble) else params
    make_cache = partial(empty_cache, member_apply.config, _bound(member_apply, base, first)[0].dtype)
    rest = (tokens, mask.astype(bool), jnp.zeros(0, jnp.int32), num_new)
    if not isinstance(apply, ApplyEnsemble):
        return greedy_search(partial(append, params), make_cache, *rest)[0]
    last = jnp.full(tokens.shape[0], tokens.shape[1] - 1, jnp.int32)
    log_weights = apply.log_weights(base, params, tokens, mask, last)
    return greedy_search_of_members(append, make_cache, params, log_weights, *rest)[0]


class Scorer:
    """Questions, tokenised once, for any number of adapters of one model.

    Args:
        model: text or hybrid.
        questions: all with equally many titles.
        like: its recipe is used; its tokenization must be separate, so that a title's tokens are the same after
            every prompt.
        batch_size: prompts read together.
        per_token: titles are compared by their mean log-probability per token instead of their sum. The sum is the
            probability of the answer; the mean does not favour short titles.
    """

    def __init__(
        self,
        model: Model,
        questions: Sequence[Question],
        like: TokenDataset,
        *,
        batch_size: int = 8,
        per_token: bool = False,
    ):
        if not questions or len({len(q.titles) for q in questions}) != 1:
            msg = f"{len(questions)} questions; expected some, all with equally many titles."
            raise ValueError(msg)
        if like.recipe.tokenization != "separate":
            msg = f"tokenization is {like.recipe.tokenization!r}; a title's tokens would depend on its prompt."
            raise ValueError(msg)
        if make_stale(model.config) is not None:
            msg = (
                f"rope_type is {model.config.rope.scaling!r}; a prompt read in blocks would be rotated differently."
            )
            raise ValueError(msg)
        self.model = model
        self.questions = tuple(questions)
        self.batch_size = min(batch_size, len(questions))
        encoded = encode_examples([q.example for q in questions], like.recipe, model.tokenizer)
        self.num_truncated = encoded.num_truncated
        self._prompts = [row.prompt.tolist() for row in encoded.encoded]
        titles = sorted({title for q in questions for title in q.titles})
        stand_ins = [
            Example(id=str(k), instruction="-", response=make_response(title), format="prompt")
            for k, title in enumerate(titles)
        ]
        responses = encode_examples(stand_ins, like.recipe, model.tokenizer).encoded
        self._response_of = {title: row.response for title, row in zip(titles, responses, strict=True)}
        self._num_new = max(len(row.response) for row in responses)
        self.per_token = per_token

    def _batches(self):
        """Rows of similar length together; the last batch is filled up with its last row."""
        order = sorted(range(len(self.questions)), key=lambda k: len(self._prompts[k]))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            filled = rows + [rows[-1]] * (self.batch_size - len(rows))
            tokens, mask = pad_left([self._prompts[row] for row in filled])
            yield rows, filled, jnp.asarray(tokens), jnp.asarray(mask)

    def candidate_scores(self, lora: LoraParams | None) -> Float[np.ndarray, "questions titles"]:
        """Log-probability of every title as the response, in nats.

        Args:
            lora: an adapter, or an ensemble where the model reads ensembles.

        Raises:
            ValueError: an ensemble that averages log-probabilities, whose normaliser needs the whole vocabulary.
        """
        model = self.model
        if isinstance(lora, Ensemble):
            if lora.aggregation != "probabilities":
                msg = f"aggregation is {lora.aggregation!r}; titles are scored under 'probabilities' only."
                raise ValueError(msg)
            model = ensemble_model(model)
        out = np.zeros((len(self.questions), len(self.questions[0].titles)))
        for rows, filled, tokens, mask in self._batches():
            titles = [[self._response_of[title] for title in self.questions[row].titles] for row in filled]
            packed = _pack(titles, self.per_token)
            scores = _candidate_log_probs(model.apply, model.base, lora, tokens, mask, packed)
            out[rows] = np.asarray(scores)[: len(rows)]
        return out

    def generate(self, lora: LoraParams | None) -> list[str]:
        """The greedy answer to every question, as long as the longest title; only its first line is an answer."""
        out = [""] * len(self.questions)
        apply = (ensemble_model(self.model) if isinstance(lora, Ensemble) else self.model).apply
        for rows, _, tokens, mask in self._batches():
            new = np.asarray(_greedy(apply, self.model.base, lora, tokens, mask, self._num_new))
            for k, row in enumerate(rows):
                out[row] = self.model.tokenizer.decode(new[k].tolist(), skip_special_tokens=True)
        return out

    def scored_metric(self, lora: LoraParams | None) -> Metric:
        """HitRatio@1 of the most probable title: always valid, since nothing but titles can be answered."""
        chosen = self.candidate_scores(lora).argmax(1)
        correct = int(sum(c == q.answer for c, q in zip(chosen.tolist(), self.questions, strict=True)))
        total = len(self.questions)
        return count_metric(HIT_RATIO_SCORED, correct=correct, valid=total, total=total)

    def generated_metrics(self, lora: LoraParams | None) -> tuple[Metric, Metric]:
        """HitRatio@1 of generated titles, matched as LLaRA does: of all questions, and of the valid ones.

        LLaRA reports the latter; ValidRatio is the first one's `valid_ratio`.
        """
        return match_answers(self.generate(lora), self.questions)


def match_answers(generated: Sequence[str], questions: Sequence[Question]) -> tuple[Metric, Metric]:
    """Counts of generated texts, one for each question; see `Scorer.generated_metrics`."""
    metric = hit_ratio(
        generated,
        [q.titles[q.answer] for q in questions],
        [q.titles for q in questions],
        matching="contained",
        name=HIT_RATIO_GENERATED,
    )
    return metric, hit_ratio_of_valid(metric)
