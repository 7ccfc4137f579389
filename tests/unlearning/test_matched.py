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
from llmeraser_jax.unlearning.matched import _ends, _targeted_rows, log_odds
from llmeraser_jax.unlearning.problem import EditProblem
from llmeraser_jax.unlearning.range_check import check_range
from llmeraser_jax.unlearning.steps import NoStepError, TargetLosses, UnlearningError
from tests.problems import ArrayExamples, ridge_objective, split_params
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


OBJECTIVE = Objective((), None, logits, cross_entropy, L2, root)


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
    assert result.targets is not None and result.targets.unknown == pytest.approx(unknown)
    gone = log_odds(losses(result.params, problem.examples, problem.named))
    if action == "remove":
        np.testing.assert_allclose(gone, log_odds(unknown), atol=0.6)
    else:
        swapped = log_odds(losses(params, problem.examples, problem.wanted))
        assert gone.mean() == pytest.approx(swapped.mean(), abs=1.0)
        wanted = log_odds(losses(result.params, problem.examples, problem.wanted))
        assert wanted.mean() == pytest.approx(log_odds(before.mean()), abs=1.0)
    assert after.mean() < before.mean() + 0.1
    assert result.range_check is not None and result.range_check.passed


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
    assert alone.targets is not None and alone.targets.unknown is None
    with_them = unlearn(OBJECTIVE, params, problem, CONFIG, modified=modified, heldout=heldout)
    np.testing.assert_array_equal(alone.params["w"], with_them.params["w"])


def edits(count: int) -> EditProblem:
    examples = ArrayExamples(np.zeros((40 + count, D)), np.zeros(40 + count, int))
    return EditProblem(examples, 40, np.arange(count), 40 + np.arange(count))


@pytest.mark.parametrize("hard", [0.0, 1.5])
def test_an_edit_exchanges_the_pair_and_its_replacement(hard):
    # Pairs with a difficulty that lasts end at their partners' log-odds, others at the partners' mean.
    rng = np.random.default_rng(0)
    difficulty, noise = hard * rng.normal(size=12), rng.normal(size=(2, 12))
    noise[1] -= noise[0] * (noise[0] - noise[0].mean()) @ noise[1] / ((noise[0] - noise[0].mean()) @ noise[0])
    old, new = -3 + difficulty + 0.1 * noise[0], 1 + difficulty + 0.1 * noise[1]
    rows = _targeted_rows(edits(12), np.zeros(12, bool))
    here = np.where(rows.goes, old[rows.indices % 40 % 12], new[(rows.indices - 40) % 12])
    ends = _ends(rows, TargetLosses(unknown=None, known=float(np.log1p(np.exp(-2.5)))), here)
    for place, index in enumerate(rows.indices):
        if rows.goes[place]:
            assert ends[place] == pytest.approx(new[index] if hard else new.mean(), abs=0.1 if hard else 1e-6)
        else:
            assert ends[place] == pytest.approx(old[index - 40] if hard else -2.5, abs=0.1 if hard else 1e-6)


def test_the_two_kinds_of_edits_are_apart():
    rows = _targeted_rows(edits(4), np.array([True, True, False, False]))
    of_query = np.isin(rows.indices % 40, [0, 1])
    here = np.where(rows.goes, -4.0, np.where(of_query, 0.5, 2.0))
    ends = _ends(rows, TargetLosses(unknown=None, known=float(np.log1p(np.exp(-4.0)))), here)
    np.testing.assert_allclose(ends, np.where(rows.goes, np.where(of_query, 0.5, 2.0), -4.0))


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
    assert result.complete and result.steps == () and result.range_check is None
    assert result.params is params and result.cost.total == pytest.approx(4)


@pytest.mark.parametrize("repairs", [0, 1])
def test_cost_is_rows_roots_and_checks(memorised, repairs):
    problem, params, heldout = make(memorised, "remove")
    config = dataclasses.replace(CONFIG, draws=3, num_steps=3, repairs=repairs, repair_size=20, sample_size=8)
    result = unlearn(OBJECTIVE, params, problem, config, heldout=heldout)
    assert len(result.steps) == 3 and all(step.scale == 1 for step in result.steps)
    assert result.cost.curvature == pytest.approx(2 * 8 * (1 / 3 + 3 * 2 / 3))
    if repairs:
        # Gradients after the last step too, and the sample that found nothing to repair.
        assert result.cost.rhs == pytest.approx(4 * 4)
        assert result.cost.trust_region == pytest.approx(40 / 3 + 20 * (1 + 1 / 3))
    else:
        # Gradients before each step check the one before it; the last has a check of its own.
        assert result.cost.rhs == pytest.approx(4 * 3)
        assert result.cost.trust_region == pytest.approx((40 + 4) / 3)


def test_budget_ends_it_early_and_says_so(memorised):
    problem, params, heldout = make(memorised, "remove")
    whole = unlearn(OBJECTIVE, params, problem, CONFIG, heldout=heldout).cost.total
    config = dataclasses.replace(CONFIG, budget=0.4)
    result = unlearn(OBJECTIVE, params, problem, config, heldout=heldout, retrain_cost=whole)
    assert 0 < result.cost.total <= 0.4 * whole
    assert "budget" in result.stopped and not result.complete
    with pytest.raises(UnlearningError, match="budget"):
        unlearn(OBJECTIVE, params, problem, config, heldout=heldout, retrain_cost=1.0)
    with pytest.raises(ValueError, match="retrain_cost"):
        unlearn(OBJECTIVE, params, problem, config, heldout=heldout)


def test_range_check_predicts_a_quadratic_exactly():
    rng = np.random.default_rng(0)
    examples = ArrayExamples(rng.normal(size=(20, 4)), rng.normal(size=20))
    problem = EditProblem(examples, 20, np.array([2, 5]), np.array([-1, -1]))
    evaluator = Evaluator(ridge_objective(0.1), problem, EraseConfig(method="path", l2=0.1))
    before, after = rng.normal(size=4), rng.normal(size=4)
    check = check_range(evaluator, split_params(before), split_params(after))
    for change, rows in ((check.forget, problem.named), (check.probe, problem.retained)):
        assert change is not None
        for params, value in ((before, change.before), (after, change.after), (after, change.predicted)):
            residual = examples.inputs[rows] @ params - examples.targets[rows]
            assert value == pytest.approx(0.5 * np.mean(residual**2), rel=1e-6)


@pytest.mark.parametrize(
    ("scale", "passed", "words"), [(0.0, False, "nothing was forgotten"), (40.0, False, "harmed")]
)
def test_range_check_fails_where_nothing_moved_and_where_the_rest_broke(memorised, scale, passed, words):
    problem, params, _ = make(memorised, "remove")
    evaluator = Evaluator(OBJECTIVE, problem, CONFIG)
    noise = np.random.default_rng(2).normal(size=(D, CLASSES))
    check = check_range(evaluator, params, {"w": params["w"] + scale * noise})
    assert check.passed is passed and words in check.verdict


def test_log_odds_are_those_of_the_probability():
    p = np.array([0.999, 0.5, 1e-3])
    np.testing.assert_allclose(log_odds(-np.log(p)), np.log((1 - p) / p), rtol=1e-9)


def test_auto_goes_on_along_the_path_where_matched_steps_leave_the_range(memorised):
    problem, params, heldout = make(memorised, "remove")
    # A ridge this high lets the rows stay where they are: nothing is forgotten.
    config = dataclasses.replace(CONFIG, row_ridge=1e9, num_steps=2, repairs=0, max_step_ratio=0.0)
    stays = unlearn(OBJECTIVE, params, problem, dataclasses.replace(config, method="matched"), heldout=heldout)
    assert stays.range_check is not None and not stays.range_check.passed
    assert "nothing was forgotten" in stays.range_check.verdict
    result = unlearn(OBJECTIVE, params, problem, config, heldout=heldout)
    assert result.method == "path" and result.range_check is not None and result.range_check.passed
    assert len(result.attempts) == 1 and result.attempts[0].startswith("matched: failed: nothing was forgotten")
    alone = unlearn(OBJECTIVE, params, problem, dataclasses.replace(CONFIG, method="path", max_step_ratio=0.0))
    # Both ways are paid for.
    assert result.cost.total > stays.cost.total and alone.method == "path"
    assert losses(result.params, problem.examples, problem.named).mean() > 0.3

    def with_retraining_at(price):
        return unlearn(OBJECTIVE, params, problem, config, heldout=heldout, retrain_cost=price)

    # Where retraining is cheaper than the path, or becomes so on the way, nobody is made to pay more for less.
    dear = with_retraining_at(stays.cost.total + 1)
    assert dear.method == "matched" and dear.cost.total == pytest.approx(stays.cost.total)
    assert dear.range_check is not None and not dear.range_check.passed
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
    check = result.range_check
    assert result.method == "matched" and len(result.steps) > 0 and not result.attempts
    assert check is not None and check.wanted is not None and check.passed
    assert max(abs(check.forget.after - check.forget.before), check.wanted.before - check.wanted.after) < 0.05
    # What was asked: the unlike row to trade places with its replacement, the others nearly nothing.
    before = [losses(params, problem.examples, rows) for rows in (problem.named, problem.wanted)]
    assert result.asked == pytest.approx(np.mean(before[1] - before[0]), rel=0.5)
    # The same change of rows that were to go further is none.
    evaluator = Evaluator(OBJECTIVE, problem, CONFIG)
    assert "nothing was forgotten" in check_range(evaluator, params, result.params).verdict
