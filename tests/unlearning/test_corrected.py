"""Correctors on ridge, where one Newton step from anywhere is retraining; and who stops them."""

import jax
import numpy as np
import pytest

from llmeraser_jax.unlearning.dispatch import unlearn
from tests.problems import join_params, ridge_objective, split_params
from tests.unlearning.test_path_on_ridge import L2, config, make_problem


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("actions", ["r", "q", "rqc"])
def test_one_corrector_takes_a_single_step_to_the_retrained_solution(actions):
    problem, before, retrained = make_problem(actions)
    settings = config(method="step", trust_region=False, correctors=1)
    result = unlearn(ridge_objective(L2), split_params(before), problem, settings)
    np.testing.assert_allclose(join_params(result.params), retrained, rtol=1e-9, atol=1e-12)
    assert result.num_correctors == 1 and len(result.steps) == 2
    assert "all 1 correctors" in result.corrected


def test_there_is_nothing_to_correct_where_the_step_was_exact():
    problem, before, _ = make_problem("c")
    finished = before + 1e-9  # so that training's own left-over is above rounding
    settings = config(method="step", trust_region=False, correctors=3)
    result = unlearn(ridge_objective(L2), split_params(finished), problem, settings)
    assert result.num_correctors == 0 and "is back at" in result.corrected


def test_they_end_where_the_gradient_is_as_small_as_training_left_it():
    problem, before, retrained = make_problem("rc")
    unfinished = before + 1e-3  # training stopped early, and left a gradient over
    settings = config(method="step", trust_region=False, correctors=5)
    result = unlearn(ridge_objective(L2), split_params(unfinished), problem, settings)
    assert result.num_correctors == 1 and "is back at" in result.corrected
    x = problem.examples.inputs
    after = np.concatenate([problem.retained, problem.wanted])
    hessian = x[after].T @ x[after] / len(after) + L2 * np.eye(x.shape[1])
    assert np.linalg.norm(hessian @ (join_params(result.params) - retrained)) < 1e-9


def test_their_cost_is_two_gradients_of_a_sample_and_a_solve():
    problem, before, _ = make_problem("r")
    plain = config(method="step", trust_region=False, memory_budget_bytes=0)
    without = unlearn(ridge_objective(L2), split_params(before), problem, plain).cost
    settings = config(method="step", trust_region=False, memory_budget_bytes=0, correctors=1)
    result = unlearn(ridge_objective(L2), split_params(before), problem, settings)
    retained, named = len(problem.retained), len(problem.named)
    # The trained objective's gradient once, the edited objective's before the step.
    assert result.cost.rhs - without.rhs == pytest.approx((retained + named) + retained)
    assert result.cost.curvature - without.curvature == pytest.approx(
        1.5 * retained * (result.steps[1].iterations + 1)
    )
