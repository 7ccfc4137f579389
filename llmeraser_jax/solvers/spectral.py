"""Preconditioners with a few eigendirections of the operator, and a multiple of the identity for the rest.

For `A = B + mu I` with `B` positive semidefinite and `B ~ U'U` with few rows, let `Q` hold the orthonormal right
singular vectors of `U` and `s` their squared singular values. Then

    P^-1 = Q' (diag(s) + mu)^-1 Q + (I - Q'Q) / (floor + mu),

where `floor` estimates `B` outside of the rows. The rows come from products with random vectors
(`nystroem_preconditioner`: Frangella, Tropp and Udell, "Randomized Nystroem preconditioning", arXiv 2110.02820) or
from a factored curvature (`factored_preconditioner`), at one backward pass each. Both constructors and the product
are traceable; vectors stay pytrees, and only Gram matrices are dense.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llmeraser_jax import trees
from llmeraser_jax.types import Key, LoraParams, Operator, WeightedRows, mv_many


@flax.struct.dataclass
class SpectralPreconditioner:
    """An approximate inverse of `B + mu I`: symmetric, and positive definite wherever `floor + mu` is above 0.

    Attributes:
        basis: `Q`, orthonormal rows, leaves [m, ...]; zero rows have no effect.
        eigenvalues: `s` [m], at least 0; 0 where the row is zero.
        floor: estimate of `B` outside of the rows; 0 leaves `mu I` there.
        mu: damping and the share of the L2 term.
    """

    basis: LoraParams
    eigenvalues: Float[Array, " m"]
    floor: Float[Array, ""]
    mu: Float[Array, ""] | float

    def solve(self, v: LoraParams) -> LoraParams:
        """`P^-1 v`."""
        rest = self.floor + self.mu
        coefficients = (rest / (self.eigenvalues + self.mu) - 1) * trees.rows_vdot(self.basis, v)
        known = trees.combine_rows(coefficients, self.basis)
        return jax.tree.map(lambda x, k: ((x + k) / rest).astype(x.dtype), v, known)

    def with_mu(self, mu: Float[Array, ""] | float) -> SpectralPreconditioner:
        """The same rows for another damping."""
        return dataclasses.replace(self, mu=mu)


def nystroem_preconditioner(
    operator: Operator, key: Key, like: LoraParams, *, rank: int, mu: Float[Array, ""] | float
) -> SpectralPreconditioner:
    """The Nystroem approximation of `B` from `rank` products with random orthonormal vectors.

    `B ~ Y' (O Y')^+ Y` with `Y = O B`, which never exceeds `B`. The pseudo-inverse leaves out what is below
    rounding; the paper shifts `B` there instead. Differs from the paper also in the factor `floor + mu`, by which
    `P` is smaller there: conjugate gradients are the same, and as it stands `P^-1` approximates the inverse itself.

    Args:
        operator: `B + mu I`, `B` positive semidefinite.
        key: of the random vectors.
        like: the structure, shapes and dtypes of adapter space.
        rank: products; the memory of as many vectors is kept, twice that is used on the way.
        mu: damping and the share of the L2 term, exactly: it is taken off the products.

    Raises:
        ValueError: `rank` is below 1 or above the size of adapter space.
    """
    probes = sketch_probes(key, like, rank=rank)
    return nystroem_from_products(probes, mv_many(operator, probes), mu=mu)


def sketch_probes(key: Key, like: LoraParams, *, rank: int) -> LoraParams:
    """Random orthonormal vectors, leaves [rank, ...]; any number of the first of them is such a set too.

    Raises:
        ValueError: `rank` is below 1 or above the size of adapter space.
    """
    if not 1 <= rank <= trees.tree_size(like):
        msg = f"rank is {rank}; it must lie between 1 and {trees.tree_size(like)}, the size of adapter space."
        raise ValueError(msg)
    draws = jax.vmap(lambda k: trees.tree_random_normal(k, like))(jax.random.split(key, rank))
    return principal_rows(draws)[0]


def nystroem_from_products(
    probes: LoraParams, products: LoraParams, *, mu: Float[Array, ""] | float
) -> SpectralPreconditioner:
    """The same from given products, made one at a time or streamed.

    Args:
        probes: from `sketch_probes`.
        products: `(B + mu I)` times each.
        mu: the multiple of the identity that the products contain besides `B`.
    """
    products = trees.tree_axpy(-mu, probes, products)
    core = trees.rows_gram(probes, products)
    values, vectors = jnp.linalg.eigh((core + core.T) / 2)
    basis, eigenvalues = principal_rows(trees.combine_rows(vectors * _inverse_root(values), products))
    return SpectralPreconditioner(basis, eigenvalues, jnp.min(eigenvalues), mu)


def factored_preconditioner(curvature: WeightedRows) -> SpectralPreconditioner:
    """The inverse of a factored curvature, as a preconditioner for the curvature that it estimates.

    Equal to the `solve` of `curvature.factorise` up to rounding, but traceable. Directions whose eigenvalue is
    below rounding of the largest one keep `mu`.

    Args:
        curvature: rows, their weights (at least 0), and `mu`.
    """
    roots = jnp.sqrt(curvature.weights)
    rows = jax.tree.map(lambda r: jnp.einsum("m,m...->m...", roots.astype(r.dtype), r), curvature.rows)
    basis, eigenvalues = principal_rows(rows)
    return SpectralPreconditioner(basis, eigenvalues, jnp.zeros((), eigenvalues.dtype), curvature.mu)


def principal_rows(rows: LoraParams) -> tuple[LoraParams, Float[Array, " m"]]:
    """Orthonormal `Q` and `s` with `U'U = Q' diag(s) Q`, for rows `U` with leaves [m, ...].

    Where `U` has lower rank, to rounding, rows of `Q` are zero and so is their `s`.
    """
    gram = trees.rows_gram(rows, rows)
    values, vectors = jnp.linalg.eigh((gram + gram.T) / 2)
    root = _inverse_root(values)
    basis = trees.combine_rows(vectors * root, rows)
    # A Gram matrix squares the condition number; one step of Newton and Schulz squares what is left of the error.
    again = trees.rows_gram(basis, basis)
    basis = trees.combine_rows(1.5 * jnp.eye(len(values), dtype=again.dtype) - 0.5 * again, basis)
    return basis, jnp.where(root > 0, values, 0)


def _inverse_root(values: Float[Array, " m"]) -> Float[Array, " m"]:
    """`values^-1/2`, and 0 where a value is rounding of the largest."""
    threshold = len(values) * jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values))
    used = values > threshold
    return jnp.where(used, 1 / jnp.sqrt(jnp.where(used, values, 1)), 0)
