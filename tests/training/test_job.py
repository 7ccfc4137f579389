"""From files to a run directory, interrupted, repeated, and refused."""

import dataclasses
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llmeraser_jax import runs
from llmeraser_jax.training.job import finetune_run
from tests.training import tiny

ROOT = Path(__file__).parent.parent.parent
WEIGHTS = "adapter/adapter_model.safetensors"


def tune(model, data_path, workdir, **changes):
    config = dataclasses.replace(tiny.CONFIG, **changes)
    return finetune_run(model, data_path, workdir, recipe=tiny.RECIPE, lora=tiny.LORA, config=config)


def test_a_finished_run_holds_what_its_training_was(finished_run, data_path, model):
    entries = sorted(entry.name for entry in finished_run.path.iterdir())
    assert entries == ["adapter", "hash.key", "initial_adapter", "metrics.jsonl", "run.json"]
    recorded = json.loads((finished_run.path / "run.json").read_text())
    assert recorded["kind"] == "finetune" and recorded["seed"] == 3
    assert recorded["data"]["path"] == str(data_path)
    assert recorded["data"]["ids"] == [f"r{k}" for k in range(10)]
    assert recorded["train"]["l2"] == 1e-3
    assert recorded["recipe"]["add_bos"] is True and recorded["recipe"]["template"] == "plain"
    assert recorded["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    result = recorded["result"]
    assert result["num_steps"] == 30 and result["gradient_equivalents"] == 100.0
    assert 0 < result["loss"] < 1.5  # log(22) = 3.1 for equal odds on all words
    assert result["gradient_norm"] > 0 and result["seconds"] > 0
    lora, initial = finished_run.load_adapter(model), finished_run.load_initial_adapter(model)
    assert np.all(np.asarray(initial.params["layers"]["q_proj"]["b"]) == 0)
    assert np.any(np.asarray(lora.params["layers"]["q_proj"]["b"]) != 0)


def test_repeating_a_finished_run_does_nothing_and_says_so(finished_run, model, data_path, caplog):
    before = {p: p.stat().st_mtime_ns for p in finished_run.path.rglob("*") if p.is_file()}
    with caplog.at_level(logging.INFO):
        again = tune(model, data_path, finished_run.path, checkpoint_every_steps=7)
    assert "finished already, with the same settings; nothing is done" in caplog.text
    assert again == finished_run
    assert {p: p.stat().st_mtime_ns for p in finished_run.path.rglob("*") if p.is_file()} == before


def test_another_configuration_in_the_same_directory_is_refused(finished_run, model, data_path):
    with pytest.raises(runs.RunError, match=r"finished run that differs in l2 \(0.001 there, 0.5 now\)"):
        tune(model, data_path, finished_run.path, l2=0.5)


def test_other_data_in_the_same_directory_is_refused(finished_run, model, tmp_path):
    other = tiny.write_rows(tmp_path / "other.jsonl", tiny.rows(9))
    with pytest.raises(runs.RunError, match="differs in training data"):
        tune(model, other, finished_run.path)


def test_dropout_is_recorded_and_changes_the_adapter(model, data_path, tmp_path):
    config = dataclasses.replace(tiny.CONFIG, epochs=1)
    runs_of = {}
    for dropout in (0.0, 0.3):
        lora = dataclasses.replace(tiny.LORA, dropout=dropout)
        path = tmp_path / f"run {dropout}"
        runs_of[dropout] = finetune_run(model, data_path, path, recipe=tiny.RECIPE, lora=lora, config=config)
        assert runs.load_run(path).lora_config.dropout == dropout
    assert runs_of[0.0].result["loss"] != runs_of[0.3].result["loss"]


def test_a_directory_in_use_is_refused(model, data_path, tmp_path):
    from llmeraser_jax import files

    with files.exclusive_use(tmp_path / "run"), pytest.raises(RuntimeError, match="Another process is writing"):
        tune(model, data_path, tmp_path / "run")


def test_the_token_mean_normaliser_is_recorded(model, tmp_path, data_path):
    recipe = dataclasses.replace(tiny.RECIPE, reduction="token")
    config = dataclasses.replace(tiny.CONFIG, epochs=1)
    run = finetune_run(model, data_path, tmp_path / "run", recipe=recipe, lora=tiny.LORA, config=config)
    assert run.normalizer == 2.0  # one word and EOS
    # An edited data set is still divided by the training set's constant.
    assert run.encode(run.load_examples()[:3], model.tokenizer).normalizer == 2.0


@pytest.fixture(scope="module")
def uninterrupted(model_path, data_path, tmp_path_factory):
    """A run in a process of its own, and the compilation cache that it filled."""
    directory = tmp_path_factory.mktemp("killed")
    assert worker(model_path, data_path, directory / "run", directory / "cache").wait() == 0
    return directory / "run", directory / "cache"


def worker(*arguments) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.training.killed_worker", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"})


def num_steps_logged(workdir: Path) -> int:
    metrics = workdir / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


@pytest.mark.parametrize("seed", [0])
def test_killed_at_random_moments_it_ends_with_the_same_bits(uninterrupted, model_path, data_path, tmp_path, seed):
    expected, cache = uninterrupted
    workdir = tmp_path / "run"
    rng = random.Random(seed)
    # Two kills between steps or inside a checkpoint, one when the last step is done and the run is being written.
    for reached in (rng.randint(1, 12), rng.randint(13, 28), 30):
        process = worker(model_path, data_path, workdir, cache)
        while process.poll() is None and num_steps_logged(workdir) < reached:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (workdir / "run.json").exists()
    assert worker(model_path, data_path, workdir, cache).wait() == 0
    assert (workdir / WEIGHTS).read_bytes() == (expected / WEIGHTS).read_bytes()
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 31))
    reference = [json.loads(line) for line in (expected / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "gradient_norm", "learning_rate"):
        assert [line[name] for line in lines] == [line[name] for line in reference]
    run, other = runs.load_run(workdir), runs.load_run(expected)
    differing = runs.differing_settings(run.settings(), other.settings())
    assert [entry.split(" (")[0] for entry in differing] == ["training data"]  # hashed with each run's own key
    assert run.load_examples() == other.load_examples()
    assert run.result["loss"] == other.result["loss"]
    assert run.result["gradient_norm"] == other.result["gradient_norm"]
