"""The inverse of a factored curvature, computed in the space of its rows.

By the Woodbury identity, `(U'WU + mu I)^-1 v = (1/mu) [v - U' S (S G S + mu I)^-1 S U v]` with `S = sqrt(W)` and
the Gram matrix `G = U U'`. Given the rows, every solve is algebra of small matrices, for any damping and any number
of right-hand sides. It runs on the host in float64, on a float32 Gram matrix.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from llmeraser_jax import trees
from llmeraser_jax.curvature.factor import FactoredCurvature
from llmeraser_jax.parallel import to_host
from llmeraser_jax.types import LoraParams

_gram = jax.jit(trees.rows_gram)
_vdot = jax.jit(trees.rows_vdot)


@jax.jit
def _difference(
    mu: jax.Array, plus: jax.Array, plus_rows: LoraParams, minus: jax.Array, minus_rows: LoraParams
) -> LoraParams:
    return jax.tree.map(
        lambda a, b: (a - b) / mu, trees.combine_rows(plus, plus_rows), trees.combine_rows(minus, minus_rows)
    )


@dataclasses.dataclass(frozen=True)
class DualInverse:
    """`(sum_j w_j u_j u_j' + mu I)^-1`. Make it with `factorise`.

    Attributes:
        operator: the curvature.
        root_weights: `sqrt(w)` [m].
        cholesky: the lower factor of `S G S + mu I` [m, m].
    """

    operator: FactoredCurvature
    root_weights: np.ndarray
    cholesky: np.ndarray

    def _small_solve(self, inner: np.ndarray) -> np.ndarray:
        """`S (S G S + mu I)^-1 S inner` for `inner = U v`, [m] or [m, k]."""
        root = self.root_weights if inner.ndim == 1 else self.root_weights[:, None]
        return root * scipy.linalg.cho_solve((self.cholesky, True), root * inner)

    def solve(self, v: LoraParams) -> LoraParams:
        """The inverse times one vector."""
        coefficients = self._small_solve(to_host(_vdot(self.operator.rows, v)).astype(np.float64))
        one = jax.tree.map(lambda x: x[None], v)
        dtype = jax.tree.leaves(v)[0].dtype
        return _difference(
            jnp.asarray(self.operator.mu, dtype),
            jnp.ones(1, dtype),
            one,
            jnp.asarray(coefficients, dtype),
            self.operator.rows,
        )

    def metric(self, others: LoraParams) -> tuple[np.ndarray, np.ndarray]:
        """`V A^-1 V'` of a set of rows `V` (leaves [k, ...]).

        Returns:
            The matrix [k, k], and [m, k] what `combination` needs again.
        """
        inner = to_host(_gram(self.operator.rows, others)).astype(np.float64)
        solved = self._small_solve(inner)
        plain = to_host(_gram(others, others)).astype(np.float64)
        matrix = (plain - inner.T @ solved) / float(self.operator.mu)
        return 0.5 * (matrix + matrix.T), solved

    def combination(self, coefficients: np.ndarray, others: LoraParams, solved: np.ndarray) -> LoraParams:
        """`A^-1 V' a`, with the second value of `metric`."""
        dtype = jax.tree.leaves(others)[0].dtype
        return _difference(
            jnp.asarray(self.operator.mu, dtype),
            jnp.asarray(coefficients, dtype),
            others,
            jnp.asarray(solved @ coefficients, dtype),
            self.operator.rows,
        )


def factorise(operator: FactoredCurvature) -> DualInverse:
    """The inverse of a factored curvature; costs `m^2 p` multiplications and no pass through the network.

    Raises:
        ValueError: `mu` is not above 0, or some weight is negative.
    """
    weights = to_host(operator.weights).astype(np.float64)
    mu = float(operator.mu)
    if not mu > 0 or np.any(weights < 0):
        msg = f"mu is {mu} and the least weight {weights.min()}; mu must be above 0 and weights at least 0."
        raise ValueError(msg)
    root = np.sqrt(weights)
    gram = to_host(_gram(operator.rows, operator.rows)).astype(np.float64)
    small = root[:, None] * gram * root
    small[np.diag_indices_from(small)] += mu
    factor, _ = scipy.linalg.cho_factor(small, lower=True)
    return DualInverse(operator, root, factor)
