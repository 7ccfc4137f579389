"""The training loop against dense references: one step, accumulation, L2, order, restarts, devices."""

import dataclasses
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmeraser_jax import parallel
from llmeraser_jax.data import encode_examples, load_examples
from llmeraser_jax.losses import lm_objective
from llmeraser_jax.models import load_model
from llmeraser_jax.training import TrainConfig, epoch_order, finetune, mean_loss, measure, step_indices
from tests.training import tiny
from tests.training.toy import dense_loss, toy_dataset, toy_lora, toy_model

CONFIG = TrainConfig(epochs=3, batch_size=4, learning_rate=0.05, l2=0.02, warmup_ratio=0.2, seed=3)


def close(got, expected, rtol=1e-5, atol=1e-6):
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(g), np.asarray(e), rtol=rtol, atol=atol)


def identical(got, expected):
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(g), np.asarray(e))


def dense_gradient(model, lora, dataset, indices, *, l2):
    return jax.value_and_grad(lambda p: dense_loss(model, p, dataset, indices, l2))(lora)


def dense_training(model, dataset, config, lora: Any) -> Any:
    """The whole training with one example at a time and optax's own Adam."""
    num_steps = config.epochs * int(np.ceil(len(dataset) / config.batch_size))
    warmup = int(config.warmup_ratio * num_steps)
    schedule: Any = optax.warmup_cosine_decay_schedule(
        config.learning_rate / (warmup + 1), config.learning_rate, warmup, num_steps
    )
    betas = {"b1": config.adam_b1, "b2": config.adam_b2, "eps": config.adam_eps}
    adam = optax.adamw(schedule, **betas, weight_decay=config.weight_decay)
    clip = optax.identity() if config.max_grad_norm is None else optax.clip_by_global_norm(config.max_grad_norm)
    optimiser: Any = optax.chain(clip, adam)
    state = optimiser.init(lora)
    for epoch in range(config.epochs):
        order = epoch_order(config.seed, epoch, len(dataset))
        for start in range(0, len(dataset), config.batch_size):
            indices = order[start : start + config.batch_size]
            _, gradient = dense_gradient(model, lora, dataset, indices, l2=config.l2)
            updates, state = optimiser.update(gradient, state, lora)
            lora = jax.tree.map(jnp.add, lora, updates)
    return lora


def test_one_step_is_optax_adam_on_the_dense_loss():
    model, dataset, lora = toy_model(), toy_dataset(n=4), toy_lora()
    config = dataclasses.replace(CONFIG, epochs=1)
    _, gradient = dense_gradient(model, lora, dataset, range(4), l2=config.l2)
    adam: Any = optax.adam(config.learning_rate)
    updates, _ = adam.update(gradient, adam.init(lora))
    close(finetune(model, dataset, config, lora=lora).lora, jax.tree.map(jnp.add, lora, updates))


@pytest.mark.parametrize("changes", [{}, {"max_grad_norm": 0.5}, {"weight_decay": 0.3}])
def test_three_epochs_with_a_smaller_last_batch_match_dense_training(changes):
    model, dataset, lora = toy_model(), toy_dataset(n=10), toy_lora()
    config = dataclasses.replace(CONFIG, **changes)
    result = finetune(model, dataset, config, lora=lora)
    assert result.num_steps == 9
    expected = dense_training(model, dataset, config, lora)
    close(result.lora, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(np.asarray(result.lora.params["a"] - lora.params["a"])).max() > 0.05  # it did move


def test_accumulated_micro_batches_give_the_gradient_of_the_whole_batch():
    model, dataset, lora = toy_model(), toy_dataset(n=10), toy_lora()
    objective = lm_objective(model.apply, model.base, l2=CONFIG.l2)
    whole = measure(objective, lora, dataset, batch_size=10)
    for microbatch_size in (1, 3, 4):
        parts = measure(objective, lora, dataset, batch_size=10, microbatch_size=microbatch_size)
        np.testing.assert_allclose(dataclasses.astuple(parts), dataclasses.astuple(whole), rtol=1e-6)
    config = dataclasses.replace(CONFIG, batch_size=5, epochs=1)
    trained = [
        finetune(model, dataset, dataclasses.replace(config, microbatch_size=m), lora=lora).lora for m in (5, 2, 1)
    ]
    close(trained[1], trained[0], rtol=1e-6, atol=1e-6)
    close(trained[2], trained[0], rtol=1e-6, atol=1e-6)


def test_measured_loss_and_gradients_are_those_of_the_dense_loss():
    model, dataset, lora = toy_model(), toy_dataset(n=10), toy_lora()
    objective = lm_objective(model.apply, model.base, l2=0.7)
    measured = measure(objective, lora, dataset, batch_size=4)
    subset = measure(objective, lora, dataset, batch_size=4, indices=np.array([1, 8]))
    for got, indices in ((measured, range(10)), (subset, (1, 8))):
        loss, data_gradient = dense_gradient(model, lora, dataset, indices, l2=0.0)
        _, gradient = dense_gradient(model, lora, dataset, indices, l2=0.7)
        np.testing.assert_allclose(got.loss, loss, rtol=1e-6)
        np.testing.assert_allclose(got.data_gradient_norm, optax.tree.norm(data_gradient), rtol=1e-5)
        np.testing.assert_allclose(got.gradient_norm, optax.tree.norm(gradient), rtol=1e-5)
        assert got.num_examples == len(indices)
    np.testing.assert_allclose(
        mean_loss(objective, lora, dataset, batch_size=3),
        dense_loss(model, lora, dataset, range(10), 0.0),
        rtol=1e-6,
    )


def test_the_result_reports_the_trained_adapter_without_l2_in_the_loss():
    model, dataset, lora = toy_model(), toy_dataset(n=10), toy_lora()
    result = finetune(model, dataset, CONFIG, lora=lora)
    _, gradient = dense_gradient(model, result.lora, dataset, range(10), l2=CONFIG.l2)
    np.testing.assert_allclose(result.loss, dense_loss(model, result.lora, dataset, range(10), 0.0), rtol=1e-5)
    np.testing.assert_allclose(result.gradient_norm, optax.tree.norm(gradient), rtol=1e-4)
    assert result.loss < dense_loss(model, lora, dataset, range(10), 0.0)
    assert result.seconds > 0
    assert result.peak_memory_bytes > 10 * 2**20
    assert result.resumed_from is None


def test_without_a_data_gradient_training_is_adam_on_the_l2_term_alone():
    """With a zero head and embedding every logit is constant, so only `l2 * theta` is left."""
    model = toy_model()
    model = dataclasses.replace(model, base=jax.tree.map(jnp.zeros_like, model.base))
    dataset, lora = toy_dataset(n=8), toy_lora()
    config = dataclasses.replace(CONFIG, adam_eps=1.0, l2=0.5, warmup_ratio=0.0, epochs=1, batch_size=8)
    gradient = jax.tree.map(lambda x: 0.5 * x, lora)
    # Adam's first direction is g / (|g| + eps), bias corrections cancelling.
    expected = jax.tree.map(lambda x, g: x - config.learning_rate * g / (jnp.abs(g) + 1.0), lora, gradient)
    result = finetune(model, dataset, config, lora=lora)
    close(result.lora, expected)
    assert result.data_gradient_norm == 0.0
    np.testing.assert_allclose(result.gradient_norm, 0.5 * optax.tree.norm(result.lora), rtol=1e-6)


def test_the_order_of_an_epoch_is_a_permutation_fixed_by_seed_and_epoch():
    orders = {(s, e): epoch_order(s, e, 50) for s in (0, 1) for e in (0, 1)}
    for order in orders.values():
        np.testing.assert_array_equal(np.sort(order), np.arange(50))
    assert len({tuple(order) for order in orders.values()}) == 4
    np.testing.assert_array_equal(epoch_order(0, 1, 50), orders[0, 1])
    # Pinned: a change of this stream would make interrupted trainings go on in another order.
    assert epoch_order(7, 2, 8).tolist() == [7, 6, 4, 1, 5, 2, 0, 3]


def test_every_epoch_visits_every_example_once():
    for epoch in range(2):
        visited = [
            i
            for step in range(3 * epoch, 3 * epoch + 3)
            for i in step_indices(step, seed=1, num_examples=10, batch_size=4)
        ]
        assert sorted(visited) == list(range(10))


def test_one_trace_serves_every_step_epoch_and_seed():
    model, dataset, lora = toy_model(), toy_dataset(n=10), toy_lora()
    counted = []

    @dataclasses.dataclass(frozen=True)
    class Counted:
        def __call__(self, *args):
            counted.append(1)
            return toy_model().apply(*args)

    model = dataclasses.replace(model, apply=Counted())
    finetune(model, dataset, CONFIG, lora=lora)
    traces_of_one_training = len(counted)
    finetune(model, dataset, dataclasses.replace(CONFIG, seed=9, epochs=2, learning_rate=0.01), lora=lora)
    finetune(model, toy_dataset(n=7), CONFIG, lora=lora)
    assert len(counted) == traces_of_one_training


def test_metrics_hold_one_line_per_step(tmp_path):
    model, dataset, lora = toy_model(), toy_dataset(n=10), toy_lora()
    finetune(model, dataset, CONFIG, lora=lora, workdir=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert [line["epoch"] for line in lines] == [0] * 3 + [1] * 3 + [2] * 3
    first = step_indices(0, seed=CONFIG.seed, num_examples=10, batch_size=4)
    np.testing.assert_allclose(lines[0]["loss"], dense_loss(model, lora, dataset, first, 0.0), rtol=1e-5)
    _, gradient = dense_gradient(model, lora, dataset, first, l2=CONFIG.l2)
    np.testing.assert_allclose(lines[0]["gradient_norm"], optax.tree.norm(gradient), rtol=1e-5)
    rates = [line["learning_rate"] for line in lines]
    assert rates.index(max(rates)) == 1 and max(rates) == pytest.approx(0.05) and min(rates) > 0


class Killed(Exception):
    pass


@pytest.mark.parametrize("stop_after", [1, 5, 8])
def test_a_training_that_is_stopped_and_restarted_ends_with_the_same_bits(tmp_path, monkeypatch, stop_after):
    module = sys.modules["llmeraser_jax.training.finetune"]  # the package's attribute is the function
    model, dataset, lora = toy_model(), toy_dataset(n=10), toy_lora()
    config = dataclasses.replace(CONFIG, checkpoint_every_steps=2)
    expected = finetune(model, dataset, config, lora=lora)
    taken = []

    def stopping(*args, **kwargs):
        if len(taken) == stop_after:
            raise Killed
        taken.append(1)
        return real(*args, **kwargs)

    real = module.adam_step
    monkeypatch.setattr(module, "adam_step", stopping)
    with pytest.raises(Killed):
        finetune(model, dataset, config, lora=lora, workdir=tmp_path / "run")
    monkeypatch.setattr(module, "adam_step", real)
    result = finetune(model, dataset, config, lora=lora, workdir=tmp_path / "run")
    assert result.resumed_from == {1: None, 5: 4, 8: 8}[stop_after]
    identical(result.lora, expected.lora)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 10))
    again = finetune(model, dataset, config, lora=lora, workdir=tmp_path / "run")
    assert again.resumed_from == 9
    identical(again.lora, expected.lora)


def test_going_on_with_other_settings_data_or_adapter_is_refused_by_name(tmp_path):
    model, dataset, lora = toy_model(), toy_dataset(n=10), toy_lora()
    config = dataclasses.replace(CONFIG, epochs=1)
    finetune(model, dataset, config, lora=lora, workdir=tmp_path)
    with pytest.raises(ValueError, match=r"differs in l2 \(0.02 there, 0.5 now\)"):
        finetune(model, dataset, dataclasses.replace(config, l2=0.5), lora=lora, workdir=tmp_path)
    with pytest.raises(ValueError, match="differs in data_sha256"):
        finetune(model, toy_dataset(n=9), config, lora=lora, workdir=tmp_path)
    with pytest.raises(ValueError, match="differs in initial_adapter_sha256"):
        finetune(model, dataset, config, lora=toy_lora(scale=0.4), workdir=tmp_path)
    # How often checkpoints are written is free.
    finetune(model, dataset, dataclasses.replace(config, checkpoint_every_steps=1), lora=lora, workdir=tmp_path)


def test_a_directory_with_other_things_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("important")
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        finetune(toy_model(), toy_dataset(), CONFIG, lora=toy_lora(), workdir=tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_divergence_stops_with_the_step_and_what_to_do(tmp_path):
    model = toy_model()
    base = jax.tree.map(lambda x: x * jnp.float32(1e30), model.base)
    with pytest.raises(FloatingPointError, match=r"At step 1 of 9 the loss is .*Lower the learning rate"):
        finetune(dataclasses.replace(model, base=base), toy_dataset(), CONFIG, lora=toy_lora(), workdir=tmp_path)


def test_eight_devices_train_as_one_does():
    mesh = parallel.make_mesh(data=4, model=2)
    dataset, lora = toy_dataset(n=10), toy_lora()
    model = toy_model()
    sharded = dataclasses.replace(model, mesh=mesh, base=parallel.replicate(model.base, mesh))
    config = dataclasses.replace(CONFIG, batch_size=8, microbatch_size=4)
    one = finetune(model, dataset, config, lora=lora)
    eight = finetune(sharded, dataset, config, lora=lora)
    assert len(eight.lora.params["a"].sharding.device_set) == 8
    close(eight.lora, one.lora, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(eight.gradient_norm, one.gradient_norm, rtol=1e-4)


def test_a_token_that_the_model_lacks_is_refused_before_training(tmp_path):
    model = load_model(tiny.save_tiny_model(tmp_path / "model"))
    tokenizer = tiny.word_tokenizer()
    tokenizer.add_tokens(["now!"])
    rows = [*tiny.rows(2), {"id": "far", "instruction": "colour now! of", "input": "", "output": "red"}]
    dataset = encode_examples(load_examples(rows), tiny.RECIPE, tokenizer)
    lora = model.init_lora(jax.random.key(0), tiny.LORA)
    with pytest.raises(
        ValueError, match=f"'far' has the token {len(tiny.WORDS)}, and the model's vocabulary ends at"
    ):
        finetune(model, dataset, tiny.CONFIG, lora=lora)
