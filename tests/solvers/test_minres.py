"""MINRES against dense float64 algebra and SciPy, on definite, indefinite and singular systems."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg

from llmeraser_jax.solvers import ConjugateGradients, Minres, Status, is_failure
from tests.dense import DenseOperator
from tests.solvers.systems import D, as_tree, as_vector, rhs, run, symmetric

INDEFINITE = np.concatenate([-np.geomspace(0.5, 20, 4), np.geomspace(0.3, 50, D - 4)])


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def solve(matrix, b, rtol=1e-10, max_steps=60):
    return run(Minres(rtol=rtol, max_steps=max_steps), DenseOperator(jnp.asarray(matrix)), as_tree(b))


def status(solution):
    return Status(int(solution.status))


@pytest.mark.parametrize("eigenvalues", [INDEFINITE, -np.geomspace(1, 9, D), np.geomspace(1, 1e4, D)])
def test_solves_symmetric_systems_of_any_definiteness(eigenvalues):
    matrix, b = symmetric(eigenvalues), rhs()
    solution = solve(matrix, b)
    assert status(solution) is Status.CONVERGED
    np.testing.assert_allclose(as_vector(solution.value), np.linalg.solve(matrix, b), rtol=1e-5, atol=1e-8)
    true_residual = np.linalg.norm(b - matrix @ as_vector(solution.value)) / np.linalg.norm(b)
    assert float(solution.relative_residual) == pytest.approx(true_residual, rel=1e-2, abs=1e-14)
    assert bool(solution.negative_curvature) == bool(eigenvalues.min() < 0)


def test_an_indefinite_system_that_stops_conjugate_gradients():
    matrix, b = symmetric(INDEFINITE), rhs()
    operator = DenseOperator(jnp.asarray(matrix))
    peer = run(ConjugateGradients(rtol=1e-10, max_steps=60), operator, as_tree(b))
    assert status(peer) in (Status.NEGATIVE_CURVATURE, Status.NEGATIVE_CURVATURE_AT_START)
    assert status(solve(matrix, b)) is Status.CONVERGED


@pytest.mark.parametrize("steps", [1, 2, 5, 9])
def test_every_iterate_has_the_least_residual_of_its_krylov_space(steps):
    matrix, b = symmetric(INDEFINITE), rhs()
    solution = solve(matrix, b, rtol=0.0, max_steps=steps)
    basis = np.linalg.qr(np.stack([np.linalg.matrix_power(matrix / 50, j) @ b for j in range(steps)], 1))[0]
    expected = basis @ np.linalg.lstsq(matrix @ basis, b, rcond=None)[0]
    np.testing.assert_allclose(as_vector(solution.value), expected, rtol=1e-5, atol=1e-9)
    least = np.linalg.norm(b - matrix @ expected) / np.linalg.norm(b)
    assert float(solution.history[steps - 1]) == pytest.approx(least, rel=1e-6)
    assert float(solution.relative_residual) == pytest.approx(least, rel=1e-6)


def test_iterates_are_those_of_scipy():
    matrix, b = symmetric(INDEFINITE), rhs()
    iterates: list = []
    scipy.sparse.linalg.minres(matrix, b, rtol=1e-12, callback=lambda x: iterates.append(x.copy()))
    for steps in (1, 4, 8):
        np.testing.assert_allclose(
            as_vector(solve(matrix, b, 0.0, steps).value), iterates[steps - 1], rtol=1e-6, atol=1e-12
        )
    history = np.asarray(solve(matrix, b).history)
    residuals = [np.linalg.norm(b - matrix @ x) / np.linalg.norm(b) for x in iterates]
    # Further on the two lose the orthogonality of their Lanczos vectors in different ways.
    np.testing.assert_allclose(history[:10], residuals[:10], rtol=1e-6)


def test_history_never_rises_and_is_nan_beyond_the_last_step():
    solution = solve(symmetric(INDEFINITE), rhs(), 1e-8)
    steps, history = int(solution.num_steps), np.asarray(solution.history)
    assert np.all(np.diff(history[:steps]) <= 0) and np.all(np.isnan(history[steps:]))
    assert history[steps - 1] <= 1e-8 < history[steps - 2]


def test_ritz_extremes_after_the_full_krylov_space_are_the_extreme_eigenvalues():
    solution = solve(symmetric(INDEFINITE), rhs(), 1e-12, D)
    np.testing.assert_allclose(solution.ritz_extremes, [-20, 50], rtol=1e-8)


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_ritz_extremes_are_those_of_the_projection_on_the_krylov_space(steps):
    matrix, b = symmetric(INDEFINITE), rhs()
    solution = solve(matrix, b, 0.0, steps)
    basis = np.linalg.qr(np.stack([np.linalg.matrix_power(matrix / 50, j) @ b for j in range(steps)], 1))[0]
    ritz = np.linalg.eigvalsh(basis.T @ matrix @ basis)
    np.testing.assert_allclose(solution.ritz_extremes, ritz[[0, -1]], rtol=1e-6)


@pytest.mark.parametrize("nonzero", [np.linspace(1, 3, 8), np.concatenate([-np.linspace(1, 2, 4), np.ones(4)])])
def test_a_singular_consistent_system_gives_the_minimum_norm_solution(nonzero):
    matrix = symmetric(np.concatenate([np.zeros(4), nonzero]))
    b = matrix @ rhs()
    solution = solve(matrix, b)
    assert status(solution) is Status.CONVERGED
    np.testing.assert_allclose(as_vector(solution.value), np.linalg.pinv(matrix) @ b, atol=1e-8)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("seed", range(4))
def test_a_singular_inconsistent_system_ends_at_a_least_squares_solution(seed, dtype):
    nonzero = np.concatenate([-np.linspace(1, 2, 4), np.linspace(1, 3, 4)])
    matrix, b = symmetric(np.concatenate([np.zeros(4), nonzero])).astype(dtype), rhs(seed).astype(dtype)
    solution = solve(matrix, b, 1e-5, 200)
    assert status(solution) is Status.LEAST_SQUARES and not is_failure(solution.status)
    wide = matrix.astype(float)
    least = np.linalg.norm(b - wide @ np.linalg.pinv(wide, rcond=1e-5) @ b) / np.linalg.norm(b)
    assert float(solution.relative_residual) == pytest.approx(least, rel=1e-4)
    assert np.linalg.norm(as_vector(solution.value)) < 1e3


@pytest.mark.parametrize("kind", ["zero operator", "right-hand side in the null space"])
def test_a_right_hand_side_that_the_operator_maps_to_zero_is_a_failure_with_a_zero_step(kind):
    matrix = np.zeros((D, D)) if kind == "zero operator" else np.diag([0.0] * 4 + [1.0] * 8)
    b = np.eye(D)[0]
    solution = solve(matrix, b)
    assert status(solution) is Status.NEGATIVE_CURVATURE_AT_START and is_failure(solution.status)
    np.testing.assert_array_equal(as_vector(solution.value), 0)


def test_a_right_hand_side_without_curvature_of_its_own_is_no_obstacle():
    b = np.zeros(D)
    b[:2] = 1  # b'Ab = 0 and Ab is not
    solution = solve(np.diag([1.0, -1.0] + [2.0] * (D - 2)), b)
    assert status(solution) is Status.CONVERGED
    np.testing.assert_allclose(as_vector(solution.value)[:2], [1, -1], atol=1e-12)


def test_zero_rhs_gives_zero_and_a_failure_not_nan():
    solution = solve(np.eye(D), np.zeros(D))
    assert status(solution) is Status.ZERO_RHS
    np.testing.assert_array_equal(as_vector(solution.value), 0)
    assert float(solution.relative_residual) == 0 and not bool(solution.negative_curvature)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_tiny_and_huge_right_hand_sides_scale_the_solution(size, dtype):
    matrix, b = symmetric(INDEFINITE).astype(dtype), (size * rhs()).astype(dtype)
    rtol = 1e-5 if dtype == np.float32 else 1e-12
    solution = solve(matrix, b, rtol)
    assert status(solution) is Status.CONVERGED
    exact = np.linalg.solve(matrix.astype(float), b.astype(float))
    assert np.linalg.norm(as_vector(solution.value) - exact) < 200 * rtol * np.linalg.norm(exact)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_numbers_are_a_failure_and_never_returned(bad):
    b = rhs()
    b[3] = bad
    matrix = np.eye(D)
    matrix[2, 2] = bad
    for solution in (solve(np.eye(D), b), solve(matrix, rhs())):
        assert status(solution) is Status.NON_FINITE
        assert np.all(np.isfinite(as_vector(solution.value)))


def test_max_steps_is_not_called_convergence():
    assert status(solve(symmetric(INDEFINITE), rhs(), 1e-10, 3)) is Status.MAX_STEPS


def test_going_on_after_convergence_keeps_the_solution():
    matrix, b = symmetric(INDEFINITE), rhs()
    solution = solve(matrix, b, 0.0, 300)
    np.testing.assert_allclose(as_vector(solution.value), np.linalg.solve(matrix, b), rtol=1e-8)


def test_one_trace_serves_many_systems():
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def value(operator, b):
        return run(Minres(rtol=1e-10, max_steps=60), operator, b).value

    for seed in range(2):
        matrix = symmetric(INDEFINITE, seed)
        x = value(DenseOperator(jnp.asarray(matrix)), as_tree(rhs(seed)))
        np.testing.assert_allclose(as_vector(x), np.linalg.solve(matrix, rhs(seed)), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bad", [{"rtol": 1.0}, {"max_steps": 0}])
def test_bad_hyper_parameters_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Minres(**bad)
