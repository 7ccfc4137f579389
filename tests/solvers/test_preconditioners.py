"""Preconditioners and approximate inverses, against dense float64 algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from llmeraser_jax import trees
from llmeraser_jax.curvature.dual import BlockCurvature, factorise
from llmeraser_jax.curvature.factor import FactoredCurvature
from llmeraser_jax.curvature.row_blocks import RowBlocks
from llmeraser_jax.solvers import ConjugateGradients, Status
from llmeraser_jax.solvers.direct import DirectInverse
from llmeraser_jax.solvers.spectral import (
    factored_preconditioner,
    nystroem_from_products,
    nystroem_preconditioner,
    principal_rows,
    sketch_probes,
)
from llmeraser_jax.types import Preconditioner, Solver
from tests.dense import DenseOperator, materialise
from tests.solvers.systems import D, DensePreconditioner, as_tree, as_vector, rhs, run, symmetric

MU = 1e-3
DECAYING = 0.25 ** np.arange(D)  # 1, 1/4, ... : what a sketch is for
LIKE = np.zeros(D)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def operator(matrix) -> DenseOperator:
    return DenseOperator(jnp.asarray(matrix), positive_semidefinite=True)


def dense_inverse(preconditioner) -> np.ndarray:
    return np.asarray(materialise(_Solves(preconditioner), as_tree(LIKE)))


class _Solves:
    """A preconditioner's `solve` as a product."""

    positive_semidefinite = True

    def __init__(self, preconditioner):
        self.mv = preconditioner.solve


@jax.jit
def nystroem4(op, key):
    return nystroem_preconditioner(op, key, as_tree(LIKE), rank=4, mu=MU)


def test_orthonormal_rows_of_an_ill_conditioned_and_of_a_singular_set():
    rng = np.random.default_rng(0)
    rows = np.geomspace(1, 1e-5, 5)[:, None] * rng.normal(size=(5, D))
    rows[4] = rows[0] - rows[1]  # rank 4
    basis, values = principal_rows(as_tree(rows))
    q, values = as_vector(basis), np.asarray(values)
    np.testing.assert_allclose(q.T @ np.diag(values) @ q, rows.T @ rows, atol=1e-12)
    assert np.count_nonzero(values) == 4
    np.testing.assert_allclose(q @ q.T, np.diag((values > 0).astype(float)), atol=1e-9)


def test_nystroem_is_the_exact_inverse_where_its_rank_suffices():
    matrix = symmetric([5.0, 2.0, 1.0, *np.zeros(D - 3)]) + MU * np.eye(D)
    found = dense_inverse(nystroem4(operator(matrix), jax.random.key(0)))
    np.testing.assert_allclose(found, np.linalg.inv(matrix), rtol=1e-9, atol=1e-7)


def test_products_made_elsewhere_give_the_same():
    matrix, key = symmetric(DECAYING) + MU * np.eye(D), jax.random.key(3)
    probes = sketch_probes(key, as_tree(jnp.zeros(D)), rank=4)
    np.testing.assert_allclose(as_vector(probes) @ as_vector(probes).T, np.eye(4), atol=1e-12)
    apart = nystroem_from_products(probes, as_tree(as_vector(probes) @ matrix), mu=MU)
    assert isinstance(apart, Preconditioner)
    together = nystroem4(operator(matrix), key)
    np.testing.assert_allclose(dense_inverse(apart), dense_inverse(together), rtol=1e-8, atol=1e-7)


def test_nystroem_is_the_textbook_formula():
    """By a pseudo-inverse of dense matrices, for the same random vectors."""
    psd, key = symmetric(DECAYING), jax.random.key(3)
    draws = np.stack(
        [as_vector(trees.tree_random_normal(k, as_tree(jnp.zeros(D)))) for k in jax.random.split(key, 4)]
    )
    sketch = psd @ draws.T
    approximation = sketch @ np.linalg.pinv(draws @ sketch) @ sketch.T
    values, vectors = np.linalg.eigh(approximation)
    top, basis = values[-4:], vectors[:, -4:]
    rest = np.eye(D) - basis @ basis.T
    expected = basis @ np.diag(1 / (top + MU)) @ basis.T + rest / (top.min() + MU)
    found = nystroem4(operator(psd + MU * np.eye(D)), key)
    np.testing.assert_allclose(np.sort(found.eigenvalues), top, rtol=1e-8)
    np.testing.assert_allclose(dense_inverse(found), expected, rtol=1e-7, atol=1e-6)
    # Another damping needs no new sketch.
    expected = basis @ np.diag(1 / (top + 0.5)) @ basis.T + rest / (top.min() + 0.5)
    np.testing.assert_allclose(dense_inverse(found.with_mu(0.5)), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_nystroem_bounds_the_condition_number(seed):
    """Frangella, Tropp and Udell, Proposition 5.3: at most (s_min + mu + ||B - B_nys||) / mu."""
    psd = symmetric(DECAYING)
    matrix = psd + MU * np.eye(D)
    found = nystroem4(operator(matrix), jax.random.key(seed))
    inverse = dense_inverse(found)
    assert np.linalg.eigvalsh(inverse).min() > 0
    q, s = as_vector(found.basis), np.asarray(found.eigenvalues)
    error = np.linalg.eigvalsh(psd - q.T @ np.diag(s) @ q)
    assert error.min() > -1e-12  # never exceeds B
    root = np.linalg.cholesky(inverse)
    condition = np.linalg.cond(root.T @ matrix @ root)
    assert condition <= (s.min() + MU + error.max()) / MU * (1 + 1e-9)
    assert condition < np.linalg.cond(matrix) / 4  # 1000 before; it goes with the fourth eigenvalue, 1/64


def test_nystroem_in_float32_stays_positive_definite_on_a_wide_spectrum():
    matrix = symmetric(10.0 ** -np.arange(D))
    like = as_tree(jnp.zeros(D, jnp.float32))
    single = operator(jnp.asarray(matrix + 1e-6 * np.eye(D), jnp.float32))
    found = nystroem_preconditioner(single, jax.random.key(0), like, rank=D, mu=1e-6)
    inverse = np.asarray(materialise(_Solves(found), like), np.float64)
    assert np.all(np.isfinite(inverse))
    assert np.linalg.eigvalsh((inverse + inverse.T) / 2).min() > 0


def random_factor(num_rows: int) -> FactoredCurvature:
    rng = np.random.default_rng(5)
    return FactoredCurvature(
        as_tree(rng.normal(size=(num_rows, D))), jnp.asarray(rng.uniform(0, 2, num_rows)), 0.05
    )


@pytest.mark.parametrize("num_rows", [5, 30])
def test_a_factored_curvature_is_inverted(num_rows):
    factored = random_factor(num_rows)
    found = jax.jit(factored_preconditioner)(factored)
    expected = np.linalg.inv(np.asarray(materialise(factored, as_tree(LIKE))))
    np.testing.assert_allclose(dense_inverse(found), expected, rtol=1e-8, atol=1e-8)
    b, rows = as_tree(rhs()), RowBlocks.whole(factored.rows)
    in_blocks = BlockCurvature.of(rows, np.asarray(factored.weights), 0.05)
    np.testing.assert_allclose(as_vector(found.solve(b)), as_vector(factorise(in_blocks).solve(b)), rtol=1e-9)


@pytest.mark.parametrize("kind", ["nystroem", "factored"])
def test_preconditioned_conjugate_gradients_reach_the_same_solution(kind):
    factored, key, like = random_factor(5), jax.random.key(2), as_tree(LIKE)
    matrix = np.asarray(materialise(factored, like)) + 0.01 * symmetric(np.linspace(0, 1, D))
    op = operator(matrix)
    made = {
        "nystroem": lambda: nystroem_preconditioner(op, key, like, rank=5, mu=0.05),
        "factored": lambda: factored_preconditioner(factored),
    }[kind]()
    solver = ConjugateGradients(rtol=1e-10, max_steps=60)
    plain, found = run(solver, op, as_tree(rhs())), run(solver, op, as_tree(rhs()), made)
    assert int(found.status) == Status.CONVERGED
    np.testing.assert_allclose(as_vector(found.value), np.linalg.solve(matrix, rhs()), rtol=1e-6)
    assert int(found.num_steps) < int(plain.num_steps)


def test_arguments_out_of_range_are_refused():
    op, key, like = operator(np.eye(D)), jax.random.key(0), as_tree(LIKE)
    for rank in (0, D + 1):
        with pytest.raises(ValueError, match="rank"):
            nystroem_preconditioner(op, key, like, rank=rank, mu=1.0)


def solve_directly(inverse, matrix, b, rtol=1e-2):
    solver = DirectInverse(DensePreconditioner(jnp.asarray(inverse)), rtol)
    assert isinstance(solver, Solver)
    return jax.jit(lambda s, op, v: s.solve(op, v))(solver, operator(matrix), as_tree(b))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_direct_inverse_states_its_true_residual(scale):
    matrix = symmetric(np.linspace(1, 3, D))
    inverse = np.linalg.inv(matrix + 0.3 * np.eye(D))
    b = scale * rhs()
    solution = solve_directly(inverse, matrix, b)
    np.testing.assert_allclose(as_vector(solution.value), inverse @ b, rtol=1e-9)
    expected = np.linalg.norm(b - matrix @ inverse @ b) / np.linalg.norm(b)
    np.testing.assert_allclose(solution.relative_residual, expected, rtol=1e-9)
    assert 0.05 < expected < 0.5 and int(solution.status) == Status.MAX_STEPS
    assert int(solve_directly(inverse, matrix, b, rtol=0.5).status) == Status.CONVERGED
    assert int(solution.num_steps) == 0 and not bool(solution.negative_curvature)


def test_a_direct_inverse_that_is_no_use_says_so():
    matrix = symmetric(np.linspace(1, 3, D))
    assert int(solve_directly(10 * np.eye(D), matrix, rhs()).status) == Status.DIVERGED
    assert int(solve_directly(np.eye(D), matrix, np.zeros(D)).status) == Status.ZERO_RHS
    broken = solve_directly(np.full((D, D), np.nan), matrix, rhs())
    assert int(broken.status) == Status.NON_FINITE
    downwards = solve_directly(np.eye(D), -matrix, rhs())
    assert bool(downwards.negative_curvature)
    flat, _ = ravel_pytree(downwards.value)
    assert np.all(np.isfinite(flat))
