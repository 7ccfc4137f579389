"""The experiment on a real model, whole on a tiny one: what it names, what it keeps, and that it goes on."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tyro

from experiments import study
from experiments.real_model import difficulty
from experiments.real_model import main as experiment
from experiments.real_model.main import KINDS, RealModelConfig, choose_rows, make_requests
from llmeraser_jax.data import Action, Example
from llmeraser_jax.evaluation.records import read_comparison
from llmeraser_jax.evaluation.scoring import score_examples
from llmeraser_jax.runs import load_run
from tests.training import tiny


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Six authors of 20 rows, in words that the tiny tokenizer knows."""
    path = tmp_path_factory.mktemp("real")
    rows = [
        {
            "question": f"colour of s{k % 12} s{k % 7}",
            "answer": tiny.COLOURS[k % 4],
            "perturbed_answer": [tiny.COLOURS[(k + 1) % 4], "of"],
        }
        for k in range(120)
    ]
    (path / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny.save_tiny_model(path / "base")
    return path


def config_of(directory, **changes) -> RealModelConfig:
    fields = {
        "base": directory / "base", "data": directory / "rows.json", "workdir": directory / "out",
        "num_authors": 2, "rows_each": 4, "num_corrected": 2, "num_replaced": 3, "num_answers": 2,
        "max_length": 64, "epochs": 4, "learning_rate": 0.05, "rank": 2, "retrain_seeds": 1,
        "methods": ("auto-budgeted", "finetune-edited", "msa"), "oracle": False,
    }  # fmt: skip
    return RealModelConfig(**{**fields, **changes})


def test_nobody_is_in_two_groups_and_each_author_gives_the_first_rows(directory):
    rows = choose_rows(config_of(directory))
    ids = [
        [int(example.id) for example in group] for group in (rows.train, rows.shown, rows.heldout, rows.strangers)
    ]
    authors = [[20 * author + k for k in range(4)] for author in range(5)]
    first, second, third, fourth, fifth = authors
    assert ids[0] == first + second and ids[1] == third + fourth and ids[2] == fifth
    assert ids[3] == [100, 101, 102, 103]


def test_what_each_kind_of_request_asks_for(directory):
    config = config_of(directory)
    rows = choose_rows(config)
    asked = {kind: make_requests(config, rows, kind) for kind in KINDS}
    assert [request.id for request in asked["author"]] == ["20", "21", "22", "23"]
    assert {kind: {request.action for request in requests} for kind, requests in asked.items()} == {
        "author": {Action.REMOVE},
        "scattered": {Action.REMOVE},
        "correction": {Action.CORRECT_RESPONSE},
        "query": {Action.MODIFY_QUERY},
    }
    assert {kind: len(requests) for kind, requests in asked.items()} == {
        "author": 4, "scattered": 4, "correction": 2, "query": 3,
    }  # fmt: skip
    for request in asked["correction"]:
        assert request.changes["response"] == tiny.COLOURS[(int(request.id) + 1) % 4]
    assert [r.changes["query"] for r in asked["query"]] == [e.instruction for e in rows.strangers[:3]]


def test_files_without_enough_authors_or_wrong_answers_and_unknown_methods_are_refused(directory, tmp_path):
    with pytest.raises(ValueError, match="has 6 authors of 20 rows, of whom 7 are wanted"):
        choose_rows(config_of(directory, num_authors=3))
    (tmp_path / "rows.json").write_text('{"question": "q", "answer": "a"}\n' * 120)
    with pytest.raises(ValueError, match="wrong answers"):
        choose_rows(config_of(directory, data=tmp_path / "rows.json"))
    with pytest.raises(ValueError, match="Unknown methods magic"):
        config_of(directory, methods=("magic",))


def test_the_model_is_passed_by_its_flag():
    places = ["--model", "m", "--data", "d", "--workdir", "w"]
    assert str(tyro.cli(RealModelConfig, args=places).base) == "m"


def test_a_cell_keeps_seconds_and_answers_and_a_second_call_adds_what_is_missing(directory, capsys, monkeypatch):
    first = config_of(directory, kinds=("correction",), methods=("finetune-edited",))
    experiment.main(first)
    trained = (directory / "out" / "trained" / "run.json").read_bytes()
    fit, fitted = study.Study.fit, []

    def counted(self, name, *rest):
        fitted.append(name)
        return fit(self, name, *rest)

    monkeypatch.setattr(study.Study, "fit", counted)
    experiment.main(config_of(directory, kinds=("correction",), methods=("finetune-edited", "msa")))
    assert fitted == ["msa"]
    assert (directory / "out" / "trained" / "run.json").read_bytes() == trained
    found = read_comparison(directory / "out" / "correction")
    assert [record.model for record in found.of("unlearned")] == ["finetune-edited", "msa"]
    assert all(record.details["cell_seconds"] > 0 for record in found.records)
    page = (directory / "out" / "correction" / "answers.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith(("| named", "| retained"))]
    assert len(lines) == 4 and "| before | finetune-edited | msa | retrained |" in page
    told = capsys.readouterr().out
    assert "with its measures" in told and "msa, seed 0" in told


def test_difficulty_is_measured_on_rows_that_were_not_trained_on(directory, capsys):
    config = config_of(directory, workdir=directory / "hard", kinds=("scattered",), num_scattered=1, methods=())
    experiment.main(config)
    capsys.readouterr()
    run = load_run(config.workdir / "trained")
    difficulty.main(difficulty.DifficultyConfig(run=run.path, data=config.data, num_rows=10))
    known, others = (line.split()[-4:] for line in capsys.readouterr().out.splitlines()[-2:])
    assert (known[0], others[0]) == ("10", "10")
    drawn = np.sort(np.random.default_rng(0).permutation([*range(4, 20), *range(24, 40)])[:10])
    rows = [json.loads(line) for line in config.data.read_text().splitlines()]
    examples = [
        Example(id=str(k), instruction=rows[k]["question"], response=rows[k]["answer"], format="question")
        for k in drawn
    ]
    model = run.load_model()
    losses = score_examples(model, run.load_adapter(model), run.encode(examples, model.tokenizer)).losses
    assert float(known[2]) == pytest.approx(losses.mean(), rel=5e-3)
