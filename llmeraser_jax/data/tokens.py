"""From one example to its token ids and loss mask, as the recipe says and the trainer did.

For the same row, ids and mask are those of TRL's SFTTrainer: a conversation's whole rendering, or prompt and
response as one text; under the loss from where its tokens part from the prompt's own.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, Int64

from llmeraser_jax import files
from llmeraser_jax.data.chat import ChatRenderer
from llmeraser_jax.data.examples import Example
from llmeraser_jax.data.pictures import PicturePlaces, places_of
from llmeraser_jax.data.templates import Recipe, make_prompt_renderer, tokenizer_adds_bos

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class EncodedExample:
    """One tokenised example, not padded.

    Attributes:
        id: the example's.
        tokens: the whole sequence.
        response_start: index of the (last) response's first token; at least 1.
        loss_mask: whether a token is a label of the loss. Nothing predicts the first one, whatever its mask says.
        images: keys of its pictures, in the order in which `tokens` has places for them.
    """

    id: str
    tokens: Int32[np.ndarray, " time"]
    response_start: int
    loss_mask: Bool[np.ndarray, " time"]
    images: tuple[str, ...] = ()

    @property
    def targets(self) -> Int64[np.ndarray, " targets"]:
        """Indices of the tokens that the loss predicts."""
        return np.flatnonzero(self.loss_mask[1:]) + 1

    @property
    def num_targets(self) -> int:
        """Tokens under the loss."""
        return int(self.loss_mask[1:].sum())

    @property
    def loss_start(self) -> int:
        """Index of the first token that the loss predicts."""
        return int(self.targets[0])

    @property
    def prompt(self) -> Int32[np.ndarray, " prompt"]:
        """What the model is given when it generates."""
        return self.tokens[: self.response_start]

    @property
    def response(self) -> Int32[np.ndarray, " response"]:
        """The response's tokens under the loss, the turn's end included."""
        return self.tokens[self.response_start : int(self.targets[-1]) + 1]

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of tokens, mask and the keys of pictures; the same on every platform."""
        mask = self.loss_mask.copy()
        mask[:1] = False
        parts = (self.tokens.astype("<i4").tobytes(), np.packbits(mask).tobytes(), "\0".join(self.images).encode())
        return hashlib.sha256(b"".join(parts)).hexdigest()


@dataclasses.dataclass(frozen=True)
class EncodedRows:
    """What `encode_rows` makes of examples.

    Attributes:
        kept: in order, those with a token under the loss.
        kept_indices: which of the examples they are.
        truncated_ids: of the kept ones that were cut.
        dropped_ids: those that cutting left without a token under the loss.
    """

    kept: tuple[EncodedExample, ...]
    kept_indices: tuple[int, ...]
    truncated_ids: tuple[str, ...]
    dropped_ids: tuple[str, ...]


def turn_ends(encoded: Iterable[EncodedExample], tokenizer: Any) -> frozenset[int]:
    """Ids of the control tokens that end the examples' responses, white space after them aside."""
    added = set(tokenizer.get_added_vocab().values())
    ends = set()
    for example in encoded:
        last = next((int(t) for t in example.response[::-1] if tokenizer.decode([int(t)]).strip()), None)
        if last in added:
            ends.add(last)
    return frozenset(ends)


def encode_rows(examples: Sequence[Example], recipe: Recipe, tokenizer: Any) -> EncodedRows:
    """Tokenises examples, each by itself.

    Raises:
        ValueError: an example that recipe or template cannot show whole, that has no token to predict, that does
            not fit where nothing may be cut, or whose pictures the model does not read; the message names it.
    """
    if not examples:
        return EncodedRows((), (), (), ())
    if recipe.template == "chat":
        origin = "the recipe" if recipe.chat_template else getattr(tokenizer, "name_or_path", "") or "the tokenizer"
        with files.reading(f"The chat template of {origin}"):
            rows = _encode_conversations(examples, recipe, tokenizer)
    else:
        rows = _encode_texts(examples, recipe, tokenizer)
    places = places_of(tokenizer)
    rows = [_with_pictures(example, row, places) for example, row in zip(examples, rows, strict=True)]
    kept, indices, truncated, dropped = [], [], [], []
    for index, (example, row) in enumerate(zip(examples, rows, strict=True)):
        tokens, mask, start = _fit(example, row, recipe, tokenizer.bos_token_id)
        if not any(mask[1:]):
            dropped.append(example.id)
            continue
        if len(tokens) < len(row[0]):
            truncated.append(example.id)
            if places is not None and tokens.count(places.token_id) < row[0].count(places.token_id):
                msg = (
                    f"Example {example.id!r}: max_length = {recipe.max_length} cuts into its pictures, "
                    f"{places.num_tokens} tokens each. Raise it; the example has {len(row[0])} tokens."
                )
                raise ValueError(msg)
        indices.append(index)
        images = () if places is None else tuple(map(places.key, example.images))
        kept.append(
            EncodedExample(example.id, np.array(tokens, np.int32), max(start, 1), np.array(mask, bool), images)
        )
    return EncodedRows(tuple(kept), tuple(indices), tuple(truncated), tuple(dropped))


# Tokens, mask, and where the response starts.
_Row = tuple[list[int], list[bool], int]


def _with_pictures(example: Example, row: _Row, places: PicturePlaces | None) -> _Row:
    """The row with as many image tokens for each picture as it has features."""
    tokens, mask, start = row
    if places is None:
        if example.images:
            named = ", ".join(picture.name for picture in example.images)
            msg = (
                f"Example {example.id!r} has pictures ({named}), and the model reads none: it has no vision tower."
            )
            raise ValueError(msg)
        return row
    count = tokens.count(places.token_id)
    if count != len(example.images):
        msg = (
            f"Example {example.id!r}: the template leaves {count} image tokens for its {len(example.images)} "
            f"pictures; {places.token!r} must stand in the text once for each."
        )
        raise ValueError(msg)
    if not count:
        return row
    start += tokens[:start].count(places.token_id) * (places.num_tokens - 1)
    tokens, mask = places.expand(tokens, mask)
    return tokens, mask, start


def _encode_conversations(examples: Sequence[Example], recipe: Recipe, tokenizer: Any) -> list[_Row]:
    renderer = ChatRenderer(recipe, tokenizer)
    rendered = [renderer.render(example) for example in examples]
    lost = [e.id for e, r in zip(examples, rendered, strict=True) if not renderer.shows_response(e, r)]
    if lost:
        logger.warning(
            "The chat template changes or leaves out part of the response of %d of %d examples, the first is %r; "
            "what it renders is what is trained on.",
            len(lost),
            len(examples),
            lost[0],
        )
    by_turn = recipe.loss_on == "assistant"
    if by_turn and not getattr(tokenizer, "is_fast", False):
        msg = "loss_on is 'assistant', which needs a fast tokenizer (character offsets)."
        raise ValueError(msg)
    whole = tokenizer([r.text for r in rendered], add_special_tokens=False, return_offsets_mapping=by_turn)
    prompts = _tokenise(tokenizer, [r.prompt for r in rendered])
    rows = []
    parted: list[tuple[str, str]] = []
    for k, (example, r, prompt) in enumerate(zip(examples, rendered, prompts, strict=True)):
        tokens = list(whole["input_ids"][k])
        start = _common_prefix_length(prompt, tokens)
        if start < len(prompt):
            parted.append((example.id, tokenizer.decode(prompt[start:])))
        if start == len(tokens):
            msg = (
                f"Example {example.id!r}: the chat template writes nothing for the response: {r.text[-400:]!r} is "
                f"the whole conversation and {r.prompt[-400:]!r} its prompt. Name another chat_template."
            )
            raise ValueError(msg)
        if by_turn and renderer.has_markers(example):
            tokens, marked = renderer.marked_tokens(example)
            mask = [bool(bit) for bit in marked]
            if not any(mask[1:]):
                msg = f"Example {example.id!r}: the chat template's generation markers enclose no token of it."
                raise ValueError(msg)
            start = _last_run_start(mask)
        elif by_turn:
            mask = [False] * len(tokens)
            for first, last in renderer.turn_spans(example, r):
                inside = _tokens_inside(whole["offset_mapping"][k], first, last)
                mask[inside.start : inside.stop] = [True] * len(inside)
                start = inside.start
        else:
            mask = [recipe.loss_on == "all"] * start + [True] * (len(tokens) - start)
        if recipe.add_eos and not r.ends_turn and tokens[-1] != tokenizer.eos_token_id:
            tokens, mask = [*tokens, tokenizer.eos_token_id], [*mask, True]
        if recipe.add_bos and tokens[:1] != [tokenizer.bos_token_id]:
            tokens, mask, start = [tokenizer.bos_token_id, *tokens], [recipe.loss_on == "all", *mask], start + 1
        rows.append((tokens, mask, start))
    if parted:
        logger.warning(
            "The prompts of %d of %d examples end otherwise than the whole conversation goes on, as that of %r "
            "with %r; the conversation is what is trained on.",
            len(parted),
            len(examples),
            *parted[0],
        )
    return rows


def _encode_texts(examples: Sequence[Example], recipe: Recipe, tokenizer: Any) -> list[_Row]:
    render = make_prompt_renderer(recipe)
    prompts = [render(example) for example in examples]
    responses = [f"{recipe.response_prefix}{example.response}" for example in examples]
    encode = _encode_jointly if recipe.tokenization == "joint" else _encode_separately
    rows = []
    for example, (prompt, tokens) in zip(examples, encode(tokenizer, prompts, responses, recipe), strict=True):
        start = _common_prefix_length(prompt, tokens)
        if start == len(tokens):
            msg = f"Example {example.id!r}: the tokenizer makes no token of the response {example.response!r}."
            raise ValueError(msg)
        if example.format == "text":
            if len(tokens) < 2:
                msg = f"Example {example.id!r}: its text is one token; nothing predicts it. Set add_bos = true."
                raise ValueError(msg)
            start = 0
        elif start == 0:
            msg = (
                f"Example {example.id!r}: its prompt has no token to predict the response from; set add_bos = true."
            )
            raise ValueError(msg)
        rows.append((tokens, [recipe.loss_on == "all"] * start + [True] * (len(tokens) - start), start))
    return rows


def _encode_jointly(
    tokenizer: Any, prompts: Sequence[str], responses: Sequence[str], recipe: Recipe
) -> list[tuple[list[int], list[int]]]:
    """Each prompt's tokens, and those of prompt and response as one text; what the tokenizer adds is in both."""
    end = tokenizer.eos_token if recipe.add_eos else ""
    closed = [response if response.endswith(end) else response + end for response in responses]
    texts = [prompt + response for prompt, response in zip(prompts, closed, strict=True)]
    as_tokenizer = recipe.add_bos == tokenizer_adds_bos(tokenizer)
    rows = []
    for prompt, tokens in zip(
        _tokenise(tokenizer, prompts, add_special_tokens=as_tokenizer),
        _tokenise(tokenizer, texts, add_special_tokens=as_tokenizer),
        strict=True,
    ):
        bos = [tokenizer.bos_token_id] if recipe.add_bos and tokens[:1] != [tokenizer.bos_token_id] else []
        rows.append(([*bos, *prompt], [*bos, *tokens]))
    return rows


def _encode_separately(
    tokenizer: Any, prompts: Sequence[str], responses: Sequence[str], recipe: Recipe
) -> list[tuple[list[int], list[int]]]:
    """Each prompt's tokens, and those with the response's.

    The response is read as the text after a line break, so that vocabularies which mark a word's beginning do not
    invent a space before it; unless the break's own tokens merge with it.
    """
    (line_break,) = _tokenise(tokenizer, ["\n"])
    cut = len(line_break)
    rows = []
    for prompt, alone, after_break in zip(
        _tokenise(tokenizer, prompts),
        _tokenise(tokenizer, responses),
        _tokenise(tokenizer, [f"\n{response}" for response in responses]),
        strict=True,
    ):
        response = after_break[cut:] if after_break[:cut] == line_break and len(after_break) > cut else alone
        if recipe.add_eos and response and response[-1] != tokenizer.eos_token_id:
            response = [*response, tokenizer.eos_token_id]
        if recipe.add_bos and prompt[:1] != [tokenizer.bos_token_id]:
            prompt = [tokenizer.bos_token_id, *prompt]
        rows.append((prompt, [*prompt, *response]))
    return rows


def _fit(example: Example, row: _Row, recipe: Recipe, bos: int | None) -> _Row:
    """The row, cut to `max_length`."""
    tokens, mask, start = row
    excess = len(tokens) - recipe.max_length
    if excess <= 0:
        return row
    if recipe.truncation_side == "error":
        msg = (
            f"Example {example.id!r}: {start} prompt and {len(tokens) - start} response tokens exceed "
            f"max_length = {recipe.max_length}, and truncation_side is 'error'. Raise max_length or name "
            "a side."
        )
        raise ValueError(msg)
    left = recipe.truncation_side == "left"
    if recipe.truncate == "sequence":
        kept = slice(excess, None) if left else slice(None, recipe.max_length)
        return tokens[kept], mask[kept], start - excess if left else start
    room = start - excess
    if room < 1:
        msg = (
            f"Example {example.id!r}: its response takes {len(tokens) - start} tokens, which with one of the "
            f"prompt exceeds max_length = {recipe.max_length}, and truncate is 'prompt'. Raise max_length."
        )
        raise ValueError(msg)
    head = 0 if not left else int(bos is not None and tokens[0] == bos)
    first = (head, head + excess) if left else (room, start)
    return tokens[: first[0]] + tokens[first[1] :], mask[: first[0]] + mask[first[1] :], room


def _tokenise(tokenizer: Any, texts: Sequence[str], *, add_special_tokens: bool = False) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"]


def _common_prefix_length(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _last_run_start(mask: Sequence[bool]) -> int:
    """Where the last run of true entries begins."""
    last = max(k for k, bit in enumerate(mask) if bit)
    return next((k + 1 for k in range(last, -1, -1) if not mask[k]), 0)


def _tokens_inside(offsets: Sequence[tuple[int, int]], first: int, last: int) -> range:
    """Tokens that end after the character `first` and not after the character `last`."""
    ends = [end for _, end in offsets]
    return range(bisect.bisect_right(ends, first), bisect.bisect_right(ends, last))
