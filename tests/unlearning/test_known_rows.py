"""A second request on one adapter takes losses from the first one, and comes to the same adapter for less."""

import json

import jax
import numpy as np
import pytest

from llmeraser_jax.models import load_model
from llmeraser_jax.training.job import finetune_run
from llmeraser_jax.unlearning import TargetMatching, erase_run
from llmeraser_jax.unlearning.budget import FORWARD
from llmeraser_jax.unlearning.known_rows import KNOWN_ROWS_FILE
from llmeraser_jax.unlearning.receipt import read_receipt
from tests.training import tiny

METHOD = TargetMatching(num_steps=2, sample_size=4, restoration_steps=1, restoration_rows=4)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def model(work):
    return load_model(tiny.save_tiny_model(work / "model"))


@pytest.fixture(scope="module")
def run(work, model):
    data = tiny.write_rows(work / "train.jsonl", tiny.rows())
    return finetune_run(model, data, work / "run", recipe=tiny.RECIPE, lora=tiny.LORA, config=tiny.CONFIG)


@pytest.fixture(scope="module")
def unseen(work):
    return tiny.write_rows(work / "unseen.jsonl", [{**row, "id": "h" + row["id"]} for row in tiny.rows(12)[8:]])


@pytest.fixture
def erase(run, model, unseen, tmp_path):
    def call(name, id_, calibration=unseen):
        requests = tiny.write_rows(tmp_path / f"{name}.jsonl", [{"id": id_, "action": "remove"}])
        out, result = erase_run(
            run, requests, tmp_path / name, METHOD, chunk_size=4, model=model, calibration_path=calibration
        )
        return out, result.params, read_receipt(out)

    (run.path / KNOWN_ROWS_FILE).unlink(missing_ok=True)
    return call


def cost(receipt):
    return receipt["gradient_equivalents"]["total"] + receipt["gradient_equivalents"]["diagnostics"]


def test_a_second_request_reuses_losses_and_ends_at_the_same_adapter(erase, run, tmp_path):
    _, alone, without = erase("alone", "r4")
    assert without["reused_losses"] == 0
    (run.path / KNOWN_ROWS_FILE).unlink()
    erase("first", "r1")
    _, params, receipt = erase("second", "r4")
    # Two calibration rows for the target, and the same two and eight of nine retained ones for the check.
    assert receipt["reused_losses"] >= 2 + 2 + 8
    # Without a file, rows that are asked for twice are computed once.
    saved = (receipt["reused_losses"] - without["reused_losses"]) * FORWARD
    assert cost(receipt) < cost(without) and cost(without) - cost(receipt) <= saved + 1e-6
    for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)
    assert receipt["validity"]["verdict"] == without["validity"]["verdict"]
    kept = json.loads((run.path / KNOWN_ROWS_FILE).read_text())
    assert "colour" not in json.dumps(kept) and "r4" not in kept["sets"]["trained"]["values"]


def test_what_belongs_to_other_calibration_rows_or_another_adapter_is_not_used(erase, run, work, caplog):
    erase("first", "r1")
    path = run.path / KNOWN_ROWS_FILE
    kept = json.loads(path.read_text())
    other = tiny.write_rows(work / "other.jsonl", [{**row, "id": "x" + row["id"]} for row in tiny.rows(12)[11:]])
    _, _, receipt = erase("second", "r2", other)
    fewer = receipt["reused_losses"]
    for change in ({**kept, "belongs_to": {}}, {**kept, "format": 0}):
        path.write_text(json.dumps(change))
        _, _, receipt = erase(f"third{change['format']}", "r2")
        assert receipt["reused_losses"] < fewer
    path.write_text("damaged")
    _, _, receipt = erase("fourth", "r2")
    assert "is not used" in caplog.text and json.loads(path.read_text())["format"] == 1
