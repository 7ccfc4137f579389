"""Rounding against a loop over groups written out; both probes on the tiny model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax.data import encode_examples, load_examples
from llmeraser_jax.evaluation import measures
from llmeraser_jax.evaluation.robustness import (
    quantise_merged,
    relearn,
    retained_only,
    round_to_nearest,
)
from llmeraser_jax.evaluation.scoring import score_examples
from llmeraser_jax.lora import Lora, merge_lora
from llmeraser_jax.models import LINEAR_NAMES
from llmeraser_jax.unlearning.problem import EditProblem
from tests.training import tiny


@pytest.mark.parametrize(("bits", "group_size"), [(4, 8), (4, 5), (2, 3), (8, 64)])
def test_rounding_is_the_loop_written_out(bits, group_size):
    kernel = np.random.default_rng(0).normal(size=(2, 13, 3)).astype(np.float32)
    expected = np.empty(kernel.shape)
    for layer, column in np.ndindex(2, 3):
        for start in range(0, 13, group_size):
            group = kernel[layer, start : start + group_size, column].astype(np.float64)
            levels = np.linspace(group.min(), group.max(), 2**bits)
            nearest = np.abs(group[:, None] - levels).argmin(1)
            expected[layer, start : start + group_size, column] = levels[nearest]
    np.testing.assert_allclose(round_to_nearest(kernel, bits=bits, group_size=group_size), expected, atol=1e-5)


def test_constant_groups_and_values_already_on_the_grid_stay_as_they_are():
    assert np.array_equal(round_to_nearest(np.full((6, 2), 0.3, np.float32)), np.full((6, 2), 0.3, np.float32))
    grid = np.arange(16, dtype=np.float32)[:, None]
    np.testing.assert_allclose(round_to_nearest(grid, group_size=16), grid, atol=1e-5)
    rounded = round_to_nearest(jnp.ones((4, 2), jnp.bfloat16) * 3)
    assert rounded.dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="bits is 1"):
        round_to_nearest(grid, bits=1)


@pytest.fixture(scope="module")
def lora(model):
    fresh = model.init_lora(jax.random.key(0), tiny.LORA)
    return jax.tree.map(lambda x: x + 0.05, fresh)


@pytest.fixture(scope="module")
def data(model, data_path):
    """Eight rows that were trained on, of which two are named, and two held-out ones."""
    examples = load_examples(data_path)
    train = encode_examples(examples[:8], tiny.RECIPE, model.tokenizer)
    return train, encode_examples(examples[8:], tiny.RECIPE, model.tokenizer, buckets=train.buckets)


NAMED = np.array([1, 4])


def test_only_linear_layers_of_the_merged_model_are_rounded(model, lora):
    rounded, rest = quantise_merged(model, lora, group_size=8)
    assert rest is None
    merged = merge_lora(model.base, lora)
    for name in merged["layers"]:
        ours, whole = rounded.base["layers"][name], merged["layers"][name]
        if name in LINEAR_NAMES:
            np.testing.assert_array_equal(ours["kernel"], round_to_nearest(whole["kernel"], group_size=8))
            assert not np.array_equal(ours["kernel"], whole["kernel"])
        else:
            assert ours is whole
    assert rounded.base["embed_tokens"] is model.base["embed_tokens"]
    with pytest.raises(ValueError, match="projector"):
        quantise_merged(model, Lora(params={**lora.params, "projector": {}}, config=lora.config))


def test_eight_bits_change_little_and_two_bits_much(model, lora, data):
    before = score_examples(model, lora, data[0], NAMED).losses

    def rounded(bits):
        return score_examples(*quantise_merged(model, lora, bits=bits, group_size=8), data[0], NAMED).losses

    np.testing.assert_allclose(rounded(8), before, atol=0.1)
    assert np.abs(rounded(2) - before).max() > 0.1


def bench_of(model, rows, **changes):
    problem = EditProblem(examples=rows, num_trained=len(rows), named=NAMED, replacements=np.array([-1, -1]))
    return measures.Bench(model=model, problem=problem, **changes)


def test_probes_are_the_mean_loss_after_rounding_and_after_training_on_the_other_rows(model, lora, data):
    train, _ = data
    config = dataclasses.replace(tiny.CONFIG, learning_rate=5e-4)
    bench = bench_of(model, train, train=config)
    unrelated = retained_only(train, NAMED)
    assert unrelated.ids == tuple(id_ for k, id_ in enumerate(train.ids) if k not in NAMED)
    rounded = score_examples(*quantise_merged(model, lora), train, NAMED).losses.mean()
    # Six rows: as many steps of one row each, at the training's own rate, which is below the probe's.
    one = dataclasses.replace(config, batch_size=1)
    again = relearn(model, lora, unrelated, one, num_steps=6)
    relearned = score_examples(model, again, train, NAMED).losses.mean()
    found = measures.measure(bench, model, lora, measures.PROBES)
    assert found["forget_loss_4_bit"] == pytest.approx(rounded, rel=1e-6)
    assert found["forget_loss_relearned"] == pytest.approx(relearned, rel=1e-6)  # the same seed draws the same rows
    assert relearned != pytest.approx(score_examples(model, lora, train, NAMED).losses.mean(), rel=1e-6)
    assert measures.relearning(bench_of(model, train), model, lora) == {}
    with pytest.raises(ValueError, match="no multiple"):
        relearn(model, lora, unrelated, dataclasses.replace(config, batch_size=4), num_steps=3)
