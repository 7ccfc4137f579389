"""The registry, fitting from a run directory, and the wrappers of what the package has elsewhere."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from llmeraser_jax.baselines import BASELINES, Baseline, Erasing, FinetuneEdited, fit, get_baseline

from llmeraser_jax import trees
from llmeraser_jax.runs import RunError
from llmeraser_jax.training import finetune
from llmeraser_jax.unlearning import EraseConfig, erase
from tests.baselines.conftest import MIXED


def test_every_baseline_of_the_issue_is_there_and_has_the_interface():
    assert set(BASELINES) >= {
        "retrain",
        "sisa",
        "receraser",
        "gradient-ascent",
        "gradient-difference",
        "kl-anchored-ascent",
        "npo",
        "simnpo",
        "e2urec",
        "finetune-edited",
        "llmeraser-auto",
        "llmeraser-matched",
        "llmeraser-path",
        "llmeraser-step",
        "llmeraser-paper-step",
        "llmeraser-paper-descent",
        "llmeraser-reference-compat",
    }
    for baseline in BASELINES.values():
        assert isinstance(baseline, Baseline)
        assert hash(baseline) == hash(dataclasses.replace(baseline))  # pyright: ignore[reportArgumentType]
        assert type(baseline).__module__.startswith("llmeraser_jax.baselines.")
    assert get_baseline("npo") is BASELINES["npo"]
    with pytest.raises(ValueError, match="There is no baseline 'magic'; there are retrain, sisa"):
        get_baseline("magic")


def test_a_run_and_a_request_file_are_enough(finished_run, model, tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in MIXED))
    fitted = fit(FinetuneEdited(epochs=1), finished_run, path, model=model)
    lora = finished_run.load_adapter(model)
    from llmeraser_jax import data

    edited = data.apply_requests(
        finished_run.load_examples(), data.load_requests(path, finished_run.load_examples())
    )
    dataset = finished_run.encode(edited, model.tokenizer)
    expected = finetune(model, dataset, dataclasses.replace(finished_run.train_config, epochs=1), lora=lora)
    for got, want in zip(jax.tree.leaves(fitted.params), jax.tree.leaves(expected.lora), strict=True):
        np.testing.assert_array_equal(got, want)
    assert fitted.gradient_equivalents == 9.0
    assert fitted.model is model
    with pytest.raises(ValueError, match="9 examples have no user, the first is 'r1'"):
        fit(FinetuneEdited(), finished_run, path, model=model, users={"r0": "a"})


def test_unknown_hyper_parameters_are_refused_where_they_are_repeated(setting):
    with pytest.raises(RunError, match="did not state learning_rate, which this baseline repeats"):
        FinetuneEdited().fit(dataclasses.replace(setting, unstated=("learning_rate",)))


def test_no_requests_are_refused(setting):
    with pytest.raises(ValueError, match="There are no requests"):
        dataclasses.replace(setting, requests=())


def test_erasing_is_erase_with_the_runs_l2(setting):
    config = EraseConfig(method="step", cg_max_steps=3, chunk_size=4, trust_region=False, sample_size=4)
    fitted = Erasing(config=config).fit(setting)
    expected = erase(
        setting.model,
        setting.lora,
        setting.dataset,
        setting.requests,
        dataclasses.replace(config, l2=setting.train.l2),
    )
    for got, want in zip(jax.tree.leaves(fitted.params), jax.tree.leaves(expected.lora), strict=True):
        np.testing.assert_array_equal(got, want)
    assert fitted.gradient_equivalents == expected.receipt.gradient_equivalents.total
    assert fitted.details["outcome"] == expected.receipt.outcome
    assert fitted.details["receipt"]["config"]["l2"] == setting.train.l2 == 1e-3
    json.dumps(fitted.details)
    assert float(trees.tree_norm(trees.tree_sub(fitted.params, setting.lora))) > 0


def test_the_papers_step_has_a_baseline_for_each_way_to_solve_for_it(setting):
    """Damped until it has a minimum. The public script's constants move every number by about 2e-4 in any case."""
    moved, told = {}, {}
    for name in ("paper-step", "paper-descent", "reference-compat"):
        baseline = get_baseline(f"llmeraser-{name}")
        assert isinstance(baseline, Erasing)
        config = dataclasses.replace(
            baseline.config,
            chunk_size=1,
            cg_rtol=1e-4,
            cg_max_steps=20,
            damping=30.0,
            learning_rate=0.1,  # of mini-batches of one: the last iterate's noise is in proportion
            diagnostic_sample=1,
        )
        fitted = dataclasses.replace(baseline, config=config).fit(setting)
        moved[name] = trees.tree_sub(fitted.params, setting.lora)
        told[name] = fitted.details["receipt"]["config"]
    assert {name: config["solver"] for name, config in told.items()} == {
        "paper-step": "cg", "paper-descent": "descent", "reference-compat": "reference-compat",
    }  # fmt: skip
    for config in told.values():
        assert (config["curvature"], config["curvature_data"]) == ("hessian", "all")
        assert (config["method"], config["trust_region"]) == ("step", False)
    exact = moved["paper-step"]
    descended = trees.tree_norm(trees.tree_sub(moved["paper-descent"], exact)) / trees.tree_norm(exact)
    assert float(descended) < 0.1
    assert 1e-4 < float(trees.tree_max_abs(moved["reference-compat"])) < 4e-4
