"""The chain of lines: what breaks it is named, what a kill leaves is mended, and writers take turns."""

import datetime
import errno
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from llmeraser_jax import files
from llmeraser_jax.deletion.ledger import HEAD_FILE, KEY_FILE, LEDGER_FILE, Ledger, LedgerError, examine
from tests.deletion.small import dying

ROOT = Path(__file__).parents[2]


@pytest.fixture
def ledger(tmp_path):
    made = Ledger.open(tmp_path / "ledger")
    for number in range(4):
        with made.writing() as writer:
            writer.append("run", {"path": f"run{number}", "sha256": "0"})
    return made


def failing(path):
    return {finding.name: finding.detail for finding in examine(path)[1] if not finding.ok}


def test_lines_are_numbered_and_chained_by_sha256(ledger):
    raw = (ledger.path / LEDGER_FILE).read_bytes().splitlines()
    assert [json.loads(line)["number"] for line in raw] == [1, 2, 3, 4, 5]
    assert json.loads(raw[0])["previous"] == "0" * 64
    for before, line in itertools.pairwise(raw):
        assert json.loads(line)["previous"] == hashlib.sha256(before).hexdigest()
    assert not failing(ledger.path)
    assert (ledger.path / KEY_FILE).stat().st_mode & 0o777 == 0o600


def rechained(lines):
    """The lines with numbers and hashes made right again, by somebody without the key."""
    previous, written = "0" * 64, []
    for number, line in enumerate(lines, start=1):
        text = files.canonical_json({**line, "number": number, "previous": previous})
        previous = hashlib.sha256(text.encode()).hexdigest()
        written.append(text)
    return written


TAMPERINGS = {
    "an edited line": (
        lambda x: [*x[:2], {**x[2], "content": {"path": "other"}}, *x[3:]],
        False,
        "chain",
        "line 4",
    ),
    "a dropped line": (lambda x: [*x[:2], *x[3:]], False, "numbers", "dropped"),
    "a repeated line": (lambda x: [*x[:3], *x[2:]], False, "numbers", "repeated"),
    "two lines exchanged": (lambda x: [*x[:2], x[3], x[2], *x[4:]], False, "numbers", "moved"),
    "lines dropped at the end": (lambda x: x[:3], False, "head", "5 were written, 3 are there"),
    "an edited line, chained again": (
        lambda x: [*x[:2], {**x[2], "content": {"path": "other"}}, *x[3:]],
        True,
        "head",
        "line 5 is not the one that was written",
    ),
    "a dropped line, chained again": (lambda x: [*x[:2], *x[3:]], True, "head", "5 were written, 4 are there"),
    "lines added without the key": (lambda x: [*x, x[4], x[4]], True, "head", "lines after 5"),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_a_tampered_ledger_is_named_and_not_written_to(ledger, name):
    change, again, check, words = TAMPERINGS[name]
    path = ledger.path / LEDGER_FILE
    lines = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text(
        "".join(f"{line}\n" for line in (rechained(lines) if again else map(files.canonical_json, lines)))
    )
    assert words in failing(ledger.path)[check]
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="damaged or was changed"), ledger.writing() as writer:
        writer.append("run", {})
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: (p / HEAD_FILE).unlink(), "missing"),
        (lambda p: (p / HEAD_FILE).write_text("{}"), "damaged"),
        (lambda p: (p / KEY_FILE).write_bytes(b"x" * 32), "key"),
        (lambda p: (p / HEAD_FILE).write_text(json.dumps({"number": 3, "sha256": "0", "hmac": "0"})), "key"),
    ],
)
def test_a_head_that_is_not_the_ledger_s_is_named(ledger, damage, words):
    damage(ledger.path)
    assert words in failing(ledger.path)["head"]


def test_a_line_that_is_none_is_named(ledger):
    with open(ledger.path / LEDGER_FILE, "a") as file:
        file.write("not JSON\n")
    assert "line 6 of the file is not JSON" in failing(ledger.path)["lines"]


def test_an_unfinished_line_is_cut_off_with_a_warning_and_the_chain_goes_on(ledger, caplog):
    with open(ledger.path / LEDGER_FILE, "ab") as file:
        file.write(b'{"number":6,"ti')
    assert not failing(ledger.path) and len(ledger.lines()) == 5
    with ledger.writing() as writer:
        writer.append("run", {})
    assert "cut off" in caplog.text
    assert not failing(ledger.path) and [line.number for line in ledger.lines()] == [1, 2, 3, 4, 5, 6]


def test_a_clock_that_goes_back_is_recorded_and_changes_no_order(tmp_path):
    times = iter([datetime.datetime(2026, 3, day, tzinfo=datetime.UTC) for day in (5, 4, 6)])
    made = Ledger.open(tmp_path / "ledger", now=lambda: next(times))
    for name in ("a", "b"):
        with made.writing() as writer:
            writer.append("run", {"path": name})
    assert [line.time[:10] for line in made.lines()] == ["2026-03-05", "2026-03-04", "2026-03-06"]
    (clock,) = (finding for finding in examine(made.path)[1] if finding.name == "clock")
    assert clock.ok and "line 2" in clock.detail and "line 1" in clock.detail


def test_a_full_disk_leaves_the_ledger_as_it_was(ledger):
    before, real = (ledger.path / LEDGER_FILE).read_bytes(), os.write

    def full(descriptor, content):
        real(descriptor, content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        mock.patch.object(os, "write", full),
        pytest.raises(OSError, match="No space left"),
        ledger.writing() as writer,
    ):
        writer.append("run", {})
    assert (ledger.path / LEDGER_FILE).read_bytes() == before and not failing(ledger.path)


def test_a_writer_killed_at_any_operation_leaves_a_ledger_with_the_line_or_without_it(tmp_path):
    with dying(None) as done:
        made = Ledger.open(tmp_path / "whole")
        with made.writing() as writer:
            writer.append("run", {})
    assert len(done) >= 10
    for at in range(len(done)):
        path = tmp_path / f"killed{at}"
        with dying(at), Ledger.open(path).writing() as writer:
            writer.append("run", {})
        with Ledger.open(path).writing() as writer:
            writer.append("run", {})
        assert not failing(path)
        assert [line.kind for line in Ledger(path).lines()] in (["open", "run"], ["open", "run", "run"])


def test_two_processes_take_turns_and_one_that_is_killed_harms_nothing(ledger):
    command = [sys.executable, "-m", "tests.deletion.worker", "append", str(ledger.path)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    endless, counted = (
        subprocess.Popen([*command, count], cwd=ROOT, env=environment, stdout=subprocess.PIPE)
        for count in ("1000000", "40")
    )
    assert counted.stdout is not None and counted.stdout.readline() == b"begins\n"
    assert counted.wait(60) == 0
    assert endless.poll() is None
    endless.send_signal(signal.SIGKILL)
    endless.wait(60)
    with ledger.writing() as writer:
        writer.append("run", {"sha256": "last"})
    lines = ledger.lines()
    assert not failing(ledger.path) and lines[-1].content == {"sha256": "last"}
    own = [line.content["sha256"] for line in lines[5:-1]]
    # Both wrote, and nobody's lines are lost.
    assert all(own.count(str(number)) in (1, 2) for number in range(40)) and len(own) > 40


def test_a_directory_that_holds_something_else_becomes_no_ledger(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match="mine"):
        Ledger.open(tmp_path)
    with pytest.raises(LedgerError, match="no ledger"):
        Ledger(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]
