"""The console script's own doings: flags, suggestions, versions, errors, closed pipes, and what it does not say."""

import os
import subprocess
import sys

import pytest

from llmeraser_jax import cli, text
from llmeraser_jax.cli import main
from tests.training import tiny

COMMAND = [sys.executable, "-m", "llmeraser_jax.cli"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["finetune", "--learning-rat", "3"],
            "llmeraser: --learning-rat is unknown; did you mean --learning-rate?",
        ),
        (["finetun", "--model", "x"], "llmeraser: finetun is unknown; did you mean finetune?"),
        (["erase", "path", "--nm-steps=3"], "llmeraser: --nm-steps is unknown; did you mean --num-steps?"),
    ],
)
def test_a_wrong_word_gets_a_suggestion_although_others_are_missing(arguments, line, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == line


def test_tyros_own_suggestion_is_not_repeated(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["finetune", "--model", "m", "--data", "d", "--workdir", str(tmp_path), "--learning-rat", "3"])
    told = capsys.readouterr().err
    assert "Perhaps you meant" in told and "--learning-rate" in told and "did you mean" not in told


def test_no_message_names_a_part_of_the_parser(capsys):
    with pytest.raises(SystemExit):
        main(["finetune", "--model", "m", "--data", "d", "--workdir", "w", "--packing", "True"])
    told = capsys.readouterr().err
    assert "packing is true" in told and "tyro" not in told


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("llmeraser ")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("x.json: not \x1b[31mJSON"), "x.json: not \\x1b[31mJSON"),
        (ValueError("a" * 10_000_000), "characters ..."),
        (KeyError("width"), "KeyError: 'width' (LLMERASER_DEBUG=1 shows where; please report it)"),
        (MemoryError(), "MemoryError (LLMERASER_DEBUG=1"),
        (RecursionError("too deep"), "RecursionError: too deep (LLMERASER"),
    ],
)
def test_every_exception_is_a_short_printable_line(error, said, capsys):
    def fail():
        raise error

    assert cli.guarded(fail) == 1
    told = capsys.readouterr().err
    assert told.startswith("llmeraser: error: ") and said in told
    assert told.count("\n") == 1 and len(told) < text.LONGEST_MESSAGE + 100 and told.rstrip("\n").isprintable()


def test_names_from_files_reach_no_terminal_as_they_are(tmp_path, capsys):
    model = tiny.save_tiny_model(tmp_path / "model")
    rows = [{**row, "id": f"\x1b]0;{row['id']}\x07", "no\x1b[2Jte": "x"} for row in tiny.rows(2)]
    data = tiny.write_rows(tmp_path / "data.jsonl", rows)
    assert main(["preview", "--model", str(model), "--data", str(data)]) == 0
    shown = capsys.readouterr()
    assert "\\x1b]0;r0\\x07" in shown.out and "these columns are ignored" in shown.err
    assert "\x1b" not in shown.out + shown.err


def test_a_reader_that_has_gone_is_no_error():
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = f"{' '.join(COMMAND)} finetune --help | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.startswith("usage: llmeraser") and done.stderr == ""


def test_nothing_is_said_about_pytorch_where_it_is_absent(tmp_path):
    model = tiny.save_tiny_model(tmp_path / "model")
    data = tiny.write_rows(tmp_path / "data.jsonl", tiny.rows(2))
    program = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a)\n"
        "import llmeraser_jax.cli\n"
        f"sys.exit(llmeraser_jax.cli.main(['preview', '--model', {str(model)!r}, '--data', {str(data)!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "2 examples" in done.stdout
    assert "PyTorch" not in done.stderr + done.stdout
