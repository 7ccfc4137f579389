"""Similarity of texts: the cosine of TF-IDF vectors, against the same worked out by hand."""

import numpy as np
import pytest

from llmeraser_jax.data import BucketShape, EncodedExample, Recipe, TokenDataset, token_similarities

ROWS = ([1, 2, 3, 3], [1, 2, 4], [1, 5, 6], [1, 3, 2])


def dataset(rows=ROWS):
    encoded = [
        EncodedExample(
            id=str(i), tokens=np.array(row, np.int32), response_start=1, loss_mask=np.ones(len(row), bool)
        )
        for i, row in enumerate(rows)
    ]
    return TokenDataset(encoded, Recipe(), buckets=[BucketShape(time=8, response=4)])


def by_hand(rows, to):
    vectors = []
    for row in rows:
        vector = np.zeros(8)
        for token in set(row):
            frequency = sum(token in other for other in rows)
            vector[token] = (1 + np.log(row.count(token))) * np.log(len(rows) / frequency)
        vectors.append(vector / max(np.linalg.norm(vector), 1e-300))
    return np.max(np.stack(vectors) @ np.stack([vectors[i] for i in to]).T, axis=1)


def test_it_is_the_cosine_with_the_nearest_of_the_named_rows():
    for to in ([0], [1, 2]):
        np.testing.assert_allclose(token_similarities(dataset(), np.array(to)), by_hand(ROWS, to), atol=1e-12)


def test_what_all_rows_share_makes_no_two_alike():
    similar = token_similarities(dataset(), np.array([0]))
    assert similar[0] == pytest.approx(1) and similar[2] == 0  # only token 1 in common
    assert similar[3] > similar[1] > 0


def test_nothing_to_be_similar_to_is_refused():
    with pytest.raises(ValueError, match="nothing to be similar to"):
        token_similarities(dataset(), np.array([], np.int64))
