"""The whole experiment on a tiny base, text and hybrid, and that a second call computes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.llara import main as llara
from experiments.llara.data import load_corpus
from experiments.llara.main import PRESETS, LlaraConfig, Study, load_base, recipe_of, render_table
from experiments.llara.scoring import HIT_RATIO_SCORED
from tests.training import tiny

NUM_ITEMS = 12


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Twelve users with sequences of films that the tiny tokenizer knows as words."""
    path = tmp_path_factory.mktemp("llara")
    rng = np.random.default_rng(0)
    rows = [{"user": u, "items": rng.permutation(NUM_ITEMS)[:7].tolist(), "domain": "game"} for u in range(12)]
    (path / "sequences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "id2name.txt").write_text("".join(f"{k}::{tiny.SHAPES[k]}\n" for k in range(NUM_ITEMS)))
    tiny.save_tiny_model(path / "base")
    return path


def _config(directory: Path, prompts: str, **changes) -> LlaraConfig:
    settings = {
        "scenarios": ("query-removal",), "methods": ("default",), "retrain_seeds": 2, "num_rows": 12,
        "rows_per_user": 3, "num_heldout": 4, "num_candidates": 4, "max_length": 96, "epochs": 2,
        "num_generated": 2, "num_kl": 3,
    }  # fmt: skip
    return LlaraConfig(
        base=directory / "base",
        data=directory,
        workdir=directory / "out",
        prompts=prompts,  # pyright: ignore[reportArgumentType]
        **{**settings, **changes},
    )


@pytest.mark.parametrize("prompts", ["text", "hybrid"])
def test_one_call_trains_erases_retrains_and_measures_and_a_second_one_reads(directory, prompts, monkeypatch):
    config = _config(directory, prompts)
    corpus = load_corpus(config.data)
    model = load_base(config, config.resolve(), corpus)
    results = Study(config, "query-removal", model, corpus).run()
    assert not results["failed"]
    assert set(results["models"]) == {"before", "default"}
    assert len(results["retrained"]) == 2
    assert results["delta_norm"]["default"] > 0
    held = results["models"]["default"]["metrics"]["held-out"][HIT_RATIO_SCORED]
    assert held["total"] == held["valid"] == 4
    extras = list((config.workdir / prompts / "query-removal").glob("*/adapter/extras.safetensors"))
    assert len(extras) == (2 if prompts == "hybrid" else 0)
    table = render_table(results)
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [
        "| before",
        "| retrained, 2 seeds",
        "| default",
    ]

    for name in ("score_examples", "heldout_kl_of", "erase_run"):
        monkeypatch.setattr(llara, name, None)
    assert Study(config, "query-removal", model, corpus).run() == results
    with pytest.raises(ValueError, match="other settings"):
        Study(_config(directory, prompts, epochs=3), "query-removal", model, corpus)


def test_the_full_preset_is_the_published_setting(directory):
    preset = _config(directory, "text", preset="full", num_rows=None, epochs=None).resolve()
    assert (preset.lora.rank, preset.lora.alpha, preset.lora.target_modules) == (8, 32.0, "all-linear")
    assert (preset.train.epochs, preset.train.batch_size, preset.train.learning_rate) == (5, 128, 2e-4)
    assert preset.dtype == "bfloat16"
    assert preset.erase.l2 == preset.train.l2
    assert PRESETS["full"].prepare.num_rows is None
    assert PRESETS["full"].prepare.num_candidates == 20


@pytest.mark.parametrize("name", PRESETS)
def test_candidates_are_never_cut_and_1000_rows_are_held_out(name):
    assert recipe_of(PRESETS[name]).truncation_side == "error"
    assert PRESETS[name].prepare.num_heldout >= 1000


def test_settings_that_cannot_be_are_refused(directory):
    with pytest.raises(ValueError, match="Unknown methods guess"):
        _config(directory, "text", methods=("guess",))
    with pytest.raises(ValueError, match="at least 2"):
        _config(directory, "text", retrain_seeds=1)
    with pytest.raises(ValueError, match="add --prompts hybrid"):
        _config(directory, "text", item_embeddings=directory / "x.npz")
