"""Owns which shard and which slice of it a training row belongs to: at random, or balanced by embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int


@dataclasses.dataclass(frozen=True, eq=False)
class Partition:
    """Where each row is trained.

    Attributes:
        shard_of: [n] in [0, num_shards).
        slice_of: [n] in [0, num_slices), within its shard.
        num_shards: how many shards.
        num_slices: how many slices each has.
    """

    shard_of: Int[np.ndarray, " examples"]
    slice_of: Int[np.ndarray, " examples"]
    num_shards: int
    num_slices: int = 1

    def rows(self, shard: int, up_to_slice: int) -> Int[np.ndarray, " rows"]:
        """Rows of a shard's slices 0 to `up_to_slice`, increasing."""
        return np.flatnonzero((self.shard_of == shard) & (self.slice_of <= up_to_slice))


def _check_counts(num_rows: int, num_shards: int, num_slices: int) -> None:
    if num_shards < 1 or num_slices < 1 or num_shards * num_slices > num_rows:
        msg = (
            f"{num_rows} rows cannot be divided into {num_shards} shards of {num_slices} slices; both must be at "
            "least 1, and each slice needs a row."
        )
        raise ValueError(msg)


def random_partition(num_rows: int, num_shards: int, num_slices: int, seed: int) -> Partition:
    """Shards, and slices of each, whose sizes differ by at most one, drawn uniformly.

    Args:
        num_rows: n.
        num_shards: how many shards.
        num_slices: slices of each.
        seed: from 0 to 2**32 - 1.

    Raises:
        ValueError: not enough rows.
    """
    _check_counts(num_rows, num_shards, num_slices)
    shard_of, slice_of = np.zeros(num_rows, np.int64), np.zeros(num_rows, np.int64)
    order = np.random.RandomState(np.array([seed], np.uint32)).permutation(num_rows)
    for shard, rows in enumerate(np.array_split(order, num_shards)):
        shard_of[rows] = shard
        for number, part in enumerate(np.array_split(rows, num_slices)):
            slice_of[part] = number
    return Partition(shard_of, slice_of, num_shards, num_slices)


def balanced_clusters(
    points: Float[np.ndarray, "points width"], num_clusters: int, *, seed: int, max_iterations: int = 50
) -> Int[np.ndarray, " points"]:
    """K-means whose clusters differ in size by at most one.

    In each iteration all pairs (point, centre) are taken by increasing distance, and a point joins the first centre
    that has room; then centres move to the means. It ends when no point changes its cluster. Begun with spread
    centres (k-means++), from a seed: the same call gives the same clusters.

    Args:
        points: [n, d].
        num_clusters: at most n.
        seed: from 0 to 2**32 - 1.
        max_iterations: at which it ends in any case.

    Raises:
        ValueError: not enough points, or some that are not finite.
    """
    points = np.asarray(points, np.float64)
    n = len(points)
    _check_counts(n, num_clusters, 1)
    if not np.all(np.isfinite(points)):
        msg = "The embeddings hold a nan or an infinity."
        raise ValueError(msg)
    points = points - points.mean(0)  # smaller squares, so that less cancels in the distances
    rng = np.random.RandomState(np.array([seed], np.uint32))
    centres = _spread_centres(points, num_clusters, rng)
    assigned = np.full(n, -1)
    for _ in range(max_iterations):
        found = _assign_with_room(_squared_distances(points, centres))
        if np.array_equal(found, assigned):
            break
        assigned = found
        centres = np.stack([points[assigned == k].mean(axis=0) for k in range(num_clusters)])
    return assigned


def _squared_distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """[points, centres], without an array of all differences."""
    squares = (points**2).sum(1)[:, None] - 2 * points @ centres.T + (centres**2).sum(1)
    return np.maximum(squares, 0)


def _spread_centres(points: np.ndarray, num_clusters: int, rng: np.random.RandomState) -> np.ndarray:
    """The first at random, each next one in proportion to its squared distance from those there are."""
    chosen = [int(rng.randint(len(points)))]
    while len(chosen) < num_clusters:
        nearest = _squared_distances(points, points[chosen]).min(axis=1)
        if nearest.sum() > 0:
            chosen.append(int(rng.choice(len(points), p=nearest / nearest.sum())))
        else:  # every point coincides with a centre
            chosen.append(int(rng.choice(np.setdiff1d(np.arange(len(points)), chosen))))
    return points[chosen]


def _assign_with_room(distances: np.ndarray) -> np.ndarray:
    """Each point to the nearest centre that has room left, pairs taken by increasing distance."""
    n, k = distances.shape
    least, larger_left = divmod(n, k)  # every cluster takes `least`, and so many of them one more
    sizes = np.zeros(k, np.int64)
    assigned = np.full(n, -1)
    for pair in np.argsort(distances, axis=None, kind="stable"):
        point, cluster = divmod(int(pair), k)
        has_room = sizes[cluster] < least or (sizes[cluster] == least and larger_left > 0)
        if assigned[point] >= 0 or not has_room:
            continue
        larger_left -= int(sizes[cluster] == least)
        sizes[cluster] += 1
        assigned[point] = cluster
    return assigned


def embedding_partition(
    embeddings: Float[np.ndarray, "examples width"],
    num_shards: int,
    *,
    seed: int,
    users: Sequence[str] | None = None,
) -> Partition:
    """Shards of rows that lie close together, balanced in rows or, where users are known, in users.

    Args:
        embeddings: one per row.
        num_shards: how many.
        seed: of the first centres.
        users: whose row each is: a user's rows stay together, placed by their mean embedding.

    Raises:
        ValueError: not enough rows or users.
    """
    if users is None:
        shard_of = balanced_clusters(embeddings, num_shards, seed=seed)
    else:
        _, user_of = np.unique(np.asarray(users), return_inverse=True)
        counts = np.bincount(user_of)
        means = np.zeros((len(counts), embeddings.shape[1]))
        np.add.at(means, user_of, np.asarray(embeddings, np.float64))
        shard_of = balanced_clusters(means / counts[:, None], num_shards, seed=seed)[user_of]
    return Partition(shard_of, np.zeros(len(shard_of), np.int64), num_shards)
