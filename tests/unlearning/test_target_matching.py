"""The matched way on a softmax head that has memorised: rows arrive, the others stay, budgets and checks hold."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax.losses import Objective, example_losses, gradient_sum
from llmeraser_jax.unlearning.config import EraseConfig
from llmeraser_jax.unlearning.dispatch import unlearn
from llmeraser_jax.unlearning.evaluator import Evaluator
from llmeraser_jax.unlearning.problem import EditProblem
from llmeraser_jax.unlearning.steps import NoStepError, UnlearningError
from llmeraser_jax.unlearning.targets import Role, _exchange, find_targets, log_odds
from llmeraser_jax.unlearning.validity import Validity, Verdict
from tests.problems import ArrayExamples, ridge_objective, split_params
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


CONFIG = EraseConfig(l2=L2, damping=1e-4, chunk_size=8, sample_size=32)


def edited(problem) -> tuple[np.ndarray, np.ndarray]:
    """The data after the request, replacements in the places of what they replace."""
    inputs, targets = problem.examples.inputs[:N].copy(), problem.examples.targets[:N].copy()
    inputs[problem.edited] = problem.examples.inputs[problem.wanted]
    targets[problem.edited] = problem.examples.targets[problem.wanted]
    return inputs, targets


@pytest.mark.parametrize("action", ["remove", "modify", "correct"])
def test_rows_arrive_and_the_others_stay(memorised, action):
    problem, params, heldout = make(memorised, action)
    modified = np.full(4, action == "modify")
    result = unlearn(OBJECTIVE, params, problem, CONFIG, heldout=heldout, modified=modified)
    assert result.method == "matched" and result.complete
    before = losses(params, problem.examples, problem.retained)
    after = losses(result.params, problem.examples, problem.retained)
    unknown = losses(params, heldout, np.arange(40)).mean()
    assert result.targets is not None and result.targets.losses.unknown == pytest.approx(unknown)
    gone = log_odds(losses(result.params, problem.examples, problem.named))
    if action == "remove":
        np.testing.assert_allclose(gone, log_odds(unknown), atol=0.6)
    else:
        swapped = log_odds(losses(params, problem.examples, problem.wanted))
        assert gone.mean() == pytest.approx(swapped.mean(), abs=1.0)
        wanted = log_odds(losses(result.params, problem.examples, problem.wanted))
        assert wanted.mean() == pytest.approx(log_odds(before.mean()), abs=1.0)
    assert after.mean() < before.mean() + 0.1
    assert result.validity is not None and result.validity.passed


@pytest.mark.parametrize("action", ["modify", "correct"])
def test_edited_rows_end_where_retraining_leaves_them(memorised, action):
    problem, params, _ = make(memorised, action, named=np.arange(0, N, 4))
    result = unlearn(OBJECTIVE, params, problem, CONFIG, modified=np.full(12, action == "modify"))
    *_, retrained = memorise(*edited(problem))
    for rows in (problem.named, problem.wanted):
        start, here, there = (
            log_odds(losses(p, problem.examples, rows)).mean() for p in (params, result.params, retrained)
        )
        assert abs(here - there) < 0.25 * abs(start - there)


@pytest.mark.parametrize("action", ["modify", "correct"])
def test_edits_need_no_heldout_rows(memorised, action):
    problem, params, heldout = make(memorised, action)
    modified = np.full(4, action == "modify")
    alone = unlearn(OBJECTIVE, params, problem, CONFIG, modified=modified)
    assert alone.method == "matched" and alone.complete
    assert alone.targets is not None and alone.targets.losses.unknown is None
    with_them = unlearn(OBJECTIVE, params, problem, CONFIG, modified=modified, heldout=heldout)
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
    evaluator = Evaluator(OBJECTIVE, problem, CONFIG)
    modified = np.array([True, True, False, False])
    found = find_targets(evaluator, params, calibration=None, modified=modified)
    for kind in (modified, ~modified):
        of_kind = np.isin(found.owners, np.flatnonzero(kind))
        goes, wanted = of_kind & (found.roles == Role.GOES), of_kind & (found.roles == Role.WANTED)
        np.testing.assert_allclose(found.ends[goes], found.start[wanted].mean())


def test_an_edit_without_effect_leaves_the_adapter_as_it_is(memorised):
    problem, params, heldout = make(memorised, "modify")
    inputs = problem.examples.inputs.copy()
    inputs[problem.wanted] = inputs[problem.named] * 1.001  # another row to nobody
    problem = dataclasses.replace(problem, examples=ArrayExamples(inputs, problem.examples.targets, 2))
    result = unlearn(OBJECTIVE, params, problem, CONFIG, heldout=heldout, modified=np.ones(4, bool))
    assert result.complete and result.method == "matched" and result.steps == ()
    np.testing.assert_array_equal(result.params["w"], params["w"])
    assert result.cost.total < 2 * len(problem.named) + len(problem.wanted) + 40 + N  # and cheap


def test_it_harms_the_others_less_than_the_right_hand_side_moved_as_far(memorised):
    problem, params, heldout = make(memorised, "remove")
    result = unlearn(OBJECTIVE, params, problem, CONFIG, heldout=heldout)
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
    problem, params, heldout = make(memorised, "remove")
    config = dataclasses.replace(CONFIG, num_steps=2, trust_region=False, damping=0.1)
    assert unlearn(OBJECTIVE, params, problem, config).method == "path"
    assert unlearn(OBJECTIVE, params, problem, config, heldout=heldout).method == "matched"
    assert unlearn(OBJECTIVE, params, problem, dataclasses.replace(config, target_loss=1.0)).method == "matched"
    with pytest.raises(ValueError, match="held-out examples or target_loss"):
        unlearn(OBJECTIVE, params, problem, dataclasses.replace(config, method="matched"))


def test_target_loss_replaces_the_heldout_rows(memorised):
    problem, params, _ = make(memorised, "remove")
    result = unlearn(OBJECTIVE, params, problem, dataclasses.replace(CONFIG, target_loss=0.7))
    np.testing.assert_allclose(losses(result.params, problem.examples, problem.named), 0.7, atol=0.15)


def test_rows_that_are_at_their_targets_leave_nothing_to_do(memorised):
    problem, params, _ = make(memorised, "remove")
    result = unlearn(OBJECTIVE, params, problem, dataclasses.replace(CONFIG, target_loss=1e-5))
    assert result.complete and result.steps == () and result.validity is None
    assert result.params is params and result.cost.total == pytest.approx(4 / 3)


@pytest.mark.parametrize("repairs", [0, 1])
def test_cost_is_rows_roots_and_checks(memorised, repairs):
    problem, params, heldout = make(memorised, "remove")
    config = dataclasses.replace(CONFIG, draws=3, num_steps=3, repairs=repairs, repair_size=20, sample_size=8)
    result = unlearn(OBJECTIVE, params, problem, config, heldout=heldout)
    assert len(result.steps) == 3 and all(step.scale == 1 for step in result.steps)
    assert result.cost.curvature == pytest.approx(2 * 8 * (1 / 3 + 3 * 2 / 3))
    if repairs:
        # Gradients after the last step too, and the sample that found nothing to repair.
        assert result.cost.rhs == pytest.approx((40 + 4) / 3 + 4 * 4)
        assert result.cost.trust_region == pytest.approx(20 * (1 + 1 / 3))
    else:
        # Gradients before each step check the one before it; the last has a check of its own.
        assert result.cost.rhs == pytest.approx((40 + 4) / 3 + 4 * 3)
        assert result.cost.trust_region == pytest.approx(4 / 3)


def test_budget_ends_it_early_and_says_so(memorised):
    problem, params, heldout = make(memorised, "remove")
    whole = unlearn(OBJECTIVE, params, problem, CONFIG, heldout=heldout).cost.total
    config = dataclasses.replace(CONFIG, budget=0.3)
    result = unlearn(OBJECTIVE, params, problem, config, heldout=heldout, retrain_cost=whole)
    assert 0 < result.cost.total <= 0.3 * whole
    assert "budget" in result.stopped and len(result.steps) < 4
    with pytest.raises(UnlearningError, match="budget"):
        unlearn(OBJECTIVE, params, problem, config, heldout=heldout, retrain_cost=1.0)
    with pytest.raises(ValueError, match="retrain_cost"):
        unlearn(OBJECTIVE, params, problem, config, heldout=heldout)


def look(objective, problem, config, before, after, calibration=None):
    """The validity check of a change, whatever made it."""
    evaluator = Evaluator(objective, problem, config)
    targets = find_targets(
        evaluator, before, calibration=calibration, modified=np.zeros(len(problem.named), bool), diagnostic=True
    )
    return Validity(evaluator, before, targets, calibration).check(after)


def test_the_validity_check_predicts_a_quadratic_exactly():
    rng = np.random.default_rng(0)
    examples = ArrayExamples(rng.normal(size=(20, 4)), rng.normal(size=20))
    problem = EditProblem(examples, 20, np.array([2, 5]), np.array([-1, -1]))
    before, after = rng.normal(size=4), rng.normal(size=4)
    config = EraseConfig(method="path", l2=0.1)
    check = look(ridge_objective(0.1), problem, config, split_params(before), split_params(after))
    change, rows = check.retained, problem.retained
    assert change is not None
    for params, value in ((before, change.before.mean), (after, change.after.mean), (after, change.predicted)):
        residual = examples.inputs[rows] @ params - examples.targets[rows]
        assert value == pytest.approx(0.5 * np.mean(residual**2), rel=1e-6)


def test_log_odds_are_those_of_the_probability():
    p = np.array([0.999, 0.5, 1e-3])
    np.testing.assert_allclose(log_odds(-np.log(p)), np.log((1 - p) / p), rtol=1e-9)


def test_auto_goes_on_along_the_path_where_matched_steps_do_not_do_what_was_asked(memorised, monkeypatch):
    problem, params, heldout = make(memorised, "remove")
    # A ridge this high lets the rows stay where they are: nothing is forgotten.
    config = dataclasses.replace(
        CONFIG, row_ridge=1e9, num_steps=2, repairs=0, max_step_ratio=0.0, max_standard_error=np.inf
    )
    stays = unlearn(OBJECTIVE, params, problem, dataclasses.replace(config, method="matched"), heldout=heldout)
    assert stays.validity is not None and stays.validity.failed
    assert "went 0% of their way" in stays.validity.words
    real = Validity.check

    def lenient(self, moved):
        check = real(self, moved)
        is_path = self.evaluator.config.method == "path"
        return dataclasses.replace(check, verdict=Verdict.COMPLETE) if is_path else check

    monkeypatch.setattr(Validity, "check", lenient)
    result = unlearn(OBJECTIVE, params, problem, config, heldout=heldout)
    assert result.method == "path" and result.complete
    assert len(result.attempts) == 1 and result.attempts[0].startswith("matched: incomplete: removed rows went 0%")
    alone = unlearn(OBJECTIVE, params, problem, dataclasses.replace(CONFIG, method="path", max_step_ratio=0.0))
    # Both ways are paid for.
    assert result.cost.total > stays.cost.total and alone.method == "path"
    assert losses(result.params, problem.examples, problem.named).mean() > 0.3

    def with_retraining_at(price):
        return unlearn(OBJECTIVE, params, problem, config, heldout=heldout, retrain_cost=price)

    # Where retraining is cheaper than the path, or becomes so on the way, nobody is made to pay more for less.
    dear = with_retraining_at(stays.cost.total + 1)
    assert dear.method == "matched" and dear.cost.total == pytest.approx(stays.cost.total)
    assert dear.validity is not None and not dear.validity.passed
    assert dear.attempts[0].startswith("path: The budget of")
    between = with_retraining_at((stays.cost.total + result.cost.total) / 2)
    assert between.cost.total <= (stays.cost.total + result.cost.total) / 2
    chex.assert_trees_all_close(with_retraining_at(2 * result.cost.total).params, result.params)


def test_a_matched_move_that_finds_no_step_is_paid_for_all_the_same(memorised, monkeypatch):
    problem, params, heldout = make(memorised, "remove")

    def give_up(evaluator, *args, **kwargs):
        evaluator.cost.curvature += 1000.0
        raise NoStepError("none")

    monkeypatch.setattr("llmeraser_jax.unlearning.dispatch.unlearn_matched", give_up)
    alone = unlearn(OBJECTIVE, params, problem, dataclasses.replace(CONFIG, method="path", sample_size=None))
    result = unlearn(OBJECTIVE, params, problem, CONFIG, heldout=heldout)
    assert result.method == "path" and result.attempts == ("matched: none",)
    assert result.cost.curvature == pytest.approx(alone.cost.curvature + 1000)


def test_edits_that_have_little_way_to_go_are_fine_without_moving_far(memorised):
    problem, params, heldout = make(memorised, "modify")
    inputs = problem.examples.inputs.copy()
    inputs[N:] = inputs[NAMED]
    inputs[N] += 0.8 * np.random.default_rng(3).normal(size=D)
    problem = dataclasses.replace(problem, examples=ArrayExamples(inputs, problem.examples.targets, 2))
    result = unlearn(OBJECTIVE, params, problem, CONFIG, heldout=heldout, modified=np.full(4, True))
    check = result.validity
    assert result.method == "matched" and len(result.steps) > 0 and not result.attempts
    assert check is not None and check.passed
    for part in ("as trained", "replacement"):
        assert abs(check.mean_loss(part, "after") - check.mean_loss(part, "before")) < 0.05
