"""Steps of groups add up to the step of all, and each is what a dense solve gives."""

import dataclasses

import jax
import numpy as np
import pytest

from llmeraser_jax.solvers import BlockConjugateGradients
from llmeraser_jax.unlearning import CurvatureSpec, attribute
from tests.problems import join_params, ridge_task
from tests.unlearning.test_path_on_ridge import CURVATURE, L2, STEP, D, N, make_problem, run


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def test_the_steps_of_groups_are_dense_solves_and_add_up_to_the_step_of_all():
    problem, before, _ = make_problem("rqc")
    whole = run(problem, before, dataclasses.replace(STEP, trust_region=None)) - before
    groups = {"first": [int(problem.named[0])], "others": [int(i) for i in problem.named[1:]]}
    solver = BlockConjugateGradients(rtol=1e-14, max_steps=50)
    parts = attribute(ridge_task(problem, before, L2), groups, curvature=CURVATURE, solver=solver)
    assert [part.name for part in parts] == ["first", "others"] and [part.num_rows for part in parts] == [1, 2]
    np.testing.assert_allclose(sum(join_params(part.delta) for part in parts), whole, rtol=1e-9, atol=1e-13)
    assert sum(part.share for part in parts) == pytest.approx(1)
    x, y = problem.examples.inputs, problem.examples.targets
    row = problem.named[0]  # a removal
    gradient = x[row] * (x[row] @ before - y[row]) + L2 * before
    dense = np.linalg.solve(x[:N].T @ x[:N] / N + L2 * np.eye(D), gradient / N)
    np.testing.assert_allclose(join_params(parts[0].delta), dense, rtol=1e-9)
    assert parts[0].delta_norm == pytest.approx(np.linalg.norm(dense))
    assert all("converged" in part.status and part.relative_residual < 1e-9 for part in parts)


@pytest.mark.parametrize("groups", [{}, {"a": [2]}, {"a": [2, 9, 16], "b": [2]}])
def test_groups_that_do_not_share_out_the_request_are_refused(groups):
    problem, before, _ = make_problem("r")
    with pytest.raises(ValueError, match="each once"):
        attribute(ridge_task(problem, before, L2), groups, curvature=CURVATURE)


@pytest.mark.parametrize(
    "changes",
    [{"kind": "auto"}, {"damping_kind": "per-matrix"}, {"matmul_precision": "bfloat16"}, {"stream": True}],
    ids=str,
)
def test_a_curvature_that_a_block_solve_does_not_know_is_refused(changes):
    problem, before, _ = make_problem("r")
    with pytest.raises(ValueError, match="attribution takes one of hessian, gauss-newton"):
        attribute(ridge_task(problem, before, L2), {"all": [2, 9, 16]}, curvature=CurvatureSpec(**changes))
