"""The controls against hand-made updates: what they move along, how far, and what they count."""

# The fixtures that a test takes are imported, and so redefined by its arguments.
# ruff: noqa: F811

import dataclasses

import jax
import numpy as np
import pytest
from llmeraser_jax.baselines import finetune_edited, gradient_ascent, gradient_difference

from llmeraser_jax import data, trees
from llmeraser_jax.losses import gradient_sum, lm_objective
from llmeraser_jax.training import finetune
from tests.training import tiny
from tests.training.conftest import data_path, finished_run, model, model_path  # noqa: F401


@pytest.fixture
def setting(finished_run, model):
    lora = finished_run.load_adapter(model)
    dataset = finished_run.encode(finished_run.load_examples(), model.tokenizer)

    def stack(*rows):
        return dataset.stack(np.array(rows), np.full(len(rows), 0.1), chunk_size=2)

    return lm_objective(model.apply, model.base, l2=1e-3), lora, stack


def assert_trees_close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_gradient_difference_climbs_on_s_and_descends_on_each_steps_retained_rows(setting):
    objective, lora, stack = setting
    result = gradient_difference(
        objective, lora, stack(1, 6), [stack(0, 2), stack(3, 4)], distance=0.4, num_examples=4
    )
    expected = lora
    for retained in ((0, 2), (3, 4)):
        up, down = (gradient_sum(objective, expected, stack(*rows)) for rows in ((1, 6), retained))
        gradient = jax.tree.map(lambda a, b: a - b, up, down)
        length = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(gradient)))
        expected = jax.tree.map(lambda p, g, length=length: p + 0.2 / length * g, expected, gradient)
    assert_trees_close(result.params, expected)
    assert result.gradient_equivalents == 8.0
    ascent = gradient_ascent(objective, lora, stack(1, 6), distance=0.4, num_examples=2, num_steps=2)
    assert float(trees.tree_norm(trees.tree_sub(result.params, ascent.params))) > 0.01


def test_gradient_difference_of_a_set_with_itself_has_no_direction(setting):
    objective, lora, stack = setting
    with pytest.raises(ValueError, match="it has no direction"):
        gradient_difference(objective, lora, stack(1, 6), [stack(1, 6)], distance=0.4, num_examples=4)
    with pytest.raises(ValueError, match="retained is empty"):
        gradient_difference(objective, lora, stack(1, 6), [], distance=0.4, num_examples=2)


def test_an_epoch_on_the_edited_data_is_training_from_the_trained_adapter(finished_run, model):
    requests = data.parse_requests([{"id": "r1", "action": "remove"}], finished_run.load_examples())
    edited = finished_run.encode(data.apply_requests(finished_run.load_examples(), requests), model.tokenizer)
    lora = finished_run.load_adapter(model)
    result = finetune_edited(model, lora, edited, tiny.CONFIG)
    expected = finetune(model, edited, dataclasses.replace(tiny.CONFIG, epochs=1), lora=lora)
    assert_trees_close(result.params, expected.lora)
    assert float(trees.tree_norm(trees.tree_sub(result.params, lora))) > 1e-3
    assert result.gradient_equivalents == 9.0
