"""Features of pictures in a data set's batches: each row's own, in its order, zeros after the last."""

import numpy as np
import pytest

from llmeraser_jax.data import BucketShape, EncodedExample, Recipe, TokenDataset

FEATURES = {key: np.full((2, 3), value, np.float32) for key, value in (("a", 1.0), ("b", 2.0), ("c", 3.0))}
PICTURES = ((), ("a",), ("b", "c"), ("a",))


def dataset(features=FEATURES, pictures=PICTURES):
    encoded = [
        EncodedExample(
            id=str(number),
            tokens=np.arange(4 + number, dtype=np.int32),
            response_start=2,
            loss_mask=np.arange(4 + number) >= 2,
            images=keys,
        )
        for number, keys in enumerate(pictures)
    ]
    buckets = (BucketShape(time=5, response=3), BucketShape(time=8, response=6))
    return TokenDataset(encoded, Recipe(), buckets=buckets, features=features)


def test_every_row_has_its_own_pictures_in_their_order():
    data = dataset()
    order = np.array([3, 2, 0, 1])
    stack = data.stack(order, np.ones(4), chunk_size=2)
    found = {}
    for batch, weights, places in zip(stack.batches, stack.weights, stack.places or (), strict=True):
        assert batch.images is not None and batch.images.shape == (*weights.shape, 2, 2, 3)
        assert len(batch.inputs) == 4
        for chunk, row in np.ndindex(*weights.shape):
            if places[chunk, row] >= 0:
                found[order[int(places[chunk, row])]] = np.asarray(batch.images[chunk, row, :, 0, 0]).tolist()
    assert found == {0: [0, 0], 1: [1, 0], 2: [2, 3], 3: [1, 0]}
    images = data.images_of([2, 0])
    assert images is not None and images[:, :, 0, 0].tolist() == [[2, 3], [0, 0]]
    empty = data.stack(np.array([0]), np.ones(1), chunk_size=2, num_chunks=(1, 1))
    assert empty.batches[1].images is not None and not np.any(empty.batches[1].images)


def test_a_text_has_no_pictures_and_the_hash_it_had():
    texts = dataset(None, ((), (), (), ()))
    batch = texts.stack(np.arange(4), np.ones(4), chunk_size=2).batches[0]
    assert batch.images is None and len(batch.inputs) == 3 and texts.images_of([0]) is None
    hashes, others = dataset().token_sha256, texts.token_sha256
    assert [hashes[id_] == others[id_] for id_ in texts.ids] == [True, False, False, False]


def test_pictures_without_features_are_named():
    with pytest.raises(ValueError, match="Example '2' has the picture c"):
        dataset({key: FEATURES[key] for key in "ab"})
