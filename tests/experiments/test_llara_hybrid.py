"""Hybrid prompts: the projector against a text model and finite differences, and as a part of every vector."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.llara import hybrid
from experiments.llara.prepare import item_text
from llmeraser_jax import trees
from llmeraser_jax.data import Example, Recipe, Request, encode_examples
from llmeraser_jax.data.requests import Action
from llmeraser_jax.evaluation.robustness import quantise_merged
from llmeraser_jax.lora import LoraConfig, load_adapter, save_adapter
from llmeraser_jax.losses import gradient_sum, lm_objective, loss_sum
from llmeraser_jax.models import Model, load_model
from llmeraser_jax.models.decoder import bind
from llmeraser_jax.solvers import ConjugateGradients
from llmeraser_jax.training import TrainConfig, finetune
from llmeraser_jax.unlearning import CurvatureSpec, Path, UnlearningTask, erase
from tests.training import tiny

NUM_ITEMS, SIZE = 6, 3
TABLE = np.random.default_rng(0).standard_normal((NUM_ITEMS, SIZE)).astype(np.float32)
RECIPE = Recipe(template="plain", max_length=32)
LORA = LoraConfig(rank=2, alpha=4.0, target_modules=("q_proj", "down_proj"))


@pytest.fixture(scope="module")
def text_model(tmp_path_factory) -> Model:
    return load_model(tiny.save_tiny_model(tmp_path_factory.mktemp("base") / "model"))


@pytest.fixture(scope="module")
def model(text_model) -> hybrid.HybridModel:
    return hybrid.make_hybrid(text_model, TABLE)


@pytest.fixture(scope="module")
def adapter(model):
    fresh = model.init_lora(
        jax.random.key(1), LoraConfig(rank=2, alpha=4.0, target_modules=("q_proj", "down_proj"))
    )
    return trees.tree_axpy(0.2, trees.tree_random_normal(jax.random.key(2), fresh), fresh)


def _examples(n: int = 8) -> tuple[Example, ...]:
    """Each item has a colour, which only its embedding tells."""
    return tuple(
        Example(
            id=f"r{k}",
            instruction=f"colour of {item_text(k % NUM_ITEMS)} now {item_text((k + 1) % NUM_ITEMS)}",
            response=tiny.COLOURS[k % NUM_ITEMS % len(tiny.COLOURS)],
            format="prompt",
        )
        for k in range(n)
    )


@pytest.fixture(scope="module")
def dataset(model):
    return encode_examples(_examples(), RECIPE, model.tokenizer)


@pytest.fixture(scope="module")
def stack(dataset):
    n = len(dataset)
    return dataset.stack(np.arange(n), np.full(n, 1 / n), chunk_size=4)


def test_every_item_is_one_token_after_the_vocabulary(model, text_model, dataset):
    assert model.first_item == len(text_model.tokenizer) == len(tiny.WORDS)
    assert [t for t in dataset.encoded[0].tokens.tolist() if t >= model.first_item] == [
        model.first_item,
        model.first_item + 1,
    ]
    assert len(text_model.tokenizer) == len(tiny.WORDS)  # the given tokenizer is not changed


@pytest.mark.torch
def test_the_projector_is_two_linear_layers_with_gelu():
    projector = hybrid.init_projector(jax.random.key(0), SIZE, 5)
    import torch

    first, second = torch.nn.Linear(SIZE, 5), torch.nn.Linear(5, 5)
    with torch.no_grad():
        for layer, name in ((first, "in"), (second, "out")):
            layer.weight.copy_(torch.tensor(np.asarray(projector[name]["kernel"]).T))
            layer.bias.copy_(torch.tensor(np.asarray(projector[name]["bias"])))
        expected = second(torch.nn.functional.gelu(first(torch.tensor(TABLE)))).numpy()
    np.testing.assert_allclose(hybrid.project_items(projector, jnp.asarray(TABLE)), expected, atol=1e-5)


def test_where_a_projected_item_is_a_word_the_logits_are_the_text_models(model, text_model, adapter):
    # The output layer's kernel is 0 and its bias a word's embedding: every item reads as that word.
    word = 11
    embedding = text_model.base["embed_tokens"]["embedding"]
    projector = jax.tree.map(jnp.zeros_like, adapter.params["projector"])
    projector["out"]["bias"] = embedding[word]
    as_word = dataclasses.replace(adapter, params={**adapter.params, "projector": projector})
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, model.first_item + NUM_ITEMS, (2, 9))
    assert (tokens >= model.first_item).any()
    read = np.where(tokens >= model.first_item, word, tokens)
    mask = np.arange(9) < np.array([[9], [7]])
    positions = np.array([[3, 8], [2, 6]])
    lora, _ = hybrid.split_adapter(adapter)
    got = model.apply(model.base, as_word, tokens, mask, positions)
    np.testing.assert_allclose(got, text_model.apply(text_model.base, lora, read, mask, positions), atol=1e-5)
    elsewhere = model.apply(model.base, adapter, tokens, mask, positions)
    assert np.abs(np.asarray(elsewhere - got)).max() > 1e-2
    assert got.shape[-1] == model.config.vocab_size


def test_rounding_merges_the_layers_and_leaves_the_projector(model, text_model, adapter):
    # The text model rounded, reading what the projector makes of each item in the place of a word's embedding.
    rounded, rest = quantise_merged(model, adapter, bits=3, group_size=8)
    lora, projector = hybrid.split_adapter(adapter)
    text, nothing = quantise_merged(text_model, lora, bits=3, group_size=8)
    assert nothing is None and rest is not None
    words = np.asarray(text.base["embed_tokens"]["embedding"])
    items = np.asarray(hybrid.project_items(projector, model.base[hybrid.ITEMS]))
    tokens = np.array([[1, model.first_item + 2, 3, model.first_item], [2, 4, model.first_item + 1, 5]])
    mask = np.ones_like(tokens)
    module, variables = bind(text.config, text.base, None)
    expected: Any = module.apply(variables, tokens, mask, embeds=np.concatenate([words, items])[tokens])
    got = rounded.apply(rounded.base, rest, tokens, mask)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert np.abs(np.asarray(got - model.apply(model.base, adapter, tokens, mask))).max() > 1e-2
    with pytest.raises(ValueError, match="projector"):  # a text model would not read it
        quantise_merged(text_model, adapter)


def test_a_prompt_is_embedded_as_the_mean_of_the_items_of_its_history(model):
    first, items = model.first_item, np.asarray(model.base[hybrid.ITEMS])
    embed = hybrid.MeanItemEmbedding(first, num_candidates=1)
    tokens = np.array([[0, 1, first + 2, 3, first, first + 4, first + 1], [1, 2, 3, 1, 2, first + 1, first + 1]])
    mask = np.array([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    last = jnp.array([5, 5])
    found = embed(model.base, jnp.asarray(tokens), jnp.asarray(mask), last)
    np.testing.assert_allclose(found, [(items[2] + items[0]) / 2, 0 * items[0]], rtol=1e-6)
    masked = embed(model.base, jnp.asarray(tokens), jnp.asarray(mask * (tokens != first)), last)
    np.testing.assert_allclose(masked[0], items[2], rtol=1e-6)
    same = hybrid.MeanItemEmbedding(first, num_candidates=1)
    assert embed == same and hash(embed) == hash(same)


def test_the_gradient_of_the_projector_is_that_of_finite_differences(model, adapter, stack):
    with jax.enable_x64(True):
        model64 = dataclasses.replace(model, base=jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), model.base))
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), adapter)
        stack64 = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, stack
        )
        objective = lm_objective(model64.apply, model64.base, l2=1e-3)
        gradient = gradient_sum(objective, params, stack64)
        rng = np.random.default_rng(5)
        direction = jax.tree.map(jnp.zeros_like, params)
        direction = dataclasses.replace(
            direction,
            params={
                **direction.params,
                "projector": jax.tree.map(
                    lambda x: jnp.asarray(rng.standard_normal(x.shape)), params.params["projector"]
                ),
            },
        )

        def value(t):
            moved = trees.tree_axpy(t, direction, params)
            return float(loss_sum(objective, moved, stack64) + objective.l2_loss(moved))

        h = 1e-5
        difference = (value(h) - value(-h)) / (2 * h)
        slope = float(trees.tree_vdot(gradient, direction))
    assert abs(slope) > 1e-3
    assert slope == pytest.approx(difference, rel=1e-6)


@functools.cache
def _trained(model):
    config = TrainConfig(epochs=40, batch_size=4, learning_rate=0.03, l2=1e-3, seed=3)
    data = encode_examples(_examples(), RECIPE, model.tokenizer)
    lora = model.init_lora(jax.random.key(0), LORA)
    return data, lora, finetune(model, data, config, lora=lora)


def test_training_moves_the_projector_and_learns_from_embeddings_alone(model):
    _, before, result = _trained(model)
    assert result.loss < 0.5 * np.log(len(tiny.COLOURS))
    moved = trees.tree_norm(trees.tree_sub(result.lora.params["projector"], before.params["projector"]))
    assert float(moved) > 0.1


def test_erasing_moves_the_projector_too(model):
    data, _, trained = _trained(model)
    requests = (
        Request(id="r1", action=Action.REMOVE),
        Request(id="r2", action=Action.MODIFY_QUERY, changes={"query": f"colour of {item_text(2)} now"}),
        Request(id="r3", action=Action.CORRECT_RESPONSE, changes={"response": "red"}),
    )
    task = UnlearningTask(
        model=model, adapter=trained.lora, data=data, requests=requests, training=TrainConfig(l2=1e-3)
    )
    path = Path(
        num_steps=2, curvature=CurvatureSpec(sample_size=4), solver=ConjugateGradients(rtol=0.05, max_steps=4)
    )
    result = erase(task, path, math.inf, chunk_size=4)
    assert result.receipt is not None
    delta = result.delta.params
    assert set(delta) == {"layers", "projector"}
    for leaf in jax.tree.leaves(delta["projector"]):
        assert float(jnp.abs(leaf).max()) > 1e-6
    assert result.receipt.delta_norm == pytest.approx(float(trees.tree_norm(result.delta)), rel=1e-5)


def test_adapters_are_written_and_read_with_their_projector(model, text_model, adapter, tmp_path):
    save_adapter(tmp_path / "adapter", adapter, model)
    read = load_adapter(tmp_path / "adapter", model)
    jax.tree.map(np.testing.assert_array_equal, read, adapter)
    # PEFT's own part is an adapter of the text model by itself.
    layers = load_adapter(tmp_path / "adapter", text_model)
    jax.tree.map(np.testing.assert_array_equal, layers, hybrid.split_adapter(adapter)[0])
    with pytest.raises(ValueError, match="projector, which no layer of this model reads"):
        save_adapter(tmp_path / "refused", adapter, text_model)
    with pytest.raises(FileNotFoundError, match=r"extras.safetensors"):
        save_adapter(tmp_path / "plain", layers, text_model)
        load_adapter(tmp_path / "plain", model)


def test_tables_are_read_with_and_without_their_padding_row(tmp_path):
    padded = np.concatenate([TABLE, np.full((1, SIZE), 7.0, np.float32)])
    np.savez(tmp_path / "a.npz", emb=padded)
    np.testing.assert_array_equal(hybrid.load_item_embeddings(tmp_path / "a.npz", NUM_ITEMS), TABLE)
    np.savez(tmp_path / "b.npz", emb=TABLE)
    np.testing.assert_array_equal(hybrid.load_item_embeddings(tmp_path / "b.npz", NUM_ITEMS), TABLE)
    np.savez(tmp_path / "b.npz", emb=TABLE, other=TABLE)
    with pytest.raises(ValueError, match="holds emb, other; expected one"):
        hybrid.load_item_embeddings(tmp_path / "b.npz", NUM_ITEMS)
    with pytest.raises(ValueError, match="expected 9 finite rows"):
        hybrid.load_item_embeddings(tmp_path / "a.npz", 9)


def test_tables_that_only_pickle_could_read_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", emb=np.array([object()], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        hybrid.load_item_embeddings(tmp_path / "a.npz", 1)
    with pytest.raises(ValueError, match=r"from .npz files only"):
        hybrid.load_item_embeddings(tmp_path / "a.pt", 1)
