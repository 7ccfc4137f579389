"""Retraining repeats the recipe on the edited data, once per seed, and nothing else changes."""

import dataclasses
import logging

import jax
import numpy as np
import pytest

from llmeraser_jax import data, runs
from llmeraser_jax.lora import save_adapter
from llmeraser_jax.training import TrainConfig, finetune
from llmeraser_jax.training.adopt import adopt
from llmeraser_jax.training.retrain import retrain
from tests.training import tiny
from tests.training.test_adopt import RECIPE, write_toml

REQUESTS = (
    {"id": "r1", "action": "remove"},
    {"id": "r4", "action": "correct_response", "response": "now"},
    {"id": "r6", "action": "remove"},
)


def requests_of(run):
    return data.parse_requests(REQUESTS, run.load_examples())


def leaves(lora):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(lora)]


@pytest.fixture(scope="module")
def retrained(finished_run, model, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("retrained")
    return retrain(finished_run, requests_of(finished_run), workdir, seeds=2, model=model)


def test_each_seed_is_a_run_on_the_edited_data(retrained, finished_run):
    assert [run.path.name for run in retrained] == ["seed_4", "seed_5"]  # the run's own seed is 3
    edited = data.apply_requests(finished_run.load_examples(), requests_of(finished_run))
    for run, seed in zip(retrained, (4, 5), strict=True):
        assert run == runs.load_run(run.path)
        assert run.kind == "retrain"
        assert run.train_config == dataclasses.replace(tiny.CONFIG, seed=seed)
        assert run.load_examples() == edited
        assert run.data_path.parent == run.path
        assert [e.id for e in run.load_examples()] == ["r0", "r2", "r3", "r4", "r5", "r7", "r8", "r9"]
        assert run.load_examples()[3].response == "now"
        assert run.parent == finished_run.reference()
        # 8 examples in batches of 4 are 2 steps an epoch; the run itself took 3.
        assert run.result["num_steps"] == 20
        assert run.result["gradient_equivalents"] == 80.0
        assert run.result["seconds"] > 0


def test_every_seed_starts_from_the_initial_adapter_of_the_run(retrained, finished_run, model):
    expected = leaves(finished_run.load_initial_adapter(model))
    for run in retrained:
        for got, want in zip(leaves(run.load_initial_adapter(model)), expected, strict=True):
            np.testing.assert_array_equal(got, want)


def test_a_retrained_adapter_is_what_plain_fine_tuning_gives(retrained, finished_run, model):
    edited = data.apply_requests(finished_run.load_examples(), requests_of(finished_run))
    result = finetune(
        model,
        data.encode_examples(edited, finished_run.recipe, model.tokenizer),
        dataclasses.replace(tiny.CONFIG, seed=4),
        lora=finished_run.load_initial_adapter(model),
    )
    for got, want in zip(leaves(retrained[0].load_adapter(model)), leaves(result.lora), strict=True):
        np.testing.assert_array_equal(got, want)
    other = leaves(retrained[1].load_adapter(model))
    assert any(not np.array_equal(a, b) for a, b in zip(leaves(result.lora), other, strict=True))


def test_finished_seeds_are_skipped_and_further_ones_added(retrained, finished_run, model, caplog):
    before = {path: path.stat().st_mtime_ns for run in retrained for path in run.path.rglob("*") if path.is_file()}
    workdir = retrained[0].path.parent
    with caplog.at_level(logging.INFO):
        again = retrain(finished_run, requests_of(finished_run), workdir, seeds=[5, 4, 11], model=model)
    assert again[:2] == (retrained[1], retrained[0])
    assert again[2].path.name == "seed_11"
    assert caplog.text.count("nothing is done") == 2
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_other_requests_in_the_same_directory_are_refused(retrained, finished_run, model):
    requests = data.parse_requests([{"id": "r2", "action": "remove"}], finished_run.load_examples())
    with pytest.raises(runs.RunError, match="differs in training data"):
        retrain(finished_run, requests, retrained[0].path.parent, seeds=[4], model=model)


@pytest.mark.parametrize(
    ("seeds", "expected"),
    [
        ([2, 3], r"seeds are \[2, 3\], and 3 is the seed of"),
        ([2, 2], "each once"),
        ([], "at least one"),
        (0, "0 retrainings were asked for"),
    ],
)
def test_seeds_must_be_new_and_distinct(finished_run, model, tmp_path, seeds, expected):
    with pytest.raises(ValueError, match=expected):
        retrain(finished_run, requests_of(finished_run), tmp_path, seeds=seeds, model=model)


def test_another_model_or_other_data_is_refused(finished_run, tmp_path, model):
    from llmeraser_jax.models import load_model

    other = load_model(tiny.save_tiny_model(tmp_path / "other", seed=1))
    with pytest.raises(runs.RunError, match="fingerprint"):
        retrain(finished_run, requests_of(finished_run), tmp_path / "out", model=other)
    path = tiny.write_rows(tmp_path / "short.jsonl", tiny.rows(9))
    with pytest.raises(runs.RunError, match="1 missing: 'r9'"):
        retrain(finished_run, requests_of(finished_run), tmp_path / "out", model=model, data_path=path)


@pytest.fixture
def adopted(finished_run, model, data_path, tmp_path):
    def make(name, adapter=None, **stated):
        path = write_toml(tmp_path / f"{name}.toml", {**RECIPE, "epochs": 2, **stated})
        return adopt(model, adapter or finished_run.path / "adapter", data_path, path, tmp_path / name)

    return make


def test_an_adopted_run_with_unknown_hyper_parameters_needs_them_to_be_given(adopted, model, tmp_path):
    run = adopted("unknown")
    with pytest.raises(runs.RunError, match="does not state batch_size and learning_rate"):
        retrain(run, requests_of(run), tmp_path / "out", model=model)
    given = TrainConfig(epochs=2, batch_size=4, learning_rate=0.05, l2=0.001)
    with pytest.raises(runs.RunError, match=r"l2 is 0.5 in the configuration given and 0.001 in"):
        retrain(run, requests_of(run), tmp_path / "out", model=model, config=dataclasses.replace(given, l2=0.5))
    (again,) = retrain(run, requests_of(run), tmp_path / "out", model=model, seeds=1, config=given)
    assert again.train_config == dataclasses.replace(given, seed=0)


def test_without_a_known_initial_adapter_every_seed_draws_its_own(adopted, model, tmp_path):
    run = adopted("known", batch_size=4, learning_rate=0.05)
    first, second = retrain(run, requests_of(run), tmp_path / "out", model=model, seeds=2)
    assert (first.path.name, second.path.name) == ("seed_0", "seed_1")
    initial = [leaves(r.load_initial_adapter(model)) for r in (first, second)]
    assert any(not np.array_equal(a, b) for a, b in zip(*initial, strict=True))
    for seed, drawn in enumerate(initial):
        for got, want in zip(drawn, leaves(model.init_lora(jax.random.key(seed), run.lora_config)), strict=True):
            np.testing.assert_array_equal(got, want)


def test_retraining_draws_the_dropout_that_the_adapter_was_trained_with(adopted, finished_run, model, tmp_path):
    lora = finished_run.load_adapter(model)
    lora = dataclasses.replace(lora, config=dataclasses.replace(lora.config, dropout=0.1))
    save_adapter(tmp_path / "adapter", lora, model)
    run = adopted("dropped", tmp_path / "adapter", dropout=0.1, batch_size=4, learning_rate=0.05)
    (again,) = retrain(run, requests_of(run), tmp_path / "out", model=model, seeds=1)
    assert again.lora_config.dropout == 0.1
    (without,) = retrain(run, requests_of(run), tmp_path / "other", model=model, seeds=1, drop_dropout=True)
    assert without.lora_config.dropout == 0.0 and without.result["loss"] != again.result["loss"]
