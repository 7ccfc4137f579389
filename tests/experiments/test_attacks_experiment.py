"""The attacks experiment on a tiny model: what it writes, and that a second call computes nothing."""

import json

import numpy as np
import pytest

from experiments import study
from experiments.attacks import main
from llmeraser_jax.evaluation.render import Table
from llmeraser_jax.evaluation.scoring import score_examples
from llmeraser_jax.models import load_model
from tests.experiments.test_fidelity import TinyTask, cell_of
from tests.training import tiny

CELL = "cells/tiny/removal-0.2"


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("attacks")
    model = load_model(tiny.save_tiny_model(workdir / "base"))
    config = main.AttacksConfig(workdir=workdir, share=0.2, methods=("finetune-edited",), num_models=4)
    return config, model, main.run(config, TinyTask(), model)  # pyright: ignore[reportArgumentType]


def test_tables_have_a_row_for_each_model(done):
    attacks, stored, retained, half = (block for block in done[2] if isinstance(block, Table))
    assert [row[:2] for row in attacks.rows] == [("before", "4"), ("finetune-edited", "4")]
    retrained = [f"retrained, seed {k}" for k in range(3)]
    for table in (stored, retained, half):
        assert [row[0] for row in table.rows] == ["before", "finetune-edited", *retrained]
    assert stored.header[1:] == ("float32", "nf4", "int8") and len(half.header) == 2 + len(main.STEPS)


def test_probes_are_losses_of_the_library(done):
    config, model, _ = done
    probes = json.loads((config.workdir / CELL / "probes/before.json").read_text())
    cell = cell_of(config.workdir, model, 0.2, retrain_seeds=3)
    problem = cell.bench.problem
    losses = score_examples(model, cell.lora, problem.examples, problem.named).losses
    assert probes["stored"]["float32"] == pytest.approx(losses.mean(), rel=1e-6)
    assert probes["relearned_retained"][0] == pytest.approx(losses.mean(), rel=1e-6)
    assert probes["relearned_half"][0] in [pytest.approx(loss, rel=1e-5) for loss in losses]
    assert probes["stored"]["int8"] == pytest.approx(losses.mean(), rel=0.05) and probes["stored"]["nf4"] > 0
    assert np.isfinite(probes["relearned_half"]).all()


def test_a_second_call_computes_nothing(done, monkeypatch):
    config, model, blocks = done
    monkeypatch.setattr(study.Study, "fit", None)
    monkeypatch.setattr(main, "probe", None)
    assert main.run(config, TinyTask(), model) == blocks  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("nothing",)}, "Unknown methods"),
        ({"share": 0.5}, "share is 0.5"),
        ({"num_models": 3}, "num_models"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        main.AttacksConfig(workdir=tmp_path, **changes)
