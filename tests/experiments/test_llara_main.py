"""The whole experiment on a tiny base, text and hybrid."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.llara import main as llara
from experiments.llara.data import load_corpus
from experiments.llara.main import PRESETS, LlaraConfig, load_base, make_scenario
from experiments.llara.scoring import HIT_RATIO_GENERATED, HIT_RATIO_SCORED
from tests.training import tiny

NUM_ITEMS = 12


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Twelve users with sequences of films that the tiny tokenizer knows as words."""
    path = tmp_path_factory.mktemp("llara")
    rng = np.random.default_rng(0)
    items = [rng.permutation(NUM_ITEMS)[:7].tolist() for _ in range(14)]
    rows = [{"user": u, "seq": items[u][:k], "next": items[u][k]} for u in range(12) for k in range(3, 7)]
    for name, lines in (("train", rows), ("val", [{"seq": items[12][:6], "next": items[12][6]}]),
                        ("test", [{"seq": items[13][:6], "next": items[13][6]}])):  # fmt: skip
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (path / "id2name.txt").write_text("".join(f"{k}::{tiny.SHAPES[k]}\n" for k in range(NUM_ITEMS)))
    tiny.save_tiny_model(path / "base")
    return path


def _config(directory: Path, prompts: str, **changes) -> LlaraConfig:
    settings = {
        "scenarios": ("query-removal",), "methods": ("finetune-edited", "sisa"), "retrain_seeds": 2,
        "method_seeds": 1, "num_rows": 12,
        "rows_per_user": 3, "num_heldout": 4, "num_candidates": 4, "max_length": 96, "epochs": 2,
        "num_generated": 2, "num_kl": 3,
    }  # fmt: skip
    return LlaraConfig(
        base=directory / "base",
        data=directory,
        workdir=directory / "out",
        hybrid=prompts == "hybrid",
        **{**settings, **changes},
    )


@pytest.mark.parametrize(("prompts", "sharded"), [("text", "sisa"), ("hybrid", "receraser")])
def test_one_call_trains_forgets_retrains_and_measures(directory, prompts, sharded):
    config = _config(directory, prompts, methods=("finetune-edited", sharded))
    llara.main(config)
    workdir = config.workdir / prompts / "query-removal"
    models = json.loads((workdir / "report.json").read_text())["models"]
    assert set(models["methods"]) == {"finetune-edited", sharded}
    assert models["retrained"]["seeds"] == 2
    for scores in (models["before"], *models["retrained"]["per_seed"], models["methods"][sharded]):
        held = scores["task_metrics"][f"held-out: {HIT_RATIO_SCORED}"]
        assert held["total"] == held["valid"] == 4
    generated = models["before"]["task_metrics"].get(f"held-out: {HIT_RATIO_GENERATED}")
    assert generated is None if prompts == "hybrid" else generated["total"] == 2
    assert models["methods"]["finetune-edited"]["delta_norm"] > 0
    extras = list(workdir.glob("*/adapter/extras.safetensors"))
    assert len(extras) == (1 if prompts == "hybrid" else 0)
    assert models["before"]["forget_loss_4_bit"] != models["before"]["forget_loss"]
    assert (workdir / "report.html").exists()


def test_held_out_users_are_shown_to_no_method(directory):
    config = _config(directory, "text")
    corpus = load_corpus(config.data)
    scenario, prepared = make_scenario(config, "removal", load_base(config, corpus), corpus)
    shown = {example.id for example in (*scenario.examples, *scenario.shown)}
    measured = {q.example.id for name in ("held-out", "test") for q in prepared.questions[name]}
    assert not shown & measured
    assert {example.id for example in scenario.heldout} <= {q.example.id for q in prepared.questions["held-out"]}


def test_the_full_preset_is_the_published_setting():
    preset = PRESETS["full"]
    assert (preset.lora.rank, preset.lora.alpha, preset.lora.target_modules) == (8, 32.0, "all-linear")
    assert (preset.train.epochs, preset.train.batch_size, preset.train.learning_rate) == (5, 128, 2e-4)
    assert preset.full and preset.num_rows is None and preset.template is None and preset.num_candidates == 20


@pytest.mark.parametrize("name", PRESETS)
def test_candidates_are_never_cut_and_1000_rows_are_held_out(name):
    assert PRESETS[name].recipe.truncation_side == "error"
    assert PRESETS[name].num_heldout >= 1000


def test_settings_that_cannot_be_are_refused(directory):
    with pytest.raises(ValueError, match="add --hybrid"):
        _config(directory, "text", item_embeddings=directory / "x.npz")
