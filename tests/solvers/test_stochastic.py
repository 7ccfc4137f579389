"""Stochastic solvers against dense float64 algebra and hand-written loops, and on systems where they diverge."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax.solvers import Lissa, QuadraticDescent, ReferenceCompat, Status, is_failure
from tests.dense import DenseOperator
from tests.solvers.systems import D, DenseSum, as_tree, as_vector, noisy_terms, rhs, run, symmetric

MATRIX = symmetric(np.linspace(0.5, 4, D))
INDEFINITE = symmetric(np.concatenate([[-2.0], np.linspace(0.5, 4, D - 1)]))
SOLVERS = {
    "sgd": QuadraticDescent(optimiser="sgd", learning_rate=0.3, num_steps=400),
    "adam": QuadraticDescent(optimiser="adam", learning_rate=0.02, num_steps=2000),
    "lissa": Lissa(scale=4.0, num_steps=400),
}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def terms(matrix, num_terms=3, noise=0.0):
    return DenseSum(jnp.asarray(noisy_terms(matrix, num_terms, noise)))


def status(solution):
    return Status(int(solution.status))


@pytest.mark.parametrize("name", SOLVERS)
def test_equal_terms_converge_to_the_dense_solution(name):
    solution = run(SOLVERS[name], terms(MATRIX), as_tree(rhs()))
    assert status(solution) is Status.CONVERGED
    np.testing.assert_allclose(as_vector(solution.value), np.linalg.solve(MATRIX, rhs()), atol=0.03)
    true_residual = np.linalg.norm(rhs() - MATRIX @ as_vector(solution.value)) / np.linalg.norm(rhs())
    assert float(solution.relative_residual) == pytest.approx(true_residual, rel=1e-6)
    assert not bool(solution.negative_curvature)


@pytest.mark.parametrize(
    ("solver", "worse"),
    [
        (Lissa(scale=8.0, num_steps=150, repeats=40), Lissa(scale=8.0, num_steps=150)),
    ],
    ids=["lissa repeats"],
)
def test_averaging_lowers_the_error_that_sampling_leaves(solver, worse):
    operator, exact = terms(MATRIX, 6, noise=0.4), np.linalg.solve(MATRIX, rhs())
    error, single = (
        np.linalg.norm(as_vector(run(s, operator, as_tree(rhs())).value) - exact) for s in (solver, worse)
    )
    assert error < single
    assert error < 0.1 * np.linalg.norm(exact)


def drawn(seed, step, num_terms, batch_terms=1):
    return np.asarray(
        jax.random.randint(jax.random.fold_in(jax.random.key(seed), step), (batch_terms,), 0, num_terms)
    )


def test_sgd_takes_the_steps_of_a_hand_written_loop():
    matrices = noisy_terms(MATRIX, 5, 0.3)
    solver = QuadraticDescent(learning_rate=0.1, num_steps=7, batch_terms=2, seed=3)
    solution = run(solver, DenseSum(jnp.asarray(matrices)), as_tree(rhs()))
    d, estimates = np.zeros(D), []
    for step in range(7):
        slope = matrices[drawn(3, step, 5, 2)].mean(0) @ d - rhs()
        estimates.append(np.linalg.norm(slope) / np.linalg.norm(rhs()))
        d = d - 0.1 * slope
    np.testing.assert_allclose(as_vector(solution.value), d, rtol=1e-10)
    np.testing.assert_allclose(solution.history, estimates, rtol=1e-10)
    assert status(solution) is Status.MAX_STEPS and int(solution.num_steps) == 7


def test_lissa_takes_the_steps_of_a_hand_written_loop():
    matrices = noisy_terms(MATRIX, 5, 0.3)
    solution = run(
        Lissa(scale=6.0, num_steps=5, repeats=2, seed=4), DenseSum(jnp.asarray(matrices)), as_tree(rhs())
    )
    ends = []
    for repeat in range(2):
        key, x = jax.random.fold_in(jax.random.key(4), repeat), rhs()
        for step in range(5):
            k = int(jax.random.randint(jax.random.fold_in(key, step), (1,), 0, 5)[0])
            x = rhs() + x - matrices[k] @ x / 6
        ends.append(x / 6)
    np.testing.assert_allclose(as_vector(solution.value), np.mean(ends, 0), rtol=1e-10)


def test_lissa_on_equal_terms_is_the_truncated_neumann_series():
    solution = run(Lissa(scale=6.0, num_steps=9), terms(MATRIX), as_tree(rhs()))
    factor = np.eye(D) - MATRIX / 6
    series = sum(np.linalg.matrix_power(factor, j) @ rhs() for j in range(10)) / 6
    np.testing.assert_allclose(as_vector(solution.value), series, rtol=1e-10)


def test_another_seed_draws_other_terms_and_the_same_seed_the_same():
    operator = terms(MATRIX, 6, 0.4)

    def value(seed):
        return as_vector(
            run(QuadraticDescent(learning_rate=0.1, num_steps=20, seed=seed), operator, as_tree(rhs())).value
        )

    np.testing.assert_array_equal(value(0), value(0))
    assert np.linalg.norm(value(0) - value(1)) > 1e-3


@pytest.mark.parametrize(
    "solver",
    [QuadraticDescent(learning_rate=5.0, num_steps=3000), Lissa(scale=0.5, num_steps=3000, repeats=2)],
    ids=["sgd", "lissa"],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_divergence_is_a_failure_with_a_finite_iterate(solver, dtype):
    operator = DenseSum(jnp.asarray(noisy_terms(MATRIX, 3, 0.1).astype(dtype)))
    solution = run(solver, operator, as_tree(rhs().astype(dtype)))
    assert status(solution) is Status.DIVERGED and is_failure(solution.status)
    assert np.all(np.isfinite(as_vector(solution.value)))
    assert not np.isnan(float(solution.relative_residual))
    assert 0 < int(solution.num_steps) < 3000


@pytest.mark.parametrize("name", ["sgd", "lissa"])
def test_an_indefinite_operator_makes_them_diverge_and_not_return_a_saddle(name):
    solution = run(SOLVERS[name], terms(INDEFINITE), as_tree(rhs()))
    assert status(solution) is Status.DIVERGED
    assert np.all(np.isfinite(as_vector(solution.value)))


def test_an_end_that_is_worse_than_no_step_is_called_divergence_before_numbers_overflow():
    solution = run(QuadraticDescent(learning_rate=0.6, num_steps=20), terms(MATRIX), as_tree(rhs()))
    assert status(solution) is Status.DIVERGED and int(solution.num_steps) == 20


def test_negative_curvature_along_the_iterate_is_reported():
    solver = QuadraticDescent(learning_rate=0.1, num_steps=5)
    assert bool(run(solver, terms(-np.eye(D)), as_tree(rhs())).negative_curvature)


ALL = [
    QuadraticDescent(learning_rate=0.1),
    QuadraticDescent(optimiser="adam", learning_rate=0.1),
    Lissa(scale=10.0, repeats=2),
    ReferenceCompat(),
]


@pytest.mark.parametrize(
    ("solver", "stated", "name"),
    [
        (QuadraticDescent(), QuadraticDescent(learning_rate=0.125), "learning_rate"),
        (Lissa(num_steps=300), Lissa(num_steps=300, scale=6.0), "scale"),
    ],
)
def test_a_step_size_is_left_to_an_eigenvalue_or_stated(solver, stated, name):
    with pytest.raises(ValueError, match=f"{name} is None"):
        run(solver, terms(MATRIX), as_tree(rhs()))
    assert solver.for_eigenvalue(4.0) == stated and stated.for_eigenvalue(100.0) is stated
    assert status(run(stated, terms(MATRIX), as_tree(rhs()))) is Status.CONVERGED


@pytest.mark.parametrize("solver", ALL)
def test_zero_rhs_gives_zero_and_a_failure_not_nan(solver):
    solution = run(solver, terms(MATRIX), as_tree(np.zeros(D)))
    assert status(solution) is Status.ZERO_RHS
    np.testing.assert_array_equal(as_vector(solution.value), 0)
    assert float(solution.relative_residual) == 0 and int(solution.num_steps) == 0


@pytest.mark.parametrize("solver", ALL)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_numbers_are_a_failure_and_never_returned(solver, bad):
    b = rhs()
    b[3] = bad
    broken = jnp.asarray(np.broadcast_to(MATRIX, (3, D, D))).at[:, 2, 2].set(bad)
    for solution in (run(solver, terms(MATRIX), as_tree(b)), run(solver, DenseSum(broken), as_tree(rhs()))):
        assert status(solution) is Status.NON_FINITE
        assert np.all(np.isfinite(as_vector(solution.value)))
        assert not np.isnan(float(solution.relative_residual))


@pytest.mark.parametrize("size", [1e-25, 1e25])
@pytest.mark.parametrize("name", ["sgd", "lissa"])
def test_tiny_and_huge_right_hand_sides_scale_the_solution_in_float32(name, size):
    operator = DenseSum(jnp.asarray(np.broadcast_to(MATRIX, (2, D, D)), jnp.float32))
    solution = run(SOLVERS[name], operator, as_tree((size * rhs()).astype(np.float32)))
    assert status(solution) is Status.CONVERGED
    np.testing.assert_allclose(as_vector(solution.value) / size, np.linalg.solve(MATRIX, rhs()), atol=1e-3)


@pytest.mark.parametrize("solver", ALL)
def test_an_operator_without_terms_is_refused_by_name(solver):
    with pytest.raises(TypeError, match=r"num_terms and term_mv; DenseOperator has none"):
        run(solver, DenseOperator(jnp.eye(D)), as_tree(rhs()))


def test_reference_compat_has_the_constants_of_the_script():
    solver = ReferenceCompat()
    assert (solver.learning_rate, solver.num_steps, solver.batch_terms) == (1e-5, 20, 1)
    assert (solver.start, solver.weight_decay) == (1e-5, 1e-5)


@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_reference_compat_converges_to_twice_the_influence_step_less_the_decay(weight_decay):
    solver = ReferenceCompat(learning_rate=0.02, num_steps=4000, weight_decay=weight_decay)
    solution = run(solver, terms(MATRIX), as_tree(rhs()))
    exact = np.linalg.solve(MATRIX / 2 + weight_decay * np.eye(D), rhs())
    np.testing.assert_allclose(as_vector(solution.value), exact, atol=1e-3)
    if weight_decay == 0:
        np.testing.assert_allclose(as_vector(solution.value), 2 * np.linalg.solve(MATRIX, rhs()), atol=1e-3)
        # `2 H^-1 b` leaves the residual `b - 2 b`.
        assert float(solution.relative_residual) == pytest.approx(1, abs=1e-3)
        assert status(solution) is Status.MAX_STEPS


def test_reference_compat_as_the_script_runs_it_moves_each_number_by_about_its_sign():
    solution = run(ReferenceCompat(), terms(MATRIX, 20), as_tree(rhs()))
    np.testing.assert_allclose(as_vector(solution.value), 1e-5 + 2e-4 * np.sign(rhs()), rtol=1e-2)


def test_reference_compat_takes_terms_in_order_without_a_seed():
    matrices = noisy_terms(MATRIX, 3, 0.5)
    ordered, repeated = DenseSum(jnp.asarray(matrices)), DenseSum(jnp.asarray(matrices[[0, 1, 2, 0, 1]]))
    solver = ReferenceCompat(learning_rate=0.1, num_steps=5)
    values = [as_vector(run(solver, operator, as_tree(rhs())).value) for operator in (ordered, repeated)]
    np.testing.assert_array_equal(values[0], values[1])
    seeded = run(ReferenceCompat(learning_rate=0.1, num_steps=5, seed=0), ordered, as_tree(rhs()))
    assert np.linalg.norm(as_vector(seeded.value) - values[0]) > 1e-6


@pytest.mark.parametrize("solver", ALL)
def test_one_trace_serves_many_systems(solver):
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def solve(operator, b):
        return run(solver, operator, b).value

    for seed in range(2):
        assert np.all(np.isfinite(as_vector(solve(terms(symmetric(np.ones(D), seed)), as_tree(rhs(seed))))))


@pytest.mark.parametrize(
    ("solver", "bad"),
    [
        (QuadraticDescent, {"optimiser": "lbfgs"}),
        (QuadraticDescent, {"learning_rate": 0.0}),
        (QuadraticDescent, {"num_steps": 0}),
        (QuadraticDescent, {"batch_size": 0}),
        (QuadraticDescent, {"batch_terms": 0}),
        (QuadraticDescent, {"rtol": 1.0}),
        (ReferenceCompat, {"learning_rate": -1.0}),
        (ReferenceCompat, {"weight_decay": -1.0}),
        (ReferenceCompat, {"num_steps": 0}),
        (ReferenceCompat, {"rtol": -1.0}),
        (Lissa, {"scale": 0.0}),
        (Lissa, {"repeats": 0}),
        (Lissa, {"num_steps": 0}),
        (Lissa, {"rtol": 2.0}),
    ],
)
def test_bad_hyper_parameters_are_refused_by_name(solver, bad):
    # A TypeError where the tests' run-time check of annotations sees it first.
    with pytest.raises((ValueError, TypeError), match=next(iter(bad))) as error:
        solver(**bad)
    assert str(next(iter(bad.values()))) in str(error.value)


def test_adams_step_size_has_to_be_stated():
    with pytest.raises(ValueError, match="optimiser 'adam' needs a learning_rate"):
        QuadraticDescent(optimiser="adam")
