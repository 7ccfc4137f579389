"""Generated answers and scores over a shared base match those of one device."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest

from llmeraser_jax import trees
from llmeraser_jax.data import Example, encode_examples
from llmeraser_jax.evaluation.scoring import _token_statistics, answer, score_examples
from llmeraser_jax.models import ApplyDecoder, greedy_decode, init_base, load_model
from llmeraser_jax.parallel import make_mesh, parse_mesh, place_batch, replicate, shard_base
from tests.multi_device.test_fsdp import gathers_and_reductions
from tests.small_lm import random_stack, small_config, small_lora
from tests.training import tiny

MESHES = ("fsdp=8", "data=2,fsdp=2,model=2")


def found(path, mesh):
    """Every score of an adapter's, and its answers."""
    model = load_model(path, mesh=mesh)
    lora = model.init_lora(jax.random.key(0), tiny.LORA)
    lora = replicate(trees.tree_axpy(0.3, trees.tree_random_normal(jax.random.key(1), lora), lora), mesh)
    examples = [Example(id=r["id"], instruction=r["instruction"], response=r["output"]) for r in tiny.rows(11)]
    dataset = encode_examples(examples, tiny.RECIPE, model.tokenizer)
    return dataclasses.asdict(score_examples(model, lora, dataset)), answer(model, lora, dataset)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.save_tiny_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def one(path):
    return found(path, None)


@pytest.mark.parametrize("text", MESHES)
def test_answers_and_scores_are_those_of_one_device(path, one, text):
    scores, answers = found(path, parse_mesh(text))
    assert answers == one[1]
    assert len(set(answers)) > 3
    for name, values in scores.items():
        np.testing.assert_allclose(values, one[0][name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("program", ["scores", "answers"])
def test_activations_are_exchanged_and_no_kernel_is_gathered(program):
    config, mesh = small_config(hidden_size=64, intermediate_size=96), make_mesh(fsdp=8)
    base, lora = (
        shard_base(init_base(config, jax.random.key(0)), mesh),
        replicate(small_lora(config, "float32"), mesh),
    )
    if program == "scores":
        batch = place_batch(jax.tree.map(lambda leaf: leaf[0], random_stack(1, 8, "float32").batches[0]), mesh)
        gathers, _ = gathers_and_reductions(partial(_token_statistics, ApplyDecoder(config)), base, lora, batch)
        largest = batch.tokens.size * config.width
    else:
        tokens = np.ones((4, 8), np.int32)
        decode = partial(greedy_decode, config, max_new_tokens=4)
        gathers, _ = gathers_and_reductions(decode, base, lora, tokens, tokens, np.array([2], np.int32))
        largest = tokens.size * config.width
    assert all(size <= largest for _, size in gathers)
    assert largest < config.num_layers * config.width * config.mlp_width  # the stack of a kernel
