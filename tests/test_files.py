"""Output is whole or absent, and JSON is strict."""

import json
import os

import numpy as np
import pytest

from llmeraser_jax import files


def names(directory):
    return sorted(entry.name for entry in directory.iterdir())


def test_a_directory_appears_with_everything_in_it(tmp_path):
    with files.atomic_directory(tmp_path / "deep" / "out") as temporary:
        (temporary / "a").write_text("1")
        assert not (tmp_path / "deep" / "out").exists()
        assert temporary.parent == tmp_path / "deep"  # same file system, so that the renaming is atomic
    assert names(tmp_path / "deep") == ["out"]
    assert names(tmp_path / "deep" / "out") == ["a"]


def test_a_failure_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyError), files.atomic_directory(tmp_path / "out") as temporary:
        (temporary / "a").write_text("1")
        raise KeyError("x")
    assert names(tmp_path) == []


def test_an_empty_directory_may_be_the_target(tmp_path):
    (tmp_path / "out").mkdir()
    with files.atomic_directory(tmp_path / "out") as temporary:
        (temporary / "a").write_text("1")
    assert names(tmp_path / "out") == ["a"]


def test_a_directory_with_something_in_it_is_refused_and_kept(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("1")
    with pytest.raises(FileExistsError, match="out already holds mine"), files.atomic_directory(tmp_path / "out"):
        pytest.fail("The block must not run.")
    assert names(tmp_path) == ["out"]


def test_a_target_filled_meanwhile_is_kept(tmp_path):
    with (
        pytest.raises(FileExistsError, match="out already holds theirs"),
        files.atomic_directory(tmp_path / "out") as temporary,
    ):
        (temporary / "a").write_text("1")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("1")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["theirs"]


def test_a_file_as_target_is_refused(tmp_path):
    (tmp_path / "out").write_text("1")
    with pytest.raises(FileExistsError, match="is an existing file"), files.atomic_directory(tmp_path / "out"):
        pytest.fail("The block must not run.")


def test_text_replaces_text_and_a_failure_keeps_the_old(tmp_path, monkeypatch):
    files.atomic_write_text(tmp_path / "a", "old\n")
    files.atomic_write_text(tmp_path / "a", "new é\n")
    assert (tmp_path / "a").read_bytes() == "new é\n".encode()

    def failing(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="disk full"):
        files.atomic_write_text(tmp_path / "a", "newer")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "new é\n"


def test_json_takes_numpy_scalars_and_paths(tmp_path):
    files.atomic_write_json(tmp_path / "a", {"x": np.float32(0.5), "n": np.int64(3), "p": tmp_path, "t": (1, 2)})
    assert json.loads((tmp_path / "a").read_text()) == {"x": 0.5, "n": 3, "p": str(tmp_path), "t": [1, 2]}
    assert files.read_json(tmp_path / "a")["n"] == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), np.float32("nan")])
def test_numbers_that_are_not_finite_are_refused_with_their_place(tmp_path, bad):
    with pytest.raises(ValueError, match=r"holds 1: loss\.1\.x = (nan|inf)"):
        files.atomic_write_json(tmp_path / "a", {"loss": [0.0, {"x": bad}]})
    assert names(tmp_path) == []


def test_a_value_without_a_json_form_is_refused():
    with pytest.raises(TypeError, match="type set cannot be written as JSON"):
        files.to_json({"x": {1}})


def test_a_file_that_is_not_json_is_named(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a\.json is not a JSON file"):
        files.read_json(tmp_path / "a.json")


def test_a_directory_is_held_by_one_user_at_a_time_and_free_afterwards(tmp_path):
    with files.exclusive_use(tmp_path / "d"):
        with pytest.raises(RuntimeError, match="Another process is writing"), files.exclusive_use(tmp_path / "d"):
            pytest.fail("The block must not run.")
        files.require_empty(tmp_path / "d")
    with files.exclusive_use(tmp_path / "d"):
        pass
    assert names(tmp_path / "d") == []
