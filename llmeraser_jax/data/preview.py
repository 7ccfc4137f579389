"""What would be trained, made visible: each example's text with the part under the loss marked."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

from llmeraser_jax.data.pictures import places_of
from llmeraser_jax.data.tokens import EncodedExample
from llmeraser_jax.text import printable

LOSS_BEGIN, LOSS_END = "⟦", "⟧"


def marked_text(encoded: EncodedExample, tokenizer: Any) -> str:
    """The example's text, special tokens included, with `LOSS_BEGIN` and `LOSS_END` around what is under the loss.

    Control characters that a terminal would obey are written out; repeated image tokens are written once, with
    their number.
    """
    places = places_of(tokenizer)
    pieces = []
    runs = itertools.groupby(range(len(encoded.tokens)), key=lambda k: bool(encoded.loss_mask[k]))
    before = ""
    for under_loss, indices in runs:
        *_, last = indices
        # From the start each time: a vocabulary that marks words' beginnings drops the first one's space.
        so_far = tokenizer.decode(encoded.tokens[: last + 1], clean_up_tokenization_spaces=False)
        piece = printable(so_far[len(before) :] if so_far.startswith(before) else so_far)
        if places is not None:
            run = f"(?:{re.escape(places.token)}){{{places.num_tokens}}}"
            piece = re.sub(run, f"{places.token}×{places.num_tokens}", piece)
        pieces.append(f"{LOSS_BEGIN}{piece}{LOSS_END}" if under_loss else piece)
        before = so_far
    return "".join(pieces)


def picture_words(encoded: EncodedExample, tokenizer: Any) -> str:
    """How many pictures and image tokens a row has, to follow its numbers of tokens; nothing for one without."""
    places = places_of(tokenizer)
    if places is None or not encoded.images:
        return ""
    count = len(encoded.images)
    tokens = int((encoded.tokens == places.token_id).sum())
    return f", {count} picture{'s' * (count > 1)} in {tokens} image tokens"


def to_json(encoded: EncodedExample) -> str:
    """`id`, `tokens` and `loss_mask` (1 under the loss) as one line of JSON."""
    row = {"id": encoded.id, "tokens": encoded.tokens.tolist(), "loss_mask": encoded.loss_mask.astype(int).tolist()}
    return json.dumps(row, ensure_ascii=False)
