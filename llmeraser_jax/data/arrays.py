"""Rows of arrays as an `ExampleSet`, for models of one's own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from llmeraser_jax.types import Batch, ExampleStack


class ArrayExamples:
    """Examples as arrays that share their first axis; all of one shape, so there is one length bucket.

    Attributes:
        arrays: a pytree of arrays [n, ...]; what an objective gets of it is a micro-batch [batch, ...].
    """

    def __init__(self, arrays: Batch):
        """Keeps the arrays on the host.

        Raises:
            ValueError: there are none, or their first axes differ.
        """
        self.arrays = jax.tree.map(np.asarray, arrays)
        lengths = sorted({leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(self.arrays)})
        if len(lengths) != 1 or not lengths[0]:
            msg = f"The arrays have {lengths or 'no'} rows; give at least one, all of the same number of rows."
            raise ValueError(msg)
        (self._length,) = lengths

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        shapes = [f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(self.arrays)]
        return f"ArrayExamples({len(self)} rows: {', '.join(shapes[:6])}{', ...' * (len(shapes) > 6)})"

    def bucket_of(self, index: int) -> int:
        """0: all rows have one shape."""
        return 0

    def stack(self, indices: np.ndarray, weights: np.ndarray, *, chunk_size: int) -> ExampleStack:
        """See `types.ExampleSet`; padding repeats the first of the rows at weight 0.

        Raises:
            ValueError: nothing to lay out, or not one weight per index.
        """
        indices, weights = np.asarray(indices, np.int64), np.asarray(weights, np.float64)
        if not len(indices) or indices.shape != weights.shape or indices.ndim != 1:
            msg = f"Got {indices.shape} indices and {weights.shape} weights; expected some, one weight each."
            raise ValueError(msg)
        places = np.concatenate([np.arange(len(indices)), np.full(-len(indices) % chunk_size, -1)])
        places = places.reshape(-1, chunk_size)
        rows = indices[np.maximum(places, 0)]
        return ExampleStack(
            batches=(jax.tree.map(lambda leaf: jnp.asarray(leaf[rows]), self.arrays),),
            weights=(jnp.asarray(np.where(places < 0, 0.0, weights[places])),),
            places=(jnp.asarray(places, jnp.int32),),
        )
