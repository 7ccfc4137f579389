"""Undoing gives back the adapter bit for bit until the directory is sealed; a sealing goes on after every kill."""

# The fixtures that a test takes are imported, and so redefined by its arguments.
# ruff: noqa: F811

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmeraser_jax.cli import main
from llmeraser_jax.deletion import seal, sealed_state, undo, verify_directory
from llmeraser_jax.runs import RunError, RunKeys, load_run
from tests.deletion import made
from tests.training.conftest import data_path, model, model_path  # noqa: F401

ROOT = Path(__file__).parents[2]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def erased(model, data_path, tmp_path_factory):
    work = tmp_path_factory.mktemp("erased")
    run = made.trained(work / "run", model, data_path)
    return made.erased(run, work / "out", model)


@pytest.fixture
def out(erased, tmp_path):
    """A copy of the erasure, with what killed work leaves beside it."""
    shutil.copytree(erased.path, tmp_path / "out")
    for name in ("out.solves/solve_0/state", "out.retraining/seed_4/adapter", ".out.tmp-12345678/parent_adapter"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "bytes").write_bytes(name.encode() * 9)
    return tmp_path / "out"


def weights(path):
    return (path / WEIGHTS).read_bytes()


def failed(path):
    return [finding.name for finding in verify_directory(path) if not finding.ok]


def test_undo_gives_back_the_adapter_before_bit_for_bit_when_the_run_before_is_gone(
    model, data_path, tmp_path, capsys
):
    run = made.trained(tmp_path / "run", model, data_path)
    out = made.erased(run, tmp_path / "out", model)
    before = {p.name: p.read_bytes() for p in (run.path / "adapter").iterdir()}
    assert weights(out.path / "adapter") != before[WEIGHTS]
    shutil.rmtree(run.path)
    assert main(["undo", str(out.path), "--workdir", str(tmp_path / "back")]) == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "back").iterdir()} == before
    with pytest.raises(FileExistsError, match="back already holds"):
        undo(out.path, tmp_path / "back")
    (out.path / "parent_adapter" / WEIGHTS).write_bytes(b"other")
    with pytest.raises(RunError, match="is not the file that the erasure wrote"):
        undo(out.path, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_directory_with_a_delta_is_undone_from_the_run_before_and_refused_without_it(model, data_path, tmp_path):
    run = made.trained(tmp_path / "run", model, data_path)
    out = as_older_version(made.erased(run, tmp_path / "out", model).path, run)
    undo(out, tmp_path / "back")
    assert weights(tmp_path / "back") == weights(run.path / "adapter")
    shutil.move(run.path, tmp_path / "elsewhere")
    with pytest.raises(RunError, match="the run that had it is gone"):
        undo(out, tmp_path / "again")


def as_older_version(out, run):
    """The directory as it was written before hashes had keys."""
    record = json.loads((out / "run.json").read_text())
    held = record["data"]
    held |= {"sha256": held.pop("content"), "token_sha256": held.pop("tokens")}
    del held["hashes"], held["key_check"], record["files"], record["mac"]
    (out / "run.json").write_text(json.dumps(record))
    (out / "hash.key").unlink()
    os.rename(out / "parent_adapter", out / "delta")
    return out


def test_an_older_directory_can_be_sealed(model, data_path, tmp_path):
    run = made.trained(tmp_path / "run", model, data_path)
    out = as_older_version(made.erased(run, tmp_path / "out", model).path, run)
    assert seal(out).num_files == 2 and not (out / "delta").exists()
    (finding,) = (f for f in verify_directory(out) if f.name == "seal")
    assert finding.ok


def test_sealing_removes_what_restores_the_erased_state_and_records_it(out, tmp_path, capsys):
    keys = RunKeys.load(out)
    assert keys is not None
    expected = {
        f"parent_adapter/{p.name}": (p.stat().st_size, keys.file(p)) for p in (out / "parent_adapter").iterdir()
    }
    bytes_ = {p: p.read_bytes() for p in (*(out / "adapter").iterdir(), out / "train.jsonl", out / "run.json")}
    assert main(["seal", str(out)]) == 0
    said = capsys.readouterr().out
    assert "still to be deleted: the run that was erased from" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    directories, texts = ["adapter", "initial_adapter"], ["requests.jsonl", "train.jsonl"]
    records = ["hash.key", "receipt.json", "run.json", "seal.json"]
    assert sorted(p.name for p in out.iterdir()) == sorted([*directories, *texts, *records])
    listed = json.loads((out / "seal.json").read_text())["removed"]
    removed = {entry["name"]: (entry["bytes"], entry["hmac_sha256"]) for entry in listed}
    assert expected.items() <= removed.items() and len(removed) == len(expected) + 3
    assert {p: p.read_bytes() for p in bytes_} == bytes_
    assert main(["verify", str(out)]) == 0
    assert "nothing in the directory restores the erased state" in capsys.readouterr().out
    with pytest.raises(RunError, match=r"was sealed \d{4}-\d\d-\d\dT.*It cannot be undone"):
        undo(out, tmp_path / "back")
    again = seal(out)
    assert again.num_files == 5 and not (tmp_path / "back").exists()
    assert load_run(out).load_examples()  # it can be erased from again


def test_files_are_overwritten_before_they_are_removed(out, monkeypatch):
    before = {p.name: p.read_bytes() for p in (out / "parent_adapter").iterdir()}
    seen = {}
    unlink = Path.unlink

    def look(path, *arguments, **options):
        if path.parent == out / "parent_adapter":
            seen[path.name] = path.read_bytes()
        unlink(path, *arguments, **options)

    monkeypatch.setattr(Path, "unlink", look)
    seal(out)
    assert seen.keys() == before.keys()
    for name, content in before.items():
        assert len(seen[name]) == len(content) and seen[name][:64] != content[:64]


def test_what_no_erasure_writes_is_refused_before_anything_is_removed(out, tmp_path):
    (out / "my_backup.bin").write_bytes(b"1")
    with pytest.raises(RunError, match=r"holds my_backup\.bin, which no erasure writes"):
        seal(out)
    (out / "my_backup.bin").unlink()
    os.link(out / "parent_adapter" / WEIGHTS, tmp_path / "second_name")
    with pytest.raises(RunError, match="is a link, has other names"):
        seal(out)
    (tmp_path / "second_name").unlink()
    (out / "adapter" / "copy.safetensors").write_bytes(b"1")
    with pytest.raises(RunError, match=r"holds adapter/copy\.safetensors"):
        seal(out)
    assert sealed_state(out) == "open" and len(list((out / "parent_adapter").iterdir())) == 2


def test_only_an_erasure_is_sealed_or_undone(erased, tmp_path):
    run = Path(erased.parent["path"])
    with pytest.raises(RunError, match="'finetune', not of an erasure"):
        seal(run)
    with pytest.raises(RunError, match="there is nothing to undo"):
        undo(run, tmp_path / "back")


def test_without_the_key_sealing_goes_on_and_hashes_nothing(out):
    (out / "hash.key").unlink()
    seal(out)
    record = json.loads((out / "seal.json").read_text())
    assert record["mac"] is None and all(entry["hmac_sha256"] is None for entry in record["removed"])


class Killed(BaseException):
    """Nothing that the program catches."""


OPERATIONS = ("unlink", "rmdir", "replace", "rename", "fsync", "open", "mkdir")


def die_at(monkeypatch, number):
    """Ends the program at the so-many-th operation on files, before or after it; returns the count so far."""
    count = [0]

    def dying(function):
        def wrapped(*arguments, **options):
            count[0] += 1
            if (now := count[0]) == number and number % 2:
                raise Killed
            try:
                return function(*arguments, **options)
            finally:
                if now == number:
                    raise Killed

        return wrapped

    for name in OPERATIONS:
        monkeypatch.setattr(os, name, dying(getattr(os, name)))
    return count


def num_operations(out, tmp_path):
    for source in (out, out.with_name("out.solves")):
        shutil.copytree(source, tmp_path / "count" / source.name)
    with pytest.MonkeyPatch.context() as patch:
        count = die_at(patch, -1)
        seal(tmp_path / "count" / "out")
    return count[0]


def test_a_sealing_killed_at_any_moment_claims_nothing_and_goes_on(out, tmp_path):
    total = num_operations(out, tmp_path)
    assert total > 20
    shutil.rmtree(tmp_path / "count")
    rng = random.Random(0)
    points = sorted(rng.sample(range(1, total + 1), 14))
    for point in points:
        work = tmp_path / f"killed {point}"
        for name in ("out", "out.solves", "out.retraining", ".out.tmp-12345678"):
            shutil.copytree(tmp_path / name, work / name)
        copy = work / "out"
        kills = 0
        while kills < 3:  # killed again at the same place of what is left, until that is no more than so many
            with pytest.MonkeyPatch.context() as patch:
                die_at(patch, point)
                try:
                    seal(copy)
                except Killed:
                    kills += 1
                else:
                    break
            state = sealed_state(copy)
            if state == "sealed":
                assert "seal" not in failed(copy), point
            elif state == "sealing":
                assert "seal" in failed(copy), point
                with pytest.raises(RunError, match="is being sealed"):
                    undo(copy, work / "back")
            else:
                undo(copy, work / "back")
                assert weights(work / "back") == weights(out / "parent_adapter")
                shutil.rmtree(work / "back")
        assert kills, point
        done = seal(copy)
        assert done.num_files >= 5 and failed(copy) == [], point
        assert sorted(p.name for p in work.iterdir()) == ["out"], point


@pytest.mark.parametrize("point", range(1, 7))
def test_an_undoing_killed_at_any_moment_writes_the_whole_adapter_or_nothing(out, tmp_path, point):
    with pytest.MonkeyPatch.context() as patch:
        die_at(patch, point)
        with pytest.raises(Killed):
            undo(out, tmp_path / "back")
    if (tmp_path / "back").exists():
        assert weights(tmp_path / "back") == weights(out / "parent_adapter")
        shutil.rmtree(tmp_path / "back")
    undo(out, tmp_path / "back")
    assert weights(tmp_path / "back") == weights(out / "parent_adapter")


def test_a_process_killed_outright_while_sealing_leaves_a_directory_to_go_on_with(out, tmp_path):
    script = (
        "import os, signal, sys\n"
        "from llmeraser_jax.deletion import seal\n"
        "left, fsync = [int(sys.argv[2])], os.fsync\n"
        "def dying(descriptor):\n"
        "    left[0] -= 1\n"
        "    if not left[0]:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    fsync(descriptor)\n"
        "os.fsync = dying\n"
        "seal(sys.argv[1])\n"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", script, str(out), "3"]
    assert subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == -signal.SIGKILL
    assert sealed_state(out) == "sealing" and failed(out) == ["parent_adapter", "seal"]
    seal(out)
    assert failed(out) == []


def test_a_full_disk_is_an_error_and_nothing_is_removed(out, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            seal(out)
    assert sealed_state(out) == "open" and failed(out) == []
