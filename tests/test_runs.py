"""A run directory comes back as written, and refuses data and models that are not what was trained on."""

# The fixtures that a test takes are imported, and so redefined by its arguments.
# ruff: noqa: F811

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from llmeraser_jax import data, runs
from llmeraser_jax.cli import main
from llmeraser_jax.models import load_model
from tests.training import tiny
from tests.training.conftest import data_path, finished_run, model, model_path  # noqa: F401


def write(path, model, examples, **changes):
    """A run without training, from the initial adapter."""
    dataset = data.encode_examples(examples, tiny.RECIPE, model.tokenizer)
    lora = model.init_lora(jax.random.key(0), tiny.LORA)
    arguments = {
        "kind": "erase",
        "model": model,
        "recipe": dataset.recipe,
        "normalizer": dataset.normalizer,
        "train_config": tiny.CONFIG,
        "examples": examples,
        "data_path": None,
        "lora": lora,
        "initial_lora": None,
        "result": {"loss": 0.5},
    }
    return runs.write_run(path, **{**arguments, **changes})


@pytest.fixture
def examples(data_path):
    return data.load_examples(data_path)


def test_a_run_comes_back_as_it_was_written(finished_run, model, data_path):
    run = runs.load_run(finished_run.path)
    assert run == finished_run
    assert run.train_config == tiny.CONFIG
    assert run.lora_config == dataclasses.replace(tiny.LORA, target_modules=("q_proj", "v_proj", "down_proj"))
    assert run.recipe.is_resolved and run.recipe.max_length == 32
    assert run.load_examples() == data.load_examples(data_path)
    assert run.model_path == model.path and run.model_dtype == "float32"
    assert run.parent is None and run.receipts == () and run.unstated == ()
    loaded = run.load_model()
    np.testing.assert_array_equal(
        np.asarray(loaded.base["embed_tokens"]["embedding"]), np.asarray(model.base["embed_tokens"]["embedding"])
    )


def test_a_base_that_was_moved_can_be_named_and_is_compared(tmp_path, model_path, data_path, capsys):
    shutil.copytree(model_path, tmp_path / "base")
    moved = load_model(tmp_path / "base")
    run = write(tmp_path / "run", moved, data.load_examples(data_path))
    shutil.move(tmp_path / "base", tmp_path / "elsewhere")
    with pytest.raises(runs.RunError, match=r"no model directory .*base.* name where it is now \(--model\)"):
        run.load_model()
    again = run.with_model_at(str(tmp_path / "elsewhere")).load_model()
    assert again.path == str(tmp_path / "elsewhere")
    arguments = ["retrain", "--run", str(run.path), "--requests", str(tmp_path / "requests.jsonl"), "--seeds", "1"]
    (tmp_path / "requests.jsonl").write_text('{"id": "r1", "action": "remove"}')
    other = tiny.save_tiny_model(tmp_path / "other", seed=1)
    assert main([*arguments, "--workdir", str(tmp_path / "re"), "--model", str(other)]) == 1
    assert f"The base model at {other} is not the one" in capsys.readouterr().err


def test_a_derived_run_keeps_its_examples_inside_and_can_be_moved(tmp_path, model, examples, finished_run):
    receipts = ({"removed": 3, "ids": ["r1"]}, {"removed": 1})
    run = write(tmp_path / "out", model, examples[2:5], parent=finished_run.reference(), receipts=receipts)
    assert run.receipts == receipts
    assert run.parent is not None and run.parent["path"] == str(finished_run.path.resolve())
    assert not run.knows_initial_adapter and run.load_initial_adapter(model) is None
    shutil.move(tmp_path / "out", tmp_path / "moved")
    moved = runs.load_run(tmp_path / "moved")
    assert moved.data_path == tmp_path / "moved" / "train.jsonl"
    assert moved.load_examples() == examples[2:5]


def test_data_that_changed_is_refused_with_every_kind_of_difference(tmp_path, finished_run):
    rows = tiny.rows()
    rows[4]["output"] = "grey" if rows[4]["output"] != "grey" else "red"
    del rows[7]
    rows.append({**rows[0], "id": "new"})
    path = tiny.write_rows(tmp_path / "changed.jsonl", rows)
    with pytest.raises(runs.RunError) as error:
        finished_run.load_examples(path)
    message = str(error.value)
    assert "1 missing: 'r7'" in message
    assert "1 that were not there: 'new'" in message
    assert "1 changed: 'r4'" in message
    assert str(path) in message and str(finished_run.path) in message


def test_the_first_ten_differences_are_listed_and_the_rest_counted(tmp_path, model, examples):
    run = write(tmp_path / "out", model, [dataclasses.replace(examples[0], id=f"i{k}") for k in range(14)])
    with pytest.raises(runs.RunError, match=r"14 missing: 'i0', .*'i9' and 4 more"):
        run.verify_examples(examples[:1])


def test_data_in_another_order_comes_back_in_the_order_of_training(tmp_path, finished_run, examples):
    path = tiny.write_rows(tmp_path / "reversed.jsonl", tiny.rows()[::-1])
    assert finished_run.load_examples(path) == examples


def test_held_out_rows_that_were_trained_on_are_left_out_and_counted(tmp_path, finished_run, caplog):
    outside = [{**row, "id": "new-" + row["id"]} for row in tiny.rows(12)[10:]]
    known = [{**row, "id": "copy-" + row["id"]} for row in tiny.rows()[:3]]
    path = tiny.write_rows(tmp_path / "mixed.jsonl", [*known, *outside])
    assert [example.id for example in finished_run.load_unseen(path)] == [row["id"] for row in outside]
    assert "3 of its 5 examples were trained on ('copy-r0', 'copy-r1', 'copy-r2')" in caplog.text
    caplog.clear()
    assert len(finished_run.load_unseen(tiny.write_rows(tmp_path / "outside.jsonl", outside))) == 2
    assert not caplog.text
    with pytest.raises(runs.RunError, match="was trained on all its 3 examples"):
        finished_run.load_unseen(tiny.write_rows(tmp_path / "known.jsonl", known))


def test_missing_data_is_named(tmp_path, finished_run):
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl: the training data of"):
        finished_run.load_examples(tmp_path / "gone.jsonl")


@pytest.mark.parametrize("touched", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_model_that_changed_is_refused(tmp_path, model_path, examples, touched):
    copy = tmp_path / "model"
    shutil.copytree(model_path, copy)
    run = write(tmp_path / "out", load_model(copy), examples)
    assert run.model_sha256 == runs.model_fingerprint(model_path)
    assert run.load_model().path == str(copy)
    content = bytearray((copy / touched).read_bytes())
    content[-2] ^= 1
    (copy / touched).write_bytes(content)
    with pytest.raises(runs.RunError, match="is not the one that"):
        run.load_model()


def test_a_loaded_model_is_compared_too(tmp_path, finished_run, model_path):
    finished_run.verify_model(load_model(model_path))
    with pytest.raises(runs.RunError, match=r"in bfloat16; .* was trained in float32"):
        finished_run.verify_model(load_model(model_path, dtype="bfloat16"))
    with pytest.raises(runs.RunError, match="quantisation is nf4"):
        finished_run.verify_model(load_model(model_path, quantization="nf4"))
    quantised = dataclasses.replace(finished_run, model_quantization="int8", matmul_precision="tf32")
    model = quantised.load_model()
    assert (model.quantization, model.config.matmul_precision) == ("int8", "tf32")
    quantised.verify_model(model)
    other = tiny.save_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(runs.RunError, match="fingerprint"):
        finished_run.verify_model(load_model(other))


def test_a_finished_run_is_never_overwritten(tmp_path, model, examples):
    write(tmp_path / "out", model, examples)
    with pytest.raises(FileExistsError, match="finished run"):
        write(tmp_path / "out", model, examples)


def test_what_an_interrupted_writing_left_is_replaced(tmp_path, model, examples):
    (tmp_path / "out" / "adapter").mkdir(parents=True)
    (tmp_path / "out" / "adapter" / "adapter_config.json").write_text("{")
    assert write(tmp_path / "out", model, examples).load_adapter(model).config.rank == 2


def test_a_result_that_is_not_finite_is_refused_and_leaves_no_run(tmp_path, model, examples):
    with pytest.raises(ValueError, match=r"result\.loss = nan"):
        write(tmp_path / "out", model, examples, result={"loss": float("nan")})
    with pytest.raises(runs.RunError, match="is not a run directory"):
        runs.load_run(tmp_path / "out")


def test_an_unfinished_training_is_told_from_no_run(tmp_path):
    with pytest.raises(runs.RunError, match="is not a run directory"):
        runs.load_run(tmp_path)
    (tmp_path / "training.json").write_text("{}")
    with pytest.raises(runs.RunError, match="holds an unfinished training"):
        runs.load_run(tmp_path)


def damage(run, path, change):
    shutil.copytree(run.path, path)
    recorded = json.loads((path / "run.json").read_text())
    change(recorded)
    (path / "run.json").write_text(json.dumps(recorded))
    return path


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda r: r.update(format_version=2), "format_version 2; this package reads 1"),
        (lambda r: r.pop("recipe"), "is damaged: KeyError: 'recipe'"),
        (lambda r: r["train"].update(weight_decay=-0.1), "damaged: ValueError: weight_decay"),
        (lambda r: r.update(kind="guess"), "damaged: kind 'guess'"),
        (lambda r: r["data"]["ids"].pop(), "damaged"),
    ],
)
def test_a_damaged_run_file_is_refused_with_the_reason(tmp_path, finished_run, change, expected):
    with pytest.raises(runs.RunError, match=expected):
        runs.load_run(damage(finished_run, tmp_path / "copy", change))


def test_a_run_without_its_adapter_is_refused(tmp_path, finished_run):
    path = damage(finished_run, tmp_path / "copy", lambda r: None)
    shutil.rmtree(path / "initial_adapter")
    with pytest.raises(runs.RunError, match="initial_adapter is missing"):
        runs.load_run(path)


def test_settings_of_runs_differ_by_name(finished_run, tmp_path, model, examples):
    other = write(tmp_path / "out", model, examples)
    assert runs.differing_settings(finished_run.settings(), finished_run.settings()) == []
    kind, rows = runs.differing_settings(finished_run.settings(), other.settings())
    assert kind == "kind ('finetune' there, 'erase' now)"
    assert rows.startswith("training data")  # each run's hashes have a key of their own
