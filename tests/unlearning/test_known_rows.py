"""Losses that are kept for the next request: which are taken, which are computed, and what they are kept for."""

import dataclasses
import json

import numpy as np
import pytest

from llmeraser_jax.data import Example, Recipe, encode_examples
from llmeraser_jax.lora import LoraConfig
from llmeraser_jax.runs import Run
from llmeraser_jax.training import TrainConfig
from llmeraser_jax.unlearning import Workspace
from llmeraser_jax.unlearning.budget import FORWARD
from llmeraser_jax.unlearning.known_rows import KNOWN_ROWS_FILE, KnownRows
from tests.problems import ArrayExamples, ridge_objective, split_params
from tests.training import tiny

OBJECTIVE = ridge_objective(1e-3)


@pytest.fixture
def examples():
    rng = np.random.default_rng(0)
    return ArrayExamples(rng.normal(size=(8, 3)), rng.normal(size=8))


@pytest.fixture
def params():
    return split_params(np.arange(3.0))


@pytest.fixture
def run(tmp_path):
    """A run directory as far as it matters here."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    return Run(
        path=tmp_path,
        kind="finetune",
        model_path="",
        model_dtype="float32",
        model_sha256="0",
        model_quantization=None,
        matmul_precision="auto",
        recipe=Recipe(),
        normalizer=None,
        lora_config=LoraConfig(rank=1, alpha=1.0),
        train_config=TrainConfig(epochs=1),
        unstated=(),
        data_path=tmp_path,
        data_ids=(),
        data_hashes=(),
        knows_initial_adapter=False,
        result={},
        parent=None,
        receipts=(),
        versions={},
    )


def values(workspace, params, examples, rows):
    return workspace.trained_values(OBJECTIVE, params, examples, np.array(rows), "rhs")


def test_known_rows_are_taken_and_only_the_others_are_paid_for(examples, params):
    alone = values(Workspace(), params, examples, [1, 6, 3, 7, 0])
    known = KnownRows({"trained": (examples, 7)})
    workspace = Workspace(known=known)
    values(workspace, params, examples, [6, 0, 7])
    assert workspace.budget.cost.rhs == pytest.approx(3 * FORWARD)
    again = values(workspace, params, examples, [1, 6, 3, 7, 0])
    # Rows 6 and 0 are known; row 7 is no trained row.
    assert workspace.budget.cost.rhs == pytest.approx((3 + 3) * FORWARD) and known.found == 2
    for one, other in zip(alone, again, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    values(workspace, params, ArrayExamples(examples.inputs, examples.targets), [6])
    assert workspace.budget.cost.rhs == pytest.approx(7 * FORWARD)  # another set of rows


def left_in(run, examples, params, rows):
    """What a request leaves in the run."""
    known = KnownRows({"trained": (examples, 8)})
    values(Workspace(known=known), params, examples, rows)
    known.save(run)


def taken_from(run, examples):
    """Which rows a later request finds."""
    known = KnownRows({"trained": (examples, 8)})
    known.load(run)
    return np.flatnonzero(known.split(examples, np.arange(8))).tolist()


def test_a_later_request_finds_what_an_earlier_one_left(run, examples, params):
    assert taken_from(run, examples) == []
    left_in(run, examples, params, [2, 5])
    assert taken_from(run, examples) == [2, 5]


def test_what_belongs_to_another_adapter_or_setting_is_not_used(run, examples, params, caplog):
    left_in(run, examples, params, [2, 5])
    assert taken_from(dataclasses.replace(run, matmul_precision="bfloat16"), examples) == []
    (run.path / "adapter" / "adapter_model.safetensors").write_bytes(b"others")
    assert taken_from(run, examples) == []
    (run.path / KNOWN_ROWS_FILE).write_text("damaged")
    assert taken_from(run, examples) == [] and "is not used" in caplog.text


def test_other_calibration_rows_are_measured_anew(run):
    def rows(answer):
        examples = [Example(id=str(k), instruction="colour of s1", response=answer) for k in range(2)]
        return encode_examples(examples, tiny.RECIPE, tiny.word_tokenizer())

    first, same, other = rows("red"), rows("red"), rows("blue")
    known = KnownRows({"calibration": (first, 2)})
    known.keep(first, np.arange(2), np.ones(2), np.zeros(2))
    known.save(run)
    for dataset, count in ((same, 2), (other, 0)):
        known = KnownRows({"calibration": (dataset, 2)})
        known.load(run)
        assert known.split(dataset, np.arange(2)).sum() == count
    assert "red" not in (run.path / KNOWN_ROWS_FILE).read_text()
    assert json.loads((run.path / KNOWN_ROWS_FILE).read_text())["sets"]["calibration"]["values"]["1"] == [1.0, 0.0]
