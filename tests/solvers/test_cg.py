"""Conjugate gradients against dense float64 linear algebra and lineax, and on systems made to break it."""

import chex
import jax
import jax.numpy as jnp
import lineax
import numpy as np
import pytest

from llmeraser_jax.curvature import Damped
from llmeraser_jax.solvers import (
    ConjugateGradients,
    Status,
    describe,
    is_failure,
    python_while_loop,
)
from tests.dense import DenseOperator

D = 12


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def as_tree(flat):
    return {"a": jnp.asarray(flat[:4]).reshape(2, 2), "b": (jnp.asarray(flat[4:]),)}


def as_vector(tree):
    return np.concatenate([np.asarray(tree["a"]).ravel(), np.asarray(tree["b"][0])])


def symmetric(eigenvalues, seed=0):
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(D, D)))
    return basis @ np.diag(eigenvalues) @ basis.T


def rhs(seed=1):
    return np.random.default_rng(seed).normal(size=D)


LOOPS = [jax.lax.while_loop, python_while_loop]


@pytest.mark.parametrize("while_loop", LOOPS)
@pytest.mark.parametrize("condition", [1e1, 1e3, 1e6])
def test_solves_positive_definite_systems_like_dense_algebra_and_lineax(condition, while_loop):
    matrix, b = symmetric(np.geomspace(1, condition, D)), rhs()
    rtol = 1e-13 * condition  # rounding limits the true residual to about eps * condition
    solver = ConjugateGradients(rtol=rtol, max_steps=200, while_loop=while_loop)
    solution = solver.solve(DenseOperator(jnp.asarray(matrix)), as_tree(b))
    exact = np.linalg.solve(matrix, b)
    assert Status(int(solution.status)) is Status.CONVERGED
    np.testing.assert_allclose(as_vector(solution.value), exact, rtol=1e-5, atol=1e-9)
    tagged = lineax.MatrixLinearOperator(jnp.asarray(matrix), lineax.positive_semidefinite_tag)
    peer = lineax.linear_solve(tagged, jnp.asarray(b), lineax.CG(rtol=rtol, atol=0.0, max_steps=200))
    np.testing.assert_allclose(as_vector(solution.value), np.asarray(peer.value), rtol=1e-5, atol=1e-9)
    true_residual = np.linalg.norm(b - matrix @ as_vector(solution.value)) / np.linalg.norm(b)
    assert float(solution.relative_residual) == pytest.approx(true_residual, rel=1e-2, abs=1e-15)


def test_both_loops_make_the_same_iterates():
    operator, b = DenseOperator(jnp.asarray(symmetric(np.geomspace(1, 50, D)))), as_tree(rhs())
    jitted, streamed = (
        ConjugateGradients(rtol=1e-8, max_steps=7, while_loop=loop).solve(operator, b) for loop in LOOPS
    )
    np.testing.assert_allclose(as_vector(jitted.value), as_vector(streamed.value), rtol=1e-12)
    assert int(jitted.num_steps) == int(streamed.num_steps) == 7


def test_exact_after_as_many_steps_as_distinct_eigenvalues():
    matrix, b = symmetric([1.0] * 4 + [3.0] * 4 + [10.0] * 4), rhs()
    solution = ConjugateGradients(rtol=1e-10, max_steps=50).solve(DenseOperator(jnp.asarray(matrix)), as_tree(b))
    assert int(solution.num_steps) == 3
    np.testing.assert_allclose(as_vector(solution.value), np.linalg.solve(matrix, b), rtol=1e-10)


def test_max_steps_is_not_called_convergence():
    matrix = symmetric(np.geomspace(1, 1e4, D))
    solution = ConjugateGradients(rtol=1e-10, max_steps=3).solve(DenseOperator(jnp.asarray(matrix)), as_tree(rhs()))
    assert Status(int(solution.status)) is Status.MAX_STEPS
    assert describe(solution.status).startswith("not converged")
    assert int(solution.num_steps) == 3
    assert not is_failure(solution.status)


def test_zero_rhs_gives_zero_and_a_failure_not_nan():
    solution = ConjugateGradients().solve(DenseOperator(jnp.eye(D)), as_tree(np.zeros(D)))
    assert Status(int(solution.status)) is Status.ZERO_RHS
    np.testing.assert_array_equal(as_vector(solution.value), 0)
    assert float(solution.relative_residual) == 0
    assert is_failure(solution.status) and "right-hand side is zero" in describe(solution.status)


def test_indefinite_system_stops_with_the_iterate_reached_and_says_so():
    eigenvalues = np.concatenate([np.linspace(1, 5, D - 1), [-0.5]])
    matrix, b = symmetric(eigenvalues), rhs()
    solution = ConjugateGradients(rtol=1e-10, max_steps=50).solve(DenseOperator(jnp.asarray(matrix)), as_tree(b))
    assert Status(int(solution.status)) is Status.NEGATIVE_CURVATURE
    assert bool(solution.negative_curvature)
    steps = int(solution.num_steps)
    assert 0 < steps < D
    # The iterate is the minimiser over the Krylov space built so far: a descent step of the quadratic.
    x = as_vector(solution.value)
    assert 0.5 * x @ matrix @ x - b @ x < 0
    stopped = ConjugateGradients(rtol=1e-10, max_steps=steps).solve(DenseOperator(jnp.asarray(matrix)), as_tree(b))
    np.testing.assert_allclose(x, as_vector(stopped.value), rtol=1e-12)


def test_negative_curvature_at_the_start_is_a_failure_with_a_zero_step():
    solution = ConjugateGradients().solve(DenseOperator(-jnp.eye(D)), as_tree(rhs()))
    assert Status(int(solution.status)) is Status.NEGATIVE_CURVATURE_AT_START
    assert is_failure(solution.status)
    np.testing.assert_array_equal(as_vector(solution.value), 0)


def test_singular_consistent_system_gives_the_minimum_norm_solution():
    matrix = symmetric(np.concatenate([np.zeros(4), np.linspace(1, 3, 8)]))
    b = matrix @ rhs()
    solution = ConjugateGradients(rtol=1e-10, max_steps=50).solve(DenseOperator(jnp.asarray(matrix)), as_tree(b))
    np.testing.assert_allclose(as_vector(solution.value), np.linalg.pinv(matrix) @ b, atol=1e-8)


def test_singular_inconsistent_system_stays_finite_and_is_not_called_converged():
    matrix = symmetric(np.concatenate([np.zeros(4), np.linspace(1, 3, 8)]))
    solution = ConjugateGradients(rtol=1e-8, max_steps=60).solve(DenseOperator(jnp.asarray(matrix)), as_tree(rhs()))
    assert Status(int(solution.status)) is not Status.CONVERGED
    assert np.all(np.isfinite(as_vector(solution.value)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_tiny_and_huge_right_hand_sides_scale_the_solution(size, dtype):
    matrix, b = symmetric(np.geomspace(1, 10, D)).astype(dtype), (size * rhs()).astype(dtype)
    rtol = 1e-5 if dtype == np.float32 else 1e-12
    solution = ConjugateGradients(rtol=rtol, max_steps=50).solve(DenseOperator(jnp.asarray(matrix)), as_tree(b))
    assert Status(int(solution.status)) is Status.CONVERGED
    exact = np.linalg.solve(matrix.astype(np.float64), b.astype(np.float64))
    error = np.linalg.norm(as_vector(solution.value) - exact) / np.linalg.norm(exact)
    assert error < 20 * rtol


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_numbers_are_a_failure_and_never_returned(bad):
    b = rhs()
    b[3] = bad
    from_rhs = ConjugateGradients().solve(DenseOperator(jnp.eye(D)), as_tree(b))
    from_operator = ConjugateGradients().solve(DenseOperator(jnp.eye(D).at[2, 2].set(bad)), as_tree(rhs()))
    for solution in (from_rhs, from_operator):
        assert Status(int(solution.status)) is Status.NON_FINITE
        assert np.all(np.isfinite(as_vector(solution.value)))


def test_going_on_after_convergence_keeps_the_solution():
    matrix, b = symmetric(np.geomspace(1, 5, D)), rhs()
    solution = ConjugateGradients(rtol=0.0, max_steps=300).solve(DenseOperator(jnp.asarray(matrix)), as_tree(b))
    np.testing.assert_allclose(as_vector(solution.value), np.linalg.solve(matrix, b), rtol=1e-10)


def test_asymmetric_product_is_caught_by_the_true_residual():
    matrix = symmetric(np.geomspace(1, 30, D))
    skew = np.random.default_rng(5).normal(size=(D, D))
    matrix = matrix + 0.3 * (skew - skew.T)
    solution = ConjugateGradients(rtol=1e-3, max_steps=400).solve(
        DenseOperator(jnp.asarray(matrix)), as_tree(rhs())
    )
    if Status(int(solution.status)) is Status.CONVERGED:
        assert float(solution.relative_residual) <= 2e-3
    else:
        assert float(solution.relative_residual) > 2e-3


def test_history_holds_the_recurrence_and_nan_beyond_it():
    matrix, b = symmetric(np.geomspace(1, 20, D)), rhs()
    solution = ConjugateGradients(rtol=1e-6, max_steps=40).solve(DenseOperator(jnp.asarray(matrix)), as_tree(b))
    steps, history = int(solution.num_steps), np.asarray(solution.history)
    assert np.all(np.isfinite(history[:steps])) and np.all(np.isnan(history[steps:]))
    assert history[steps - 1] <= 1e-6 < history[steps - 2]


def test_damping_shifts_every_eigenvalue():
    matrix, b = symmetric(np.linspace(-0.9, 2, D)), rhs()
    operator = Damped(DenseOperator(jnp.asarray(matrix)), 1.0)
    solution = ConjugateGradients(rtol=1e-11, max_steps=60).solve(operator, as_tree(b))
    np.testing.assert_allclose(as_vector(solution.value), np.linalg.solve(matrix + np.eye(D), b), rtol=1e-8)


def test_operators_are_arguments_so_one_trace_serves_many_systems():
    chex.clear_trace_counter()
    solver = ConjugateGradients(rtol=1e-8, max_steps=30)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def solve(operator, b):
        return solver.solve(operator, b).value

    for seed in range(3):
        matrix = symmetric(np.geomspace(1, 5, D), seed)
        x = solve(DenseOperator(jnp.asarray(matrix)), as_tree(rhs(seed)))
        np.testing.assert_allclose(as_vector(x), np.linalg.solve(matrix, rhs(seed)), rtol=1e-6)


@pytest.mark.parametrize("bad", [{"rtol": -1.0}, {"rtol": 1.0}, {"max_steps": 0}])
def test_bad_hyper_parameters_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        ConjugateGradients(**bad)
