"""Partitions: sizes, determinism, users kept together, and what balanced clusters find."""

import numpy as np
import pytest

from llmeraser_jax.rivals.partition import balanced_clusters, embedding_partition, random_partition


@pytest.mark.parametrize(("n", "shards", "slices"), [(10, 3, 2), (7, 7, 1), (23, 4, 5)])
def test_random_shards_and_slices_differ_by_at_most_one(n, shards, slices):
    partition = random_partition(n, shards, slices, seed=4)
    sizes = np.bincount(partition.shard_of, minlength=shards)
    assert sizes.sum() == n and sizes.max() - sizes.min() <= 1
    for shard in range(shards):
        inside = np.bincount(partition.slice_of[partition.shard_of == shard], minlength=slices)
        assert inside.max() - inside.min() <= 1
        everything = partition.rows(shard, slices - 1)
        assert np.array_equal(everything, np.flatnonzero(partition.shard_of == shard))
        assert len(partition.rows(shard, 0)) == inside[0]
    again, other = random_partition(n, shards, slices, seed=4), random_partition(n, shards, slices, seed=5)
    assert np.array_equal(again.shard_of, partition.shard_of)
    assert np.array_equal(again.slice_of, partition.slice_of)
    assert not np.array_equal(other.shard_of, partition.shard_of)


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="5 rows cannot be divided into 3 shards of 2 slices"):
        random_partition(5, 3, 2, seed=0)


@pytest.mark.parametrize(("n", "k"), [(10, 3), (11, 3), (12, 3), (5, 5), (30, 7)])
def test_clusters_are_balanced_and_deterministic(n, k):
    points = np.random.default_rng(n).normal(size=(n, 4))
    points[: n // 2] *= 0.01  # most points near one centre: nearest centres alone would not balance
    clusters = balanced_clusters(points, k, seed=1)
    sizes = np.bincount(clusters, minlength=k)
    assert sizes.sum() == n and sizes.max() - sizes.min() <= 1
    assert np.array_equal(clusters, balanced_clusters(points, k, seed=1))


def test_clusters_that_are_there_are_found():
    rng = np.random.default_rng(0)
    truth = rng.permutation(np.repeat(np.arange(3), 6))
    points = 10 * np.eye(3)[truth] + rng.normal(size=(18, 3))
    clusters = balanced_clusters(points, 3, seed=0)
    assert len({(int(a), int(b)) for a, b in zip(truth, clusters, strict=True)}) == 3


def test_equal_points_are_divided_too():
    sizes = np.bincount(balanced_clusters(np.ones((8, 2)), 3, seed=0))
    assert sorted(sizes) == [2, 3, 3]


def test_a_users_rows_stay_together_and_users_are_balanced():
    rng = np.random.default_rng(0)
    users = [f"u{k}" for k in rng.integers(0, 7, 40)]
    partition = embedding_partition(rng.normal(size=(40, 3)), 3, seed=0, users=users)
    shards_of_user = {user: set() for user in users}
    for user, shard in zip(users, partition.shard_of, strict=True):
        shards_of_user[user].add(int(shard))
    assert all(len(shards) == 1 for shards in shards_of_user.values())
    sizes = np.bincount([shards.pop() for shards in shards_of_user.values()], minlength=3)
    assert sizes.max() - sizes.min() <= 1


def test_embeddings_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="nan or an infinity"):
        balanced_clusters(np.array([[0.0], [np.nan]]), 1, seed=0)
