"""The controls against hand-made updates: what they move along, how far, and what they count."""

import dataclasses

import jax
import numpy as np
import pytest

from llmeraser_jax import data, trees
from llmeraser_jax.losses import gradient_sum
from llmeraser_jax.rivals import EqualLengthAscent, FinetuneEdited
from llmeraser_jax.training import finetune
from llmeraser_jax.unlearning import EditProblem, Workspace, erase
from tests.problems import ArrayExamples, ridge_task

WORKSPACE = Workspace(seed=5)


@pytest.fixture
def removals(task, finished_run):
    """Two removals."""
    lines = [{"id": name, "action": "remove"} for name in ("r1", "r6")]
    return dataclasses.replace(task, requests=data.parse_requests(lines, finished_run.load_examples()))


def assert_trees_close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def gradient(task, params, rows, weights):
    stack = task.problem.examples.stack(np.asarray(rows), np.asarray(weights, float), chunk_size=2)
    return gradient_sum(task.objective, params, stack)


def norm(tree) -> float:
    return np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(tree)))


@pytest.mark.parametrize("difference", [False, True])
def test_it_climbs_on_s_and_descends_on_each_steps_retained_rows(removals, difference):
    method = EqualLengthAscent(length=0.1, num_steps=2, difference=difference)
    result = method.run(removals, WORKSPACE)
    rng, expected = np.random.default_rng([5]), removals.adapter
    step_length = 0.05 * norm(removals.adapter)
    for _ in range(2):
        along = gradient(removals, expected, [1, 6], [0.1, 0.1])
        if difference:
            retained = np.sort(rng.choice([0, 2, 3, 4, 5, 7, 8, 9], 2, replace=False))
            down = gradient(removals, expected, retained, [0.1, 0.1])
            along = jax.tree.map(lambda a, b: a - b, along, down)
        expected = jax.tree.map(lambda p, g: p + step_length / norm(along) * g, expected, along)  # noqa: B023
    assert_trees_close(result.params, expected)
    assert result.cost.training == (8.0 if difference else 4.0)
    assert result.cost.retraining == removals.cost_of_retraining == 10 * 8
    assert result.receipt is None and result.details["distance"] == pytest.approx(2 * step_length)


def test_with_and_without_retained_rows_it_goes_elsewhere(removals):
    ascent, difference = (
        EqualLengthAscent(length=0.1, num_steps=2, difference=difference).run(removals, WORKSPACE).params
        for difference in (False, True)
    )
    assert float(trees.tree_norm(trees.tree_sub(ascent, difference))) > 0.01


def test_one_step_goes_as_far_as_stated_along_the_right_hand_side_of_every_category(task):
    result = EqualLengthAscent(length=0.1, num_steps=1).run(task, WORKSPACE)
    along = gradient(task, task.adapter, [1, 4, 6, 10, 11], [0.1, 0.1, 0.1, -0.1, -0.1])
    assert norm(result.delta) == pytest.approx(0.1 * norm(task.adapter), rel=1e-5)
    assert_trees_close(result.delta, trees.tree_scale(0.1 * norm(task.adapter) / norm(along), along))
    assert result.cost.training == 5.0


def test_rows_without_a_gradient_give_no_direction():
    examples = ArrayExamples(np.zeros((3, 2)), np.ones(3))
    problem = EditProblem(examples, 3, np.array([1]), np.array([-1]))
    with pytest.raises(ValueError, match="it has no direction"):
        erase(ridge_task(problem, np.ones(2), 0.0), EqualLengthAscent())


def test_where_every_row_is_named_there_is_none_to_descend_on():
    examples = ArrayExamples(np.ones((2, 2)), np.arange(2.0))
    task = ridge_task(EditProblem(examples, 1, np.array([0]), np.array([1])), np.ones(2), 0.0)
    with pytest.raises(ValueError, match="no retained row to descend on"):
        erase(task, EqualLengthAscent(difference=True))
    assert erase(task, EqualLengthAscent()).cost.training == 20.0


def test_an_epoch_on_the_edited_data_is_training_from_the_trained_adapter(task, finished_run, model):
    edited = data.apply_requests(finished_run.load_examples(), task.requests)
    result = FinetuneEdited().run(task, WORKSPACE)
    training = dataclasses.replace(finished_run.train_config, epochs=1)
    encoded = finished_run.encode(edited, model.tokenizer)
    expected = finetune(model, encoded, training, lora=finished_run.load_adapter(model))
    assert_trees_close(result.params, expected.lora)
    assert float(trees.tree_norm(result.delta)) > 1e-3
    assert result.cost.training == 9.0
