"""What keeps a step honest: the trust region, the validity check, the budget, and what is called complete."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax import trees
from llmeraser_jax.curvature import CURVATURES, DatasetCurvature, mean_eigenvalue
from llmeraser_jax.solvers import ConjugateGradients
from llmeraser_jax.unlearning import (
    PUBLIC_SCRIPT,
    CurvatureSpec,
    EditProblem,
    Path,
    UnlearningError,
    Verdict,
    Weighted,
    Workspace,
)
from llmeraser_jax.unlearning.inverse import InverseCurvature
from llmeraser_jax.unlearning.records import NoStepError
from llmeraser_jax.unlearning.validity import Validity
from tests.problems import ArrayExamples, receipt_of, solves_of
from tests.unlearning.test_path_on_ridge import CURVATURE, PATH, SOLVER, STEP, D, N, erase_ridge, make_problem
from tests.unlearning.test_target_matching import AUTO, MATCHING, OBJECTIVE, erase_head, head_task, make
from tests.unlearning.test_target_matching import memorised as memorised_rows

memorised = memorised_rows  # the fixture, under a name of this module


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def test_the_validity_check_looks_at_other_rows_than_any_step_protected(monkeypatch):
    rng = np.random.default_rng(0)
    examples = ArrayExamples(rng.normal(size=(400, D)), rng.normal(size=400), 1)
    problem = EditProblem(examples, 400, np.arange(4), np.full(4, -1))
    looked_at = {64: [], 128: []}

    def noting(lay_out):
        def noted(self, examples, indices, **options):
            rows = np.setdiff1d(indices.indices if isinstance(indices, Weighted) else indices, problem.named)
            if len(rows):
                looked_at[len(rows)].append(rows)
            return lay_out(self, examples, indices, **options)

        return noted

    for name in ("stack", "micro_batches"):
        monkeypatch.setattr(Workspace, name, noting(getattr(Workspace, name)))
    path = Path(curvature=CurvatureSpec(sample_size=64, damping=0.1), solver=SOLVER, trust_region=None)
    result = erase_ridge(problem, np.zeros(D) + 0.1, path)
    protected, (probe, *again) = looked_at[64], looked_at[128]
    assert len(receipt_of(result).steps) == 8 and len(protected) >= 8
    assert again and all(np.array_equal(rows, probe) for rows in again)
    # Of 64 and 128 among 396 drawn apart, 21 are expected in both, and 38 are five standard deviations more.
    assert max(len(np.intersect1d(rows, probe)) for rows in protected) < 38


def test_a_relative_damping_is_measured_on_the_matrix_that_is_solved_with(memorised):
    problem, params, _ = make(memorised, "remove")
    # At a point where the softmax's targets are improbable, the Hessian of this head is still positive: what makes
    # the fallback is a solve that says it met negative curvature.
    spec = CurvatureSpec(kind="auto", damping=0.3, damping_kind="mean-eigenvalue")
    workspace = Workspace(chunk_size=8)
    inverse: Any = InverseCurvature(head_task(problem, params), workspace, spec, ConjugateGradients(max_steps=15))
    weighted = Weighted(np.arange(8), np.full(8, 1 / 8))
    rhs = workspace.gradient(OBJECTIVE, params, problem.examples, problem.influence_rhs())
    solve_once, kinds = inverse._solve_whole, []

    def meets_negative_curvature(params, weighted, rhs):
        solution = solve_once(params, weighted, rhs)
        kinds.append(inverse.kind)
        if inverse.kind == "hessian":
            inverse._rhos = 123.0  # what the Hessian's measurement left
            return dataclasses.replace(solution, negative_curvature=jnp.asarray(True))
        return solution

    inverse._solve_whole = meets_negative_curvature
    inverse.solve(params, weighted, rhs)
    assert kinds == ["hessian", "gauss-newton"]
    assert inverse.reason == "gauss-newton: solve 1 met non-positive curvature of the damped Hessian"
    stack = workspace.stack(problem.examples, weighted)
    operator = DatasetCurvature(OBJECTIVE, params, stack, CURVATURES["gauss-newton"])
    expected = 0.3 * mean_eigenvalue(operator, jax.random.key(workspace.seed), params, 4)
    assert inverse.least_damping == pytest.approx(float(expected), rel=1e-9)


def test_the_public_script_is_undamped_and_a_damping_that_is_asked_for_acts():
    problem, before, _ = make_problem("r")
    assert PUBLIC_SCRIPT.curvature.damping == 0
    damped = dataclasses.replace(PUBLIC_SCRIPT.curvature, damping=1e5)
    plain, other = (
        erase_ridge(problem, before, dataclasses.replace(PUBLIC_SCRIPT, curvature=curvature)).params["tail"]
        for curvature in (PUBLIC_SCRIPT.curvature, damped)
    )
    assert np.abs(plain - other).max() > 1e-6


@pytest.mark.parametrize("rhs", ["influence", "newton"])
def test_a_step_that_the_budget_does_not_cover_is_not_begun(rhs):
    problem, before, _ = make_problem("rqc")
    method = dataclasses.replace(STEP, rhs=rhs, solver=ConjugateGradients(rtol=1e-14, max_steps=10))

    def run(budget):
        return erase_ridge(problem, before, method, budget, retraining_cost=5.0 * N)

    with pytest.raises(UnlearningError, match="The budget of 6 gradient equivalents"):
        run(0.03)
    free, enough = run(np.inf), run(10.0)
    for a, b in zip(jax.tree.leaves(free.params), jax.tree.leaves(enough.params), strict=True):
        np.testing.assert_array_equal(a, b)
    # A little less, and the solve is planned with fewer iterations; it never takes more than it may.
    least = enough.cost.total / (5.0 * N)
    planned = run(0.99 * least)
    assert planned.cost.total <= 0.99 * enough.cost.total
    assert solves_of(planned)[0].iterations < solves_of(enough)[0].iterations


def test_a_step_against_its_right_hand_side_is_refused_without_looking(monkeypatch):
    problem, before, _ = make_problem("r")
    solve = InverseCurvature.solve

    def backwards(self, params, weighted, rhs):
        solution = solve(self, params, weighted, rhs)
        return dataclasses.replace(solution, value=trees.tree_scale(-1.0, solution.value))

    monkeypatch.setattr(InverseCurvature, "solve", backwards)
    checks = []
    monkeypatch.setattr(
        "llmeraser_jax.unlearning.trust_region.Check.losses_and_slopes",
        lambda self, *args: checks.append(self),
    )
    with pytest.raises(UnlearningError, match="changed the objective as predicted"):
        erase_ridge(problem, before, STEP)
    assert not checks


@pytest.mark.parametrize("method", [STEP, dataclasses.replace(PATH, num_steps=3)], ids=["step", "path"])
def test_with_the_curvature_of_retained_rows_the_check_is_of_the_same_objective(method):
    problem, before, _ = make_problem("r")
    curvature = dataclasses.replace(CURVATURE, data="retained")
    result = erase_ridge(problem, before, dataclasses.replace(method, curvature=curvature))
    for record in solves_of(result):
        assert record.scale == 1.0
        assert record.actual_reduction == pytest.approx(record.predicted_reduction, rel=1e-6)


def test_what_fails_the_check_both_ways_is_not_called_complete(memorised, monkeypatch):
    problem, params, calibration = make(memorised, "remove")
    assert receipt_of(erase_head(problem, params, AUTO, calibration)).complete
    real = Validity.check

    def fails(self, moved):
        return dataclasses.replace(real(self, moved), verdict=Verdict.INCOMPLETE, reasons=("as the test wants",))

    monkeypatch.setattr(Validity, "check", fails)
    receipt = receipt_of(erase_head(problem, params, AUTO, calibration))
    assert receipt.method == "target matching" and not receipt.complete
    assert receipt.attempts[0].startswith("path: incomplete: as the test wants")
    # Nor where no budget is left for the path.
    alone = erase_head(problem, params, MATCHING, calibration)
    receipt = receipt_of(erase_head(problem, params, AUTO, calibration, retraining_cost=alone.cost.total + 1))
    assert receipt.attempts[0].startswith("fallback: The budget") and not receipt.complete


def test_rows_that_depend_on_each_other_are_refused_in_words(memorised, monkeypatch):
    problem, params, calibration = make(memorised, "remove")

    def singular(*args):
        raise np.linalg.LinAlgError("Singular matrix")

    monkeypatch.setattr(np.linalg, "solve", singular)
    with pytest.raises(NoStepError, match="row_ridge"):
        erase_head(problem, params, MATCHING, calibration)
    assert receipt_of(erase_head(problem, params, AUTO, calibration)).method == "path"
    monkeypatch.setattr("llmeraser_jax.unlearning.matching_rows.factorise", singular)
    with pytest.raises(NoStepError, match="raise damping"):
        erase_head(problem, params, MATCHING, calibration)
