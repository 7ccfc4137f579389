"""Metrics are whole lines, and a restarted run's file reads as if there had been no restart."""

import builtins
import json
import sys

import pytest

from llmeraser_jax import tracking


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_every_line_is_there_as_soon_as_it_is_logged(tmp_path):
    with tracking.MetricsLogger(tmp_path / "m.jsonl") as metrics:
        metrics.log(1, loss=0.5, name="x")
        assert [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()] == [
            {"step": 1, "loss": 0.5, "name": "x"}
        ]


def test_going_on_drops_later_lines_and_a_torn_one(tmp_path):
    path = tmp_path / "m.jsonl"
    with tracking.MetricsLogger(path) as metrics:
        for step in (1, 2, 3, 4):
            metrics.log(step, loss=0.5)
    with open(path, "a") as file:
        file.write('{"step": 5, "lo')
    with tracking.MetricsLogger(path, last_step=2) as metrics:
        metrics.log(3, loss=0.25)
    assert steps(path) == [1, 2, 3]
    assert json.loads(path.read_text().splitlines()[-1])["loss"] == 0.25


def test_a_complete_line_without_its_line_end_is_dropped(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    with tracking.MetricsLogger(path, last_step=2) as metrics:
        metrics.log(3)
    assert steps(path) == [1, 3]


def test_starting_anew_empties_the_file(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n')
    tracking.MetricsLogger(tmp_path / "m.jsonl").close()
    assert (tmp_path / "m.jsonl").read_text() == ""


def test_nan_is_refused(tmp_path):
    with tracking.MetricsLogger(tmp_path / "m.jsonl") as metrics, pytest.raises(ValueError, match="loss = nan"):
        metrics.log(1, loss=float("nan"))


def test_tensorboard_without_its_package_is_an_error_that_names_the_extra(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("tensorboardX"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"llmeraser-jax\[tensorboard\]"):
        tracking.MetricsLogger(tmp_path / "m.jsonl", tensorboard_dir=tmp_path / "tb")


def test_numbers_go_to_tensorboard_and_a_restart_purges_later_ones(tmp_path, monkeypatch):
    written, opened = [], []

    class Writer:
        def __init__(self, directory, purge_step):
            opened.append((directory, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    monkeypatch.setattr(tracking, "_tensorboard_writer", lambda d, purge_step: Writer(d, purge_step))
    with tracking.MetricsLogger(tmp_path / "m.jsonl", last_step=4, tensorboard_dir=tmp_path / "tb") as metrics:
        metrics.log(5, loss=0.5, note="text")
    assert opened == [(tmp_path / "tb", 5)]
    assert written == [("loss", 0.5, 5), "closed"]


def test_the_progress_bar_is_silent_away_from_a_terminal(capfd, monkeypatch):
    with tracking.progress(description="counting", total=3) as bar:
        bar.update()
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with tracking.progress(description="counting", total=3) as bar:
        bar.update()
    assert "counting" in capfd.readouterr().err
