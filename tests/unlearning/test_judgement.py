"""The validity check against retraining: what it calls complete is right, and what is right it rarely refuses."""

import collections
import dataclasses

import jax
import numpy as np
import pytest

from llmeraser_jax.solvers import ConjugateGradients, Lissa, Minres, QuadraticDescent
from llmeraser_jax.types import Solver
from llmeraser_jax.unlearning import (
    Auto,
    Corrected,
    EditProblem,
    Path,
    RowPreconditioner,
    TargetMatching,
    UnlearningError,
    ValidityCheck,
    Verdict,
    Workspace,
    targets,
)
from llmeraser_jax.unlearning.targets import find_targets
from llmeraser_jax.unlearning.validity import Validity
from tests.problems import ArrayBatch, ArrayExamples, join_params, receipt_of, ridge_solution
from tests.unlearning.judgement import (
    AUTO,
    CASES,
    CHUNK_SIZE,
    CURVATURE,
    FOUR,
    MATCHING,
    PATH,
    STEP,
    Case,
    Setting,
    cross_entropy,
    fit,
    harm_others,
    is_right,
    logits,
    make_setting,
)
from tests.unlearning.test_path_on_ridge import L2, erase_ridge
from tests.unlearning.test_path_on_ridge import PATH as RIDGE_PATH
from tests.unlearning.test_path_on_ridge import STEP as RIDGE_STEP
from tests.unlearning.test_path_on_ridge import make_problem as make_ridge


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def look(setting: Setting, params) -> ValidityCheck:
    task, workspace = setting.task, Workspace(chunk_size=CHUNK_SIZE)
    targets = find_targets(task, workspace, diagnostic=True)
    return Validity(task, workspace, targets).check(params)


def verdict_of(case: Case, setting: Setting) -> tuple[Verdict, object]:
    if case.by_hand is not None:
        params = case.by_hand(setting)
        return look(setting, params).verdict, params
    result = setting.erase(case.method, calibration=setting.calibration if case.calibration else None)
    check = receipt_of(result).validity
    return (Verdict.COMPLETE if check is None else check.verdict), result.params


def test_what_is_called_complete_is_right_and_what_is_right_is_rarely_refused():
    settings: dict[str, Setting] = {}
    table: collections.Counter[tuple[bool, Verdict]] = collections.Counter()
    wrong = []
    with jax.enable_x64(True):
        for case in CASES:
            setting = settings.setdefault(repr(case.setting), make_setting(**case.setting))
            verdict, params = verdict_of(case, setting)
            right = is_right(setting, params)
            table[right, verdict] += 1
            if right != (verdict is Verdict.COMPLETE) and verdict is not Verdict.NOT_JUDGED:
                wrong.append(f"{case.name}: right {right}, called {verdict}")
    num_right = sum(count for (right, _), count in table.items() if right)
    assert len(CASES) >= 40 and num_right >= 20 and len(CASES) - num_right >= 20, table
    assert table[False, Verdict.COMPLETE] == 0, wrong
    refused = table[True, Verdict.INCOMPLETE] + table[True, Verdict.HARMFUL]
    assert refused <= num_right / 20, wrong
    # Neither is a verdict bought with silence.
    assert table[True, Verdict.NOT_JUDGED] + table[False, Verdict.NOT_JUDGED] <= 3, table


def test_every_forget_row_is_listed_with_where_it_was_and_should_be_and_is():
    setting = make_setting(remove=(3, 10), correct=(20,))
    check = look(setting, setting.retrained)
    assert [(row.id, row.part) for row in check.rows] == [
        ("3", "removed"),
        ("10", "removed"),
        ("20", "as trained"),
        ("20", "replacement"),
    ]
    problem, rows = setting.problem, [3, 10, 20, int(setting.problem.wanted[0])]
    for row, before, after in zip(
        check.rows, setting.losses(setting.before, rows), setting.losses(setting.retrained, rows), strict=True
    ):
        assert row.before == pytest.approx(before) and row.after == pytest.approx(after) and row.arrived
    assert check.rows[0].target == pytest.approx(setting.unseen(setting.before).mean())
    rise = setting.losses(setting.retrained, problem.retained) - setting.losses(setting.before, problem.retained)
    assert check.retained is not None and check.retained.num_rows == len(problem.retained)
    assert check.retained.rise.percentile_95 == pytest.approx(np.quantile(rise, 0.95))
    assert check.retained.rise.worst == pytest.approx(rise.max())


def test_one_row_in_twenty_may_stay_behind_and_none_of_fewer():
    for every, count in ((2, 24), (4, 12)):
        setting = make_setting(remove=tuple(range(0, 48, every)))
        problem = setting.problem
        easiest = problem.named[np.argmin(setting.losses(setting.retrained, problem.named))]
        keep = np.concatenate([problem.retained, [easiest]])
        params = fit(problem.examples.inputs[keep], problem.examples.targets[keep], setting.l2)
        check = look(setting, params)
        assert sum(row.arrived is False for row in check.rows) == 1 and len(check.rows) == count
        assert check.passed == (count >= 20), check.words


def test_harm_is_harm_where_every_forget_row_is_right():
    setting = make_setting(remove=FOUR)
    harmed = harm_others(setting)
    before, after = (setting.losses(p, setting.problem.retained) for p in (setting.before, harmed))
    check = look(setting, harmed)
    assert check.verdict is Verdict.HARMFUL and all(row.arrived for row in check.rows)
    assert after.mean() - before.mean() > check.harm_bound
    assert check.reasons[0].startswith(f"retained rows were harmed: their mean loss went {before.mean():.3g} -> ")


def test_rows_that_are_remembered_better_were_not_forgotten():
    setting = make_setting(remove=FOUR)
    examples, rows = setting.problem.examples, list(FOUR)
    batch = ArrayBatch(examples.inputs[rows], examples.targets[rows])
    uphill = jax.grad(lambda p: cross_entropy(logits(None, p, batch), batch).sum())(setting.before)
    better = jax.tree.map(lambda x, g: x - 10.0 * g, setting.before, uphill)
    assert np.all(setting.losses(better, rows) < setting.losses(setting.before, rows))
    check = look(setting, better)
    assert check.verdict is Verdict.INCOMPLETE and "went 0% of their way" in check.words


def test_a_row_known_below_rounding_moves():
    setting = make_setting(remove=FOUR, deep=10)
    assert setting.losses(setting.before, [10])[0] < 1e-12
    result = setting.erase()
    assert receipt_of(result).complete and setting.losses(result.params, [10])[0] > 1.0


@pytest.mark.parametrize("stored", [True, False])
def test_copies_in_the_retain_set_are_named_and_kept(monkeypatch, stored):
    monkeypatch.setattr(targets, "rows_fit", lambda *_: stored)  # else cosines are those of sketches
    setting = make_setting(remove=FOUR, copy=FOUR[:2])
    result = setting.erase()
    receipt = receipt_of(result)
    assert receipt.validity is not None and receipt.complete
    places = [int(found[0]) if len(found) else None for found in setting.problem.look_alikes or ()]
    assert [row.copies for row in receipt.validity.rows] == [(str(p),) if p is not None else () for p in places]
    after = setting.losses(result.params, setting.problem.named)
    oracle = setting.losses(setting.retrained, setting.problem.named)
    assert np.all(after[:2] < oracle[:2] + 0.1) and np.all(after[2:] > 1.0)


@pytest.mark.parametrize("method", [RIDGE_STEP, RIDGE_PATH], ids=["step", "path"])
@pytest.mark.parametrize("action", ["r", "q", "c", "rqc"])
def test_the_exact_answer_on_ridge_is_no_failure(method, action):
    problem, before, _ = make_ridge(action)
    result = erase_ridge(problem, before, method)
    check = receipt_of(result).validity
    assert check is not None and not check.failed
    after = np.concatenate([problem.retained, problem.wanted])
    exact = ridge_solution(problem.examples.inputs[after], problem.examples.targets[after], L2)
    assert method is RIDGE_STEP or np.linalg.norm(join_params(result.params) - exact) < 1e-6


CG = ConjugateGradients(rtol=0.05, max_steps=15)


def steps_with(solver: Solver = CG, **changes):
    """A single step with another solver or curvature."""
    return dataclasses.replace(STEP, solver=solver, curvature=dataclasses.replace(CURVATURE, **changes))


METHODS = {
    "auto": AUTO,
    "target matching, corrected": Corrected(method=MATCHING, max_steps=3, curvature=CURVATURE),
    "path": PATH,
    "path, auto curvature": Path(curvature=dataclasses.replace(CURVATURE, kind="auto", memory_budget_bytes=0)),
    "step, corrected": Corrected(method=STEP, max_steps=2, curvature=CURVATURE),
    "descent": steps_with(QuadraticDescent(num_steps=40, rtol=0.05)),
    "lissa": steps_with(Lissa(num_steps=40, rtol=0.05)),
    "minres": steps_with(Minres(rtol=0.05, max_steps=15), damping_kind="mean-eigenvalue"),
    "row preconditioner": steps_with(dataclasses.replace(CG, preconditioner=RowPreconditioner())),
    "bfloat16": steps_with(matmul_precision="bfloat16"),
}


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("name", METHODS)
def test_no_budget_is_exceeded(name, share):
    setting = _budget_setting()
    price = 60.0 * len(setting.problem.retained)
    try:
        result = setting.erase(METHODS[name], share, retraining_cost=price)
    except UnlearningError as error:
        assert "budget" in str(error)
    else:
        assert result.cost.total <= share * price * (1 + 1e-9)


_made: list[Setting] = []


def _budget_setting() -> Setting:
    if not _made:
        _made.append(make_setting(remove=FOUR))
    return _made[0]


def test_nothing_costs_more_than_a_retraining_unless_it_may():
    setting = _budget_setting()
    method = dataclasses.replace(PATH, solver=ConjugateGradients(rtol=1e-9, max_steps=15))
    price = 400.0

    def run(budget):
        return setting.erase(method, budget, calibration=None, retraining_cost=price)

    assert run(None).cost.total <= price < run(np.inf).cost.total


@pytest.mark.parametrize("where", ["named", "retained", "calibration"])
def test_a_row_that_is_not_finite_is_named_before_anything_is_computed(where):
    setting = _budget_setting()
    problem, calibration = setting.problem, setting.calibration
    inputs, unseen = problem.examples.inputs.copy(), calibration.inputs.copy()
    row = {"named": 10, "retained": 5, "calibration": 7}[where]
    (unseen if where == "calibration" else inputs)[row, 0] = np.nan
    problem = dataclasses.replace(problem, examples=ArrayExamples(inputs, problem.examples.targets))
    with pytest.raises(ValueError, match=rf"{where} row '{row}'.* is nan"):
        setting.erase(requests=problem, calibration=ArrayExamples(unseen, calibration.targets))


def test_the_only_row_can_be_corrected():
    rng = np.random.default_rng(0)
    inputs = np.repeat(rng.normal(size=(1, 128)), 2, axis=0)
    problem = EditProblem(ArrayExamples(inputs, np.array([1, 2])), 1, np.array([0]), np.array([1]))
    setting = make_setting(remove=(0,), n=2)
    before = fit(inputs[:1], np.array([1]), setting.l2)
    for method in (AUTO, PATH):
        result = setting.erase(method, requests=problem, adapter=before, calibration=None, modified=None)
        receipt = receipt_of(result)
        assert receipt.validity is not None and receipt.validity.retained is None
        assert method is PATH or receipt.complete


def test_the_first_step_reports_its_standard_error():
    setting = _budget_setting()
    sample = dataclasses.replace(CURVATURE, sample_size=32)
    for method in (
        Auto(first=dataclasses.replace(MATCHING, max_standard_error=np.inf, num_steps=4), fallback=PATH),
        Path(num_steps=4, curvature=sample),
    ):
        receipts = [receipt_of(setting.erase(method, seed=seed)) for seed in range(2)]
        assert all(0.01 < receipt.steps[0].standard_error < 1.0 for receipt in receipts)
        assert all(receipt.step_standard_error == receipt.steps[0].standard_error for receipt in receipts)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda task: Workspace(seed=-1), "seed"),
        (lambda task: Workspace(seed=2**32), "seed"),
        (lambda task: Workspace(chunk_size=0), "chunk_size"),
        (lambda task: dataclasses.replace(task, target_loss=np.inf), "target_loss"),
        (lambda task: TargetMatching(max_standard_error=0.0), "max_standard_error"),
        (lambda task: dataclasses.replace(CURVATURE, max_standard_error=0.0), "max_standard_error"),
    ],
)
def test_bad_values_are_refused_by_name(make, named):
    with pytest.raises(ValueError, match=named):
        make(_budget_setting().task)
