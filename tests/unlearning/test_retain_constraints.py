"""What keeps a step honest: the trust region, the validity check, the budget, and what is called complete."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax import trees
from llmeraser_jax.curvature import CURVATURES, DatasetCurvature, mean_eigenvalue
from llmeraser_jax.solvers import Status
from llmeraser_jax.unlearning.dispatch import unlearn
from llmeraser_jax.unlearning.evaluator import Evaluator
from llmeraser_jax.unlearning.problem import EditProblem, Weighted
from llmeraser_jax.unlearning.steps import NoStepError, UnlearningError
from llmeraser_jax.unlearning.validity import Validity, Verdict
from tests.problems import ArrayExamples, ridge_objective, split_params
from tests.unlearning.test_matched import CONFIG, OBJECTIVE, make
from tests.unlearning.test_matched import memorised as memorised_rows
from tests.unlearning.test_path_on_ridge import L2, D, N, config, make_problem

memorised = memorised_rows  # the fixture, under a name of this module


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def erase(problem, before, **changes):
    retrain_cost = changes.pop("retrain_cost", None)
    settings = config(**changes)
    return unlearn(ridge_objective(L2), split_params(before), problem, settings, retrain_cost=retrain_cost)


def test_the_validity_check_looks_at_other_rows_than_any_step_protected(monkeypatch):
    rng = np.random.default_rng(0)
    examples = ArrayExamples(rng.normal(size=(400, D)), rng.normal(size=400), 1)
    problem = EditProblem(examples, 400, np.arange(4), np.full(4, -1))
    retained, stack = [], Evaluator.stack

    def noted(self, weighted):
        rows = np.setdiff1d(weighted.indices, problem.named)
        if len(rows):
            retained.append(rows)
        return stack(self, weighted)

    monkeypatch.setattr(Evaluator, "stack", noted)
    settings = config(curvature_data="sample", sample_size=64, damping=0.1, trust_region=False)
    result = unlearn(ridge_objective(L2), split_params(np.zeros(D) + 0.1), problem, settings)
    *protected, probe = retained
    assert len(result.steps) == 8 and len(protected) >= 8 and len(probe) == 128
    # Of 64 and 128 among 396 drawn apart, 21 are expected in both, and 38 are five standard deviations more.
    assert max(len(np.intersect1d(rows, probe)) for rows in protected) < 38


def test_a_relative_damping_is_measured_on_the_matrix_that_is_solved_with(memorised):
    problem, params, _ = make(memorised, "remove")
    # At a point where the softmax's targets are improbable, the Hessian of this head is still positive: what makes
    # the fallback is a solve that says it met negative curvature.
    settings = dataclasses.replace(
        CONFIG, method="step", curvature="auto", damping=0.3, damping_kind="mean-eigenvalue"
    )
    evaluator = Evaluator(OBJECTIVE, problem, settings)
    weighted = Weighted(np.arange(8), np.full(8, 1 / 8))
    rhs = evaluator.gradient(params, problem.influence_rhs())
    solve_once, kinds = evaluator._solve_krylov, []

    def meets_negative_curvature(params, weighted, rhs):
        solution = solve_once(params, weighted, rhs)
        kinds.append(evaluator.kind)
        if evaluator.kind == "hessian":
            evaluator._rhos = 123.0  # what the Hessian's measurement left
            return dataclasses.replace(solution, negative_curvature=jnp.asarray(True))
        return solution

    evaluator._solve_krylov = meets_negative_curvature
    evaluator.solve(params, weighted, rhs)
    assert kinds == ["hessian", "gauss-newton"]
    operator = DatasetCurvature(OBJECTIVE, params, evaluator.stack(weighted), CURVATURES["gauss-newton"])
    expected = 0.3 * mean_eigenvalue(operator, jax.random.key(settings.seed), params, 4)
    assert evaluator.least_damping == pytest.approx(float(expected), rel=1e-9)


def test_the_public_script_is_undamped():
    problem, before, _ = make_problem("r")
    plain, damped = (
        erase(problem, before, method="step", solver="reference-compat", damping=rho) for rho in (0.0, 50.0)
    )
    for a, b in zip(jax.tree.leaves(plain.params), jax.tree.leaves(damped.params), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("rhs", ["influence", "newton"])
def test_a_step_that_the_budget_does_not_cover_is_not_begun(rhs):
    problem, before, _ = make_problem("rqc")
    common = {"method": "step", "rhs": rhs, "cg_max_steps": 10, "retrain_cost": 5.0 * N}
    with pytest.raises(UnlearningError, match="The budget of 6 gradient equivalents"):
        erase(problem, before, budget=0.03, **common)
    free = erase(problem, before, budget=np.inf, **common)
    enough = erase(problem, before, budget=10.0, **common)
    for a, b in zip(jax.tree.leaves(free.params), jax.tree.leaves(enough.params), strict=True):
        np.testing.assert_array_equal(a, b)
    # A little less, and the solve is planned with fewer iterations; it never takes more than it may.
    least = enough.cost.total / (5.0 * N)
    planned = erase(problem, before, budget=0.99 * least, **common)
    assert planned.cost.total <= 0.99 * enough.cost.total
    assert planned.steps[0].iterations < enough.steps[0].iterations


def test_a_step_against_its_right_hand_side_is_refused_without_looking(monkeypatch):
    problem, before, _ = make_problem("r")
    solve = Evaluator.solve

    def backwards(self, params, weighted, rhs):
        solution = solve(self, params, weighted, rhs)
        return dataclasses.replace(solution, value=trees.tree_scale(-1.0, solution.value))

    monkeypatch.setattr(Evaluator, "solve", backwards)
    evaluators = []
    monkeypatch.setattr(
        "llmeraser_jax.unlearning.trust_region.Check.losses_and_slopes",
        lambda self, *args: evaluators.append(self),
    )
    with pytest.raises(UnlearningError, match="changed the objective as predicted"):
        erase(problem, before, method="step")
    assert not evaluators


@pytest.mark.parametrize("method", ["step", "path"])
def test_with_the_curvature_of_retained_rows_the_check_is_of_the_same_objective(method):
    problem, before, _ = make_problem("r")
    result = erase(
        problem, before, method=method, num_steps=3 if method == "path" else None, curvature_data="retained"
    )
    for record in result.steps:
        assert record.scale == 1.0
        assert record.actual_reduction == pytest.approx(record.predicted_reduction, rel=1e-6)


def test_a_matched_solve_is_called_converged_where_its_residual_is_below_the_tolerance(memorised):
    problem, params, heldout = make(memorised, "remove")
    for rtol, status in ((1e-6, Status.CONVERGED), (0.0, Status.RESIDUAL_DRIFT)):
        settings = dataclasses.replace(CONFIG, method="matched", cg_rtol=rtol)
        result = unlearn(OBJECTIVE, params, problem, settings, heldout=heldout)
        assert {step.status for step in result.steps} == {status}
        assert all(0 < step.relative_residual < 1e-6 for step in result.steps)


def test_what_leaves_the_range_both_ways_is_not_called_complete(memorised, monkeypatch):
    problem, params, heldout = make(memorised, "remove")
    settings = dataclasses.replace(CONFIG, method="auto")
    assert unlearn(OBJECTIVE, params, problem, settings, heldout=heldout).complete
    real = Validity.check

    def fails(self, moved):
        return dataclasses.replace(real(self, moved), verdict=Verdict.INCOMPLETE, reasons=("as the test wants",))

    monkeypatch.setattr(Validity, "check", fails)
    moved = unlearn(OBJECTIVE, params, problem, settings, heldout=heldout)
    assert (
        moved.method == "matched"
        and moved.attempts[0].startswith("path: incomplete: as the test wants")
        and not moved.complete
    )
    # Nor where no budget is left for the path.
    alone = unlearn(OBJECTIVE, params, problem, dataclasses.replace(settings, method="matched"), heldout=heldout)
    moved = unlearn(OBJECTIVE, params, problem, settings, heldout=heldout, retrain_cost=alone.cost.total + 1)
    assert moved.attempts[0].startswith("path: The budget") and not moved.complete


def test_rows_that_depend_on_each_other_are_refused_in_words(memorised, monkeypatch):
    problem, params, heldout = make(memorised, "remove")

    def singular(*args):
        raise np.linalg.LinAlgError("Singular matrix")

    monkeypatch.setattr(np.linalg, "solve", singular)
    settings = dataclasses.replace(CONFIG, method="matched")
    with pytest.raises(NoStepError, match="row_ridge"):
        unlearn(OBJECTIVE, params, problem, settings, heldout=heldout)
    assert unlearn(OBJECTIVE, params, problem, CONFIG, heldout=heldout).method == "path"
    monkeypatch.setattr("llmeraser_jax.unlearning.matched.factorise", singular)
    with pytest.raises(NoStepError, match="raise damping"):
        unlearn(OBJECTIVE, params, problem, settings, heldout=heldout)
