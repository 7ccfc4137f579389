"""The fidelity experiment: which rows and requests it draws, and that a second call computes nothing again."""

import dataclasses
import json

import numpy as np
import pytest
from scipy import stats

from experiments import study
from experiments.common import claim_settings
from experiments.fidelity import frontier, main, profiles
from llmeraser_jax.data import Action, Example, Recipe, apply_requests, load_examples
from llmeraser_jax.demo.people import CITIES, PROFESSIONS
from llmeraser_jax.evaluation.page import Row, rows_of
from llmeraser_jax.evaluation.records import read_comparison, write_plan
from llmeraser_jax.evaluation.render import Picture, Table
from llmeraser_jax.models import load_model
from llmeraser_jax.unlearning import TargetMatching, UnlearningError
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


@dataclasses.dataclass(frozen=True)
class TinyTask:
    name = "tiny"
    recipe: Recipe = tiny.RECIPE
    lora = tiny.LORA
    train = tiny.CONFIG

    def draw(self):
        rows = tuple(
            Example(id=row["id"], instruction=row["instruction"], input=row["input"], response=row["output"])
            for row in tiny.rows(12)
        )
        return profiles.Profiles(phrasings=1, train=rows[:8], heldout=rows[8:], strangers=())


@dataclasses.dataclass(frozen=True)
class Hopeless:
    def run(self, task, workspace):
        raise UnlearningError("no step was found")


def cell_of(workdir, model, share=0.125, retrain_seeds=2):
    id_ = main.CellId(task="tiny", category="removal", share=share)
    return main.study_of(workdir, id_, TinyTask(), model, retrain_seeds)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(tiny.save_tiny_model(tmp_path_factory.mktemp("fidelity") / "base"))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, model):
    """Two requests of one task; of the first, methods that work and one that fails."""
    workdir = tmp_path_factory.mktemp("fidelity") / "out"
    monkeypatch = pytest.MonkeyPatch()
    quick = TargetMatching(sample_size=4)
    monkeypatch.setattr(main, "METHODS", {**main.METHODS, "target-matching": quick, "hopeless": Hopeless()})
    claim_settings(workdir / "tasks" / "tiny", {"train": {"epochs": tiny.CONFIG.epochs}})
    for share, names in ((0.125, ("target-matching", "cb-as-matched", "hopeless")), (0.2, ())):
        cell = cell_of(workdir, model, share)
        write_plan(cell.workdir, cell.plan(dict.fromkeys(names, 1)))
        assert cell.retrained
        for name in names:
            cell.run(name, 0)
    monkeypatch.undo()
    return workdir


def test_a_trained_run_is_shared_and_each_request_has_its_retrainings(workdir):
    assert (workdir / "tasks/tiny/trained/run.json").exists()
    retrained = sorted(p.parent.relative_to(workdir) for p in workdir.rglob("retrained/*/*/run.json"))
    assert [str(p).removeprefix("tasks/tiny/retrained/") for p in retrained] == [
        f"removal-{share}/seed_{seed}" for share in (0.125, 0.2) for seed in (4, 5)
    ]
    for share in (0.125, 0.2):
        path = workdir / f"tasks/tiny/retrained/removal-{share}/seed_4/train.jsonl"
        gone = {r.id for r in profiles.make_requests(TinyTask().draw(), "removal", share)}
        assert len(gone) == 2 and not gone & {row.id for row in load_examples(path)}


def test_what_is_there_is_read_and_not_computed_again(workdir, model, monkeypatch):
    monkeypatch.setattr(study.Study, "fit", None)
    record = cell_of(workdir, model).run("target-matching", 0)
    kept = json.loads((workdir / "cells/tiny/removal-0.125/records/target-matching-seed_0.json").read_text())
    assert record.scores == kept["scores"]
    with pytest.raises(TypeError):
        cell_of(workdir, model).run("newton", 0)


def test_a_cell_is_judged_against_the_mean_of_its_retrained_models(workdir):
    report = dict(main.load_reports(workdir))["tiny/removal-0.125"]
    retrained, result = report["models"]["retrained"], report["models"]["methods"]["target-matching"]
    target = np.mean([scores["forget_loss"] for scores in retrained["per_seed"]])
    before, after = report["models"]["before"]["forget_loss"], result["forget_loss"]
    closure = report["gap_closure"]["methods"]["target-matching"]["forget_loss"]
    assert closure == pytest.approx(1 - abs(after - target) / abs(before - target))
    rows = {row.label: row for row in rows_of(report)}
    spent = report["cost"]["methods"]["target-matching"]["gradient_equivalents"]
    assert rows["target-matching"].share("gradient_equivalents") == pytest.approx(spent / 60)  # 10 epochs of 6 rows
    assert float(main.EXTRA_COLUMNS[0].cell(rows["target-matching"])) == pytest.approx(2 * spent / 60, rel=5e-3)
    assert report["seed_floor"]["heldout_kl"] > 0 and report["models"]["before"]["heldout_kl_to_retrained"] > 0
    assert set(result["task_metrics"]) == {"exact_match", "retained: exact_match"}


def test_controls_move_as_far_as_the_default(workdir):
    records = {r.model: r for r in read_comparison(workdir / "cells/tiny/removal-0.125").of("unlearned")}
    moved = {name: record.details.get("delta_norm") for name, record in records.items()}
    assert moved["cb-as-matched"] == pytest.approx(moved["target-matching"], rel=1e-4)


def test_the_grid_has_a_row_per_cell_and_method_and_a_picture(workdir):
    blocks = main.render(workdir)
    first = next(block for block in blocks if isinstance(block, Table))
    assert [row[0].removeprefix("tiny/removal-0.125: ") for row in first.rows] == [
        "before", "target-matching", "cb-as-matched", "hopeless (no step)", "retrained, mean of 2",
    ]  # fmt: skip
    assert "cost / 5 epochs" in first.header
    assert (workdir / "grid-cost.png").read_bytes().startswith(b"\x89PNG")


def test_without_results_the_page_says_so(tmp_path):
    assert main.render(tmp_path) and "No cell was measured yet" in (tmp_path / "report.md").read_text()


def test_other_settings_are_refused_in_a_workdir(tmp_path):
    claim_settings(tmp_path, {"epochs": 5, "modules": ("a",)})
    claim_settings(tmp_path, {"epochs": 5, "modules": ("a",)})
    with pytest.raises(ValueError, match="epochs: 5 there, 6 now"):
        claim_settings(tmp_path, {"epochs": 6, "modules": ("a",)})


def test_the_plan_is_cut_to_a_subset_and_large_tasks_to_their_shares(tmp_path):
    config = main.FidelityConfig(workdir=tmp_path, subset=("*/removal-*/target-matching", "*/query-0.01/*"))
    plan = config.plan()
    of_default = {id_.path_of(name) for id_, names in plan.items() for name in names if name == "target-matching"}
    cells = [f"profiles-400/removal-{share}" for share in (0.01, 0.05, 0.1)]
    cells += ["profiles-4000/removal-0.01", "profiles-400/query-0.01", "profiles-4000/query-0.01"]
    assert of_default == {f"{cell}/target-matching" for cell in cells}
    assert "paper-step" not in {n for id_, names in plan.items() if id_.task == "profiles-4000" for n in names}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shares": (0.5,)}, "share is 0.5"),
        ({"retrain_seeds": 1}, "retrain_seeds is 1; it must be at least 2"),
    ],
)
def test_impossible_plans_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        main.FidelityConfig(workdir=tmp_path, **changes)


def row_of(closure: float | None, cost: float = 1.0, accuracy: float = 0.9) -> Row:
    """A method's row of a report."""
    retrained = {"task_metrics": {frontier.RETAINED_ACCURACY: {"value": 0.95}}}
    report = {
        "models": {"retrained": retrained},
        "cost": {"retrain": {"gradient_equivalents": 10.0}},
        "seed_floor": {},
    }
    entry = {"name": "m", "task_metrics": {frontier.RETAINED_ACCURACY: {"value": accuracy}}}
    spent = {"gradient_equivalents": cost}
    return Row(
        label="m", kind="unlearned", entry=entry, closure={"forget_loss": closure}, cost=spent, report=report
    )


def test_intervals_are_those_of_students_t():
    values = [0.2, 0.5, None, 0.9, 0.4]
    found = frontier.Estimate.of(values)
    assert found is not None and found.half is not None and found.count == 4
    known = [value for value in values if value is not None]
    low, high = stats.t.interval(0.95, 3, loc=np.mean(known), scale=stats.sem(known))
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert frontier.Estimate.of([None]) is None
    single = frontier.Estimate.of([0.5])
    assert single is not None and single.half is None and single.show("+") == "+0.50"


def test_differences_are_taken_request_by_request():
    """The methods differ by 0.1 in each request, far less than requests differ: the interval leaves out 0."""
    requests = [{"a": row_of(x), "b": row_of(x - 0.1 - 0.001 * x)} for x in (0.2, 0.5, 0.9)]
    requests += [{"a": row_of(None), "b": row_of(0.3)}, {"a": row_of(0.3)}]
    found = frontier.differences(requests, "b", "a", frontier.QUANTITIES[0])
    assert found is not None and found.count == 3 and found.mean == pytest.approx(-0.1, abs=1e-3)
    assert found.show("+").endswith("*")
    noisy = [{"a": row_of(0.5), "b": row_of(x)} for x in (0.2, 0.9, 0.5)]
    unclear = frontier.differences(noisy, "b", "a", frontier.QUANTITIES[0])
    assert unclear is not None and not unclear.show("+").endswith("*")


def test_several_requests_have_tables_and_a_picture():
    requests = [{"auto": row_of(x, 2.0), "npo": row_of(x - 0.3, 4.0, 0.85)} for x in (0.9, 0.8)]
    found = frontier.blocks({"p/removal-0.1": requests, "p/query-0.1": requests[:1]}, "auto", "grid")
    first, second = (block for block in found if isinstance(block, Table))
    assert [row[:3] for row in first.rows] == [("auto", "2", "0.2"), ("npo", "2", "0.4")]
    assert [row[0] for row in second.rows] == ["npo"] and second.rows[0][1].startswith("+0.20")
    for cell, mean in ((2, "-0.30"), (5, "-0.05")):
        assert second.rows[0][cell].startswith(f"{mean} ±") and second.rows[0][cell].endswith(" *")
    assert any(isinstance(block, Picture) for block in found)
    assert not frontier.blocks({"p/query-0.1": requests[:1]}, "auto", "grid")


def test_several_requests_of_a_kind_name_other_rows(tmp_path):
    plan = main.FidelityConfig(workdir=tmp_path, num_requests=2, num_rows=(400,), shares=(0.01,)).plan()
    assert [id_.directory for id_ in plan] == [
        "removal-0.01", "query-0.01", "correction-0.01", "removal-0.01-1", "query-0.01-1", "correction-0.01-1",
    ]  # fmt: skip
