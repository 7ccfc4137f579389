"""Rows of adapter space in blocks, one a micro-batch: programs know the shape of a block, not how many there are.

So a request of another size, or a sample that grows, compiles nothing.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from jaxtyping import Float, Int

from llmeraser_jax import trees
from llmeraser_jax.parallel import to_host
from llmeraser_jax.types import LoraParams

_gram = jax.jit(trees.rows_gram)
_products = jax.jit(trees.rows_vdot)
multiply = jax.jit(trees.tree_multiply)


@jax.jit
def _with_combination(total: LoraParams, coefficients: jax.Array, rows: LoraParams) -> LoraParams:
    return trees.tree_add(total, trees.combine_rows(coefficients, rows))


@jax.jit
def _with_squares(total: LoraParams, weights: jax.Array, rows: LoraParams) -> LoraParams:
    return trees.tree_add(total, trees.combine_rows(weights, trees.tree_multiply(rows, rows)))


@dataclasses.dataclass(frozen=True)
class RowBlocks:
    """`u_i` as blocks.

    Attributes:
        blocks: leaves [b, ...]; rows that belong to nothing (padding of micro-batches) may be among them.
        places: [m] where the rows are, counted through all blocks.
    """

    blocks: tuple[LoraParams, ...]
    places: Int[np.ndarray, " m"]

    @classmethod
    def whole(cls, rows: LoraParams) -> RowBlocks:
        """Rows [m, ...] as one block."""
        return cls((rows,), np.arange(len(jax.tree.leaves(rows)[0])))

    def __len__(self) -> int:
        return len(self.places)

    @property
    def sizes(self) -> list[int]:
        """Rows of each block."""
        return [len(jax.tree.leaves(block)[0]) for block in self.blocks]

    def joined(self, others: RowBlocks) -> RowBlocks:
        """These rows, then the others; nothing is copied."""
        places = np.concatenate([self.places, sum(self.sizes) + others.places])
        return RowBlocks((*self.blocks, *others.blocks), places)

    def gram(self, others: RowBlocks) -> Float[np.ndarray, "m k"]:
        """`U V'` in float64, from products in float32."""
        if others is self:
            parts = [[_gram(a, b) for b in self.blocks[: k + 1]] for k, a in enumerate(self.blocks)]
            lower = to_host(parts)
            found = [
                [lower[j][k] if k <= j else lower[k][j].T for k in range(len(lower))] for j in range(len(lower))
            ]
        else:
            found = to_host([[_gram(a, b) for b in others.blocks] for a in self.blocks])
        return np.block(found).astype(np.float64)[np.ix_(self.places, others.places)]

    def products(self, v: LoraParams) -> Float[np.ndarray, " m"]:
        """`U v` in float64, from products in float32."""
        found = to_host([_products(block, v) for block in self.blocks])
        return np.concatenate(found).astype(np.float64)[self.places]

    def combine(self, coefficients: Float[np.ndarray, " m"], start: LoraParams | None = None) -> LoraParams:
        """`sum_i c_i u_i`, added to `start` where there is one."""
        total = self._zero() if start is None else start
        for block, part in zip(self.blocks, self._by_block(coefficients), strict=True):
            total = _with_combination(total, part, block)
        return total

    def squares(self, weights: Float[np.ndarray, " m"]) -> LoraParams:
        """`sum_i w_i u_i^2`, number by number: the diagonal of `U'WU`."""
        total = self._zero()
        for block, part in zip(self.blocks, self._by_block(weights), strict=True):
            total = _with_squares(total, part, block)
        return total

    def scaled(self, scale: LoraParams) -> RowBlocks:
        """Every row times `scale`, number by number."""
        return RowBlocks(tuple(multiply(block, scale) for block in self.blocks), self.places)

    def _zero(self) -> LoraParams:
        return jax.tree.map(lambda x: np.zeros(x.shape[1:], x.dtype), self.blocks[0])

    def _by_block(self, coefficients: np.ndarray) -> list[np.ndarray]:
        """Coefficients of each block's rows, 0 for rows that belong to nothing."""
        whole = np.zeros(sum(self.sizes), jax.tree.leaves(self.blocks[0])[0].dtype)
        whole[self.places] = coefficients
        return np.split(whole, np.cumsum(self.sizes)[:-1])
