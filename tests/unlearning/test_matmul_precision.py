"""Steps with bfloat16 matmul inputs: as exact as float32 ones, by residuals in float32, and counted."""

import dataclasses

import jax
import numpy as np
import pytest

from llmeraser_jax.curvature import CURVATURES, Bfloat16Products, Damped, DatasetCurvature
from llmeraser_jax.solvers import ConjugateGradients, Minres, Status
from llmeraser_jax.unlearning import CurvatureSpec, EditProblem, Path, Step, Weighted, Workspace, erase, inverse
from tests.problems import (
    ArrayExamples,
    join_params,
    receipt_of,
    ridge_solution,
    ridge_task,
    solves_of,
    split_params,
)

N, D, L2 = 64, 24, 0.02
CURVATURE = CurvatureSpec(data="all", damping=0.0, matmul_precision="bfloat16")
SOLVER = ConjugateGradients(rtol=1e-4, max_steps=50)
STEP = Step(curvature=CURVATURE, solver=SOLVER, trust_region=None)
UNCACHED = dataclasses.replace(CURVATURE, memory_budget_bytes=0)


@pytest.fixture(scope="module")
def ridge():
    """Problem, trained parameters, design matrix and targets; float32, since only that is made narrow."""
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(N, D)) * np.geomspace(0.2, 2, D)).astype(np.float32)
    y = rng.normal(size=N).astype(np.float32)
    problem = EditProblem(ArrayExamples(x, y), N, np.array([3, 40]), np.array([-1, -1]))
    return problem, ridge_solution(x, y, L2).astype(np.float32), x, y


def inverse_of(problem, before) -> inverse.InverseCurvature:
    return inverse.InverseCurvature(ridge_task(problem, before, L2), Workspace(chunk_size=4), CURVATURE, SOLVER)


def moved_by(problem, before, method):
    result = erase(ridge_task(problem, before, L2), method, chunk_size=4)
    receipt, solves = receipt_of(result), solves_of(result)
    assert all(record.status is Status.CONVERGED for record in solves)
    assert all(record.relative_residual <= 2e-4 for record in solves)
    for record in solves:  # a receipt has no room for what is not a number
        assert 0 < len(record.residual_history) <= record.iterations
        assert np.all(np.isfinite(record.residual_history))
    assert receipt.product_asymmetry is not None and 1e-6 < receipt.product_asymmetry < 4e-3
    return join_params(result.params) - before


def close(moved, expected):
    return np.linalg.norm(moved - expected) < 5e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("changes", [{}, {"solver": Minres(rtol=1e-4, max_steps=50)}, {"curvature": UNCACHED}])
def test_a_step_is_the_dense_one(ridge, changes):
    problem, before, x, y = ridge
    gradients = x * (x @ before - y)[:, None] + L2 * before
    matrix = x.T @ x / N + L2 * np.eye(D)
    expected = np.linalg.solve(matrix, gradients[problem.named].sum(0) / N)
    assert close(moved_by(problem, before, dataclasses.replace(STEP, **changes)), expected)


def test_the_path_ends_where_retraining_does(ridge):
    problem, before, x, y = ridge
    expected = ridge_solution(x[problem.retained], y[problem.retained], L2) - before
    path = Path(num_steps=2, curvature=CURVATURE, solver=SOLVER, trust_region=None)
    assert close(moved_by(problem, before, path), expected)


def test_without_residuals_in_float32_the_tolerance_is_missed(ridge):
    problem, before, x, _ = ridge
    found = inverse_of(problem, before)
    weighted = Weighted(np.arange(N), np.full(N, 1 / N))
    stack = found.workspace.stack(problem.examples, weighted)
    kind = CURVATURES["gauss-newton"]
    operator = Damped(DatasetCurvature(found.objective, split_params(before), stack, kind), 0.0)
    b = np.random.default_rng(2).normal(size=D).astype(np.float32)
    matrix = x.astype(np.float64).T @ x / N + L2 * np.eye(D)

    def residual(solution):
        return np.linalg.norm(b - matrix @ join_params(solution.value)) / np.linalg.norm(b)

    solver = ConjugateGradients(rtol=1e-4, max_steps=50)
    alone = jax.jit(lambda b: solver.solve(Bfloat16Products(operator), b))(split_params(b))
    refined = found.solve(split_params(before), weighted, split_params(b))
    assert residual(alone) > 1e-3
    assert residual(refined) < 3e-4
    assert float(refined.relative_residual) == pytest.approx(residual(refined), rel=0.1)


def test_products_of_corrections_are_counted(ridge, monkeypatch):
    problem, before, _, _ = ridge
    solves, solve = [], inverse._solve

    def recorded(*args):
        solution = solve(*args)
        solves.append(int(solution.num_exact_products))
        return solution

    monkeypatch.setattr(inverse, "_solve", recorded)
    result = erase(ridge_task(problem, before, L2), dataclasses.replace(STEP, curvature=UNCACHED), chunk_size=4)
    # Each inner solve has two residuals besides its steps: its own, and the exact one.
    assert result.cost.curvature / (1.5 * N) == pytest.approx(solves_of(result)[0].iterations + 2 * solves[0])
    assert len(solves) == 1 and solves[0] > 1


def test_inner_solves_stop_no_lower_than_the_asymmetry(ridge):
    problem, before, _, _ = ridge
    found = inverse_of(problem, before)
    found.asymmetry = 0.2  # as if measured
    weighted = Weighted(np.arange(N), np.full(N, 1 / N))
    rhs = split_params(np.random.default_rng(2).normal(size=D).astype(np.float32))
    solution = found.solve(split_params(before), weighted, rhs)
    residuals = np.asarray(solution.history)
    residuals = residuals[np.isfinite(residuals)]
    assert residuals[-1] <= 0.2 < residuals[:-1].min()
    assert float(solution.relative_residual) < 0.02
