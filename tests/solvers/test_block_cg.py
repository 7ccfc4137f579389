"""Block conjugate gradients against dense float64 algebra: shared Krylov space, dependent and broken columns."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax.solvers import BlockConjugateGradients, ConjugateGradients, Status
from tests.dense import DenseOperator
from tests.solvers.systems import D, as_tree, as_vector, rhs, run, symmetric


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def operator(matrix):
    return DenseOperator(jnp.asarray(matrix))


def several(k, seed=1):
    return np.stack([rhs(seed + i) for i in range(k)])


def statuses(solution):
    return [Status(int(s)) for s in solution.status]


SOLVER = BlockConjugateGradients(rtol=1e-10, max_steps=40)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("condition", [1e1, 1e4])
def test_every_column_is_the_dense_solution(k, condition):
    matrix, b = symmetric(np.geomspace(1, condition, D)), several(k)
    solution = run(SOLVER, operator(matrix), as_tree(b))
    assert statuses(solution) == [Status.CONVERGED] * k
    np.testing.assert_allclose(as_vector(solution.value), np.linalg.solve(matrix, b.T).T, rtol=1e-6, atol=1e-9)
    assert solution.history.shape == (k, 40) and solution.ritz_extremes.shape == (k, 2)
    assert np.all(np.asarray(solution.relative_residual) <= 2e-10)


def test_one_column_makes_the_iterates_of_conjugate_gradients():
    matrix, b = symmetric(np.geomspace(1, 100, D)), several(1)
    block = run(BlockConjugateGradients(rtol=1e-8, max_steps=6), operator(matrix), as_tree(b))
    single = run(ConjugateGradients(rtol=1e-8, max_steps=6), operator(matrix), as_tree(b[0]))
    np.testing.assert_allclose(as_vector(block.value)[0], as_vector(single.value), rtol=1e-9)
    np.testing.assert_allclose(block.history[0], single.history, rtol=1e-8)


def test_columns_share_the_krylov_space_so_that_steps_divide_by_their_number():
    matrix, b = symmetric(np.geomspace(1, 30, D)), several(4)
    solution = run(BlockConjugateGradients(rtol=1e-9, max_steps=40), operator(matrix), as_tree(b))
    assert np.all(np.asarray(solution.num_steps) == D // 4)


def test_every_iterate_minimises_the_energy_over_the_block_krylov_space():
    matrix, b = symmetric(np.geomspace(1, 30, D)), several(3)
    solution = run(BlockConjugateGradients(rtol=0.0, max_steps=2), operator(matrix), as_tree(b))
    basis = np.linalg.qr(np.concatenate([b, b @ matrix]).T)[0]
    expected = basis @ np.linalg.solve(basis.T @ matrix @ basis, basis.T @ b.T)
    np.testing.assert_allclose(as_vector(solution.value), expected.T, rtol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_duplicate_dependent_and_zero_columns_do_no_harm(dtype):
    matrix = symmetric(np.geomspace(1, 100, D)).astype(dtype)
    a, c = rhs(1), rhs(2)
    b = np.stack([a, a, np.zeros(D), c, a - 2 * c, a * (1 + 1e-5), -3 * c]).astype(dtype)
    rtol = 1e-5 if dtype == np.float32 else 1e-11
    solution = run(BlockConjugateGradients(rtol=rtol, max_steps=60), operator(matrix), as_tree(b))
    expected = [Status.CONVERGED] * 7
    expected[2] = Status.ZERO_RHS
    assert statuses(solution) == expected
    exact = np.linalg.solve(matrix.astype(float), b.astype(float).T).T
    got = as_vector(solution.value)
    np.testing.assert_allclose(got, exact, atol=200 * rtol)
    np.testing.assert_array_equal(got[2], 0)
    assert int(solution.num_steps[2]) == 0 and np.all(np.isnan(solution.history[2]))


def test_columns_that_converge_at_different_times_all_converge():
    eigenvalues = np.geomspace(1, 1e3, D)
    matrix = symmetric(eigenvalues)
    _, vectors = np.linalg.eigh(matrix)
    b = np.stack([vectors[:, 3], rhs(1), vectors[:, 0] + vectors[:, 5]])
    solution = run(SOLVER, operator(matrix), as_tree(b))
    assert statuses(solution) == [Status.CONVERGED] * 3
    assert float(solution.history[0, 0]) < 1 and float(solution.history[1, 0]) > 1e-3
    np.testing.assert_allclose(as_vector(solution.value), np.linalg.solve(matrix, b.T).T, atol=1e-7)


def test_more_columns_than_dimensions():
    matrix, b = symmetric(np.geomspace(1, 30, D)), several(D + 3)
    solution = run(SOLVER, operator(matrix), as_tree(b))
    assert statuses(solution) == [Status.CONVERGED] * (D + 3)
    np.testing.assert_allclose(as_vector(solution.value), np.linalg.solve(matrix, b.T).T, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_columns_of_very_different_size(dtype):
    matrix = symmetric(np.geomspace(1, 10, D)).astype(dtype)
    sizes = np.array([1e-30, 1.0, 1e30])[:, None]
    b = (sizes * several(3)).astype(dtype)
    rtol = 1e-5 if dtype == np.float32 else 1e-11
    solution = run(BlockConjugateGradients(rtol=rtol, max_steps=40), operator(matrix), as_tree(b))
    assert statuses(solution) == [Status.CONVERGED] * 3
    exact = np.linalg.solve(matrix.astype(float), b.astype(float).T).T / sizes
    np.testing.assert_allclose(as_vector(solution.value) / sizes, exact, atol=20 * rtol)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_column_fails_alone(bad):
    matrix, b = symmetric(np.geomspace(1, 10, D)), several(3)
    b[1, 5] = bad
    solution = run(SOLVER, operator(matrix), as_tree(b))
    assert statuses(solution) == [Status.CONVERGED, Status.NON_FINITE, Status.CONVERGED]
    np.testing.assert_allclose(as_vector(solution.value)[[0, 2]], np.linalg.solve(matrix, b[[0, 2]].T).T, rtol=1e-7)
    np.testing.assert_array_equal(as_vector(solution.value)[1], 0)


def test_a_non_finite_product_is_a_failure_and_never_returned():
    solution = run(SOLVER, operator(np.diag([np.nan] + [1.0] * (D - 1))), as_tree(several(2)))
    assert statuses(solution) == [Status.NON_FINITE] * 2
    np.testing.assert_array_equal(as_vector(solution.value), 0)


def test_an_indefinite_system_stops_with_the_iterates_reached_and_says_so():
    matrix = symmetric(np.concatenate([[-0.3], np.linspace(1, 5, D - 1)]))
    b = several(3)
    solution = run(SOLVER, operator(matrix), as_tree(b))
    assert statuses(solution) == [Status.NEGATIVE_CURVATURE] * 3
    assert np.all(np.asarray(solution.negative_curvature))
    x = as_vector(solution.value)
    assert np.all(0.5 * np.einsum("ki,ij,kj->k", x, matrix, x) - np.einsum("ki,ki->k", b, x) < 0)


@pytest.mark.parametrize("matrix", [-np.eye(D), np.zeros((D, D))])
def test_no_positive_curvature_at_the_start_is_a_failure_with_zero_steps(matrix):
    solution = run(SOLVER, operator(matrix), as_tree(several(2)))
    assert statuses(solution) == [Status.NEGATIVE_CURVATURE_AT_START] * 2
    np.testing.assert_array_equal(as_vector(solution.value), 0)


def test_a_singular_consistent_system_gives_minimum_norm_solutions():
    matrix = symmetric(np.concatenate([np.zeros(4), np.linspace(1, 3, 8)]))
    b = several(3) @ matrix
    solution = run(SOLVER, operator(matrix), as_tree(b))
    np.testing.assert_allclose(as_vector(solution.value), b @ np.linalg.pinv(matrix), atol=1e-8)


def test_a_singular_inconsistent_system_stays_finite_and_is_not_called_converged():
    matrix = symmetric(np.concatenate([np.zeros(4), np.linspace(1, 3, 8)]))
    solution = run(SOLVER, operator(matrix), as_tree(several(3)))
    assert Status.CONVERGED not in statuses(solution)
    assert np.all(np.isfinite(as_vector(solution.value)))


def test_one_trace_serves_many_systems():
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def solve(a, b):
        return run(SOLVER, a, b).value

    for seed in range(2):
        matrix, b = symmetric(np.geomspace(1, 5, D), seed), several(3, seed)
        np.testing.assert_allclose(
            as_vector(solve(operator(matrix), as_tree(b))), np.linalg.solve(matrix, b.T).T, rtol=1e-7
        )


@pytest.mark.parametrize("tree", [{"a": jnp.zeros((2, 3)), "b": jnp.zeros(4)}, {"a": jnp.zeros(())}])
def test_leaves_without_a_common_leading_axis_are_refused(tree):
    with pytest.raises(ValueError, match="expected one axis `k`"):
        run(SOLVER, operator(np.eye(D)), tree)


@pytest.mark.parametrize("bad", [{"rtol": 1.0}, {"max_steps": 0}])
def test_bad_hyper_parameters_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        BlockConjugateGradients(**bad)
