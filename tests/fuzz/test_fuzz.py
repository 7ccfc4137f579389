"""No file that a user can hand in ends in anything but success, or a short line that names it.

The slow part runs `LLMERASER_FUZZ` inputs of each kind (default: `SLOW`): pytest -m slow tests/fuzz
"""

import contextlib
import io
import os
import re
import shutil
import sys
import time

import pytest

from llmeraser_jax import cli, text
from tests.fuzz.subjects import make_subjects, write_directory

KINDS = (
    "requests jsonl", "data jsonl", "messages jsonl", "data json", "data csv", "data parquet", "data directory",
    "adapter", "configuration", "base", "sharded base", "tokenizer", "recipe", "chat recipe", "trainer's files",
    "run", "receipt",
)  # fmt: skip
QUICK, SLOW = 40, 700
SECONDS = 30  # of this process's time, for one input


class _NobodyThere(io.StringIO):
    """Standard input that must not be asked."""

    def readline(self, *arguments):
        raise AssertionError("a question was asked on the console")


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    return make_subjects(tmp_path_factory.mktemp("whole"))


def outcome(subject, path):
    """Exit status and standard error, as the console has them."""
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        status = cli.guarded(lambda: (subject.load(path) and 0) or 0)
    return status, told.getvalue()


def complaint(status, told, path, seconds):
    """What is wrong with how an input ended; None where nothing is."""
    if seconds > SECONDS:
        return f"took {seconds:.0f} s"
    if status == 0:
        return None
    lines = told.removeprefix("llmeraser: error: ").rstrip("\n").split("\n")
    if "please report it" in told:
        return "an exception that no loader expects"
    if len(lines) > 25 or len(told) > text.LONGEST_MESSAGE + 200:
        return "a message without bound"
    if not all(re.sub(r"\t", " ", line).isprintable() for line in lines):
        return "a character that a terminal obeys"
    if str(path) not in told:
        return "does not name the file"
    return None


def run(subject, seeds, work, capfd):
    failures = []
    ended = [0, 0]
    for seed in seeds:
        files, name = subject.damaged(seed)
        path = work / f"{seed}"
        path.mkdir()
        write_directory(path, files)
        began = time.process_time()
        try:
            status, told = outcome(subject, path)
        except AssertionError as error:
            status, told = 1, f"{error} please report it"
        problem = complaint(status, told, path, time.process_time() - began)
        ended[status != 0] += 1
        if problem or (path / "ran").exists():
            failures.append(f"seed {seed}, {name}: {problem}: {told[:600]!r}")
        shutil.rmtree(path)
    print(f"{subject.name}: {ended[0]} read, {ended[1]} refused, {len(failures)} wrong")
    return failures


@pytest.fixture
def nobody(monkeypatch):
    monkeypatch.setattr(sys, "stdin", _NobodyThere())


@pytest.mark.parametrize("kind", KINDS)
def test_whole_inputs_are_read(subjects, kind, tmp_path):
    write_directory(tmp_path, subjects[kind].files)
    assert outcome(subjects[kind], tmp_path) == (0, "")


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_inputs_end_in_one_line_that_names_them(subjects, kind, tmp_path, capfd, nobody):
    assert run(subjects[kind], range(QUICK), tmp_path, capfd) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_inputs(subjects, kind, tmp_path, capfd, nobody):
    count = int(os.environ.get("LLMERASER_FUZZ", SLOW))
    assert run(subjects[kind], range(1000, 1000 + count), tmp_path, capfd) == []
