"""A replay from a checkpoint is the training that never saw the forgotten rows, bit for bit."""

import dataclasses
import json
import logging
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax import data, losses, runs
from llmeraser_jax.cli import main
from llmeraser_jax.data import BucketShape
from llmeraser_jax.deletion import verify_directory
from llmeraser_jax.training.batches import lay_out_mean
from llmeraser_jax.training.finetune import adam_of, adam_step, learning_rates
from llmeraser_jax.training.job import finetune_run
from llmeraser_jax.training.replay import plan_replay, replay, run_with_checkpoints
from llmeraser_jax.unlearning import drift, erase_run
from tests.deletion import made
from tests.training import tiny

CONFIG = dataclasses.replace(tiny.CONFIG, epochs=3, checkpoint_every_steps=1)
ORDER = [  # of the examples, in each of the three epochs, for seed 3
    np.random.RandomState(np.array([3, epoch], np.uint32)).permutation(10).tolist() for epoch in range(3)
]


@pytest.fixture(scope="module")
def kept(model, data_path, tmp_path_factory):
    """A run of 3 epochs with 3 steps each, batches of 4, 4 and 2."""
    workdir = tmp_path_factory.mktemp("kept") / "run"
    return finetune_run(
        model,
        data_path,
        workdir,
        recipe=tiny.RECIPE,
        lora=tiny.LORA,
        config=CONFIG,
        keep_checkpoints=True,
    )


def rows_of_step(step):
    """Ids of a step's examples, drawn as the training does, by hand."""
    epoch, position = divmod(step, 3)
    return [f"r{k}" for k in ORDER[epoch][4 * position : 4 * position + 4]]


def trained_without(run, model, edited, num_steps=9):
    """The oracle: the same schedule from the start, on edited data that holds nothing of the forgotten rows."""
    shape = BucketShape(**run.result["shape"])
    dataset = data.encode_examples(edited, run.recipe, model.tokenizer, buckets=[shape])
    objective = losses.lm_objective(model.apply, model.base, l2=CONFIG.l2)
    adam, params = adam_of(CONFIG), run.load_initial_adapter(model)
    state, rates, taken = adam.transformation().init(params), learning_rates(CONFIG, 9), 0
    for step in range(num_steps):
        ids = [id_ for id_ in rows_of_step(step) if id_ in dataset.ids]
        taken += len(ids)
        if not ids:
            continue
        stack = lay_out_mean(dataset, dataset.indices_of(ids), 1 / len(ids), batch_size=4, microbatch_size=4)
        _, gradient = losses.loss_and_gradient_sums(objective, params, stack)
        prior = objective.from_prior(params)
        rate = jnp.asarray(rates[step])
        params, state, _ = adam_step(params, state, gradient, prior, rate, adam=adam, l2=CONFIG.l2)
    return params, taken


def assert_same_bits(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def requests_for(run, *rows):
    return data.parse_requests([{"action": "remove", **row} for row in rows], run.load_examples())


def test_checkpoints_of_the_first_epoch_are_kept_and_change_nothing_in_the_adapter(
    kept, model, data_path, tmp_path
):
    assert sorted(p.name for p in (kept.path / "checkpoints").iterdir() if p.name.isdigit()) == ["1", "2", "3"]
    assert list(kept.result["checkpoints"]) == ["1", "2", "3"]
    assert run_with_checkpoints(kept) == kept
    plain = finetune_run(model, data_path, tmp_path / "plain", recipe=tiny.RECIPE, lora=tiny.LORA, config=CONFIG)
    assert_same_bits(plain.load_adapter(model), kept.load_adapter(model))
    assert run_with_checkpoints(plain) is None and not (plain.path / "checkpoints").exists()
    with pytest.raises(runs.RunError, match="no checkpoints to replay from"):
        replay(plain, requests_for(plain, {"id": "r1"}), tmp_path / "out", model=model)
    # Asked for once more without them, a finished run keeps what it has.
    again = finetune_run(model, data_path, kept.path, recipe=tiny.RECIPE, lora=tiny.LORA, config=CONFIG)
    assert again == kept and (kept.path / "checkpoints" / "3").is_dir()


@pytest.mark.parametrize("first_seen", [0, 1, 2])
def test_a_replay_is_the_training_that_never_saw_the_rows_bit_for_bit(kept, model, tmp_path, first_seen):
    # All rows of the step: where it is the last, small one of the epoch, it is left out then.
    gone = rows_of_step(first_seen) if first_seen == 2 else rows_of_step(first_seen)[:1]
    requests = requests_for(kept, *({"id": id_} for id_ in gone))
    run = replay(kept, requests, tmp_path / "out", model=model)
    edited = data.apply_requests(kept.load_examples(), requests)
    expected, taken = trained_without(kept, model, edited)
    assert_same_bits(run.load_adapter(model), expected)
    assert run.kind == "retrain" and run.parent == kept.reference() and run.load_examples() == edited
    assert run.result["replayed_from_step"] == first_seen
    assert run.result["gradient_equivalents"] == taken - 4 * first_seen
    assert run.train_config.seed == kept.train_config.seed
    # The start is that of the training itself, which had all rows.
    at_checkpoint, _ = trained_without(kept, model, edited, num_steps=first_seen)
    as_trained, _ = trained_without(kept, model, kept.load_examples(), num_steps=first_seen)
    assert_same_bits(at_checkpoint, as_trained)
    different = [
        not np.array_equal(a, b)
        for a, b in zip(
            jax.tree.leaves(run.load_adapter(model)), jax.tree.leaves(kept.load_adapter(model)), strict=True
        )
    ]
    assert any(different)


def test_a_corrected_row_takes_the_place_of_the_old_one(kept, model, tmp_path):
    changed, gone = rows_of_step(2)[0], rows_of_step(1)[3]
    requests = requests_for(kept, {"id": changed, "action": "correct_response", "response": "now"}, {"id": gone})
    run = replay(kept, requests, tmp_path / "out", model=model)
    edited = data.apply_requests(kept.load_examples(), requests)
    assert_same_bits(run.load_adapter(model), trained_without(kept, model, edited)[0])
    assert run.result["replayed_from_step"] == 1


def test_a_row_longer_than_all_of_the_training_is_replayed_from_the_start(kept, model, caplog):
    id_ = rows_of_step(2)[0]
    response = " ".join(["now"] * 20)
    requests = requests_for(kept, {"id": id_, "action": "correct_response", "response": response})
    edited = data.apply_requests(kept.load_examples(), requests)
    shape = BucketShape(**kept.result["shape"])
    dataset = data.encode_examples(edited, kept.recipe, model.tokenizer, buckets=[shape])
    assert plan_replay(kept, dataset).first_step == 0
    assert "longer than all rows of the training" in caplog.text


def test_an_interrupted_replay_goes_on_and_a_finished_one_is_not_repeated(
    kept, model, tmp_path, caplog, monkeypatch
):
    requests = requests_for(kept, {"id": rows_of_step(1)[0]})
    whole = replay(kept, requests, tmp_path / "whole", model=model)
    calls = []

    def dying(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return adam_step(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[adam_step.__module__], "adam_step", dying)
        with pytest.raises(KeyboardInterrupt):
            replay(kept, requests, tmp_path / "out", model=model)
    other = requests_for(kept, {"id": rows_of_step(1)[1]})
    with pytest.raises(ValueError, match="differs in data_sha256"):
        replay(kept, other, tmp_path / "out", model=model)
    with caplog.at_level(logging.INFO):
        run = replay(kept, requests, tmp_path / "out", model=model)
        assert replay(kept, requests, tmp_path / "out", model=model) == run
    assert "Going on after step 4 of 9" in caplog.text
    assert_same_bits(run.load_adapter(model), whole.load_adapter(model))
    assert "nothing is done" in caplog.text


def test_another_checkpoint_in_the_place_of_the_one_that_was_written_is_refused(kept, model, tmp_path):
    shutil.copytree(kept.path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/1")
    shutil.copytree(tmp_path / "run/checkpoints/2", tmp_path / "run/checkpoints/1")
    run = runs.load_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"The checkpoint of step 1 .* is not the one that the training wrote"):
        replay(run, requests_for(run, {"id": rows_of_step(1)[0]}), tmp_path / "out", model=model)


def test_a_chain_that_has_drifted_too_far_is_retrained_where_that_is_asked_for(kept, model, tmp_path, monkeypatch):
    monkeypatch.setattr(drift, "DISTANCE", (0.0, 0.0))
    lines = [{"id": rows_of_step(1)[0], "action": "remove"}]
    requests = tiny.write_rows(tmp_path / "requests.jsonl", lines)
    for choice in ("warn", "retrain"):
        out = tmp_path / choice
        _, result = erase_run(kept, requests, out, made.Push(), model=model, on_incomplete=choice)
        receipt = result.receipt
        assert receipt is not None and receipt.complete
        retrained = choice == "retrain"
        assert receipt.outcome.startswith("complete: replayed") == retrained
        assert (json.loads((out / "receipt.json").read_text())["drift"] is None) == retrained
        assert any("the chain has drifted too far" in attempt for attempt in receipt.attempts) == retrained


def test_a_fallback_replays_into_the_chain_and_a_later_one_leaves_out_the_rows_of_both(kept, model, tmp_path):
    first, second = rows_of_step(2)[0], rows_of_step(1)[2]
    run, gone, method = kept, [], made.Push(complete=False)
    for number, (id_, step) in enumerate(((first, 2), (second, 1)), start=1):
        gone.append(id_)
        requests = tiny.write_rows(tmp_path / f"{number}.jsonl", [{"id": id_, "action": "remove"}])
        out = tmp_path / f"out{number}"
        run, result = erase_run(run, requests, out, method, model=model, on_incomplete="retrain")
        assert result.receipt is not None
        assert result.receipt.outcome == f"complete: replayed on the edited data after step {step}"
        edited = tuple(e for e in kept.load_examples() if e.id not in gone)
        assert run.load_examples() == edited and len(run.receipts) == number
        assert_same_bits(run.load_adapter(model), trained_without(kept, model, edited)[0])
        assert [finding for finding in verify_directory(out) if not finding.ok] == []
        assert not out.with_name(f"{out.name}.retraining").exists()
    command = ["retrain", "--run", str(kept.path), "--requests", str(tmp_path / "1.jsonl"), "--replay"]
    assert main([*command, "--workdir", str(tmp_path / "re")]) == 0
    again = runs.load_run(tmp_path / "re" / "replay")
    assert_same_bits(again.load_adapter(model), runs.load_run(tmp_path / "out1").load_adapter(model))
