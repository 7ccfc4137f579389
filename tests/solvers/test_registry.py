"""Every solver of the registry on the same systems, read through the same `Solution`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax.solvers import SOLVERS, Status, describe
from llmeraser_jax.types import Solution, Solver
from tests.solvers.systems import D, DenseSum, as_tree, as_vector, noisy_terms, rhs, symmetric

SETTINGS = {
    "cg": {"rtol": 1e-6, "max_steps": 50},
    "block-cg": {"rtol": 1e-6, "max_steps": 50},
    "minres": {"rtol": 1e-6, "max_steps": 50},
    "quadratic": {"learning_rate": 0.3, "num_steps": 400},
    "reference-compat": {"learning_rate": 0.02, "num_steps": 3000, "weight_decay": 0.0},
    "lissa": {"scale": 4.0, "num_steps": 400},
}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def test_the_settings_cover_the_registry():
    assert set(SETTINGS) == set(SOLVERS)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("eigenvalues", [np.linspace(0.5, 4, D), np.full(D, 2.0)])
def test_every_solver_solves_a_definite_system_on_pytrees(name, eigenvalues):
    solver = SOLVERS[name](**SETTINGS[name])
    assert isinstance(solver, Solver) and hash(solver) == hash(SOLVERS[name](**SETTINGS[name]))
    matrix, b = symmetric(eigenvalues), rhs()
    operator = DenseSum(jnp.asarray(noisy_terms(matrix, 3, 0.0)))
    block = name == "block-cg"
    solution = jax.jit(solver.solve)(operator, as_tree(b[None] if block else b))
    assert isinstance(solution, Solution)
    value = as_vector(solution.value)
    expected = jnp.linalg.solve(matrix, b) * (2 if name == "reference-compat" else 1)
    np.testing.assert_allclose(value[0] if block else value, expected, atol=2e-3)
    assert jax.tree.structure(solution.value) == jax.tree.structure(as_tree(b))


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_has_working_defaults(name):
    assert isinstance(SOLVERS[name](), Solver)


def test_every_status_has_words():
    assert all(describe(status).split(":")[0] for status in Status)
