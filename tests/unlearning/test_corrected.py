"""Newton steps after a method: on ridge one of them from anywhere is retraining; and what stops them."""

import dataclasses

import jax
import numpy as np
import pytest

from llmeraser_jax.unlearning import Corrected, Receipt, Result
from tests.problems import join_params, receipt_of, solves_of
from tests.unlearning.test_path_on_ridge import (
    CURVATURE,
    L2,
    SOLVER,
    STEP,
    TRUST_REGION,
    erase_ridge,
    make_problem,
)

PLAIN = dataclasses.replace(STEP, trust_region=None)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def correct(problem, before, max_steps: int, **changes) -> tuple[Result, Receipt]:
    """A single step, and at most so many Newton steps after it."""
    curvature = dataclasses.replace(CURVATURE, **changes)
    method = Corrected(
        method=dataclasses.replace(PLAIN, curvature=curvature),
        max_steps=max_steps,
        curvature=curvature,
        solver=SOLVER,
        trust_region=TRUST_REGION,
    )
    result = erase_ridge(problem, before, method)
    return result, receipt_of(result)


@pytest.mark.parametrize("actions", ["r", "q", "rqc"])
def test_one_newton_step_takes_a_single_step_to_the_retrained_solution(actions):
    problem, before, retrained = make_problem(actions)
    result, receipt = correct(problem, before, 1)
    np.testing.assert_allclose(join_params(result.params), retrained, rtol=1e-9, atol=1e-12)
    assert receipt.num_correctors == 1 and len(receipt.steps) == 2
    assert receipt.method == "step, corrected" and receipt.corrected == "all 1 Newton steps were taken"


def test_there_is_nothing_to_correct_where_the_step_was_exact():
    problem, before, _ = make_problem("c")
    finished = before + 1e-9  # so that training's own left-over is above rounding
    _, receipt = correct(problem, finished, 3)
    assert receipt.num_correctors == 0 and "is back at" in receipt.corrected


def test_they_end_where_the_gradient_is_as_small_as_training_left_it():
    problem, before, retrained = make_problem("rc")
    unfinished = before + 1e-3  # training stopped early, and left a gradient over
    result, receipt = correct(problem, unfinished, 5)
    assert receipt.num_correctors == 1 and "is back at" in receipt.corrected
    x = problem.examples.inputs
    after = np.concatenate([problem.retained, problem.wanted])
    hessian = x[after].T @ x[after] / len(after) + L2 * np.eye(x.shape[1])
    assert np.linalg.norm(hessian @ (join_params(result.params) - retrained)) < 1e-9


def test_their_cost_is_two_gradients_of_a_sample_and_a_solve():
    problem, before, _ = make_problem("r")
    uncached = dataclasses.replace(CURVATURE, memory_budget_bytes=0)
    without = erase_ridge(problem, before, dataclasses.replace(PLAIN, curvature=uncached)).cost
    result, _ = correct(problem, before, 1, memory_budget_bytes=0)
    retained, named = len(problem.retained), len(problem.named)
    # The trained objective's gradient once, the edited objective's before the step.
    assert result.cost.rhs - without.rhs == pytest.approx((retained + named) + retained)
    assert result.cost.curvature - without.curvature == pytest.approx(
        1.5 * retained * (solves_of(result)[1].iterations + 1)
    )
