"""Iterative refinement on dense systems: the exact operator's solution from products of a wrong one."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax.solvers import ConjugateGradients, Minres, Refined, Status, inner_tolerance
from llmeraser_jax.solvers.refinement import MAX_CORRECTIONS
from tests.dense import DenseOperator
from tests.solvers.systems import D, as_tree, as_vector, rhs, symmetric

SPECTRUM = np.geomspace(0.5, 20, D)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def perturbed(matrix, size):
    """The matrix with a symmetric error of this spectral norm."""
    error = symmetric(np.linspace(-1, 1, D), seed=5)
    return matrix + size * error


def solve(matrix, approximation, b, solver=None, rtol=1e-8):
    solver = ConjugateGradients(rtol=1e-2, max_steps=40) if solver is None else solver
    approximate, exact = (DenseOperator(jnp.asarray(m)) for m in (approximation, matrix))
    refined = Refined(solver=solver, approximation=lambda _: approximate, rtol=rtol)
    solution = jax.jit(lambda b: refined.solve(exact, b))(as_tree(b))
    return solution, solution.num_exact_products


def relative_residual(matrix, x, b):
    return np.linalg.norm(b - matrix @ x) / np.linalg.norm(b)


@pytest.mark.parametrize("solver", [ConjugateGradients(rtol=1e-2, max_steps=40), Minres(rtol=1e-2, max_steps=40)])
def test_the_exact_residual_meets_a_tolerance_that_the_approximation_alone_misses(solver):
    matrix, b = symmetric(SPECTRUM), rhs()
    approximation = perturbed(matrix, 0.05)
    alone = np.linalg.solve(approximation, b)
    assert relative_residual(matrix, alone, b) > 1e-3
    solution, num_solves = solve(matrix, approximation, b, solver, rtol=1e-6)
    x = as_vector(solution.value)
    assert Status(int(solution.status)) is Status.CONVERGED
    assert float(solution.relative_residual) == pytest.approx(relative_residual(matrix, x, b), rel=1e-6)
    assert float(solution.relative_residual) < 2e-6
    np.testing.assert_allclose(x, np.linalg.solve(matrix, b), rtol=1e-4, atol=1e-6)
    assert 2 < int(num_solves) <= MAX_CORRECTIONS + 1


@pytest.mark.parametrize(("rtol", "num_solves"), [(0.3, 1), (0.05, 1), (0.04, 2), (1e-3, 3), (1e-5, 4)])
def test_inner_tolerances_multiply_to_the_whole(rtol, num_solves):
    inner = inner_tolerance(rtol)
    assert inner**num_solves == pytest.approx(rtol)
    assert inner >= 0.05
    assert inner_tolerance(0.0) == inner_tolerance(float(jnp.finfo(jnp.float32).eps))


def test_steps_are_summed_and_history_and_ritz_values_are_the_first_solve_s():
    matrix, b = symmetric(SPECTRUM), rhs()
    approximation = perturbed(matrix, 0.05)
    solver = ConjugateGradients(rtol=1e-2, max_steps=40)
    solution, num_solves = solve(matrix, approximation, b, solver, rtol=1e-5)
    # The same scheme written out, with NumPy between the solves.
    x, steps, solves, first = np.zeros(D), 0, 0, None
    while solves == 0 or relative_residual(matrix, x, b) > 2e-5:
        inner = solver.solve(DenseOperator(jnp.asarray(approximation)), as_tree(b - matrix @ x))
        first = inner if first is None else first
        x, steps, solves = x + as_vector(inner.value), steps + int(inner.num_steps), solves + 1
    assert (int(num_solves), int(solution.num_steps)) == (solves, steps)
    assert solves > 1
    np.testing.assert_allclose(as_vector(solution.value), x, rtol=1e-8)
    assert first is not None
    chex.assert_trees_all_close((solution.history, solution.ritz_extremes), (first.history, first.ritz_extremes))


def test_an_exact_approximation_takes_one_solve_and_its_units_do_not_matter():
    matrix, b = symmetric(SPECTRUM), rhs()
    solver = ConjugateGradients(rtol=1e-9, max_steps=40)
    for scale in (1.0, 1e-200):
        solution, num_solves = solve(matrix, matrix, scale * b, solver)
        assert int(num_solves) == 1
        np.testing.assert_allclose(as_vector(solution.value) / scale, np.linalg.solve(matrix, b), rtol=1e-6)


def test_an_approximation_that_is_too_far_off_ends_with_the_best_residual_and_says_so():
    matrix, b = symmetric(SPECTRUM), rhs()
    # Half of the matrix: every solve goes twice as far as it should, so that residuals keep their length.
    solution, num_solves = solve(matrix, matrix / 2, b, ConjugateGradients(rtol=1e-6, max_steps=40))
    assert Status(int(solution.status)) is Status.RESIDUAL_DRIFT
    assert int(num_solves) == 2
    assert float(solution.relative_residual) == pytest.approx(
        relative_residual(matrix, as_vector(solution.value), b), rel=1e-6
    )


def test_a_correction_that_makes_the_residual_worse_is_not_added():
    # With a third of the matrix the solution is three times too long: residuals of 2, and after a correction of 4.
    matrix, b = symmetric(SPECTRUM), rhs()
    solution, num_solves = solve(matrix, matrix / 3, b, ConjugateGradients(rtol=1e-8, max_steps=60))
    assert int(num_solves) == 2
    assert Status(int(solution.status)) is Status.RESIDUAL_DRIFT
    assert float(solution.relative_residual) == pytest.approx(2, rel=1e-5)
    np.testing.assert_allclose(as_vector(solution.value), 3 * np.linalg.solve(matrix, b), rtol=1e-4, atol=1e-6)


def test_corrections_end_after_a_few_however_slowly_they_help():
    matrix, b = symmetric(SPECTRUM), rhs()
    # Each correction leaves a third.
    solution, num_solves = solve(matrix, matrix * 1.5, b, ConjugateGradients(rtol=1e-9, max_steps=60), rtol=1e-12)
    assert int(num_solves) == MAX_CORRECTIONS + 1
    assert float(solution.relative_residual) == pytest.approx((1 / 3) ** int(num_solves), rel=1e-5)
    assert Status(int(solution.status)) is Status.RESIDUAL_DRIFT


@pytest.mark.parametrize(
    ("eigenvalues", "max_steps", "expected"),
    [(SPECTRUM, 2, Status.MAX_STEPS), (-SPECTRUM, 40, Status.NEGATIVE_CURVATURE_AT_START)],
)
def test_a_first_solve_that_did_not_converge_is_reported_as_it_ended(eigenvalues, max_steps, expected):
    matrix, b = symmetric(eigenvalues), rhs()
    solution, num_solves = solve(matrix, matrix, b, ConjugateGradients(rtol=1e-6, max_steps=max_steps))
    assert Status(int(solution.status)) is expected
    assert int(num_solves) == 1
    residual = relative_residual(matrix, as_vector(solution.value), b)
    assert float(solution.relative_residual) == pytest.approx(residual, rel=1e-6)
    assert bool(solution.negative_curvature) == (expected is Status.NEGATIVE_CURVATURE_AT_START)
