"""Target matching on a softmax head that has memorised: rows arrive, the others stay, budgets and checks hold."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax.losses import Objective, example_losses, gradient_sum
from llmeraser_jax.unlearning import (
    Auto,
    CurvatureSpec,
    EditProblem,
    MatchingRecord,
    Method,
    Path,
    Result,
    TargetMatching,
    TrustRegion,
    UnlearningError,
    UnlearningTask,
    Verdict,
    Workspace,
    erase,
)
from llmeraser_jax.unlearning.records import NoStepError, record_to_mapping
from llmeraser_jax.unlearning.targets import Role, _exchange, find_targets, log_odds
from llmeraser_jax.unlearning.validity import Validity
from tests.problems import ArrayExamples, receipt_of, ridge_task, split_params
from tests.unlearning.judgement import log_odds as head_log_odds
from tests.unlearning.test_path_on_softmax import cross_entropy, logits

N, D, CLASSES, L2 = 48, 64, 3, 1e-4
NAMED = np.array([3, 10, 11, 30])


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def root(z, batch, key):
    p = jax.nn.softmax(z)
    noisy = jnp.sqrt(p) * jax.random.rademacher(key, z.shape, z.dtype)
    return noisy - p * noisy.sum(-1, keepdims=True)


OBJECTIVE = Objective((), None, logits, cross_entropy, L2, root, head_log_odds)


def draw(rng, count):
    """Rows whose classes are random: all that can be learnt about them is by heart."""
    return rng.normal(size=(count, D)), rng.integers(0, CLASSES, count)


def memorise(inputs, targets):
    """The rows, and a head trained on them until it knows them by heart."""
    params = {"w": jnp.zeros((D, CLASSES))}
    stack = ArrayExamples(inputs, targets).stack(np.arange(N), np.full(N, 1 / N), chunk_size=N)
    batch, weights = jax.tree.map(lambda x: x[0], stack.batches[0]), stack.weights[0][0]
    loss = lambda p: jnp.sum(weights * OBJECTIVE.data_losses(p, batch)) + OBJECTIVE.l2_loss(p)  # noqa: E731
    rate = min(0.5, 2 * N / np.linalg.norm(inputs, 2) ** 2)  # below 2 over the largest eigenvalue, which is less
    descend = jax.jit(lambda p: jax.tree.map(lambda x, g: x - rate * g, p, jax.grad(loss)(p)))
    for _ in range(2000):
        params = descend(params)
    return inputs, targets, params


@pytest.fixture(scope="module")
def memorised():
    with jax.enable_x64(True):
        return memorise(*draw(np.random.default_rng(0), N))


def make(memorised, action: str, named: np.ndarray = NAMED):
    inputs, targets, params = memorised
    rng = np.random.default_rng(1)
    new_inputs, new_targets = inputs[named].copy(), targets[named].copy()
    if action == "correct":
        new_targets = (new_targets + 1) % CLASSES
    if action == "modify":
        new_inputs = rng.normal(size=new_inputs.shape)
    examples = ArrayExamples(np.concatenate([inputs, new_inputs]), np.concatenate([targets, new_targets]), 2)
    replacements = np.full(len(named), -1) if action == "remove" else N + np.arange(len(named))
    return EditProblem(examples, N, named, replacements), params, ArrayExamples(*draw(rng, 40))


def losses(params, examples, indices) -> np.ndarray:
    stack = examples.stack(np.asarray(indices), np.ones(len(indices)), chunk_size=8)
    return example_losses(OBJECTIVE, params, stack)


MATCHING = TargetMatching(damping=1e-4, sample_size=32)
CURVATURE = CurvatureSpec(damping=1e-4)
PATH = Path(curvature=CURVATURE)
AUTO = Auto(first=MATCHING, fallback=PATH)


def head_task(problem, params, calibration=None, **fields) -> UnlearningTask:
    """A request about the head."""
    return UnlearningTask(model=OBJECTIVE, adapter=params, requests=problem, calibration=calibration, **fields)


def erase_head(problem, params, method: Method = AUTO, calibration=None, budget=None, **fields) -> Result:
    return erase(head_task(problem, params, calibration, **fields), method, budget, chunk_size=8)


def edited(problem) -> tuple[np.ndarray, np.ndarray]:
    """The data after the request, replacements in the places of what they replace."""
    inputs, targets = problem.examples.inputs[:N].copy(), problem.examples.targets[:N].copy()
    inputs[problem.edited] = problem.examples.inputs[problem.wanted]
    targets[problem.edited] = problem.examples.targets[problem.wanted]
    return inputs, targets


@pytest.mark.parametrize("action", ["remove", "modify", "correct"])
def test_rows_arrive_and_the_others_stay(memorised, action):
    problem, params, calibration = make(memorised, action)
    modified = np.full(4, action == "modify")
    result = erase_head(problem, params, AUTO, calibration, modified=modified)
    receipt = receipt_of(result)
    assert receipt.method == "target matching" and receipt.complete
    before = losses(params, problem.examples, problem.retained)
    after = losses(result.params, problem.examples, problem.retained)
    unknown = losses(params, calibration, np.arange(40)).mean()
    assert receipt.targets is not None and receipt.targets.unknown == pytest.approx(unknown)
    gone = log_odds(losses(result.params, problem.examples, problem.named))
    if action == "remove":
        np.testing.assert_allclose(gone, log_odds(unknown), atol=0.6)
    else:
        swapped = log_odds(losses(params, problem.examples, problem.wanted))
        assert gone.mean() == pytest.approx(swapped.mean(), abs=1.0)
        wanted = log_odds(losses(result.params, problem.examples, problem.wanted))
        assert wanted.mean() == pytest.approx(log_odds(before.mean()), abs=1.0)
    assert after.mean() < before.mean() + 0.1
    assert receipt.validity is not None and receipt.validity.passed


@pytest.mark.parametrize("action", ["modify", "correct"])
def test_edited_rows_end_where_retraining_leaves_them(memorised, action):
    problem, params, _ = make(memorised, action, named=np.arange(0, N, 4))
    result = erase_head(problem, params, modified=np.full(12, action == "modify"))
    *_, retrained = memorise(*edited(problem))
    for rows in (problem.named, problem.wanted):
        start, here, there = (
            log_odds(losses(p, problem.examples, rows)).mean() for p in (params, result.params, retrained)
        )
        assert abs(here - there) < 0.25 * abs(start - there)


@pytest.mark.parametrize("action", ["modify", "correct"])
def test_edits_need_no_calibration_rows(memorised, action):
    problem, params, calibration = make(memorised, action)
    modified = np.full(4, action == "modify")
    alone = erase_head(problem, params, modified=modified)
    receipt = receipt_of(alone)
    assert receipt.method == "target matching" and receipt.complete
    assert receipt.targets is not None and receipt.targets.unknown is None
    with_them = erase_head(problem, params, AUTO, calibration, modified=modified)
    np.testing.assert_array_equal(alone.params["w"], with_them.params["w"])


@pytest.mark.parametrize("hard", [0.0, 1.5])
def test_an_edit_exchanges_the_pair_and_its_replacement(hard):
    # Pairs with a difficulty that lasts end at their partners' log-odds, others at the partners' mean.
    rng = np.random.default_rng(0)
    difficulty, noise = hard * rng.normal(size=12), rng.normal(size=(2, 12))
    noise[1] -= noise[0] * (noise[0] - noise[0].mean()) @ noise[1] / ((noise[0] - noise[0].mean()) @ noise[0])
    old, new = -3 + difficulty + 0.1 * noise[0], 1 + difficulty + 0.1 * noise[1]
    old_ends, new_ends = _exchange(old, new, -2.5)
    tolerance = 0.1 if hard else 1e-6
    np.testing.assert_allclose(old_ends, new if hard else new.mean(), atol=tolerance)
    np.testing.assert_allclose(new_ends, old if hard else -2.5, atol=tolerance)


def test_the_two_kinds_of_edits_are_apart(memorised):
    problem, params, _ = make(memorised, "modify")
    other = make(memorised, "correct")[0].examples
    inputs, targets = problem.examples.inputs.copy(), problem.examples.targets.copy()
    inputs[N + 2 :], targets[N + 2 :] = other.inputs[N + 2 :], other.targets[N + 2 :]
    problem = dataclasses.replace(problem, examples=ArrayExamples(inputs, targets, 2))
    modified = np.array([True, True, False, False])
    found = find_targets(head_task(problem, params, modified=modified), Workspace(chunk_size=8))
    for kind in (modified, ~modified):
        of_kind = np.isin(found.owners, np.flatnonzero(kind))
        goes, wanted = of_kind & (found.roles == Role.GOES), of_kind & (found.roles == Role.WANTED)
        np.testing.assert_allclose(found.ends[goes], found.start[wanted].mean())


def test_an_edit_without_effect_leaves_the_adapter_as_it_is(memorised):
    problem, params, calibration = make(memorised, "modify")
    inputs = problem.examples.inputs.copy()
    inputs[problem.wanted] = inputs[problem.named] * 1.001  # another row to nobody
    problem = dataclasses.replace(problem, examples=ArrayExamples(inputs, problem.examples.targets, 2))
    result = erase_head(problem, params, AUTO, calibration, modified=np.ones(4, bool))
    receipt = receipt_of(result)
    assert receipt.complete and receipt.method == "target matching" and receipt.steps == ()
    np.testing.assert_array_equal(result.params["w"], params["w"])
    assert result.cost.total < 2 * len(problem.named) + len(problem.wanted) + 40 + N  # and cheap


def test_it_harms_the_others_less_than_the_right_hand_side_moved_as_far(memorised):
    problem, params, calibration = make(memorised, "remove")
    result = erase_head(problem, params, AUTO, calibration)
    stack = problem.examples.stack(problem.named, np.ones(4), chunk_size=8)
    target = losses(result.params, problem.examples, problem.named).mean()
    direction = gradient_sum(OBJECTIVE, params, stack)
    scale = 1.0
    while losses({"w": params["w"] + scale * direction["w"]}, problem.examples, problem.named).mean() < target:
        scale *= 1.1
    plain = losses({"w": params["w"] + scale * direction["w"]}, problem.examples, problem.retained).mean()
    start = losses(params, problem.examples, problem.retained).mean()
    matched = losses(result.params, problem.examples, problem.retained).mean()
    assert matched - start < 0.5 * (plain - start)


def test_auto_takes_the_path_where_it_does_not_know_where_rows_should_end(memorised):
    problem, params, calibration = make(memorised, "remove")
    matching = dataclasses.replace(MATCHING, num_steps=2, damping=0.1)
    path = Path(num_steps=2, trust_region=None, curvature=CurvatureSpec(damping=0.1, sample_size=32))
    auto = Auto(first=matching, fallback=path)
    assert receipt_of(erase_head(problem, params, auto)).method == "path"
    assert receipt_of(erase_head(problem, params, auto, calibration)).method == "target matching"
    assert receipt_of(erase_head(problem, params, auto, target_loss=1.0)).method == "target matching"
    with pytest.raises(ValueError, match="give calibration rows or target_loss"):
        erase_head(problem, params, matching)


def test_target_matching_is_refused_where_a_loss_has_no_log_odds():
    examples = ArrayExamples(np.eye(4), np.ones(4))
    task = ridge_task(EditProblem(examples, 4, np.array([2]), np.array([-1])), np.ones(4), 0.1, target_loss=0.7)
    with pytest.raises(ValueError, match="needs an objective with a log_odds_fn"):
        erase(task, MATCHING)


def test_target_loss_replaces_the_calibration_rows(memorised):
    problem, params, _ = make(memorised, "remove")
    result = erase_head(problem, params, target_loss=0.7)
    np.testing.assert_allclose(losses(result.params, problem.examples, problem.named), 0.7, atol=0.15)


def test_rows_that_are_at_their_targets_leave_nothing_to_do(memorised):
    problem, params, _ = make(memorised, "remove")
    result = erase_head(problem, params, target_loss=1e-5)
    receipt = receipt_of(result)
    assert receipt.complete and receipt.steps == () and receipt.validity is None
    assert result.params is params and result.cost.total == pytest.approx(4 / 3)


@pytest.mark.parametrize(
    "restoration", [{"restoration_steps": 0}, {"restoration_steps": 1, "restoration_rows": 20}]
)
def test_cost_is_rows_roots_and_checks(memorised, restoration):
    problem, params, calibration = make(memorised, "remove")
    method = dataclasses.replace(MATCHING, num_roots=3, num_steps=3, sample_size=8, **restoration)
    result = erase_head(problem, params, method, calibration)
    steps = receipt_of(result).steps
    assert len(steps) == 3 and all(step.scale == 1 for step in steps)
    assert result.cost.curvature == pytest.approx(2 * 8 * (1 / 3 + 3 * 2 / 3))
    if restoration["restoration_steps"]:
        # Gradients after the last step too, and the sample that found nothing to restore.
        assert result.cost.rhs == pytest.approx((40 + 4) / 3 + 4 * 4)
        assert result.cost.trust_region == pytest.approx(20 * (1 + 1 / 3))
    else:
        # Gradients before each step check the one before it; the last has a check of its own.
        assert result.cost.rhs == pytest.approx((40 + 4) / 3 + 4 * 3)
        assert result.cost.trust_region == pytest.approx(4 / 3)


def test_budget_ends_it_early_and_says_so(memorised):
    problem, params, calibration = make(memorised, "remove")
    whole = erase_head(problem, params, AUTO, calibration).cost.total
    result = erase_head(problem, params, AUTO, calibration, 0.4, retraining_cost=whole)
    receipt = receipt_of(result)
    assert 0 < result.cost.total <= 0.4 * whole
    assert "stopped early: the budget of" in receipt.outcome and len(receipt.steps) < 4
    with pytest.raises(UnlearningError, match="budget"):
        erase_head(problem, params, AUTO, calibration, 0.3, retraining_cost=1.0)
    with pytest.raises(ValueError, match="retraining_cost"):
        erase_head(problem, params, AUTO, calibration, 0.3)


def test_rows_that_are_not_stored_ask_for_their_diagonal_in_advance(memorised):
    problem, params, calibration = make(memorised, "remove")
    method = dataclasses.replace(MATCHING, memory_budget_bytes=0)
    # A look at four rows with gradients and after the step, and the passes over 32 sampled rows twice.
    with pytest.raises(UnlearningError, match="takes up to 69"):
        erase_head(problem, params, method, calibration, 1.0, retraining_cost=60.0)
    spent = erase_head(problem, params, MATCHING, calibration, 1.0, retraining_cost=60.0).cost.curvature
    assert spent == 32


def look(task: UnlearningTask, after):
    """The validity check of a change, whatever made it."""
    workspace = Workspace(chunk_size=8)
    targets = find_targets(task, workspace, diagnostic=True)
    return Validity(task, workspace, targets).check(after)


def test_the_validity_check_predicts_a_quadratic_exactly():
    rng = np.random.default_rng(0)
    examples = ArrayExamples(rng.normal(size=(20, 4)), rng.normal(size=20))
    problem = EditProblem(examples, 20, np.array([2, 5]), np.array([-1, -1]))
    before, after = rng.normal(size=4), rng.normal(size=4)
    check = look(ridge_task(problem, before, 0.1), split_params(after))
    change, rows = check.retained, problem.retained
    assert change is not None
    for params, value in ((before, change.before.mean), (after, change.after.mean), (after, change.predicted)):
        residual = examples.inputs[rows] @ params - examples.targets[rows]
        assert value == pytest.approx(0.5 * np.mean(residual**2), rel=1e-6)


def test_log_odds_are_those_of_the_probability():
    p = np.array([0.999, 0.5, 1e-3])
    np.testing.assert_allclose(log_odds(-np.log(p)), np.log((1 - p) / p), rtol=1e-9)


def test_auto_goes_on_along_the_path_where_target_matching_does_not_do_what_was_asked(memorised, monkeypatch):
    problem, params, calibration = make(memorised, "remove")
    # A ridge this high lets the rows stay where they are: nothing is forgotten.
    stuck = dataclasses.replace(
        MATCHING, row_ridge=1e9, num_steps=2, restoration_steps=0, max_standard_error=np.inf
    )
    spec = dataclasses.replace(CURVATURE, max_standard_error=np.inf)
    path = Path(curvature=spec, trust_region=TrustRegion(max_step_ratio=0.0))
    stays = erase_head(problem, params, stuck, calibration)
    failed = receipt_of(stays).validity
    assert failed is not None and failed.failed
    assert "went 0% of their way" in failed.words
    real, move, on_the_path = Validity.check, Path.move, []

    def noted(self, *args):
        moved = move(self, *args)
        on_the_path.append(moved.params)
        return moved

    def lenient(self, moved):
        check = real(self, moved)
        is_path = any(moved is params for params in on_the_path)
        return dataclasses.replace(check, verdict=Verdict.COMPLETE) if is_path else check

    monkeypatch.setattr(Path, "move", noted)
    monkeypatch.setattr(Validity, "check", lenient)

    def with_retraining_at(price=None):
        auto = Auto(first=stuck, fallback=path)
        result = erase_head(problem, params, auto, calibration, retraining_cost=price)
        return result, receipt_of(result)

    result, receipt = with_retraining_at()
    assert receipt.method == "path" and receipt.complete
    (attempt,) = receipt.attempts
    assert attempt.startswith("target matching: incomplete: removed rows went 0%")
    # Both ways are paid for.
    assert result.cost.total > stays.cost.total
    assert losses(result.params, problem.examples, problem.named).mean() > 0.3

    # Where retraining is cheaper than the path, or becomes so on the way, nobody is made to pay more for less.
    dear, receipt = with_retraining_at(stays.cost.total + 1)
    assert receipt.method == "target matching" and dear.cost.total == pytest.approx(stays.cost.total)
    assert receipt.validity is not None and not receipt.validity.passed
    assert receipt.attempts[0].startswith("fallback: The budget of")
    between, _ = with_retraining_at((stays.cost.total + result.cost.total) / 2)
    assert between.cost.total <= (stays.cost.total + result.cost.total) / 2
    chex.assert_trees_all_close(with_retraining_at(2 * result.cost.total)[0].params, result.params)


def test_target_matching_that_finds_no_step_is_paid_for_all_the_same(memorised, monkeypatch):
    problem, params, calibration = make(memorised, "remove")

    def give_up(self, task, workspace, targets):
        workspace.budget.spend("curvature", 1000.0)
        raise NoStepError("none")

    monkeypatch.setattr(TargetMatching, "move", give_up)
    alone = erase_head(problem, params, PATH)
    result = erase_head(problem, params, AUTO, calibration)
    receipt = receipt_of(result)
    assert receipt.method == "path" and receipt.attempts == ("target matching: none",)
    assert result.cost.curvature == pytest.approx(alone.cost.curvature + 1000)


def test_edits_that_have_little_way_to_go_are_fine_without_moving_far(memorised):
    problem, params, calibration = make(memorised, "modify")
    inputs = problem.examples.inputs.copy()
    inputs[N:] = inputs[NAMED]
    inputs[N] += 0.8 * np.random.default_rng(3).normal(size=D)
    problem = dataclasses.replace(problem, examples=ArrayExamples(inputs, problem.examples.targets, 2))
    receipt = receipt_of(erase_head(problem, params, AUTO, calibration, modified=np.full(4, True)))
    check = receipt.validity
    assert receipt.method == "target matching" and len(receipt.steps) > 0 and not receipt.attempts
    assert check is not None and check.passed
    for part in ("as trained", "replacement"):
        assert abs(check.mean_loss(part, "after") - check.mean_loss(part, "before")) < 0.05


def test_records_have_what_target_matching_has_and_no_solver(memorised):
    problem, params, calibration = make(memorised, "remove")
    receipt = receipt_of(erase_head(problem, params, MATCHING, calibration))
    assert receipt.steps and all(isinstance(step, MatchingRecord) for step in receipt.steps)
    foreign = {"iterations", "products", "status", "residual_history", "negative_curvature", "curvature"}
    for step in receipt.to_mapping()["steps"]:
        assert not foreign & set(step) and step["way_left_after"] < step["way_left_before"]
    assert record_to_mapping(receipt.steps[0])["retained_loss"] is None  # no restoration step, no constrained rows
    summary = receipt.solver
    assert summary.status == "solved directly, by the factored curvature"
    assert summary.iterations == 0 and summary.converged and summary.certified and not summary.negative_curvature
    assert summary.relative_residual == max(step.relative_residual for step in receipt.steps) < 1e-6
