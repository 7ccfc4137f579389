"""The comparison that experiments share, whole on a tiny base: what is measured against numbers computed here."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from typing import Any

import numpy as np
import pytest

from experiments import study
from experiments import study as module
from experiments.llara.main import LlaraConfig
from experiments.tallrec_movie.main import TallrecConfig
from experiments.tofu.main import TofuConfig
from llmeraser_jax.data import Action, Example, Request
from llmeraser_jax.evaluation.job import build_overview, gather, held_out_task, page_of
from llmeraser_jax.evaluation.klom import klom, response_margins
from llmeraser_jax.evaluation.records import read_comparison
from llmeraser_jax.evaluation.render import render_markdown
from llmeraser_jax.evaluation.scoring import answer, score_examples
from llmeraser_jax.evaluation.summary import klom_of, summarise
from llmeraser_jax.models import load_model
from llmeraser_jax.rivals import NPO, SISA, Ensemble, KFade, ensemble_model, make_ensemble
from llmeraser_jax.runs import load_run
from llmeraser_jax.unlearning import Workspace, task_of_run
from tests.training import tiny

METHODS = ("step", "finetune-edited", "npo", "sisa")
OPTIONS = study.StudyOptions(methods=METHODS, method_seeds=2, retrain_seeds=2, sharded_seeds=2, klom_seeds=2)


def _examples(shapes, colour=0):
    return tuple(
        Example(id=f"{k}", instruction=f"colour of s{k}", response=tiny.COLOURS[(k + colour) % 4]) for k in shapes
    )


def _scenario(base, **changes) -> study.Scenario:
    model = load_model(base)
    fields = {
        "name": "tiny",
        "model": model,
        "recipe": tiny.RECIPE,
        "lora": tiny.LORA,
        "train": tiny.CONFIG,
        "chunk_size": 4,
        "examples": _examples(range(8)),
        "requests": (Request(id="2", action=Action.REMOVE), Request(id="5", action=Action.REMOVE)),
        "shown": _examples((8, 9)),
        "heldout": _examples((10, 11)),
        "num_task_seeds": 1,
        "question": "Can it forget two of eight colours?",
        "make_task": lambda model, encode: held_out_task(model, encode(_examples((8, 9, 10, 11)))),
    }
    return study.Scenario(**{**fields, **changes})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save_tiny_model(tmp_path_factory.mktemp("base") / "model", seed=4)


def methods_of(results):
    """Records by name."""
    found = {}
    for record in results.of("unlearned"):
        found.setdefault(record.model, []).append(record)
    return found


@pytest.fixture(scope="module")
def done(base, tmp_path_factory):
    """A study with all kinds of methods, its workdir and its results."""
    workdir = tmp_path_factory.mktemp("study")
    scenario = _scenario(base)
    return scenario, workdir, study.run_study(scenario, workdir, OPTIONS)


def test_every_method_has_its_seeds_and_those_that_draw_nothing_a_single_one(done):
    _, _, results = done
    methods = methods_of(results)
    assert {name: len(seeds) for name, seeds in methods.items()} == {
        "step": 2, "finetune-edited": 1, "npo": 2, "sisa": 2,
    }  # fmt: skip
    assert ["task" in record.scores for record in methods["npo"]] == [True, False]
    probed = {name: ["forget_loss_4_bit" in r.scores for r in records] for name, records in methods.items()}
    assert probed == {name: [True] + [False] * (len(seeds) - 1) for name, seeds in methods.items()}
    assert len(results.of("retrained")) == 2
    assert not any(record.failed for record in results.records)


def test_scores_are_those_of_the_library_on_the_retrained_run(done):
    scenario, workdir, results = done
    owner = study.Study(scenario, workdir, retrain_seeds=2)
    lora, record = owner.bench.retrained[0], results.of("retrained")[0]
    named = score_examples(scenario.model, lora, owner.encode([scenario.examples[2], scenario.examples[5]]))
    np.testing.assert_allclose(record.scores["named"]["losses"], named.losses, rtol=1e-5)
    scores = summarise(results)["models"]["retrained"]["per_seed"][0]
    assert scores["forget_loss"] == pytest.approx(named.losses.mean(), rel=1e-5)
    assert scores["forget_probability"] == pytest.approx(np.exp(-named.losses).mean(), rel=1e-5)
    outside = score_examples(scenario.model, lora, owner.encode(scenario.heldout)).losses
    wins = [(a < b) + 0.5 * (a == b) for a in named.losses for b in outside]
    assert scores["membership_auc"]["loss"]["value"] == pytest.approx(np.mean(wins))
    assert scores["wanted_loss"] is None


def test_the_descents_rate_is_the_grids_nearest_to_retraining(done):
    _, _, results = done
    chosen, later = (record.details["chosen"] for record in methods_of(results)["npo"])
    distances = {float(rate): value for rate, value in chosen["distances_of_learning_rates"].items()}
    assert set(distances) == set(module.LEARNING_RATES)
    assert chosen["learning_rate"] == min(distances, key=distances.__getitem__)
    assert later == {"learning_rate": chosen["learning_rate"]}


def test_what_was_fitted_to_choose_a_rate_is_not_fitted_again(done, tmp_path, monkeypatch):
    scenario, workdir, results = done
    shutil.copytree(workdir, tmp_path / "copy")
    (tmp_path / "copy" / "records" / "npo-seed_0.json").unlink()
    run, rates, sizes = NPO.run, [], set()

    def counted(self, task, workspace):
        rates.append(self.learning_rate)
        sizes.add((self.batch_size, self.microbatch_size))
        return run(self, task, workspace)

    monkeypatch.setattr(NPO, "run", counted)
    owner = study.Study(scenario, tmp_path / "copy", retrain_seeds=2)
    assert owner.before.train_config.microbatch_size is None
    owner.scenario = dataclasses.replace(scenario, train=dataclasses.replace(scenario.train, microbatch_size=1))
    record = owner.run("npo", 0)
    assert rates == list(module.LEARNING_RATES)
    assert sizes == {(NPO().batch_size, 1)}
    rate = record.details["chosen"]["learning_rate"]
    chosen = dataclasses.replace(NPO(), learning_rate=rate, epochs=20)
    afresh = run(chosen, owner.task(), Workspace())
    losses = record.scores["named"]["losses"]
    assert np.mean(losses) == pytest.approx(owner.losses(owner.model, afresh.params)["forget_loss"], rel=1e-5)
    np.testing.assert_allclose(losses, methods_of(results)["npo"][0].scores["named"]["losses"], rtol=1e-4)


def test_a_rate_is_also_chosen_by_what_every_method_is_given(done):
    """Two removed rows: they should be like calibration rows, and retained rows as they are."""
    scenario, workdir, _ = done
    owner = study.Study(scenario, workdir, retrain_seeds=2)
    shown = score_examples(scenario.model, owner.lora, owner.encode(scenario.shown)).losses.mean()
    kept = owner.losses(owner.model, owner.lora)["retained_loss"]
    assert owner.targets == {"forget_loss": pytest.approx(shown), "wanted_loss": None, "retained_loss": kept}
    owner.scenario = dataclasses.replace(
        scenario, methods={"npo": lambda cell: cell.nearest("npo", NPO(), oracle=False)}
    )
    fitted, chosen = owner._choose(owner.method("npo", 0), 0)
    distances = {float(rate): value for rate, value in chosen["distances_of_learning_rates"].items()}
    losses: dict[str, Any] = owner.losses(owner.model, fitted.params)
    nearest = abs(losses["forget_loss"] - shown) + abs(losses["retained_loss"] - kept)
    assert nearest == pytest.approx(min(distances.values()), rel=1e-4)
    assert not chosen["oracle"] and distances[chosen["learning_rate"]] == min(distances.values())


def test_rivals_without_a_rate_are_offered_strengths_and_without_the_oracle_all_have_their_defaults(done):
    scenario, workdir, _ = done
    owner = study.Study(scenario, workdir, retrain_seeds=2)
    offered = owner.method("k-fade", 1)
    assert offered.chosen_as == "kl" and [m.kl for m in offered.candidates.values()] == list(offered.candidates)
    # Two named rows are one step of an epoch.
    assert {(m.scale, m.epochs) for m in owner.method("msa", 0).candidates.values()} == {
        (0.5, 20), (1.0, 20), (2.0, 20),
    }  # fmt: skip
    owner.scenario = dataclasses.replace(scenario, oracle=False)
    assert owner.method("k-fade", 1) == KFade()
    assert owner.method("npo", 3) == NPO(epochs=20, seed=3)


def test_costs_are_the_gradients_that_were_taken(done):
    _, _, results = done
    assert results.of("retrained")[0].cost["gradient_equivalents"] == 6 * tiny.CONFIG.epochs
    assert methods_of(results)["sisa"][0].cost["preparation_gradient_equivalents"] > 0


def test_a_second_call_reads_and_other_settings_are_refused(done, monkeypatch):
    scenario, workdir, results = done
    monkeypatch.setattr(module.measures, "measure", None)
    again = study.run_study(scenario, workdir, OPTIONS)
    assert again.records == results.records and again.klom_records == results.klom_records
    other = dataclasses.replace(scenario, train=dataclasses.replace(tiny.CONFIG, epochs=3))
    with pytest.raises(ValueError, match="other settings"):
        study.Study(other, workdir)


def test_other_data_in_the_same_directory_are_refused_and_those_there_kept(done):
    scenario, workdir, _ = done
    before = {path.name: path.read_bytes() for path in (workdir / "data").iterdir()}
    changed = dataclasses.replace(scenario.heldout[0], response="grey blue")
    for name, other in (
        ("heldout", dataclasses.replace(scenario, heldout=(changed, *scenario.heldout[1:]))),
        ("train", dataclasses.replace(scenario, examples=scenario.examples[::-1])),
        ("requests", dataclasses.replace(scenario, requests=scenario.requests[:1])),
    ):
        with pytest.raises(ValueError, match=f"holds other {name}"):
            study.Study(other, workdir, retrain_seeds=2)
    assert {path.name: path.read_bytes() for path in (workdir / "data").iterdir()} == before


def test_an_ensemble_is_also_measured_as_it_was_before_the_request(done):
    scenario, workdir, results = done
    own = methods_of(results)["sisa"][0].details["own_before"]
    task = study.Study(scenario, workdir, retrain_seeds=2).task()
    fitted = SISA().run(task, Workspace())
    assert fitted.model is not None
    named = score_examples(fitted.model, fitted.before, task.problem.examples, task.problem.named)
    assert own["forget_loss"] == pytest.approx(named.losses.mean(), rel=1e-4)
    assert "own_before" not in methods_of(results)["npo"][0].details


def test_a_comparison_killed_between_retrained_models_goes_on(done, tmp_path):
    scenario, workdir, results = done
    shutil.copytree(workdir, tmp_path / "copy")
    seeds = sorted((tmp_path / "copy" / "records").glob("retrained-seed_*.json"))
    seeds[-1].unlink()
    again = study.run_study(scenario, tmp_path / "copy", OPTIONS)
    ours, theirs = (found.of("retrained")[-1].scores["named"]["losses"] for found in (again, results))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_other_numbers_of_retrained_models_are_refused_where_something_was_compared(done):
    scenario, workdir, _ = done
    with pytest.raises(ValueError, match="compares with 2 retrained models, and retrain_seeds is 3"):
        study.run_study(scenario, workdir, dataclasses.replace(OPTIONS, retrain_seeds=3))


def test_klom_compares_models_of_their_own_seeds_with_retrained_ones(done):
    scenario, workdir, results = done
    assert Counter(record.model for record in results.klom_records) == {
        "before": 2, "retrained": 2, "step": 2, "finetune-edited": 2, "npo": 2,
    }  # fmt: skip
    owner = study.Study(scenario, workdir, retrain_seeds=2)
    again = [load_run(path) for path in sorted((workdir / "trained_again").iterdir())]
    assert [run.train_config.seed for run in again] == [1000 + tiny.CONFIG.seed, 1001 + tiny.CONFIG.seed]
    assert [len(run.load_examples()) for run in again] == [8, 8]
    rows = owner.encode([scenario.examples[2], scenario.examples[5]])

    def margins(loras):
        return response_margins(np.stack([score_examples(scenario.model, lora, rows).losses for lora in loras]))

    retrained = margins(owner.bench.retrained)
    before = klom(margins([run.load_adapter(scenario.model) for run in again]), retrained)
    np.testing.assert_allclose(klom_of(results)["before"]["named"].values, before.values, rtol=1e-6)
    rate = methods_of(results)["npo"][0].details["chosen"]["learning_rate"]
    # Two named rows are one step of an epoch, of which the library's own are 5.
    forgotten = [
        NPO(epochs=20, learning_rate=rate, seed=seed)
        .run(task_of_run(run, scenario.requests, model=scenario.model), Workspace())
        .params
        for seed, run in enumerate(again)
    ]
    losses = [r.scores["named"]["losses"] for r in results.klom_records if r.model == "npo"]
    np.testing.assert_allclose(
        losses, [score_examples(scenario.model, lora, rows).losses for lora in forgotten], rtol=1e-4
    )


def test_klom_goes_on_where_it_was_at_the_rate_that_was_chosen(done, monkeypatch):
    scenario, workdir, results = done
    (workdir / "klom" / "npo-seed_1.json").unlink()
    monkeypatch.setattr(study.Study, "_choose", None)  # choosing a rate again would fail
    study.Study(scenario, workdir, retrain_seeds=2).measure_klom(("npo",), 2)
    # All but the seconds that it took.
    again, before = ([dataclasses.replace(record, details={}) for record in found.klom_records]
                     for found in (read_comparison(workdir), results))  # fmt: skip
    assert again == before


def test_tables_name_every_model_once_and_the_pictures_are_there(done):
    _, _, results = done
    page = page_of(summarise(results))
    tables = render_markdown(page)
    for name in ("before", *METHODS, "**retrained, mean of 2**"):
        lines = [line for line in tables.splitlines() if line.startswith(f"| {name} |")]
        assert sum("weight left" not in line for line in lines) == 5  # and no header of a receipt's steps
    assert {"report-cost.png", "report-examples.png"} <= {picture.name for picture in page.pictures}


def test_the_report_reads_what_a_study_wrote_and_says_what_was_asked(done):
    _, workdir, _ = done
    page = render_markdown(build_overview(gather([workdir])))
    assert "Can it forget two of eight colours?" in page
    assert "2 removed of 8 training examples" in page
    assert "Not finished" not in page
    assert "**exact match**: share of held-out questions" in page
    assert "tiny: step" in page  # its receipt


def test_methods_of_an_earlier_call_stay_in_the_tables(done, tmp_path):
    scenario, workdir, results = done
    shutil.copytree(workdir, tmp_path / "copy")
    (tmp_path / "copy" / "comparison.json").unlink()
    options = study.StudyOptions(methods=("npo",), method_seeds=2, retrain_seeds=2)
    again = study.run_study(scenario, tmp_path / "copy", options)
    assert methods_of(again) == methods_of(results)
    assert again.methods == {"npo": 2}
    options = study.StudyOptions(methods=("sisa",), retrain_seeds=2)
    later = study.run_study(scenario, tmp_path / "copy", options)
    assert later.methods == {"npo": 2, "sisa": 1}


def test_what_names_nothing_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match="Unknown methods guess"):
        study.StudyOptions(methods=("guess",))
    with pytest.raises(ValueError, match="klom_seeds is -1; it must be at least 0"):
        study.StudyOptions(klom_seeds=-1)
    with pytest.raises(ValueError, match="retrain_seeds is 0; it must be at least 1"):
        TallrecConfig(base=tmp_path, data=tmp_path, workdir=tmp_path, retrain_seeds=0)
    with pytest.raises(ValueError, match="at least 1"):
        study.Study(_scenario(base), tmp_path, retrain_seeds=0)


@pytest.mark.parametrize("config", [LlaraConfig, TofuConfig, TallrecConfig])
def test_a_command_refuses_an_unknown_method_before_it_reads_anything(config, tmp_path):
    nowhere = tmp_path / "nowhere"
    with pytest.raises(ValueError, match="Unknown methods nop"):
        config(base=nowhere, data=nowhere, workdir=nowhere, methods=("npo", "nop"))


def test_an_ensemble_of_one_adapter_answers_and_scores_as_the_adapter(done):
    scenario, workdir, _ = done
    owner = study.Study(scenario, workdir, retrain_seeds=2)
    rows = owner.encode(scenario.examples)
    lora = owner.lora
    alone: Ensemble = make_ensemble([lora, lora])
    model = ensemble_model(scenario.model)
    assert answer(model, alone, rows) == answer(scenario.model, lora, rows)
    np.testing.assert_allclose(
        score_examples(model, alone, rows).losses, score_examples(scenario.model, lora, rows).losses, atol=1e-5
    )
    both = make_ensemble([owner.bench.retrained[0], lora])
    assert not np.allclose(score_examples(model, both, rows).losses, score_examples(model, alone, rows).losses)
