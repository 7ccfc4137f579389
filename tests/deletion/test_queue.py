"""Requests that wait, and processing them: what is refused, what is written back, and kills at every operation."""

import datetime
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmeraser_jax.deletion import Ledger, LedgerError, add_entry, one_month_later, process_queue, read_state
from llmeraser_jax.deletion.ledger import LEDGER_FILE, examine
from llmeraser_jax.runs import load_run
from tests.deletion.small import SECRET, dying, erase_nothing, make_run
from tests.training import tiny

ROOT = Path(__file__).parents[2]
TODAY = datetime.date(2026, 3, 31)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def model(made):
    return made[0]


@pytest.fixture(scope="module")
def run(made):
    return made[1]


def clock():
    return datetime.datetime(2026, 3, 31, 12, tzinfo=datetime.UTC)


def correction(directory, id_="r5"):
    line = {"id": id_, "action": "correct_response", "response": SECRET}
    return tiny.write_rows(directory / "correction.jsonl", [line])


@pytest.fixture
def ledger(run, tmp_path):
    """Two entries: two removals by a rule, due in a month, and a correction that is due today."""
    made = Ledger.open(tmp_path / "ledger", now=clock)
    add_entry(made, run.path, subject="Ada Dorson", where="user=U1", reason="Art. 17", requester="data subject")
    add_entry(made, pseudonym="case 7", requests_path=correction(tmp_path), due=TODAY)
    return made


def entries(ledger):
    return list(read_state(ledger.lines()).entries.values())


def process(ledger, model, **options):
    options = {"everything": True, "erase": erase_nothing, "compute": {"model": model}, **options}
    return process_queue(ledger, **options)


def everything_in(directory):
    return b"".join(path.read_bytes() for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("received", "due"),
    [("2026-01-15", "2026-02-15"), ("2026-01-31", "2026-02-28"), ("2024-01-30", "2024-02-29"),
     ("2026-03-31", "2026-04-30"), ("2026-12-31", "2027-01-31")],
)  # fmt: skip
def test_the_due_day_is_a_calendar_month_later(received, due):
    assert one_month_later(datetime.date.fromisoformat(received)) == datetime.date.fromisoformat(due)


def test_an_entry_holds_rows_dates_and_a_pseudonym_but_no_name_and_no_text(ledger):
    first, second = entries(ledger)
    assert first.rows == (("r1", "remove"), ("r2", "remove")) and second.rows == (("r5", "correct_response"),)
    assert first.due == datetime.date(2026, 4, 30) and second.due == TODAY
    assert first.subject == ledger.pseudonym("Ada Dorson") and second.subject == "case 7"
    written = (ledger.path / LEDGER_FILE).read_text()
    assert not [text for text in ("Ada", "U1", SECRET, "colour") if text in written]
    (texts,) = (ledger.path / "pending").iterdir()
    assert texts.stat().st_mode & 0o777 == 0o600 and SECRET in texts.read_text()


def test_what_is_due_comes_first_and_by_a_date(ledger):
    state = read_state(ledger.lines())
    assert [entry.number for entry in state.waiting(TODAY)] == [4]
    assert [entry.number for entry in state.waiting()] == [4, 3]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"where": "user=U99"}, "matches none of the 10 rows"),
        ({"where": "colour=red"}, "has the column 'colour'.*id, instruction, input, output, user"),
        ({"where": "user"}, "COLUMN=VALUE"),
        ({"ids": ["r1", "r9"]}, "'r1' is named already by entry 3, which is pending"),
        ({"ids": ["nobody"]}, "unknown id 'nobody'"),
        ({"ids": ["r9"], "where": "user=U2"}, "one way"),
        ({}, "one way"),
        ({"ids": ["r9"], "subject": None}, "whom the request is about"),
        ({"ids": ["r9"], "pseudonym": "x"}, "whom the request is about"),
        ({"ids": ["r9"], "due": datetime.date(2026, 3, 1)}, "before it was received"),
        ({"ids": [f"r{k}" for k in range(10)]}, "removes all 10"),
    ],
)
def test_what_cannot_be_carried_out_is_refused_in_one_line_and_nothing_is_written(ledger, options, words):
    before = everything_in(ledger.path)
    with pytest.raises(ValueError, match=words) as raised:
        add_entry(ledger, **{"subject": "somebody", **options})
    assert "\n" not in str(raised.value) and everything_in(ledger.path) == before


def test_a_rule_that_matches_every_row_is_refused(run, tmp_path):
    rows = [{**row, "site": "all"} for row in tiny.rows()]
    path = tiny.write_rows(tmp_path / "sites.jsonl", rows)
    with pytest.raises(LedgerError, match="matches all 10 rows"):
        add_entry(Ledger.open(tmp_path / "l"), run.path, subject="x", where="site=all", data_path=path)


def test_processing_writes_each_outcome_back_and_drops_new_texts(ledger, model, run):
    done = process(ledger, model, everything=False)
    assert done is not None and [entry.number for entry in done.entries] == [4]
    first, second = entries(ledger)
    assert first.state == "pending" and second.state == "done" and second.outcome is not None
    assert second.outcome["verdict"] == "complete" and second.outcome["arrived"] == {"r5": True}
    assert not list((ledger.path / "pending").iterdir())
    assert not (ledger.path / "processing" / "requests.jsonl").exists()
    out = ledger.path / "runs" / "batch-0005"
    assert {e.id: e.response for e in load_run(out).load_examples()}["r5"] == SECRET
    # The second batch erases from the first one's result, and with nothing left there is nothing to do.
    again = process(ledger, model)
    assert again is not None and again.run.parent is not None
    assert again.run.parent["sha256"] == load_run(out).reference()["sha256"]
    assert {"r1", "r2"}.isdisjoint(again.run.data_ids) and len(again.run.data_ids) == 8
    assert process(ledger, model) is None
    assert all(finding.ok for finding in examine(ledger.path)[1])
    # Later entries see the edited data, and the run before is not taken up again.
    with pytest.raises(ValueError, match="unknown id 'r1'"):
        add_entry(ledger, subject="x", ids=["r1"])
    with pytest.raises(LedgerError, match="none of them any more"):
        add_entry(ledger, subject="x", where="user=U1")
    with pytest.raises(LedgerError, match="has gone on from"):
        add_entry(ledger, run.path, subject="x", ids=["r9"])
    assert add_entry(ledger, subject="x", where="user=U2").rows == (("r3", "remove"), ("r4", "remove"))


def test_a_failed_batch_leaves_its_entries_waiting(ledger, model):
    def fail(*arguments, **options):
        raise ValueError("no usable step")

    with pytest.raises(ValueError, match="no usable step"):
        process(ledger, model, erase=fail)
    assert {entry.state for entry in entries(ledger)} == {"pending"}
    assert entries(ledger)[0].failure == "ValueError: no usable step"
    assert not (ledger.path / "processing" / "requests.jsonl").exists() and not (ledger.path / "runs").exists()
    assert process(ledger, model) is not None


def test_a_batch_begun_with_other_settings_is_begun_again(ledger, model):
    with dying(None), pytest.raises(OSError, match="disk"):
        process(ledger, model, erase=_full_disk, seed=1)
    assert {entry.state for entry in entries(ledger)} == {"in progress"}
    with pytest.raises(LedgerError, match="named already by entry 3, which is in progress"):
        add_entry(ledger, subject="x", ids=["r1"])
    assert process(ledger, model, seed=2) is not None
    kinds = [line.kind for line in ledger.lines()]
    assert kinds[4:] == ["start", "failed", "start", "outcome", "outcome"]


def _full_disk(*arguments, **options):
    raise OSError("the disk is full")


def test_new_texts_that_were_changed_or_lost_are_named(ledger, model):
    (texts,) = (ledger.path / "pending").iterdir()
    content = texts.read_text()
    texts.write_text(content.replace(SECRET, "blue"))
    with pytest.raises(LedgerError, match="entry 4"):
        process(ledger, model)
    texts.unlink()
    with pytest.raises(LedgerError, match="missing"):
        process(ledger, model)
    assert [line.kind for line in ledger.lines()][4:] == []


def test_a_run_that_is_another_s_is_not_taken_for_the_batch_s(ledger, model, run):
    shutil.copytree(run.path, ledger.path / "runs" / "other")
    with pytest.raises(FileExistsError, match="already holds"):
        process(ledger, model, workdir=ledger.path / "runs" / "other")


def test_killed_at_any_operation_the_same_call_goes_on_and_erases_once(ledger, model, run, tmp_path):
    whole = shutil.copytree(ledger.path, tmp_path / "whole")
    with dying(None) as done:
        assert process(Ledger(whole, now=clock), model) is not None
    assert len(done) >= 40
    for at in range(0, len(done), 2):
        path = shutil.copytree(ledger.path, tmp_path / f"killed{at}")
        calls = []

        def counted(*arguments, calls=calls, **options):
            calls.append(arguments[2])
            return erase_nothing(*arguments, **options)

        with dying(at):
            process(Ledger(path, now=clock), model, erase=counted)
        erased = [p for p in (path / "runs").glob("batch-*") if (p / "run.json").exists()]
        process(Ledger(path, now=clock), model, erase=counted)
        assert all(finding.ok for finding in examine(path)[1]), at
        lines = Ledger(path).lines()
        outcomes = [line.content["entry"] for line in lines if line.kind == "outcome"]
        assert sorted(outcomes) == [3, 4], at
        assert len(calls) == (1 if erased or not calls[1:] else 2), at
        assert len(list((path / "runs").glob("batch-*"))) == 1, at
        assert not list((path / "pending").iterdir()) and not (path / "processing" / "requests.jsonl").exists(), at
        shutil.rmtree(path)


def test_an_addition_killed_at_any_operation_is_there_once_or_can_be_made_again(ledger, tmp_path):
    request = correction(tmp_path, "r8")
    whole = shutil.copytree(ledger.path, tmp_path / "whole")
    with dying(None) as done:
        add_entry(Ledger(whole, now=clock), pseudonym="case 8", requests_path=request)
    assert len(done) >= 6
    for at in range(len(done)):
        path = shutil.copytree(ledger.path, tmp_path / f"killed{at}")
        with dying(at):
            add_entry(Ledger(path, now=clock), pseudonym="case 8", requests_path=request)
        try:
            add_entry(Ledger(path, now=clock), pseudonym="case 8", requests_path=request)
        except LedgerError as error:
            assert "named already by entry 5" in str(error)
        assert [entry.rows[0][0] for entry in entries(Ledger(path))] == ["r1", "r5", "r8"]
        assert all(finding.ok for finding in examine(path)[1])


def test_a_process_killed_after_the_erasure_does_not_erase_again(ledger, model, run):
    arguments = [sys.executable, "-m", "tests.deletion.worker", "process", str(ledger.path)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    worker = subprocess.Popen([*arguments, str(run.model_path)], cwd=ROOT, env=environment, stdout=subprocess.PIPE)
    assert worker.stdout is not None
    assert worker.stdout.readline() == b"begins\n" and worker.stdout.readline() == b"erased\n"
    with pytest.raises(RuntimeError, match="Another process"):
        process(ledger, model)
    worker.send_signal(signal.SIGKILL)
    worker.wait(60)
    done = process(ledger, model, erase=_full_disk)
    assert done is not None and [entry.state for entry in done.entries] == ["done", "done"]
