"""TALLRec's book data: rows without users, on files of the released form."""

import dataclasses
import json
from pathlib import Path

import pytest

from experiments.common import command_line
from experiments.tallrec_book.main import PRESETS, BookConfig
from experiments.tallrec_movie.main import make_scenario
from llmeraser_jax.data import Action, apply_requests, load_examples
from llmeraser_jax.models import load_model
from tests.training import tiny


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


def _config(directory: Path, preset: str = "small", **changes) -> BookConfig:
    places = {"base": directory, "data": directory, "workdir": directory / "out"}
    return dataclasses.replace(PRESETS[preset], **places, **changes)


def test_validation_rows_are_trained_on_and_every_row_is_its_own_user(directory):
    examples, users = _config(directory).load("train")
    assert "valid3" in examples[3].input
    assert users == tuple(str(k) for k in range(10))
    held, _ = _config(directory).load("test")
    assert "test3" in held[3].input


@pytest.mark.parametrize("name", ["removal", "correction"])
def test_a_scenario_trains_on_released_rows_and_no_row_is_in_two_places(directory, name):
    tiny.save_tiny_model(directory / "base")
    config = _config(directory, num_rows=8, num_test=5, num_kl=3, num_shown=4, removed_share=0.25, edited_share=0.5)
    scenario = make_scenario(config, name, load_model(directory / "base"))
    edited = apply_requests(scenario.examples, scenario.requests)
    released = {e.id: e for e in load_examples(directory / "valid.json")}
    assert all(released[e.id] == e for e in edited)
    if name == "removal":
        assert [r.action for r in scenario.requests] == [Action.REMOVE] * 2
        assert len(edited) == 6
    else:
        assert sum(released[e.id] != e for e in scenario.examples) == len(scenario.requests) == 4
    test, shown = config.load_outside()
    assert (len(test), len(shown)) == (5, 4)
    assert not {e.input for e in test} & {e.input for e in shown}
    assert {e.id for e in scenario.heldout} <= {e.id for e in test}


def test_the_full_preset_is_the_published_setting_on_the_same_files(directory):
    config = _config(directory, "full")
    assert (config.lora.rank, config.lora.alpha, config.lora.target_modules) == (8, 32.0, "all-linear")
    assert (config.train.epochs, config.train.batch_size, config.train.learning_rate) == (5, 128, 2e-4)
    assert config.recipe.template == "alpaca"
    assert (config.num_rows, config.num_test, config.num_shown, config.rows_per_user) == (2427, 2327, 100, 1)
    assert config.load("train") == _config(directory).load("train")


def test_small_prompts_have_a_context_of_1024_tokens(directory):
    assert _config(directory).recipe.max_length == 1024


@pytest.mark.parametrize("word", ["small", "full"])
def test_the_command_line_names_the_preset(directory, word):
    arguments = [word, "--base", str(directory), "--data", str(directory), "--workdir", str(directory / "out")]
    assert command_line(PRESETS, arguments) == _config(directory, word)
