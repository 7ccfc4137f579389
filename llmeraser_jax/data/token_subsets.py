"""Parts of responses: which tokens two responses share, and examples whose loss is read at some tokens only."""

from __future__ import annotations

import dataclasses
import difflib

import jax
import numpy as np
from jaxtyping import Bool, Int

from llmeraser_jax.types import ExampleSet, ExampleStack


def align_tokens(old: np.ndarray, new: np.ndarray) -> tuple[Int[np.ndarray, " shared"], Int[np.ndarray, " shared"]]:
    """Places of the tokens that two sequences share in order (difflib's longest matching blocks).

    Args:
        old: token ids.
        new: token ids.

    Returns:
        Increasing places in `old`, and in `new`, of the same tokens.
    """
    blocks = difflib.SequenceMatcher(None, old.tolist(), new.tolist(), autojunk=False).get_matching_blocks()
    places = [(b.a + k, b.b + k) for b in blocks for k in range(b.size)]
    in_old, in_new = np.array(places, np.int64).reshape(-1, 2).T
    return in_old, in_new


@dataclasses.dataclass(frozen=True)
class TokenSubsets:
    """An `ExampleSet` whose rows are rows of another set with the loss at some of their loss tokens.

    Attributes:
        examples: the other set; its batches have the field `target_weights`, above 0 at loss tokens.
        rows: [m] the row of `examples` behind each.
        masks: for each, which of the row's loss tokens count, in order; None is all of them. The loss is the mean
            over those that count.
    """

    examples: ExampleSet
    rows: Int[np.ndarray, " m"]
    masks: tuple[Bool[np.ndarray, " _"] | None, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def bucket_of(self, index: int) -> int:
        """The length bucket of the row behind example `index`."""
        return self.examples.bucket_of(int(self.rows[index]))

    def stack(self, indices: np.ndarray, weights: np.ndarray, *, chunk_size: int) -> ExampleStack:
        """Lays out `indices` as the other set does; tokens that do not count have target weight 0.

        Raises:
            ValueError: a mask is not as long as its row has loss tokens, or leaves none.
        """
        indices = np.asarray(indices)
        stack = self.examples.stack(self.rows[indices], weights, chunk_size=chunk_size)
        assert stack.places is not None  # of a set's stack
        batches = []
        for batch, places in zip(stack.batches, stack.places, strict=True):
            kept = np.array(batch.target_weights)
            flat = kept.reshape(-1, kept.shape[-1])
            for row, place in enumerate(np.asarray(places).reshape(-1)):
                if place >= 0:
                    flat[row] = self._masked(int(indices[place]), flat[row])
            batches.append(batch.replace(target_weights=jax.device_put(kept)))
        return dataclasses.replace(stack, batches=tuple(batches))

    def _masked(self, index: int, weights: np.ndarray) -> np.ndarray:
        mask = self.masks[index]
        if mask is None:
            return weights
        at = np.flatnonzero(weights > 0)
        if len(at) != len(mask) or not mask.any():
            msg = f"A mask of {len(mask)} tokens with {mask.sum()} kept, for a row of {len(at)} loss tokens."
            raise ValueError(msg)
        masked = np.zeros_like(weights)
        masked[at[mask]] = 1 / mask.sum()
        return masked
