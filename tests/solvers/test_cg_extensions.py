"""Preconditioning and Ritz values of conjugate gradients, against dense float64 algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.sparse.linalg

from llmeraser_jax.solvers import ConjugateGradients, Status, is_failure
from tests.dense import DenseOperator
from tests.solvers.systems import D, DensePreconditioner, as_tree, as_vector, rhs, run, symmetric


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def operator(matrix):
    return DenseOperator(jnp.asarray(matrix))


def status(solution):
    return Status(int(solution.status))


def badly_scaled(size=D):
    scales = np.geomspace(1, 1e3, size)
    return scales[:, None] * symmetric(np.geomspace(1, 5, size)) * scales


def test_the_exact_inverse_as_preconditioner_converges_in_one_step():
    matrix, b = symmetric(np.geomspace(1, 1e4, D)), rhs()
    exact = DensePreconditioner(jnp.asarray(np.linalg.inv(matrix)))
    solution = run(ConjugateGradients(rtol=1e-9), operator(matrix), as_tree(b), exact)
    assert status(solution) is Status.CONVERGED and int(solution.num_steps) == 1
    np.testing.assert_allclose(as_vector(solution.value), np.linalg.solve(matrix, b), rtol=1e-8)
    np.testing.assert_allclose(solution.ritz_extremes, [1, 1], rtol=1e-9)


def test_a_diagonal_preconditioner_saves_most_steps_of_a_badly_scaled_system():
    matrix, b = badly_scaled(48), rhs(size=48)
    solver = ConjugateGradients(rtol=1e-8, max_steps=400)
    plain = run(solver, operator(matrix), as_tree(b))
    diagonal = DensePreconditioner(jnp.diag(1 / jnp.diag(jnp.asarray(matrix))))
    preconditioned = run(solver, operator(matrix), as_tree(b), diagonal)
    assert status(preconditioned) is Status.CONVERGED
    assert 2 * int(preconditioned.num_steps) < int(plain.num_steps)
    np.testing.assert_allclose(as_vector(preconditioned.value), np.linalg.solve(matrix, b), rtol=1e-4)


def test_steps_and_iterates_are_those_of_scipy():
    matrix, b = badly_scaled(), rhs()
    inverse = np.diag(1 / np.diag(matrix))
    iterates: list = []
    peer, info = scipy.sparse.linalg.cg(
        matrix, b, rtol=1e-8, atol=0, M=inverse, callback=lambda x: iterates.append(x.copy())
    )
    assert info == 0
    preconditioner = DensePreconditioner(jnp.asarray(inverse))
    solution = run(ConjugateGradients(rtol=1e-8, max_steps=60), operator(matrix), as_tree(b), preconditioner)
    assert int(solution.num_steps) == len(iterates)
    np.testing.assert_allclose(as_vector(solution.value), peer, rtol=1e-8)
    after = [np.linalg.norm(b - matrix @ x) / np.linalg.norm(b) for x in iterates]
    np.testing.assert_allclose(solution.history[: len(after)], after, rtol=1e-4, atol=1e-12)


def test_the_identity_as_preconditioner_changes_nothing():
    matrix, b = symmetric(np.geomspace(1, 50, D)), rhs()
    solver = ConjugateGradients(rtol=1e-8, max_steps=9)
    plain = run(solver, operator(matrix), as_tree(b))
    identity = run(solver, operator(matrix), as_tree(b), DensePreconditioner(jnp.eye(D)))
    assert int(identity.num_steps) == int(plain.num_steps)
    np.testing.assert_allclose(as_vector(identity.value), as_vector(plain.value), rtol=1e-9)
    np.testing.assert_allclose(identity.ritz_extremes, plain.ritz_extremes, rtol=1e-9)


@pytest.mark.parametrize("inverse", [-np.eye(D), np.zeros((D, D))])
def test_a_preconditioner_that_is_not_positive_is_a_failure_with_a_zero_step(inverse):
    solution = run(
        ConjugateGradients(), operator(np.eye(D)), as_tree(rhs()), DensePreconditioner(jnp.asarray(inverse))
    )
    assert status(solution) is Status.INDEFINITE_PRECONDITIONER and is_failure(solution.status)
    np.testing.assert_array_equal(as_vector(solution.value), 0)


def test_an_indefinite_preconditioner_met_later_is_a_failure_with_a_finite_iterate():
    inverse = symmetric(np.concatenate([[-0.5], np.linspace(1, 2, D - 1)]), seed=4)
    solver = ConjugateGradients(rtol=1e-10, max_steps=60)
    matrix = symmetric(np.geomspace(1, 100, D))
    found = [
        run(solver, operator(matrix), as_tree(rhs(seed)), DensePreconditioner(jnp.asarray(inverse)))
        for seed in range(8)
    ]
    late = [s for s in found if status(s) is Status.INDEFINITE_PRECONDITIONER and int(s.num_steps) > 0]
    assert late
    for solution in found:
        assert np.all(np.isfinite(as_vector(solution.value)))


def test_a_preconditioner_that_returns_nan_is_a_failure_and_never_returned():
    broken = DensePreconditioner(jnp.full((D, D), jnp.nan))
    solution = run(ConjugateGradients(), operator(np.eye(D)), as_tree(rhs()), broken)
    assert status(solution) is Status.NON_FINITE
    np.testing.assert_array_equal(as_vector(solution.value), 0)


@pytest.mark.parametrize("max_steps", [D, 40])
def test_ritz_extremes_after_the_full_krylov_space_are_the_extreme_eigenvalues(max_steps):
    eigenvalues = np.geomspace(0.3, 20, D)
    solver = ConjugateGradients(rtol=1e-13, max_steps=max_steps)
    solution = run(solver, operator(symmetric(eigenvalues)), as_tree(rhs()))
    np.testing.assert_allclose(solution.ritz_extremes, [0.3, 20], rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_ritz_extremes_are_those_of_the_projection_on_the_krylov_space(steps):
    matrix, b = symmetric(np.geomspace(0.3, 20, D)), rhs()
    solution = run(ConjugateGradients(rtol=0.0, max_steps=steps), operator(matrix), as_tree(b))
    basis, _ = np.linalg.qr(np.stack([np.linalg.matrix_power(matrix, j) @ b for j in range(steps)], 1))
    ritz = np.linalg.eigvalsh(basis.T @ matrix @ basis)
    np.testing.assert_allclose(solution.ritz_extremes, ritz[[0, -1]], rtol=1e-8)


def test_preconditioned_ritz_extremes_are_those_of_the_preconditioned_operator():
    matrix = badly_scaled()
    inverse = np.diag(1 / np.diag(matrix))
    solver = ConjugateGradients(rtol=1e-13, max_steps=D)
    solution = run(solver, operator(matrix), as_tree(rhs()), DensePreconditioner(jnp.asarray(inverse)))
    half = np.sqrt(inverse)
    expected = np.linalg.eigvalsh(half @ matrix @ half)[[0, -1]]
    np.testing.assert_allclose(solution.ritz_extremes, expected, rtol=1e-5)


def test_a_direction_of_negative_curvature_is_in_the_ritz_extremes():
    matrix = symmetric(np.concatenate([np.linspace(1, 5, D - 1), [-0.5]]))
    solution = run(ConjugateGradients(rtol=1e-10, max_steps=50), operator(matrix), as_tree(rhs()))
    assert bool(solution.negative_curvature)
    least, largest = map(float, solution.ritz_extremes)
    assert -0.5 - 1e-9 <= least < 0 < largest <= 5 + 1e-9


def test_ritz_extremes_of_a_solve_without_a_product_are_nan():
    assert np.all(np.isnan(run(ConjugateGradients(), operator(np.eye(D)), as_tree(np.zeros(D))).ritz_extremes))


def test_a_zero_operator_has_zero_ritz_extremes_and_no_step():
    solution = run(ConjugateGradients(), operator(np.zeros((D, D))), as_tree(rhs()))
    assert status(solution) is Status.NEGATIVE_CURVATURE_AT_START
    np.testing.assert_array_equal(solution.ritz_extremes, 0)
