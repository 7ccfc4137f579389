"""Every solver on the same systems, read through the same `Solution`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax.solvers import (
    BlockConjugateGradients,
    ConjugateGradients,
    Lissa,
    Minres,
    QuadraticDescent,
    ReferenceCompat,
    Status,
    describe,
)
from llmeraser_jax.types import Solution, Solver
from tests.solvers.systems import D, DenseSum, as_tree, as_vector, noisy_terms, rhs, symmetric

SETTINGS = {
    ConjugateGradients: {"rtol": 1e-6, "max_steps": 50},
    BlockConjugateGradients: {"rtol": 1e-6, "max_steps": 50},
    Minres: {"rtol": 1e-6, "max_steps": 50},
    QuadraticDescent: {"learning_rate": 0.3, "num_steps": 400},
    ReferenceCompat: {"learning_rate": 0.02, "num_steps": 3000, "weight_decay": 0.0},
    Lissa: {"scale": 4.0, "num_steps": 400},
}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("eigenvalues", [np.linspace(0.5, 4, D), np.full(D, 2.0)])
def test_every_solver_solves_a_definite_system_on_pytrees(kind, eigenvalues):
    solver = kind(**SETTINGS[kind])
    assert isinstance(solver, Solver) and hash(solver) == hash(kind(**SETTINGS[kind]))
    matrix, b = symmetric(eigenvalues), rhs()
    operator = DenseSum(jnp.asarray(noisy_terms(matrix, 3, 0.0)))
    block = kind is BlockConjugateGradients
    solution = jax.jit(solver.solve)(operator, as_tree(b[None] if block else b))
    assert isinstance(solution, Solution)
    value = as_vector(solution.value)
    expected = jnp.linalg.solve(matrix, b) * (2 if kind is ReferenceCompat else 1)
    np.testing.assert_allclose(value[0] if block else value, expected, atol=2e-3)
    assert jax.tree.structure(solution.value) == jax.tree.structure(as_tree(b))


@pytest.mark.parametrize("kind", SETTINGS)
def test_every_solver_has_working_defaults(kind):
    assert isinstance(kind(), Solver)


def test_every_status_has_words():
    assert all(describe(status).split(":")[0] for status in Status)
