"""Steps with bfloat16 operands: as exact as float32 ones, by residuals in float32, and counted."""

import jax
import numpy as np
import pytest

from llmeraser_jax.curvature import CURVATURES, Damped, DatasetCurvature, NarrowProducts
from llmeraser_jax.solvers import ConjugateGradients, Status
from llmeraser_jax.unlearning import evaluator as evaluator_module
from llmeraser_jax.unlearning.dispatch import unlearn
from llmeraser_jax.unlearning.evaluator import Evaluator
from llmeraser_jax.unlearning.problem import EditProblem, Weighted
from tests.problems import ArrayExamples, join_params, ridge_objective, ridge_solution, split_params
from tests.unlearning.test_path_on_ridge import config

N, D, L2 = 64, 24, 0.02


@pytest.fixture(scope="module")
def ridge():
    """Problem, trained parameters, design matrix and targets; float32, since only that is made narrow."""
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(N, D)) * np.geomspace(0.2, 2, D)).astype(np.float32)
    y = rng.normal(size=N).astype(np.float32)
    problem = EditProblem(ArrayExamples(x, y), N, np.array([3, 40]), np.array([-1, -1]))
    return problem, ridge_solution(x, y, L2).astype(np.float32), x, y


def settings(**changes):
    narrow = {"method": "step", "trust_region": False, "l2": L2, "cg_rtol": 1e-4, "operands": "bfloat16"}
    return config(**{**narrow, **changes})


def moved_by(problem, before, **changes):
    result = unlearn(ridge_objective(L2), split_params(before), problem, settings(**changes))
    assert all(record.status is Status.CONVERGED for record in result.steps)
    assert all(record.relative_residual <= 2e-4 for record in result.steps)
    for record in result.steps:  # a receipt has no room for what is not a number
        assert 0 < len(record.residual_history) <= record.iterations
        assert np.all(np.isfinite(record.residual_history))
    assert 1e-6 < result.asymmetry < 4e-3
    return join_params(result.params) - before


def close(moved, expected):
    return np.linalg.norm(moved - expected) < 5e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("changes", [{}, {"solver": "minres"}, {"memory_budget_bytes": 0}])
def test_a_step_is_the_dense_one(ridge, changes):
    problem, before, x, y = ridge
    gradients = x * (x @ before - y)[:, None] + L2 * before
    matrix = x.T @ x / N + L2 * np.eye(D)
    expected = np.linalg.solve(matrix, gradients[problem.named].sum(0) / N)
    assert close(moved_by(problem, before, **changes), expected)


def test_the_path_ends_where_retraining_does(ridge):
    problem, before, x, y = ridge
    expected = ridge_solution(x[problem.retained], y[problem.retained], L2) - before
    assert close(moved_by(problem, before, method="path", num_steps=2), expected)


def test_without_residuals_in_float32_the_tolerance_is_missed(ridge):
    problem, before, x, _ = ridge
    evaluator = Evaluator(ridge_objective(L2), problem, settings())
    weighted = Weighted(np.arange(N), np.full(N, 1 / N))
    kind = CURVATURES["gauss-newton"]
    operator = Damped(
        DatasetCurvature(ridge_objective(L2), split_params(before), evaluator.stack(weighted), kind), 0.0
    )
    b = np.random.default_rng(2).normal(size=D).astype(np.float32)
    matrix = x.astype(np.float64).T @ x / N + L2 * np.eye(D)

    def residual(solution):
        return np.linalg.norm(b - matrix @ join_params(solution.value)) / np.linalg.norm(b)

    solver = ConjugateGradients(rtol=1e-4, max_steps=50)
    alone = jax.jit(lambda b: solver.solve(NarrowProducts(operator), b))(split_params(b))
    refined = evaluator.solve(split_params(before), weighted, split_params(b))
    assert residual(alone) > 1e-3
    assert residual(refined) < 3e-4
    assert float(refined.relative_residual) == pytest.approx(residual(refined), rel=0.1)


def test_products_of_corrections_are_counted(ridge, monkeypatch):
    problem, before, _, _ = ridge
    solves, solve = [], evaluator_module._solve_with_narrow_products

    def recorded(*args):
        solution, num_solves = solve(*args)
        solves.append(int(num_solves))
        return solution, num_solves

    monkeypatch.setattr(evaluator_module, "_solve_with_narrow_products", recorded)
    result = unlearn(ridge_objective(L2), split_params(before), problem, settings(memory_budget_bytes=0))
    # Each inner solve has two residuals besides its steps: its own, and the exact one.
    assert result.cost.curvature / (1.5 * N) == pytest.approx(result.steps[0].iterations + 2 * solves[0])
    assert len(solves) == 1 and solves[0] > 1


def test_inner_solves_stop_no_lower_than_the_asymmetry(ridge):
    problem, before, _, _ = ridge
    evaluator = Evaluator(ridge_objective(L2), problem, settings())
    evaluator.asymmetry = 0.2  # as if measured
    weighted = Weighted(np.arange(N), np.full(N, 1 / N))
    rhs = split_params(np.random.default_rng(2).normal(size=D).astype(np.float32))
    solution = evaluator.solve(split_params(before), weighted, rhs)
    residuals = np.asarray(solution.history)
    residuals = residuals[np.isfinite(residuals)]
    assert residuals[-1] <= 0.2 < residuals[:-1].min()
    assert float(solution.relative_residual) < 0.02
