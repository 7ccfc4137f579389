"""TALLRec's book data: rows without users, on files of the released form."""

import json
from pathlib import Path

import pytest
import tyro

from experiments.tallrec_book.main import BookConfig, FullBookConfig, Preset
from experiments.tallrec_movie.main import write_scenario
from llmeraser_jax.data import Action, apply_requests, load_examples, load_requests


@pytest.fixture
def directory(tmp_path) -> Path:
    for split in ("valid", "test"):
        rows = [
            {
                "instruction": "Yes or no?",
                "input": f'User Preference: "B{k}"\nWhether the user will like the target book "{split}{k}"?',
                "output": "Yes." if k % 2 else "No.",
            }
            for k in range(10)
        ]
        (tmp_path / f"{split}.json").write_text(json.dumps(rows))
    return tmp_path


def _config(directory: Path, kind: type[BookConfig] = BookConfig, **changes) -> BookConfig:
    return kind(base=directory, data=directory, workdir=directory / "out", **changes)


def test_validation_rows_are_trained_on_and_every_row_is_its_own_user(directory):
    examples, users = _config(directory).load("train")
    assert "valid3" in examples[3].input
    assert users == tuple(str(k) for k in range(10))
    held, _ = _config(directory).load("test")
    assert "test3" in held[3].input


@pytest.mark.parametrize("scenario", ["removal", "correction"])
def test_a_scenario_is_written_as_files_the_library_reads(directory, tmp_path, scenario):
    config = _config(directory, num_rows=8, num_heldout=5, removed_share=0.25, flipped_share=0.5)
    write_scenario(config, scenario, tmp_path / "data")
    examples = load_examples(tmp_path / "data" / "train.jsonl")
    requests = load_requests(tmp_path / "data" / "requests.jsonl", examples)
    edited = apply_requests(examples, requests)
    released = {e.id: e for e in load_examples(directory / "valid.json")}
    assert all(released[e.id] == e for e in edited)
    if scenario == "removal":
        assert [r.action for r in requests] == [Action.REMOVE] * 2
        assert len(edited) == 6
    else:
        assert sum(released[e.id] != e for e in examples) == len(requests) == 4
    assert len(load_examples(tmp_path / "data" / "heldout.jsonl")) == 5


def test_the_full_preset_is_the_published_setting_on_the_same_files(directory):
    config = _config(directory, FullBookConfig)
    assert (config.lora.rank, config.lora.alpha, config.lora.target_modules) == (8, 32.0, "all-linear")
    assert (config.train.epochs, config.train.batch_size, config.train.learning_rate) == (5, 128, 2e-4)
    assert {m.l2 for m in config.methods.values()} == {config.train.l2}
    assert config.recipe.template == "alpaca"
    assert (config.num_rows, config.num_heldout, config.rows_per_user) == (2427, 2427, 1)
    assert config.load("train") == _config(directory).load("train")


def test_small_prompts_have_a_context_of_1024_tokens(directory):
    assert _config(directory).recipe.max_length == 1024


@pytest.mark.parametrize(("word", "kind"), [("small", BookConfig), ("full", FullBookConfig)])
def test_the_command_line_names_the_preset(directory, word, kind):
    arguments = [word, "--base", str(directory), "--data", str(directory), "--workdir", str(directory)]
    assert type(tyro.cli(Preset, args=arguments)) is kind
