"""Similarity of texts: the cosine of TF-IDF vectors, against the same worked out by hand."""

import numpy as np

from llmeraser_jax.data import BucketShape, EncodedExample, Recipe, TokenDataset, find_look_alikes

ROWS = ([1, 2, 3, 3], [1, 2, 4], [1, 5, 6], [1, 3, 2])


def dataset(rows=ROWS):
    encoded = [
        EncodedExample(
            id=str(i), tokens=np.array(row, np.int32), response_start=1, loss_mask=np.ones(len(row), bool)
        )
        for i, row in enumerate(rows)
    ]
    return TokenDataset(encoded, Recipe(), buckets=[BucketShape(time=8, response=4)])


def cosines_by_hand(rows):
    vectors = []
    for row in rows:
        vector = np.zeros(8)
        for token in set(row):
            frequency = sum(token in other for other in rows)
            vector[token] = (1 + np.log(row.count(token))) * np.log(len(rows) / frequency)
        vectors.append(vector / max(np.linalg.norm(vector), 1e-300))
    return np.stack(vectors) @ np.stack(vectors).T


def test_look_alikes_are_those_whose_cosine_is_high_enough_most_alike_first():
    named, among = np.array([0, 1]), np.array([3, 1, 2, 0])
    cosines = cosines_by_hand(ROWS)
    for least in np.unique([cosines[i, j] + shift for i in named for j in among for shift in (-1e-12, 1e-12)]):
        found = find_look_alikes(dataset(), named, among, least=float(least), at_most=4)
        for i, rows in zip(named, found, strict=True):
            assert set(rows) == {j for j in among if cosines[i, j] >= least}
            assert np.all(np.diff(cosines[i, rows]) <= 1e-12)
    assert [len(rows) for rows in find_look_alikes(dataset(), named, among, least=0.0, at_most=2)] == [2, 2]


def test_what_all_rows_share_makes_no_two_alike():
    (found,) = find_look_alikes(dataset(), np.array([0]), np.array([1, 2, 3]), least=1e-9)
    assert found.tolist() == [3, 1]  # row 2 has only token 1 in common
