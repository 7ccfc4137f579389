"""Targets of edits are for the tokens that differ; the others stay."""

import dataclasses

import jax
import numpy as np
import pytest

from llmeraser_jax.data import TokenSubsets, align_tokens, encode_examples, find_look_alikes, load_examples
from llmeraser_jax.data.requests import parse_requests
from llmeraser_jax.losses import forward_values, lm_objective, per_example
from llmeraser_jax.models import load_model
from llmeraser_jax.unlearning import UnlearningTask, Workspace, make_problem
from llmeraser_jax.unlearning.targets import Role, differing_tokens, find_targets, log_odds, regress_on_difficulty
from tests.training import tiny


@pytest.mark.parametrize(
    ("old", "new", "in_old", "in_new"),
    [
        ([1, 2, 3, 4], [1, 2, 9, 4], [0, 1, 3], [0, 1, 3]),  # one word
        ([1, 2, 3], [1, 2, 7, 8, 9], [0, 1], [0, 1]),  # the end, and longer
        ([1, 2], [3, 4, 5], [], []),  # all of it
        ([1, 2, 3, 4, 5], [1, 4, 5], [0, 3, 4], [0, 1, 2]),  # a part left out
    ],
)
def test_shared_tokens_are_aligned(old, new, in_old, in_new):
    found = align_tokens(np.array(old), np.array(new))
    np.testing.assert_array_equal(found[0], in_old)
    np.testing.assert_array_equal(found[1], in_new)


def test_a_shared_token_that_is_harder_in_the_new_response_counts_as_different():
    old, new = np.array([1, 2, 3, 4]), np.array([1, 2, 9, 4])
    known, new_losses = np.full(4, 0.01), np.array([0.01, 0.01, 6.0, 0.05])
    goes, wanted = differing_tokens(old, known, new, new_losses)
    np.testing.assert_array_equal(goes, [False, False, True, False])
    np.testing.assert_array_equal(wanted, [False, False, True, False])
    new_losses[3] = 1.0  # what follows the change is not known either
    goes, wanted = differing_tokens(old, known, new, new_losses)
    np.testing.assert_array_equal(goes, [False, False, True, True])
    np.testing.assert_array_equal(wanted, [False, False, True, True])
    # Another query to the same response: the tokens that depend on it.
    goes, wanted = differing_tokens(old, known, old, np.array([0.01, 3.0, 0.02, 0.01]))
    np.testing.assert_array_equal(goes, [False, True, False, False])
    np.testing.assert_array_equal(wanted, goes)
    # Nothing is different: the exchange is about all tokens, and has nowhere to go.
    assert differing_tokens(old, known, old, known) == (None, None)


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    directory = tmp_path_factory.mktemp("targets")
    model = load_model(tiny.save_tiny_model(directory / "model"))
    rows = tiny.rows()
    rows[3] = {**rows[3], "output": "s3 s4 red blue"}
    examples = load_examples(tiny.write_rows(directory / "train.jsonl", rows))
    dataset = encode_examples(examples, tiny.RECIPE, model.tokenizer)
    requests = parse_requests(
        [
            {"id": "r1", "action": "remove"},
            {"id": "r3", "action": "correct_response", "response": "s3 s4 red green"},
        ],
        examples,
    )
    return model, dataset, make_problem(model, dataset, requests)


WORKSPACE = Workspace(chunk_size=4)


def task_of(problem) -> UnlearningTask:
    """The request on an adapter that does nothing yet."""
    model, _, edits = problem
    objective = lm_objective(model.apply, model.base, l2=1e-3)
    return UnlearningTask(model=objective, adapter=model.init_lora(jax.random.key(0), tiny.LORA), requests=edits)


def token_values(task: UnlearningTask, rows) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and losses of each row's loss tokens."""
    stack = WORKSPACE.stack(task.problem.examples, rows)
    found = per_example(forward_values, stack, task.objective, task.adapter).tokens
    return [(ids[~np.isnan(losses)], losses[~np.isnan(losses)]) for ids, losses in zip(*found, strict=True)]


def test_the_loss_at_some_tokens_is_their_mean(problem):
    edits, task = problem[2], task_of(problem)
    rows = np.array([5, int(edits.named[1]), 0, int(edits.wanted[0])])
    tokens = token_values(task, rows)
    masks = []
    for row, (ids, losses) in zip(rows, tokens, strict=True):
        np.testing.assert_array_equal(ids, edits.examples.encoded[row].tokens[-len(ids) :])
        masks.append(np.arange(len(losses)) % 2 == 0)
    view = TokenSubsets(edits.examples, rows, (masks[0], masks[1], None, masks[3]))
    found = WORKSPACE.row_values(task.objective, task.adapter, view, np.arange(4))
    for k, (_, losses) in enumerate(tokens):
        expected = losses.mean() if k == 2 else losses[masks[k]].mean()
        assert found.losses[k] == pytest.approx(expected, rel=1e-5)
        assert found.log_odds[k] == pytest.approx(np.log(np.expm1(expected)), rel=1e-4)
    with pytest.raises(ValueError, match="A mask of 1 tokens"):
        short = dataclasses.replace(view, masks=(np.ones(1, bool), *view.masks[1:]))
        short.stack(np.arange(4), np.ones(4), chunk_size=4)


def test_an_edit_has_rows_for_what_goes_what_is_wanted_and_what_stays(problem):
    edits, task = problem[2], task_of(problem)
    targets = find_targets(task, WORKSPACE)
    of_edit = targets.owners == 1
    by_role = {Role(int(role)): k for k, role in enumerate(targets.roles) if of_edit[k]}
    assert set(by_role) == {Role.GOES, Role.WANTED, Role.STAYS}
    (old_ids, old), (_, new) = token_values(task, np.array([edits.named[1], edits.wanted[0]]))
    word = len(old_ids) - 2  # the last word, before the end of sequence
    assert isinstance(targets.examples, TokenSubsets)
    mask = targets.examples.masks[by_role[Role.GOES]]
    assert mask is not None and mask[word] and not mask[: word - 1].any()
    stays = targets.examples.masks[by_role[Role.STAYS]]
    np.testing.assert_array_equal(stays, ~mask)
    # Nothing is asked of the shared tokens, and nobody knows where the removed row should end.
    assert targets.way[by_role[Role.STAYS]] == 0 and not targets.known
    assert np.isnan(targets.ends[(targets.owners == 0)]).all()
    assert np.isfinite(targets.ends[of_edit]).all() and len(old) == len(new)


def test_look_alikes_are_the_texts_with_most_in_common(problem):
    _, dataset, _ = problem
    twice = encode_examples(
        (*dataset.examples, dataclasses.replace(dataset.examples[1], id="twin")),
        dataset.recipe,
        problem[0].tokenizer,
    )
    named, others = np.array([1, 4]), np.setdiff1d(np.arange(len(twice)), [1, 4])
    of_first, of_second = find_look_alikes(twice, named, others, least=0.9)
    assert list(of_first) == [len(twice) - 1] and len(of_second) == 0
    assert len(find_look_alikes(twice, named, others, least=0.0, at_most=2)[1]) == 2


def test_a_row_left_out_is_predicted_by_the_line_through_the_others():
    rng = np.random.default_rng(0)
    x = rng.normal(size=12)
    y = 0.5 - 2 * x + 0.3 * rng.normal(size=12)
    at, explained, spread = regress_on_difficulty(x, y, np.array([0.0, 1.0]))
    slope, intercept = np.polyfit(x, y, 1)
    np.testing.assert_allclose(at, [intercept, intercept + slope])
    assert spread == pytest.approx((y - intercept - slope * x).std())
    others = [np.delete(np.arange(12), k) for k in range(12)]
    missed = [y[k] - np.polyval(np.polyfit(x[rest], y[rest], 1), x[k]) for k, rest in enumerate(others)]
    assert explained == pytest.approx(1 - np.sum(np.square(missed)) / np.sum((y - y.mean()) ** 2))


@pytest.fixture(scope="module")
def removals(tmp_path_factory):
    """Three rows to remove, and 20 that no model was trained on."""
    directory = tmp_path_factory.mktemp("removals")
    model = load_model(tiny.save_tiny_model(directory / "model"))
    examples = load_examples(tiny.write_rows(directory / "rows.jsonl", tiny.rows(28)))
    train, unseen = (encode_examples(rows, tiny.RECIPE, model.tokenizer) for rows in (examples[:8], examples[8:]))
    requests = parse_requests([{"id": examples[k].id, "action": "remove"} for k in (1, 4, 6)], examples[:8])
    return model, train, unseen, requests


def removal_task(removals, adapter, **fields) -> UnlearningTask:
    model, train, unseen, requests = removals
    return UnlearningTask(
        model=model, adapter=adapter, data=train, requests=requests, calibration=unseen,
        training=tiny.CONFIG, **fields,
    )  # fmt: skip


def test_rows_of_an_adapter_that_does_nothing_are_where_they_should_be(removals):
    """It predicts every row exactly as the model before training: nothing was memorised."""
    task = removal_task(removals, removals[0].init_lora(jax.random.key(0), tiny.LORA))
    found = find_targets(task, WORKSPACE)
    assert found.losses.explained == pytest.approx(1.0, abs=1e-6)
    unseen = WORKSPACE.row_values(task.objective, task.adapter, removals[2], np.arange(20)).losses
    own = WORKSPACE.row_values(task.objective, task.adapter, removals[1], np.array([1, 4, 6])).losses
    np.testing.assert_allclose(found.ends, log_odds(np.clip(own, unseen.min(), unseen.max())), rtol=1e-5)
    assert np.ptp(found.ends) > 0


def test_rows_that_the_untrained_model_says_nothing_of_get_the_mean(removals):
    """An adapter that answers at random: how hard a row was before says nothing."""
    model = removals[0]
    adapter = model.init_lora(jax.random.key(0), tiny.LORA)
    drawn = iter(jax.random.split(jax.random.key(3), len(jax.tree.leaves(adapter))))
    noisy = jax.tree.map(lambda leaf: 2.0 * jax.random.normal(next(drawn), leaf.shape), adapter)
    found = find_targets(removal_task(removals, noisy), WORKSPACE)
    assert found.losses.explained is not None and found.losses.unknown is not None
    assert found.losses.explained < 0.2
    np.testing.assert_allclose(found.ends, log_odds(found.losses.unknown))
    stated = find_targets(removal_task(removals, noisy, target_loss=1.5), WORKSPACE)
    assert stated.losses.explained is None
    np.testing.assert_allclose(stated.ends, log_odds(1.5))
