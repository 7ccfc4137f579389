"""No file that a user can hand in ends in anything but success, or a short line that names it.

The slow part runs `LLMERASER_FUZZ` inputs of each kind (default: `SLOW`): pytest -m slow tests/fuzz
"""

import contextlib
import io
import json
import logging
import os
import re
import shutil
import sys
import time

import pytest

from llmeraser_jax import cli, text
from llmeraser_jax.data import chat
from tests.fuzz.subjects import TEMPLATES, make_subjects, write_directory

KINDS = (
    "requests jsonl", "data jsonl", "messages jsonl", "data json", "data csv", "data parquet", "data directory",
    "adapter", "configuration", "base", "sharded base", "tokenizer", "recipe", "chat recipe", "trainer's files",
    "run", "receipt",
)  # fmt: skip
QUICK, SLOW = 40, 700
PLACES = "The recipe cannot be used|The chat template of the (recipe|tokenizer)"  # named in the place of the file
SECONDS = 30  # of this process's time, for one input


class _NobodyThere(io.StringIO):
    """Standard input that must not be asked."""

    def readline(self, *arguments):
        raise AssertionError("a question was asked on the console")


@pytest.fixture(autouse=True)
def _no_handlers(monkeypatch, caplog):
    """Commands of tests before left handlers, whose streams are closed."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    caplog.set_level(logging.WARNING, "llmeraser_jax")


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
    if str(path) not in told and not re.search(PLACES, told):
        return "does not name the file"
    return None


def run(subject, seeds, work):
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
    monkeypatch.setattr(chat, "_MOST_SECONDS", 0.5)
    monkeypatch.setattr(chat, "_MOST_BYTES", 2**28)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_inputs_are_read(subjects, kind, tmp_path):
    write_directory(tmp_path, subjects[kind].files)
    assert outcome(subjects[kind], tmp_path) == (0, "")


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_inputs_end_in_one_line_that_names_them(subjects, kind, tmp_path, nobody):
    assert run(subjects[kind], range(QUICK), tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_inputs(subjects, kind, tmp_path, nobody):
    count = int(os.environ.get("LLMERASER_FUZZ", SLOW))
    assert run(subjects[kind], range(1000, 1000 + count), tmp_path) == []


def test_code_of_a_tokenizer_is_refused_by_name(subjects, tmp_path, nobody):
    from llmeraser_jax.models import load_tokenizer

    files = dict(subjects["tokenizer"].files)
    config = json.loads(files["tokenizer_config.json"])
    config |= {"auto_map": {"AutoTokenizer": ["mine.Tokenizer", None]}, "tokenizer_class": "Mine"}
    files["tokenizer_config.json"] = json.dumps(config).encode()
    files["mine.py"] = b"open('ran', 'w')\n"
    write_directory(tmp_path, files)
    with pytest.raises(ValueError, match=rf"{tmp_path}: its tokenizer is code of its own \(auto_map\)"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("number", ["nan", "inf", "1e300"])
def test_numbers_that_are_none_are_found_in_an_adapter(subjects, number, tmp_path):
    from safetensors.numpy import load_file, save_file

    write_directory(tmp_path, subjects["adapter"].files)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(name for name in tensors if "v_proj.lora_B" in name)
    tensors[name] = tensors[name].astype("float64")
    tensors[name][0, 0] = float(number)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    status, told = outcome(subjects["adapter"], tmp_path)
    assert status == 1 and "holds nan, infinity or numbers beyond float32 in layers/v_proj/b" in told


def test_an_expression_that_takes_for_ever_is_refused(subjects, tmp_path, monkeypatch):
    from llmeraser_jax.lora import config as lora_config

    monkeypatch.setattr(lora_config, "_MOST_SECONDS", 0.2)
    files = dict(subjects["adapter"].files)
    config = json.loads(files["adapter_config.json"]) | {
        "target_modules": r"(\w|\w\w|\.|[a-z.])+X|(.*)*(.*)*(.*)*Y"
    }
    files["adapter_config.json"] = json.dumps(config).encode()
    write_directory(tmp_path, files)
    status, told = outcome(subjects["adapter"], tmp_path)
    assert status == 1 and "takes more than 0.2 s" in told and str(tmp_path) in told


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (TEMPLATES[0], "takes longer than 0.5 s"),
        ("{% set n = namespace(x='a' * 2 ** 20) %}{% for i in range(20) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
         "MemoryError"),
        ("{{ 'a' * 30000000 }}", "writes 30000000 characters"),
    ],
)  # fmt: skip
def test_a_template_is_bounded_in_time_memory_and_length(subjects, template, said, tmp_path, nobody):
    write_directory(tmp_path, {**subjects["tokenizer"].files, "chat_template.jinja": template.encode()})
    status, told = outcome(subjects["tokenizer"], tmp_path)
    assert status == 1 and said in told and str(tmp_path) in told
