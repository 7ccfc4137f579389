"""Extraction strength: how small a part of a response has to be given away for the model to say the rest.

    strength = 1 - k / n,   k the least prefix of the n tokens from which greedy decoding gives all the others

1: the query alone suffices; 0: nothing is reproduced. Carlini et al. 2021 (arXiv 2012.07805) extract training data
by prompting with its beginning; Wang et al. 2024 (arXiv 2406.09179) made the number of it.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Array, Bool, Float


def extraction_strengths(
    greedy_hits: Bool[Array | np.ndarray, "examples response"], mask: Bool[Array | np.ndarray, "examples response"]
) -> Float[np.ndarray, " examples"]:
    """The strength of each example, from one teacher-forced pass.

    Decoding greedily after the right prefix gives the right token as long as the right token is the most probable
    one; so the rest is reproduced from k on exactly where every later position is a hit, and no text has to be
    generated.

    Differs from OpenUnlearning's code in that a response whose last token is wrong has strength 0 (there `1 / n`,
    as if its last token were reproduced after the others).

    Args:
        greedy_hits: True where the right token is the most probable one, given all right tokens before.
        mask: True for a token that counts, False for padding (and for an end-of-sequence token, which is no text).

    Returns:
        One number in [0, 1] per example; nan where no token counts.

    Raises:
        ValueError: shapes that differ.
    """
    hits, counts = np.asarray(greedy_hits).astype(bool), np.asarray(mask).astype(bool)
    if hits.ndim != 2 or hits.shape != counts.shape:
        msg = f"Expected [examples, response] twice, got {hits.shape} and mask {counts.shape}."
        raise ValueError(msg)
    strengths = np.full(len(hits), np.nan)
    for i, (row, keep) in enumerate(zip(hits, counts, strict=True)):
        tokens = row[keep]
        if tokens.size:
            misses = np.flatnonzero(~tokens)
            reproduced = tokens.size if misses.size == 0 else tokens.size - 1 - misses[-1]
            strengths[i] = reproduced / tokens.size
    return strengths
