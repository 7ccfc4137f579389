"""The inverse of a factored curvature, computed in the space of its rows.

By the Woodbury identity, `(U'WU + mu I)^-1 v = (1/mu) [v - U' S (S G S + mu I)^-1 S U v]` with `S = sqrt(W)` and
the Gram matrix `G = U U'`. Given the rows, every solve is algebra of small matrices, for any damping and any number
of right-hand sides. It runs on the host in float64, on a float32 Gram matrix.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import scipy.linalg
from jaxtyping import Bool, Float

from llmeraser_jax import trees
from llmeraser_jax.curvature.row_blocks import RowBlocks
from llmeraser_jax.types import LoraParams


@dataclasses.dataclass(frozen=True)
class BlockCurvature:
    """`sum_j w_j u_j u_j' + mu I`, its rows in blocks and their Gram matrix at hand.

    Attributes:
        rows: `u_j`.
        weights: `w_j` [m], at least 0.
        mu: above 0: the share of the L2 term and the damping.
        gram: `U U'` [m, m].
    """

    rows: RowBlocks
    weights: np.ndarray
    mu: float
    gram: np.ndarray

    @classmethod
    def of(cls, rows: RowBlocks, weights: np.ndarray, mu: float) -> BlockCurvature:
        """Computes the Gram matrix: `m^2 p` multiplications and no pass through the network."""
        return cls(rows, weights, mu, rows.gram(rows))

    @property
    def positive_semidefinite(self) -> bool:
        return True

    def mv(self, v: LoraParams) -> LoraParams:
        """The product with `v`."""
        return self.rows.combine(self.weights * self.rows.products(v), _scaled(float(self.mu), v))

    def joined(self, others: BlockCurvature) -> BlockCurvature:
        """Both samples as one, each with its share of the rows; only products across are new."""
        share = len(others.rows) / (len(self.rows) + len(others.rows))
        across = self.rows.gram(others.rows)
        return BlockCurvature(
            rows=self.rows.joined(others.rows),
            weights=np.concatenate([(1 - share) * self.weights, share * others.weights]),
            mu=others.mu,
            gram=np.block([[self.gram, across], [across.T, others.gram]]),
        )


_scaled = jax.jit(trees.tree_scale)


@dataclasses.dataclass(frozen=True)
class DualInverse:
    """`(sum_j w_j u_j u_j' + mu I)^-1`. Make it with `factorise`.

    Attributes:
        curvature: the matrix.
        root_weights: `sqrt(w)` [m].
        cholesky: the lower factor of `S G S + mu I` [m, m].
    """

    curvature: BlockCurvature
    root_weights: np.ndarray
    cholesky: np.ndarray

    def _small_solve(self, inner: np.ndarray) -> np.ndarray:
        """`S (S G S + mu I)^-1 S inner` for `inner = U v`, [m] or [m, k]."""
        root = self.root_weights if inner.ndim == 1 else self.root_weights[:, None]
        return root * scipy.linalg.cho_solve((self.cholesky, True), root * inner)

    def solve(self, v: LoraParams) -> LoraParams:
        """The inverse times one vector."""
        rows, mu = self.curvature.rows, self.curvature.mu
        coefficients = self._small_solve(rows.products(v))
        return rows.combine(-coefficients / mu, _scaled(1 / float(mu), v))

    def metric(
        self, inner: Float[np.ndarray, "m k"], plain: Float[np.ndarray, "k k"]
    ) -> tuple[Float[np.ndarray, "k k"], Float[np.ndarray, "m k"]]:
        """`V A^-1 V'` of a set of rows `V`.

        Args:
            inner: `U V'`.
            plain: `V V'`.

        Returns:
            The matrix, and `w` such that `A^-1 V' a = (V' a - U' w a) / mu`.
        """
        solved = self._small_solve(inner)
        matrix = (plain - inner.T @ solved) / self.curvature.mu
        return 0.5 * (matrix + matrix.T), solved


def factorise(curvature: BlockCurvature, half: Bool[np.ndarray, " m"] | None = None) -> DualInverse:
    """The inverse of a factored curvature.

    Args:
        curvature: the matrix.
        half: which half of the rows counts, twice; None is all of them.

    Raises:
        ValueError: `mu` is not above 0, or some weight is negative.
    """
    weights, mu = curvature.weights, curvature.mu
    if not mu > 0 or np.any(weights < 0):
        msg = f"mu is {mu} and the least weight {weights.min()}; mu must be above 0 and weights at least 0."
        raise ValueError(msg)
    root = np.sqrt(weights if half is None else np.where(half, 2 * weights, 0))
    small = root[:, None] * curvature.gram * root
    small[np.diag_indices_from(small)] += mu
    factor, _ = scipy.linalg.cho_factor(small, lower=True)
    return DualInverse(curvature, root, factor)
