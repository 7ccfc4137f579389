"""Probes of ensembles: each member rounded and relearned as one adapter is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import study
from llmeraser_jax.data import encode_examples, load_examples
from llmeraser_jax.evaluation.robustness import quantise_merged, relearn, retained_only
from llmeraser_jax.lora import Lora
from llmeraser_jax.models import load_model
from llmeraser_jax.rivals import ensemble_model, make_ensemble
from tests.rivals.gates import drawn_gate
from tests.training import tiny

NAMED = np.array([1, 4])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(tiny.save_tiny_model(tmp_path_factory.mktemp("base") / "model"))


@pytest.fixture(scope="module")
def lora(model):
    return jax.tree.map(lambda x: x + 0.05, model.init_lora(jax.random.key(0), tiny.LORA))


@pytest.fixture(scope="module")
def data(model, tmp_path_factory):
    """Eight rows that were trained on, of which two are named, and the others."""
    examples = load_examples(tiny.write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", tiny.rows()))
    train = encode_examples(examples[:8], tiny.RECIPE, model.tokenizer)
    return train, encode_examples(examples[8:], tiny.RECIPE, model.tokenizer, buckets=train.buckets)


@pytest.fixture(scope="module", params=["equal weights", "gated"])
def ensemble(request, model, lora):
    """Two members; where gated, with weights that are not equal."""
    gate = drawn_gate(model.config, 2) if request.param == "gated" else None
    return make_ensemble([lora, jax.tree.map(lambda x: x - 0.1, lora)], gate=gate)


def test_a_rounded_ensemble_is_the_mean_of_its_members_rounded_one_by_one(model, data, ensemble):
    both = ensemble_model(model)
    rounded, rest = study.quantise(both, ensemble, bits=3, group_size=8)
    tokens = np.stack([np.pad(data[0].encoded[i].tokens, (0, 12))[:12] for i in NAMED])
    mask = np.stack([np.arange(12) < len(data[0].encoded[i].tokens) for i in NAMED])
    positions = np.array([[2, 3], [2, 3]])
    weights = jnp.full((2, 2), 0.5)
    if ensemble.gate is not None:
        embeddings = ensemble.gate.embed(model.base, jnp.asarray(tokens), jnp.asarray(mask), jnp.array([2, 2]))
        weights = jnp.exp(ensemble.gate.log_weights(embeddings))
        assert np.abs(np.asarray(weights) - 0.5).max() > 0.05
    expected = 0
    for k in range(2):
        alone, nothing = quantise_merged(model, ensemble.member(k), bits=3, group_size=8)
        assert nothing is None
        logits = alone.apply(alone.base, None, tokens, mask, positions)
        expected += weights[:, k, None, None] * jax.nn.softmax(logits, axis=-1)
    got = jnp.exp(rounded.apply(rounded.base, rest, tokens, mask, positions))
    np.testing.assert_allclose(got, expected, atol=2e-6)
    as_it_was = jnp.exp(both.apply(both.base, ensemble, tokens, mask, positions))
    assert np.abs(np.asarray(got - as_it_was)).max() > 1e-3
    with pytest.raises(ValueError, match="projector"):
        extra = make_ensemble([Lora(params={**ensemble.member(0).params, "projector": {}}, config=tiny.LORA)])
        study.quantise(both, extra)


def test_each_member_of_an_ensemble_relearns_the_same_rows(model, data, ensemble):
    config = dataclasses.replace(tiny.CONFIG, learning_rate=0.02)
    unrelated = retained_only(data[0], NAMED)
    again = study.relearn(ensemble_model(model), ensemble, unrelated, config, num_steps=2)
    for k in range(2):
        alone = relearn(model, ensemble.member(k), unrelated, config, num_steps=2)
        jax.tree.map(np.testing.assert_array_equal, again.member(k), alone)
    assert again.gate is ensemble.gate and again.aggregation == ensemble.aggregation
    assert not np.array_equal(jax.tree.leaves(again.members)[0], jax.tree.leaves(ensemble.members)[0])
