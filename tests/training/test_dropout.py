"""LoRA dropout: where it acts, that its masks are unbiased and reproducible, and that zero draws nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax import data, losses, parallel, trees
from llmeraser_jax.models.decoder import Linear
from llmeraser_jax.training import dropout, finetune
from llmeraser_jax.training import finetune as finetune_function
from llmeraser_jax.training.batches import lay_out_mean, step_indices
from tests.models.tiny import MASK, TOKENS, random_lora, tiny_model
from tests.training import tiny

RATE = 0.25
CONFIG = dataclasses.replace(tiny.CONFIG, epochs=3, microbatch_size=2)


def with_dropout(lora, rate=RATE):
    return lora.replace(config=dataclasses.replace(lora.config, dropout=rate))


@pytest.fixture(scope="module")
def dataset(model, data_path):
    return data.encode_examples(data.load_examples(data_path), tiny.RECIPE, model.tokenizer)


@pytest.fixture(scope="module")
def initial(model):
    return with_dropout(model.init_lora(jax.random.key(2), tiny.LORA))


def linear(variables, x, key=None):
    module = Linear(x.shape[-1], False, 1.0, 0.5, RATE, "float32")
    return jnp.asarray(module.apply(variables, x, rngs=None if key is None else {"dropout": key}))


def test_masks_act_on_the_adapters_input_alone_and_are_unbiased():
    width = 6
    kernel = jax.random.normal(jax.random.key(0), (width, width))
    variables = {"params": {"kernel": kernel}, "lora": {"a": jnp.eye(width), "b_t": jnp.eye(width)}}
    x = jax.random.normal(jax.random.key(1), (5, width))
    # With A and B the identity, the adapter's output is half its input.
    draws = jax.vmap(lambda key: linear(variables, x, key) - x @ kernel)(jax.random.split(jax.random.key(2), 4000))
    kept = np.asarray(draws) / np.asarray(0.5 * x / (1 - RATE))
    np.testing.assert_allclose(kept, np.round(kept), atol=1e-4)
    assert set(np.unique(np.round(kept))) == {0.0, 1.0}
    rates = kept.mean(axis=0)
    assert np.abs(rates - (1 - RATE)).max() < 5 * np.sqrt(RATE * (1 - RATE) / 4000)
    np.testing.assert_allclose(linear(variables, x) - x @ kernel, 0.5 * x, rtol=1e-4, atol=1e-5)


def test_a_linear_probe_has_without_dropout_the_mean_of_its_values_with():
    rng = jax.random.split(jax.random.key(3), 4)
    kernel, a, b_t = (jax.random.normal(k, shape) for k, shape in zip(rng, [(8, 8), (2, 8), (2, 8)], strict=False))
    variables = {"params": {"kernel": kernel}, "lora": {"a": a, "b_t": b_t}}
    x = jax.random.normal(rng[3], (3, 8))
    draws = jax.vmap(lambda key: linear(variables, x, key))(jax.random.split(jax.random.key(4), 4000))
    error = np.std(np.asarray(draws), axis=0) / np.sqrt(4000)
    assert np.all(np.abs(draws.mean(axis=0) - linear(variables, x)) < 5 * error + 1e-5)


def test_layers_and_modules_draw_masks_of_their_own():
    model = tiny_model()
    lora = with_dropout(random_lora(model, target_modules=("q_proj", "v_proj")))
    apply = jax.jit(lambda lora, key: model.apply(model.base, lora, TOKENS, MASK, dropout_key=key))
    plain = jax.jit(lambda lora: model.apply(model.base, lora, TOKENS, MASK))(lora)
    key = jax.random.key(0)
    assert not np.allclose(apply(lora, key), plain)
    np.testing.assert_array_equal(apply(lora, key), apply(lora, key))
    assert not np.allclose(apply(lora, key), apply(lora, jax.random.key(1)))
    # One module in one layer alone: were its mask another's, these changes would be the same ones.
    zero = trees.tree_zeros_like(lora)
    np.testing.assert_allclose(apply(zero, key), model.apply(model.base, None, TOKENS, MASK), rtol=1e-5, atol=1e-5)


def test_a_step_has_the_gradient_of_the_masked_network(model, dataset, initial):
    config = dataclasses.replace(CONFIG, epochs=1, batch_size=10, microbatch_size=5)
    indices = step_indices(0, seed=config.seed, num_examples=10, batch_size=10)
    stack = lay_out_mean(dataset, indices, 0.1, batch_size=10, microbatch_size=5)
    key = dropout.step_key(config.seed, 0)
    objective = dropout.dropout_objective(model.apply, model.base, key)
    loss, gradient = losses.loss_and_gradient_sums(objective, initial, dropout.with_places(stack))

    @jax.jit
    def by_hand(params):
        total = 0.0
        for chunk in range(2):
            batch = jax.tree.map(lambda x, chunk=chunk: x[chunk], stack.batches[0])
            logits = model.apply(
                model.base,
                params,
                batch.tokens,
                batch.attention_mask,
                batch.positions,
                dropout_key=jax.random.fold_in(key, 5 * chunk),
            )
            total += jnp.sum(stack.weights[0][chunk] * losses.response_cross_entropy(logits, batch))
        return total

    expected, expected_gradient = jax.value_and_grad(by_hand)(initial)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    difference = trees.tree_norm(trees.tree_sub(gradient, expected_gradient))
    assert float(difference) < 1e-5 * float(trees.tree_norm(expected_gradient))


def test_a_training_that_was_restarted_ends_with_the_same_adapter(model, dataset, initial, tmp_path, monkeypatch):
    import sys

    module = sys.modules[finetune_function.__module__]
    whole = finetune(model, dataset, CONFIG, lora=initial)
    step, calls = module.adam_step, []

    def interrupted(*args, **kwargs):
        calls.append(None)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    monkeypatch.setattr(module, "adam_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune(model, dataset, CONFIG, lora=initial, workdir=tmp_path)
    again = finetune(model, dataset, CONFIG, lora=initial, workdir=tmp_path)
    assert again.resumed_from == 4
    jax.tree.map(np.testing.assert_array_equal, again.lora, whole.lora)
    # Another rate is another training.
    with pytest.raises(ValueError, match=r"differs in dropout \(0.25 there, None now\)"):
        finetune(model, dataset, CONFIG, lora=with_dropout(initial, 0.0), workdir=tmp_path)


def test_without_dropout_nothing_is_drawn(model, dataset, initial, monkeypatch):
    import sys

    module = sys.modules[finetune_function.__module__]
    plain = finetune(model, dataset, CONFIG, lora=with_dropout(initial, 0.0))
    masked = finetune(model, dataset, CONFIG, lora=initial)
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(plain.lora), jax.tree.leaves(masked.lora), strict=True)
    )
    monkeypatch.setattr(module, "dropout_objective", pytest.fail)
    again = finetune(model, dataset, CONFIG, lora=with_dropout(initial, 0.0))
    jax.tree.map(np.testing.assert_array_equal, again.lora, plain.lora)


def test_devices_that_share_a_micro_batch_draw_masks_of_their_own(model, dataset, initial):
    mesh = parallel.make_mesh(data=2, devices=jax.devices()[:2])
    stack = lay_out_mean(dataset, np.arange(4), 0.25, batch_size=4, microbatch_size=4)
    key = dropout.step_key(0, 0)
    objective = dropout.dropout_objective(model.apply, model.base, key)
    shared = parallel.place_stack(dropout.with_places(stack), mesh)
    loss, _ = losses.loss_and_gradient_sums(objective, parallel.replicate(initial, mesh), shared)
    batch = jax.tree.map(lambda x: x[0], stack.batches[0])
    expected = 0.0
    for start in (0, 2):
        rows = jax.tree.map(lambda x, start=start: x[start : start + 2], batch)
        drawn = jax.random.fold_in(key, start)
        logits = model.apply(
            model.base, initial, rows.tokens, rows.attention_mask, rows.positions, dropout_key=drawn
        )
        expected += 0.25 * float(jnp.sum(losses.response_cross_entropy(logits, rows)))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
