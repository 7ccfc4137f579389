"""What would tell an erased example: its texts, its tokens, and their hashes without a key."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llmeraser_jax import data
from llmeraser_jax.data import Example, TokenDataset


def traces_of(examples: Sequence[Example], texts: Sequence[str], dataset: TokenDataset) -> dict[str, bytes]:
    """Byte strings by what they are.

    Args:
        examples: the erased ones, as they were.
        texts: theirs that no other example has.
        dataset: holds them, encoded.
    """
    found = {f"the text {text!r}": text.encode() for text in texts}
    encoded = {row.id: row for row in dataset.encoded}
    for example in examples:
        row = encoded[example.id]
        # The special tokens at both ends are everybody's.
        tokens = [int(token) for token in row.tokens[1:-1]]
        for separator in (", ", ",", " ", "\n"):
            found[f"{example.id}: tokens, {separator!r} between"] = separator.join(map(str, tokens)).encode()
        for kind in ("<i2", "<i4", "<i8"):
            found[f"{example.id}: tokens as {kind}"] = np.array(tokens, kind).tobytes()
        for what, sha256 in (("content", data.content_hash(example)), ("tokens", row.sha256)):
            found[f"{example.id}: hash of {what}"] = sha256.encode()
            found[f"{example.id}: hash of {what}, raw"] = bytes.fromhex(sha256)
    return found


def traces_in(place: Path | bytes, traces: dict[str, bytes]) -> list[str]:
    """Which of them are in the bytes, or in any file of a directory, in words."""
    contents = {"the output": place} if isinstance(place, bytes) else {}
    if isinstance(place, Path):
        contents = {str(p): p.read_bytes() for p in sorted(place.rglob("*")) if p.is_file()}
        assert contents, f"there is nothing in {place}"
    return [
        f"{name} in {where}" for where, held in contents.items() for name, trace in traces.items() if trace in held
    ]
