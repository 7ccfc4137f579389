"""Dense systems with known spectra, as the interfaces that solvers take."""

from __future__ import annotations

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

D = 12


def as_tree(flat):
    """A vector [12], or several [k, 12], as a pytree of two leaves."""
    flat = jnp.asarray(flat)
    return {"a": flat[..., :4].reshape(*flat.shape[:-1], 2, 2), "b": (flat[..., 4:],)}


def as_vector(tree):
    """Inverse of `as_tree`."""
    a, b = np.asarray(tree["a"]), np.asarray(tree["b"][0])
    return np.concatenate([a.reshape(*a.shape[:-2], 4), b], axis=-1)


def symmetric(eigenvalues, seed=0):
    """A symmetric matrix with these eigenvalues in a random basis."""
    size = len(eigenvalues)
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))
    return basis @ np.diag(eigenvalues) @ basis.T


def rhs(seed=1, size=D):
    return np.random.default_rng(seed).normal(size=size)


@flax.struct.dataclass
class DensePreconditioner:
    """Multiplies by a matrix."""

    inverse: jnp.ndarray

    def solve(self, v):
        flat, unravel = ravel_pytree(v)
        return unravel(self.inverse @ flat)


@flax.struct.dataclass
class DenseSum:
    """The mean of matrices [n, p, p], as a finite sum."""

    matrices: jnp.ndarray

    positive_semidefinite = False

    @property
    def num_terms(self) -> int:
        return self.matrices.shape[0]

    def term_mv(self, k, v):
        flat, unravel = ravel_pytree(v)
        return unravel(self.matrices[k] @ flat)

    def mv(self, v):
        flat, unravel = ravel_pytree(v)
        return unravel(self.matrices.mean(0) @ flat)


def noisy_terms(matrix, num_terms, noise, seed=2):
    """Symmetric positive semidefinite matrices near `matrix` whose mean it is, exactly up to rounding."""
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(num_terms, len(matrix), len(matrix)))
    shifts = noise * (factors + factors.transpose(0, 2, 1)) / 2
    return matrix + shifts - shifts.mean(0)


def assert_identical(got, expected):
    """Bit for bit, nan equal to nan."""
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(g, e)


@partial(jax.jit, static_argnums=0)
def run(solver, operator, b, *arguments):
    """`solver.solve`, compiled once for each solver and shape."""
    return solver.solve(operator, b, *arguments)
