"""Which rows the TALLRec experiment takes and what it requests, on four rows of two users."""

import csv
import dataclasses
import json
from pathlib import Path

import pytest

from experiments.common import draw
from experiments.tallrec_movie import prepare
from experiments.tallrec_movie.main import TallrecConfig, main, make_scenario
from llmeraser_jax.data import Action, Example, Request, apply_requests
from llmeraser_jax.models import load_model
from tests.training import tiny

USERS = ("7", "7", "7", "9")
LABELS = ("Yes.", "No.", "Yes.", "No.")


def _write_split(directory: Path, split: str) -> None:
    rows = [{"instruction": "colour of", "input": f"s{k}", "output": label} for k, label in enumerate(LABELS)]
    (directory / f"{split}.json").write_text(json.dumps(rows))
    with (directory / f"{split}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user_id", "movie_id"])
        writer.writerows([user, k] for k, user in enumerate(USERS))


@pytest.fixture
def directory(tmp_path):
    _write_split(tmp_path, "train")
    _write_split(tmp_path, "valid")
    _write_split(tmp_path, "test")
    tiny.save_tiny_model(tmp_path / "base")
    return tmp_path


@pytest.fixture
def examples(directory):
    return prepare.load_rows(directory, "train")[0]


def _config(directory: Path, **changes) -> TallrecConfig:
    settings = {
        "num_rows": 4, "num_test": 4, "num_kl": 2, "num_shown": 2, "removed_share": 0.25, "edited_share": 0.5,
        "max_length": 32,
    }  # fmt: skip
    return TallrecConfig(
        **{"base": directory, "data": directory, "workdir": directory / "out", **settings, **changes}
    )


def test_rows_carry_their_number_as_id_and_their_user(directory):
    examples, users = prepare.load_rows(directory, "train")
    assert [e.id for e in examples] == ["0", "1", "2", "3"]
    assert [e.response for e in examples] == list(LABELS)
    assert users == USERS


def test_files_that_do_not_pair_up_are_refused(directory):
    (directory / "train.csv").write_text("user_id,movie_id\n7,0\n")
    with pytest.raises(ValueError, match=r"train.csv has 1 rows and train.json 4"):
        prepare.load_rows(directory, "train")


def test_no_user_gives_more_rows_than_allowed():
    for seed in range(5):
        chosen = prepare.choose_rows(USERS, 3, 2, seed)
        assert sorted(USERS[row] for row in chosen) == ["7", "7", "9"]
        assert chosen.tolist() == sorted(set(chosen.tolist()))


def test_all_rows_are_taken_where_all_are_asked_for():
    assert prepare.choose_rows(USERS, 4, 3, 0).tolist() == [0, 1, 2, 3]


def test_more_rows_than_the_users_have_are_refused():
    with pytest.raises(ValueError, match="2 users with 2 rows each give 3 rows, not 4"):
        prepare.choose_rows(USERS, 4, 2, 0)


@pytest.mark.parametrize(("num_rows", "expected"), [(1, {"9"}), (4, {"7", "9"})])
def test_users_are_chosen_to_have_exactly_the_rows_wanted(num_rows, expected):
    for seed in range(5):
        assert set(prepare.choose_users(USERS, num_rows, seed)) == expected


def test_a_number_of_rows_that_no_set_of_users_has_is_refused():
    with pytest.raises(ValueError, match="No set of the 2 users has exactly 2 rows"):
        prepare.choose_users(USERS, 2, 0)


@pytest.mark.parametrize("seed", range(5))
def test_users_with_uneven_numbers_of_rows_are_combined_until_they_fit(seed):
    users = [*"aaa", *"bb", *"cc", *"ddddd"]  # only b and c together have four rows
    assert sorted(prepare.choose_users(users, 4, seed)) == ["b", "c"]
    drawn = prepare.choose_users(users, 7, seed)
    assert len(set(drawn)) == len(drawn) and sum(map(users.count, drawn)) == 7


def test_removal_names_every_row_of_the_user_and_no_other(examples):
    assert prepare.removal_requests(examples, USERS, ["7"]) == tuple(
        Request(id=id_, action=Action.REMOVE) for id_ in ("0", "1", "2")
    )


def test_flipping_inverts_the_labels_named_and_no_other(examples):
    wrong, requests = prepare.flip_labels(examples, 2, 0)
    named = {int(request.id) for request in requests}
    assert len(named) == 2
    opposite = {"Yes.": "No.", "No.": "Yes."}
    assert [e.response for e in wrong] == [opposite[y] if k in named else y for k, y in enumerate(LABELS)]
    assert {r.action for r in requests} == {Action.CORRECT_RESPONSE}


def test_the_corrections_restore_the_labels(examples):
    wrong, requests = prepare.flip_labels(examples, 2, 1)
    assert wrong != examples
    assert apply_requests(wrong, requests) == examples


@pytest.mark.parametrize("name", ["removal", "correction"])
def test_a_scenario_names_what_it_says_and_measures_on_other_rows(directory, name):
    config = _config(directory)
    scenario = make_scenario(config, name, load_model(directory / "base"))
    edited = apply_requests(scenario.examples, scenario.requests)
    if name == "removal":
        assert [(r.id, r.action) for r in scenario.requests] == [("3", Action.REMOVE)]
        assert [e.id for e in edited] == ["0", "1", "2"]
        assert scenario.users == dict(zip("0123", USERS, strict=True))
    else:
        assert {r.action for r in scenario.requests} == {Action.CORRECT_RESPONSE}
        assert [e.response for e in edited] == list(LABELS)
    assert (len(scenario.shown), len(scenario.heldout)) == (2, 2)
    again = make_scenario(config, name, scenario.model)
    assert (again.examples, again.requests, again.shown) == (scenario.examples, scenario.requests, scenario.shown)


def test_one_command_measures_yes_no_answers_of_every_model(directory, capsys):
    config = _config(directory, base=directory / "base", scenarios=("removal",), epochs=2)
    main(dataclasses.replace(config, methods=("finetune-edited",), retrain_seeds=2, method_seeds=1))
    report = json.loads((config.workdir / "removal" / "report.json").read_text())
    models = report["models"]
    for scores in (models["before"], *models["retrained"]["per_seed"], models["methods"]["finetune-edited"]):
        metric = scores["task_metrics"]["accuracy"]
        # The tiny tokenizer knows neither answer: equally probable ones are no answer.
        assert (metric["total"], metric["valid"]) == (4, 0)
        assert set(scores["task_metrics"]) == {"accuracy", "auc"}
    assert report["cost"]["retrain"]["per_seed"][0]["gradient_equivalents"] == 6
    assert "removal: 1 of 4 examples named" in capsys.readouterr().out


def test_more_rows_than_there_are_cannot_be_drawn(examples):
    assert draw(examples, 4, 0) == examples
    assert len({e.id for e in draw(examples, 3, 0)}) == 3
    with pytest.raises(ValueError, match="5 rows were asked for, and there are 4"):
        draw(examples, 5, 0)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_that_names_nothing_or_everything_is_refused(directory, share):
    with pytest.raises(ValueError, match="removed_share is"):
        _config(directory, removed_share=share)


def test_the_last_film_of_the_history_is_replaced_and_nothing_else():
    text = (
        'User Preference: "A", "B (1)"\nUser Unpreference: "C"\nWhether the user will like the target movie "{}"?'
    )
    rows = tuple(Example(id=str(k), instruction="i", input=text.format(f"T{k}"), response="Yes.") for k in range(3))
    (request,) = prepare.replace_films(rows, 1, 0)
    (new,) = [row for row in apply_requests(rows, [request]) if row not in rows]
    target = int(new.id)
    others = [f"T{k}" for k in range(3) if k != target]
    assert new.input in {rows[target].input.replace('"C"', f'"{other}"') for other in others}
