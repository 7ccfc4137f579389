"""On ridge regression the method's signs and constants have a closed-form oracle: retraining."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from llmeraser_jax.solvers import ConjugateGradients
from llmeraser_jax.unlearning import (
    Corrected,
    CurvatureSpec,
    EditProblem,
    Method,
    Path,
    Result,
    Step,
    TrustRegion,
    UnlearningError,
    erase,
    log_odds_weights,
)
from llmeraser_jax.unlearning.path import next_weight
from tests.problems import ArrayExamples, join_params, receipt_of, ridge_solution, ridge_task, solves_of

L2 = 0.1
N, D = 40, 5

# Exact solves on all data: nothing between the formula and the answer.
CURVATURE = CurvatureSpec(data="all", damping=0.0)
SOLVER = ConjugateGradients(rtol=1e-14, max_steps=50)
TRUST_REGION = TrustRegion(max_step_ratio=0.0)
PATH = Path(curvature=CURVATURE, solver=SOLVER, trust_region=TRUST_REGION)
STEP = Step(curvature=CURVATURE, solver=SOLVER, trust_region=TRUST_REGION)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def make_problem(actions: str, num_buckets: int = 1, num_named: int = 3):
    """A request whose named rows are removed ("r"), get another input ("q") or another target ("c")."""
    rng = np.random.default_rng(0)
    inputs, targets = rng.normal(size=(N, D)), rng.normal(size=N)
    named = np.arange(2, 2 + 7 * num_named, 7)
    kinds = (actions * num_named)[:num_named]
    all_inputs, all_targets, replacements = [inputs], [targets], []
    next_index = N
    for row, kind in zip(named, kinds, strict=True):
        if kind == "r":
            replacements.append(-1)
            continue
        x, y = inputs[row].copy(), targets[row]
        if kind == "q":
            x[:2] += rng.normal(size=2)
        else:
            y = y + 2.0
        all_inputs.append(x[None])
        all_targets.append(np.array([y]))
        replacements.append(next_index)
        next_index += 1
    examples = ArrayExamples(np.concatenate(all_inputs), np.concatenate(all_targets), num_buckets)
    problem = EditProblem(examples, N, named, np.array(replacements))
    after = np.concatenate([problem.retained, problem.wanted])
    before = ridge_solution(inputs, targets, L2)
    retrained = ridge_solution(examples.inputs[after], examples.targets[after], L2)
    return problem, before, retrained


def erase_ridge(problem, before, method: Method = PATH, budget=None, *, l2=L2, chunk_size=4, **fields) -> Result:
    return erase(ridge_task(problem, before, l2, **fields), method, budget, chunk_size=chunk_size)


def run(problem, before, method: Method = PATH, **settings) -> np.ndarray:
    return join_params(erase_ridge(problem, before, method, **settings).params)


@pytest.mark.parametrize("actions", ["r", "q", "c", "rqc"])
@pytest.mark.parametrize("num_steps", [1, 2, 7])
@pytest.mark.parametrize("kind", ["gauss-newton", "hessian"])
def test_path_lands_on_the_retrained_solution_for_every_number_of_steps(actions, num_steps, kind):
    problem, before, retrained = make_problem(actions)
    curvature = dataclasses.replace(CURVATURE, kind=kind)
    after = run(problem, before, dataclasses.replace(PATH, num_steps=num_steps, curvature=curvature))
    np.testing.assert_allclose(after, retrained, rtol=0, atol=1e-12)
    assert np.linalg.norm(before - retrained) > 1e-2


@pytest.mark.parametrize("actions", ["r", "q", "c", "rqc"])
def test_newton_lands_on_the_retrained_solution(actions):
    problem, before, retrained = make_problem(actions)
    after = run(problem, before, dataclasses.replace(STEP, rhs="newton"))
    np.testing.assert_allclose(after, retrained, rtol=0, atol=1e-12)


@pytest.mark.parametrize("actions", ["r", "q", "rqc"])
def test_single_step_errs_in_second_order_of_the_named_share(actions):
    errors = []
    for num_named in (1, 2, 4):
        problem, before, retrained = make_problem(actions, num_named=num_named)
        after = run(problem, before, STEP)
        gap = np.linalg.norm(before - retrained)
        errors.append(np.linalg.norm(after - retrained))
        assert errors[-1] < 0.6 * gap, "the step must move towards the retrained solution"
    assert errors[0] > 1e-6, "one step with the old data's curvature is not exact"


def test_single_step_error_is_quadratic_in_the_size_of_a_response_change():
    # The same data weighted k times: the share of one removed example falls as 1/k, its error as 1/k^2.
    rng = np.random.default_rng(3)
    inputs, targets = rng.normal(size=(20, D)), rng.normal(size=20)
    errors, gaps = [], []
    for copies in (1, 2, 4, 8):
        x, y = np.tile(inputs, (copies, 1)), np.tile(targets, copies)
        problem = EditProblem(ArrayExamples(x, y), len(x), np.array([3]), np.array([-1]))
        keep = np.arange(len(x)) != 3
        retrained = ridge_solution(x[keep], y[keep], L2)
        before = ridge_solution(x, y, L2)
        errors.append(np.linalg.norm(run(problem, before, STEP) - retrained))
        gaps.append(np.linalg.norm(before - retrained))
    rates = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert np.all((rates > 1.7) & (rates < 2.6)), rates
    assert np.all(np.log2(np.array(gaps[:-1]) / np.array(gaps[1:])) < 1.3)


def test_response_correction_is_exact_in_a_single_step_because_the_curvature_does_not_change():
    problem, before, retrained = make_problem("c")
    np.testing.assert_allclose(run(problem, before, STEP), retrained, rtol=0, atol=1e-12)


@pytest.mark.parametrize("trust_region", [TRUST_REGION, None])
def test_trust_region_leaves_quadratics_alone(trust_region):
    problem, before, retrained = make_problem("rqc")
    method = dataclasses.replace(PATH, num_steps=4, trust_region=trust_region)
    result = erase_ridge(problem, before, method)
    receipt = receipt_of(result)
    assert [step.scale for step in receipt.steps] == [1.0] * 4
    assert receipt.left == 0
    if trust_region:
        for step in solves_of(result):
            assert step.actual_reduction == pytest.approx(step.predicted_reduction, rel=1e-9)
    np.testing.assert_allclose(join_params(result.params), retrained, rtol=0, atol=1e-12)


def test_limit_on_the_step_norm_holds_and_the_remainder_is_taken_up_again():
    problem, before, retrained = make_problem("r")
    limit = 0.1
    result = erase_ridge(
        problem,
        before,
        Path(num_steps=6, curvature=CURVATURE, solver=SOLVER, trust_region=TrustRegion(max_step_ratio=limit)),
    )
    receipt = receipt_of(result)
    assert max(step.delta_norm for step in receipt.steps) <= limit * 1.05 * np.linalg.norm(before)
    assert min(step.scale for step in receipt.steps) < 1
    assert receipt.left == 0
    gap = np.linalg.norm(before - retrained)
    assert np.linalg.norm(join_params(result.params) - retrained) < 0.1 * gap


def test_results_do_not_depend_on_buckets_or_chunks():
    results = []
    for num_buckets, chunk_size in ((1, 4), (3, 5), (1, 64)):
        problem, before, _ = make_problem("rqc", num_buckets)
        results.append(run(problem, before, dataclasses.replace(PATH, num_steps=3), chunk_size=chunk_size))
    np.testing.assert_allclose(results[1], results[0], atol=1e-12)
    np.testing.assert_allclose(results[2], results[0], atol=1e-12)


def test_sampled_curvature_is_unbiased_over_seeds():
    problem, _, _ = make_problem("rqc", num_buckets=3)
    exact = problem.path_mean(0.3, None, np.random.default_rng(0))
    dense = np.zeros(len(problem.examples))
    dense[exact.indices] = exact.weights
    draws = np.zeros((4000, len(dense)))
    for seed, row in enumerate(draws):
        sampled = problem.path_mean(0.3, 9, np.random.default_rng(seed))
        row[sampled.indices] = sampled.weights
        assert row.sum() == pytest.approx(dense.sum())
    standard_error = draws.std(0) / np.sqrt(len(draws))
    assert np.all(np.abs(draws.mean(0) - dense) <= 5 * standard_error + 1e-12)


@pytest.mark.parametrize(("budget_bytes", "per_product", "setup"), [(0, 1.5, 0.0), (2**30, 1.0, 1 / 3)])
def test_cost_counts_right_hand_sides_products_and_checks(budget_bytes, per_product, setup):
    problem, before, _ = make_problem("rqc")
    curvature = dataclasses.replace(CURVATURE, memory_budget_bytes=budget_bytes)
    result = erase_ridge(problem, before, dataclasses.replace(PATH, num_steps=2, curvature=curvature))
    data = N + 2
    products = sum(step.iterations + 1 for step in solves_of(result))
    assert result.cost.rhs == pytest.approx(2 * (1 + 2 + 2))
    assert result.cost.curvature == pytest.approx((per_product * products + 2 * setup) * data)
    assert result.cost.trust_region == pytest.approx(2 * (2 / 3 + 1 / 3) * data)


def test_a_request_that_changes_no_gradient_fails_instead_of_writing_a_zero_step():
    problem, before, _ = make_problem("r", num_named=1)
    problem.examples.inputs[problem.named[0]] = 0
    with pytest.raises(UnlearningError, match="right-hand side is zero"):
        erase_ridge(problem, before, l2=0.0)


def test_log_odds_weights_are_as_stated():
    weights = log_odds_weights(4, 4.0)
    logistic = 1 / (1 + np.exp(-4.0))
    wide = log_odds_weights(1000, 4.0)
    assert wide[0] - wide[1] == pytest.approx(1 / 4001) and np.all(np.diff(wide) < 0)
    np.testing.assert_allclose(weights, [1, logistic, 0.5, 1 - logistic, 0], rtol=1e-12)
    np.testing.assert_allclose(log_odds_weights(1, 4.0), [1, 0])
    np.testing.assert_allclose(log_odds_weights(2, 4.0), [1, 0.5, 0])


@pytest.mark.parametrize("num_steps", [1, 2, 3, 8])
def test_next_weight_follows_the_schedule_and_keeps_its_stride_in_between(num_steps):
    schedule = log_odds_weights(num_steps, 4.0)
    for here, there in itertools.pairwise(schedule):
        assert next_weight(schedule, float(here)) == pytest.approx(there, rel=1e-12)
    if num_steps == 8:
        stride = 8 / 6
        log_odds = np.log(0.6 / 0.4) - stride
        assert next_weight(schedule, 0.6) == pytest.approx(1 / (1 + np.exp(-log_odds)))
        assert next_weight(schedule, 0.9999) == pytest.approx(schedule[1])
        assert next_weight(schedule, float(schedule[-2]) * 0.9) == 0


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Step(rhs="jump"), "rhs"),  # pyright: ignore[reportArgumentType]
        (lambda: CurvatureSpec(damping=-1.0), "damping"),
        (lambda: ConjugateGradients(rtol=1.0), "rtol"),
        (lambda: Path(num_steps=0), "num_steps"),
        (lambda: Path(log_odds_range=40.0), "log_odds_range"),
        (lambda: TrustRegion(min_ratio=1.0), "min_ratio"),
        (lambda: Corrected(max_steps=0), "max_steps"),
    ],
)
def test_bad_choices_are_refused_by_name(make, named):
    with pytest.raises((ValueError, TypeError), match=named):
        make()
