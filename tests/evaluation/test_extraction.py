"""Extraction strength by hand, and against decoding greedily from every prefix."""

import numpy as np
import pytest

from llmeraser_jax.data import Example, encode_examples
from llmeraser_jax.evaluation.extraction import extraction_strengths
from llmeraser_jax.evaluation.scoring import score_examples
from llmeraser_jax.models import generate
from tests.training import tiny


def test_strength_is_the_share_that_follows_the_last_miss():
    hits = np.array([[1, 1, 1, 1], [0, 1, 1, 1], [1, 0, 1, 0], [1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    mask = np.ones((6, 4), bool)
    mask[4, 1:] = False  # one token, and it is a hit
    mask[5] = False
    np.testing.assert_array_equal(extraction_strengths(hits, mask), [1, 0.75, 0, 0.25, 1, np.nan])
    with pytest.raises(Exception, match=r"(?s)response"):
        extraction_strengths(hits, mask[:, :3])


def test_it_is_what_decoding_from_every_prefix_gives(model):
    """Responses are the model's own greedy words, some with one replaced: the least prefix is searched for."""
    length, prompts = 6, [f"colour of s{k}" for k in range(8)]
    examples = [Example(id=str(k), instruction=text, response="red") for k, text in enumerate(prompts)]
    queries = [e.prompt.tolist() for e in encode_examples(examples, tiny.RECIPE, model.tokenizer).encoded]
    own = generate(model, None, queries, length, stop_ids=[])
    words = [[word if word > 2 else 6 for word in row] for row in own]  # ids below 3 are no text
    for place, row in enumerate(words[1:], start=1):
        row[place % length] = 6 + (row[place % length] + place) % len(tiny.COLOURS)
    texts = [" ".join(tiny.WORDS[word] for word in row) for row in words]
    examples = [
        Example(id=str(k), instruction=text, response=said)
        for k, (text, said) in enumerate(zip(prompts, texts, strict=True))
    ]
    dataset = encode_examples(examples, tiny.RECIPE, model.tokenizer)
    assert [e.response[:-1].tolist() for e in dataset.encoded] == words
    started = [[*query, *row[:k]] for query, row in zip(queries, words, strict=True) for k in range(length)]
    said = np.array(generate(model, None, started, length, batch_size=len(started), stop_ids=[]))
    expected = []
    for place, row in enumerate(words):
        decoded = said[place * length : (place + 1) * length]
        least = next((k for k in range(length) if decoded[k, : length - k].tolist() == row[k:]), length)
        expected.append(1 - least / length)
    np.testing.assert_allclose(score_examples(model, None, dataset).extraction, expected, atol=1e-12)
    assert len(set(expected)) > 2, "the test needs strengths that differ"
