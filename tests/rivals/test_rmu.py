"""RMU: which activations it reads, and where it moves them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax.models import ApplyDecoder, init_base
from llmeraser_jax.rivals import RMU
from llmeraser_jax.rivals.rmu import ActivationLoss, HiddenAtResponse
from llmeraser_jax.unlearning import Workspace
from tests.small_lm import random_stack, small_config, small_lora


def test_activations_are_those_that_the_head_would_read_if_the_later_layers_added_nothing():
    config = small_config()
    base, lora = init_base(config, jax.random.key(0), "float32"), small_lora(config, "float32")
    batch = jax.tree.map(lambda x: x[0], random_stack(1, 3, "float32").batches[0])
    hidden = HiddenAtResponse(config, 1)(base, lora, batch.tokens, batch.attention_mask, batch.positions)
    silent, adapter = dict(base, layers=dict(base["layers"])), dict(lora.params["layers"])
    for name in ("o_proj", "down_proj"):
        silent["layers"][name] = {"kernel": base["layers"][name]["kernel"].at[1].set(0)}
        adapter[name] = {**adapter[name], "b": adapter[name]["b"].at[1].set(0)}
    quiet = dataclasses.replace(lora, params={"layers": adapter})
    logits = ApplyDecoder(config)(silent, quiet, batch.tokens, batch.attention_mask, batch.positions)
    h = np.asarray(hidden, np.float64)
    normed = h / np.sqrt((h**2).mean(-1, keepdims=True) + config.norm_eps) * base["final_norm"]["scale"]
    np.testing.assert_allclose(logits, normed @ base["lm_head"]["kernel"], rtol=1e-4, atol=1e-5)


def test_the_target_is_one_direction_as_long_as_stated():
    batch = jax.tree.map(lambda x: x[0], random_stack(1, 3, "float32").batches[0])
    trained, moved = np.random.default_rng(0).normal(size=(2, 3, 3, 16)).astype(np.float32)
    got = ActivationLoss(depth=0.5, steering=2.0, seed=4)(jnp.asarray(moved), (jnp.asarray(trained),), batch)
    direction = np.asarray(jax.random.uniform(jax.random.key(4), (16,)))
    target = 2.0 * np.linalg.norm(trained, axis=-1, keepdims=True) * direction / np.linalg.norm(direction)
    expected = (((moved - target) ** 2).mean(-1) * np.asarray(batch.target_weights)).sum(-1)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.fixture(scope="module")
def removal(task):
    """One removal: edits move later layers too."""
    return dataclasses.replace(task, requests=task.requests[:1])


def test_it_misdirects_the_forget_set_holds_the_rest_and_leaves_later_layers_alone(removal):
    method = RMU(epochs=60, learning_rate=0.005, depth=0.5, retain_weight=100.0, steering=3.0)
    result = method.run(removal, Workspace())
    problem, model = removal.problem, removal.model

    def distance(rows):
        stack = problem.examples.stack_uniform(np.asarray(rows), np.ones(len(rows)), chunk_size=len(rows))
        batch = jax.tree.map(lambda x: x[0], stack.batches[0])
        read = HiddenAtResponse(model.config, 1)
        before, after = (
            read(model.base, p, batch.tokens, batch.attention_mask, batch.positions)
            for p in (removal.adapter, result.params)
        )
        return float(jnp.linalg.norm(after - before) / jnp.linalg.norm(before))

    assert distance(problem.named) > 3 * distance(problem.retained)
    first, second = zip(*((x[0], x[1]) for x in jax.tree.leaves(result.delta)), strict=True)
    assert max(float(jnp.abs(x).max()) for x in first) > 0.01
    assert all(float(jnp.abs(x).max()) == 0 for x in second)
    # One forget row and nine retained ones a step, each read by two adapters, through one layer of two.
    assert result.cost.training == pytest.approx(60 * (1 + 9) * 0.5 * 4 / 3)
