"""Which authors the TOFU experiment takes, and its measures against the formulas, on files of the released form."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import sem

from experiments.common import command_line
from experiments.tofu import main as experiment
from experiments.tofu.main import PRESETS, TofuConfig, choose_authors, make_scenario
from llmeraser_jax.data import Action, encode_examples
from llmeraser_jax.evaluation.scoring import score_examples
from llmeraser_jax.models import load_model
from tests.training import tiny


def _write(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Two hundred authors whose questions and answers are words that the tiny tokenizer knows."""
    path = tmp_path_factory.mktemp("tofu")
    full = [
        {"question": f"colour of s{row % 12} s{row % 7}", "answer": tiny.COLOURS[row % 4]} for row in range(4000)
    ]
    _write(path / "full.json", full)
    _write(path / "forget05.json", full[3800:])
    perturbed = [
        {**row, "paraphrased_answer": f"now {row['answer']}", "perturbed_answer": ["now of", "of of"]}
        for row in full[3600:]
    ]
    _write(path / "forget10_perturbed.json", perturbed)
    real = [{"question": f"colour of s{k}", "answer": "red", "perturbed_answer": ["blue", "of"]} for k in range(5)]
    _write(path / "real_authors_perturbed.json", real)
    tiny.save_tiny_model(path / "base")
    return path


def _config(directory: Path, **changes) -> TofuConfig:
    settings = {"num_retained": 12, "num_shown": 2, "num_heldout": 1, "num_utility": 4, "max_length": 64}
    places = {"base": directory / "base", "data": directory, "workdir": directory / "out"}
    return TofuConfig(**{**places, **settings, **changes})


def test_nobody_is_in_two_groups_and_the_forgotten_are_forget05s(directory):
    authors = choose_authors(_config(directory))
    assert authors.forgotten == (190,)
    assert authors.retained == (0, 1, *range(180, 190))
    assert (authors.shown, authors.heldout) == ((179, 178), (177,))
    full = choose_authors(PRESETS["full"])
    groups = [*full.forgotten, *full.retained, *full.shown, *full.heldout]
    assert sorted(groups) == list(range(200))


def test_all_rows_of_the_forgotten_authors_are_removed_and_no_other(directory):
    scenario = make_scenario(_config(directory, num_forgotten=2), load_model(directory / "base"))
    assert {request.action for request in scenario.requests} == {Action.REMOVE}
    assert [request.id for request in scenario.requests] == [str(row) for row in range(3800, 3840)]
    assert len(scenario.examples) == 14 * 20
    assert {scenario.users[e.id] for e in scenario.examples[-40:]} == {"190", "191"}  # pyright: ignore


def _losses(model, encode, rows, texts):
    """Of the base, nats per token of each text as the answer."""
    examples = [
        experiment.Example(id=str(k), instruction=row["question"], response=text, format="question")
        for k, (row, text) in enumerate(zip(rows, texts, strict=True))
    ]
    data = encode(examples)
    return -score_examples(model, None, data).log_probs / data.num_targets


def test_the_task_is_tofus_formulas_on_the_models_losses(directory):
    model = load_model(directory / "base")
    config = _config(directory)
    scenario = make_scenario(config, model)

    def encode(examples):
        return encode_examples(examples, config.recipe, model.tokenizer)

    measured = scenario.make_task(model, encode)(model, None)
    rows = [json.loads(line) for line in (directory / "forget10_perturbed.json").read_text().splitlines()][200:220]

    right = _losses(model, encode, rows, [row["paraphrased_answer"] for row in rows])
    wrong = np.stack(
        [_losses(model, encode, rows, [row["perturbed_answer"][k] for row in rows]) for k in (0, 1)], axis=1
    )
    expected = np.exp(-wrong.mean(1)) / np.exp(-right)
    np.testing.assert_allclose(measured["truth_ratios"], expected, rtol=1e-4)
    metrics = measured["metrics"]
    assert metrics["truth ratio (geometric)"]["value"] == pytest.approx(
        np.minimum(expected, 1 / expected).mean(), rel=1e-4
    )
    each = [min(ratio, 1 / ratio) for ratio in expected]
    assert metrics["truth ratio (geometric)"]["standard_error"] == pytest.approx(sem(each), rel=1e-3)
    numbers = [value for part in measured["utility_parts"] for value in part.values()]
    utility = 0.0 if 0 in numbers else 6 / sum(1 / value for value in numbers)
    assert len(numbers) == 6
    assert metrics["utility of 6"]["value"] == pytest.approx(utility)


def test_world_facts_make_the_utility_tofus_own_where_their_file_is_there(directory, tmp_path):
    model = load_model(directory / "base")
    for path in directory.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    rows = (directory / "real_authors_perturbed.json").read_text().splitlines()
    (tmp_path / "world_facts_perturbed.json").write_text("\n".join(rows[1:]) + "\n")
    config = _config(directory, data=tmp_path)
    scenario = make_scenario(config, model)
    assert scenario.settings["num_world_facts"] == min(len(rows) - 1, config.num_utility)
    assert "num_world_facts" not in make_scenario(_config(directory), model).settings

    def encode(examples):
        return encode_examples(examples, config.recipe, model.tokenizer)

    measured = scenario.make_task(model, encode)(model, None)
    # Of world facts, as of real authors, the probability is relative to the wrong answers.
    world = [json.loads(row) for row in rows[1 : 1 + config.num_utility]]
    texts = [[row["answer"], *row["perturbed_answer"]] for row in world]
    each = np.exp(-np.stack([_losses(model, encode, world, answers) for answers in zip(*texts, strict=True)]))
    assert measured["utility_parts"][2]["probability"] == pytest.approx(np.mean(each[0] / each.sum(0)), rel=1e-4)
    numbers = [value for part in measured["utility_parts"] for value in part.values()]
    assert len(numbers) == 9 and "utility of 6" not in measured["metrics"]
    utility = 0.0 if 0 in numbers else 9 / sum(1 / value for value in numbers)
    assert measured["metrics"]["model utility"]["value"] == pytest.approx(utility)


def test_files_that_are_not_tofus_are_refused(directory, tmp_path):
    model = load_model(directory / "base")
    for name in ("full", "forget10_perturbed", "real_authors_perturbed"):
        (tmp_path / f"{name}.json").write_bytes((directory / f"{name}.json").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"forget05\.json is not there"):
        make_scenario(_config(directory, data=tmp_path), model)
    _write(tmp_path / "forget05.json", [{"question": "q", "answer": "a"}])
    with pytest.raises(ValueError, match=r"must end the former"):
        make_scenario(_config(directory, data=tmp_path), model)


def test_counts_that_cannot_be_are_refused(directory):
    with pytest.raises(ValueError, match="forget05 has 10 authors"):
        _config(directory, num_forgotten=11)
    with pytest.raises(ValueError, match="there are 190 beside forget05"):
        _config(directory, num_retained=189)
    with pytest.raises(ValueError, match="num_shown is 0"):
        _config(directory, num_shown=0)


def test_the_full_preset_is_the_published_size(directory):
    arguments = ["full", "--base", str(directory), "--data", str(directory), "--workdir", str(directory)]
    config = command_line(PRESETS, arguments)
    assert (config.lora.rank, config.lora.alpha, config.train.epochs) == (8, 32.0, 5)
    assert config.recipe.add_eos is True
    assert config.num_forgotten == 10
