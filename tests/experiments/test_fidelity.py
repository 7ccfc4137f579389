"""The fidelity experiment: which rows and requests it draws, and that a second call computes nothing again."""

import dataclasses
import json

import numpy as np
import pytest

from experiments.fidelity import cells, main, methods, profiles, table, tasks
from experiments.workdirs import claim_settings
from llmeraser_jax.data import Action, Example, Recipe, apply_requests, load_examples, parse_requests
from llmeraser_jax.demo.people import CITIES, PROFESSIONS
from llmeraser_jax.models import load_model
from llmeraser_jax.unlearning import EraseConfig, UnlearningError
from tests.training import tiny

PEOPLE = profiles.make_profiles(40)
WORDED = profiles.make_profiles(120, phrasings=3)


def test_training_rows_depend_on_size_and_seed_alone():
    assert profiles.make_profiles(40) == PEOPLE
    assert profiles.make_profiles(40, seed=1).train != PEOPLE.train
    assert len(PEOPLE.train) == 40 and len({row.query for row in PEOPLE.train}) == 40
    assert len({row.query for row in WORDED.train}) == 120


def test_a_fact_has_one_answer_in_all_its_wordings():
    answers = {}
    for row in WORDED.train:
        answers.setdefault(row.id.rsplit("-", 1)[0], set()).add(row.response)
    assert len(answers) == 40 and all(len(found) == 1 for found in answers.values())


@pytest.mark.parametrize("num_rows", [400, 6000])
def test_nobody_is_drawn_twice_even_where_the_names_of_the_demo_run_out(num_rows):
    drawn = profiles.make_profiles(num_rows)
    queries = [row.query for row in (*drawn.train, *drawn.heldout)]
    assert len(set(queries)) == len(queries) == num_rows + 264
    assert not {name for name in drawn.strangers if any(name in query for query in queries)}


def test_removals_take_all_rows_of_a_person():
    requests = profiles.make_requests(WORDED, "removal", 0.1)
    assert {request.action for request in requests} == {Action.REMOVE}
    people = [request.id.split("-")[0] for request in requests]
    assert len(set(people)) == 2 and all(people.count(person) == 6 for person in people)


@pytest.mark.parametrize(("category", "field"), [("query", "instruction"), ("correction", "response")])
def test_edits_change_one_thing_in_all_wordings_of_a_fact(category, field):
    requests = profiles.make_requests(WORDED, category, 0.1)
    edited = {row.id: row for row in apply_requests(WORDED.train, requests)}
    changed = [(row, edited[row.id]) for row in WORDED.train if edited[row.id] != row]
    assert len(changed) == len(requests) == 12  # 4 of 40 facts
    assert len({row.id.split("-")[0] for row, _ in changed}) == 4
    for row, new in changed:
        assert dataclasses.replace(new, **{field: getattr(row, field)}) == row
    if category == "correction":
        assert len({(row.id.rsplit("-", 1)[0], new.response) for row, new in changed}) == 4
        assert {new.response.rstrip(".") for _, new in changed} <= {*CITIES, *PROFESSIONS}
    else:
        assert not {new.query for _, new in changed} & {row.query for row in (*WORDED.train, *WORDED.heldout)}


def test_request_seeds_name_other_rows_of_the_same_data():
    first, second = (profiles.make_requests(PEOPLE, "removal", 0.1, seed) for seed in (0, 1))
    assert first != second and len(first) == len(second) == 4


def test_the_last_film_of_the_history_is_replaced_and_nothing_else():
    text = (
        'User Preference: "A", "B (1)"\nUser Unpreference: "C"\nWhether the user will like the target movie "{}"?'
    )
    rows = tuple(Example(id=str(k), instruction="i", input=text.format(f"T{k}"), response="Yes.") for k in range(3))
    (request,) = tasks.replace_films(rows, 1, 0)
    (new,) = [row for row in apply_requests(rows, [request]) if row not in rows]
    target = int(new.id)
    others = [f"T{k}" for k in range(3) if k != target]
    assert new.input in {rows[target].input.replace('"C"', f'"{other}"') for other in others}


@dataclasses.dataclass(frozen=True)
class TinyTask:
    name: str = "tiny"
    recipe: Recipe = tiny.RECIPE
    lora = tiny.LORA
    train = tiny.CONFIG
    erase = EraseConfig(l2=1e-3, sample_size=4, num_steps=2, cg_max_steps=2, diagnostic_sample=4)

    def draw(self, category, share, request_seed):
        rows = tuple(
            Example(id=row["id"], instruction=row["instruction"], input=row["input"], response=row["output"])
            for row in tiny.rows(12)
        )
        train, heldout = rows[:8], rows[8:]
        (request,) = parse_requests([{"id": f"r{request_seed}", "action": "remove"}], train)
        return tasks.CellData(
            trained_key="shared", train=train, heldout=heldout, num_like_train=4, requests=(request,)
        )

    def settings(self):
        return {"epochs": self.train.epochs}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(tiny.save_tiny_model(tmp_path_factory.mktemp("fidelity") / "base"))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, model):
    """Two requests of one task, one method each that works and one that fails."""
    workdir = tmp_path_factory.mktemp("fidelity") / "out"

    def fails(setting):
        raise UnlearningError("no step was found")

    for request_seed in (0, 1):
        id_ = cells.CellId(task="tiny", category="removal", share=0.125, request_seed=request_seed)
        cell = cells.Cell(workdir, id_, TinyTask(), model, num_retrained=2)
        for name in ("matched", "cb-as-matched", "ascent-best"):
            cell.run(name, methods.METHODS[name])
        cell.run("hopeless", fails)
    return workdir


def test_a_trained_run_is_shared_and_each_request_has_its_retrainings(workdir):
    assert [p.name for p in (workdir / "tasks/tiny/trained").iterdir()] == ["shared"]
    retrained = sorted(p.parent.relative_to(workdir) for p in workdir.rglob("retrained/*/*/run.json"))
    assert [str(p).removeprefix("tasks/tiny/retrained/") for p in retrained] == [
        f"removal-0.125{request}/seed_{seed}" for request in ("", "-request1") for seed in (4, 5)
    ]
    for request, gone in (("", "r0"), ("-request1", "r1")):
        path = workdir / f"tasks/tiny/retrained/removal-0.125{request}/seed_4/train.jsonl"
        assert gone not in {row.id for row in load_examples(path)}


def test_what_is_there_is_read_and_not_computed_again(workdir, model):
    def explodes(setting):
        raise AssertionError("computed again")

    cell = cells.Cell(workdir, cells.CellId(task="tiny", category="removal", share=0.125), TinyTask(), model)
    found = cell.run("matched", explodes)
    assert found == json.loads((workdir / "cells/tiny/removal-0.125/matched.json").read_text())
    (workdir / "cells/tiny/removal-0.125/again.json").unlink(missing_ok=True)
    with pytest.raises(AssertionError, match="computed again"):
        cell.run("again", explodes)


def test_a_cell_is_judged_against_the_mean_of_its_retrained_models(workdir):
    reference = json.loads((workdir / "cells/tiny/removal-0.125/reference.json").read_text())
    result = json.loads((workdir / "cells/tiny/removal-0.125/matched.json").read_text())
    target = np.mean([scores["forget_loss"] for scores in reference["retrained"]])
    before, after = reference["before"]["forget_loss"], result["after"]["forget_loss"]
    assert result["closure"] == {"forget_loss": pytest.approx(1 - abs(after - target) / abs(before - target))}
    assert result["cost"] == pytest.approx(result["gradient_equivalents"] / 70)  # 10 epochs of 7 rows
    assert result["cost_of_5_epochs"] == pytest.approx(2 * result["cost"])
    assert result["kl_over_floor"] == pytest.approx(result["after"]["heldout_kl"] / reference["seed_floor"])
    assert reference["before"]["heldout_kl"] > 0


def test_controls_move_as_far_as_the_default_or_say_that_an_oracle_chose(workdir):
    names = ("matched", "cb-as-matched", "ascent-best")
    read = {n: json.loads((workdir / f"cells/tiny/removal-0.125/{n}.json").read_text()) for n in names}
    assert read["cb-as-matched"]["delta_norm"] == pytest.approx(read["matched"]["delta_norm"], rel=1e-4)
    assert not read["cb-as-matched"]["chosen_with_oracle"] and read["ascent-best"]["chosen_with_oracle"]
    distances = read["ascent-best"]["details"]["distances_to_retraining"]
    assert 1 - read["ascent-best"]["closure"]["forget_loss"] == pytest.approx(min(distances), abs=1e-5)


def test_the_oracle_judges_by_the_gaps_that_exist():
    before, losses = {"forget_loss": 0.0, "wanted_loss": 1.0}, {"forget_loss": 1.5, "wanted_loss": 3.0}
    apart = [{"forget_loss": 2.0, "wanted_loss": w} for w in (0.0, 2.2)]
    assert cells.distance_left(before, losses, apart) == pytest.approx(0.25)
    near = [{"forget_loss": 2.0, "wanted_loss": w} for w in (0.0, 0.2)]
    assert cells.distance_left(before, losses, near) == pytest.approx(2.9 / 0.9)
    diverged = {"forget_loss": float("nan"), "wanted_loss": None}
    assert cells.distance_left(before, diverged, near) == 1e30


def test_the_table_has_a_row_per_method_over_all_requests(workdir):
    lines = table.render_table(table.load_results(workdir), tuple(methods.METHODS)).splitlines()
    assert [line.split(" | ")[3] for line in lines[2:]] == [
        "matched",
        "cb-as-matched",
        "ascent-best (oracle)",
        "hopeless",
    ]
    assert [line.split(" | ")[4] for line in lines[2:]] == ["2", "2", "2", "0 of 2"]
    assert "no step: no step was found" in lines[-1]
    assert len({line.count(" | ") for line in (lines[0], *lines[2:])}) == 1


def test_the_plot_is_a_picture_with_and_without_results(workdir):
    for results in ([], table.load_results(workdir)):
        assert table.render_plot(results, tuple(methods.METHODS)).startswith(b"\x89PNG")


def test_other_settings_are_refused_in_a_workdir(tmp_path):
    claim_settings(tmp_path, {"epochs": 5, "modules": ("a",)})
    claim_settings(tmp_path, {"epochs": 5, "modules": ("a",)})
    with pytest.raises(ValueError, match="epochs: 5 there, 6 now"):
        claim_settings(tmp_path, {"epochs": 6, "modules": ("a",)})


def test_the_plan_is_cut_to_a_subset_and_large_tasks_to_their_shares(tmp_path):
    config = main.FidelityConfig(workdir=tmp_path, subset=("*/removal-*/matched", "*/query-0.01/*"))
    plan = main.planned(config)
    assert {id_.path_of(name) for id_, names in plan.items() for name in names if name == "matched"} == {
        f"profiles-400/removal-{share}/matched" for share in (0.01, 0.05, 0.1)
    } | {f"profiles-{n}/query-0.01/matched" for n in (400, 4000)} | {"profiles-4000/removal-0.01/matched"}
    assert "paper-step" not in {n for id_, names in plan.items() if id_.task == "profiles-4000" for n in names}
    assert list(main.planned(dataclasses.replace(config, request_seeds=2)))[: len(plan)] == list(plan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shares": (0.5,)}, "share is 0.5"),
        ({"retrain_seeds": 1}, "needs at least 2"),
        ({"tallrec": "there"}, "both tallrec"),
        ({"large_methods": ("magic",)}, "Unknown methods magic"),
    ],
)
def test_impossible_plans_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        main.FidelityConfig(workdir=tmp_path, **changes)
