"""Studies on `llmeraser report`'s page: cells against numbers by hand, gaps named, broken files refused."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from scipy.stats import ks_2samp

from llmeraser_jax.cli import main
from llmeraser_jax.evaluation.blocks import Details, Page, Table, render_html, render_markdown
from llmeraser_jax.evaluation.gather import gather
from llmeraser_jax.evaluation.model_tables import MetricMeaning
from llmeraser_jax.evaluation.overview import build_overview
from llmeraser_jax.evaluation.plots import ACTION_NAMES
from llmeraser_jax.evaluation.study import (
    QUALITY,
    STATISTIC,
    StudyManifest,
    forget_quality,
    membership,
    read_study,
    write_manifest,
)
from llmeraser_jax.runs import RunError
from tests.evaluation.test_overview import step, write_erasure, write_evaluation

MANIFEST = StudyManifest(
    name="colours",
    question="Can a model forget two colours?",
    base="tiny",
    num_examples=8,
    named={"remove": 2},
    num_unseen=2,
    num_heldout=5,
    num_truncated=1,
    retrain_seeds=3,
    methods={"npo": 2, "sisa": 1},
    metrics={"hits": MetricMeaning(meaning="how many arrows hit.", better="higher")},
    devices="1 x cpu",
    versions={"jax": "0.0"},
)


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def side(losses):
    return {"losses": losses, "min_k": [-x for x in losses], "min_k_plus_plus": [-x for x in losses]}


def scores(named, unseen=(2.0, 3.0), **changes):
    """Measures of a model with these losses."""
    return {
        "forget_loss": float(np.mean(named)),
        "wanted_loss": None,
        "retained_loss": 0.5,
        "forget_probability": float(np.exp(-np.array(named)).mean()),
        "extraction_strength": 0.25,
        "named": side(list(named)),
        "unseen": side(list(unseen)),
        "gradient_equivalents": 200.0,
        "seconds": 10.0,
        "task": {"metrics": {"hits": {"value": 0.5, "standard_error": 0.1, "correct": 2, "valid": 3, "total": 4}}},
        **changes,
    }


def write_study(directory, **changes):
    """Before at a loss of 0, retrained at 1.9, 2 and 2.1; npo at 1 and 1.5, SISA at 6."""
    write_manifest_of(directory, **changes)
    write(
        directory / "settings.json",
        {"lora": {"rank": 4}, "train": {"epochs": 3, "batch_size": 2, "learning_rate": 0.1}},
    )
    write(directory / "scores" / "before.json", scores([0.0, 0.0], forget_loss_relearned=0.125))
    for seed, loss in enumerate((1.9, 2.0, 2.1), start=1):
        write(directory / "scores" / f"seed_{seed}.json", scores([loss, loss]))
    write(directory / "scores" / "heldout_kl.json", {"before": 1.0, "seed_floors": [0.4, 0.5, 0.6]})
    for seed, loss in enumerate((1.0, 1.5)):
        npo = scores(
            [loss, loss], heldout_kl=0.5 + seed, gradient_equivalents=20.0, chosen={"learning_rate": 0.001}
        )
        write(directory / "methods" / f"npo-seed_{seed}.json", npo)
    sisa = scores([6.0, 6.0], heldout_kl=0.25, preparation_gradient_equivalents=300.0)
    write(directory / "methods" / "sisa-seed_0.json", sisa)
    return directory


def write_manifest_of(directory, **changes):
    directory.mkdir(parents=True, exist_ok=True)
    write_manifest(directory, dataclasses.replace(MANIFEST, **changes))


@pytest.fixture
def directory(tmp_path):
    return write_study(tmp_path / "colours")


def page_of(*directories):
    return build_overview(gather(directories))


def text_of(*directories):
    return render_markdown(page_of(*directories))


def cells(page: Page, first: str):
    """Of the table whose second column is called so, by row and column."""
    (table,) = [b for b in page.blocks if isinstance(b, Table) and b.header[0] == "model" and first in b.header]
    return {(row[0], title): cell for row in table.rows for title, cell in zip(table.header, row, strict=True)}


def test_cells_are_the_numbers_of_the_files_by_hand(directory):
    page = page_of(directory)
    cell = cells(page, "loss on S")
    assert cell["npo", "loss on S"] == "1.25 ± 0.35"  # 1 and 1.5
    assert cell["npo", "closure on S"] == "0.62 ± 0.18"  # 1/2 and 3/4
    assert cell["sisa", "closure on S"] == "-1.00"  # twice as far beyond as before is below
    assert cell["retrained, mean of 3", "loss on S"] == "2 ± 0.1"
    assert cell["before", "held-out KL / floor"] == "2"
    assert cell["npo", "held-out KL / floor"] == "2 ± 1.4"  # 0.5 and 1.5 over 0.5
    assert cell["retrained, mean of 3", "held-out KL / floor"] == "1 ± 0.2"
    assert cell["npo", "cost / retraining"] == "0.1"
    assert cell["sisa", "prepared / retraining"] == "1.5" and cell["npo", "prepared / retraining"] == "–"
    assert [cell[name, "seeds"] for name in ("npo", "sisa", "retrained, mean of 3")] == ["2", "1", "3"]
    closest = scores([-1e-4, -1e-4], heldout_kl=0.5)  # a closure that rounds to zero from below
    write(directory / "methods" / "sisa-seed_0.json", closest)
    assert cells(page_of(directory), "loss on S")["sisa", "closure on S"] == "0.00"
    forgetting = cells(page, "probability")
    assert forgetting["before", "probability"] == "1"
    assert forgetting["before", "AUC, loss"] == "1"  # both below both unseen ones
    # Named losses 1.9 and 2 stand below 2 and 3 in all pairs but a tie, 2.1 in half of them.
    aucs = [1.0, 0.75, 0.5]
    assert forgetting["retrained, mean of 3", "AUC, loss"] == f"0.75 ± {np.std(aucs, ddof=1):.3g}"
    assert forgetting["before", "loss on S, relearned"] == "0.125"
    assert forgetting["sisa", "loss on S, relearned"] == "–"
    assert cells(page, "hits")["sisa", "hits"] == "0.5 ± 0.1 (2 / 3 / 4)"


def test_a_page_says_what_was_asked_of_what_and_which_way_is_good(directory):
    page = page_of(directory)
    text = render_markdown(page)
    for told in (
        "Can a model forget two colours?",
        "2 removed of 8 trained on (1 prompts were cut to fit).",
        "2 to tell S from (membership inference), 5 behind the held-out KL",
        "`tiny`, LoRA of rank 4, 3 epochs of batches of 2 at a learning rate of 0.1",
        "**hits**: how many arrows hit. In brackets: correct / valid / asked for. Higher is better.",
        "**Learning rates** (npo 0.001)",
        "4 held-out examples",
    ):
        assert told in text
    for table in (block for block in page.blocks if isinstance(block, Table) and block.header[0] == "model"):
        for title in table.header[1:]:
            assert f"* **{title}**: " in text
    assert [picture.name for picture in page.pictures] == ["study1-cost.png", "study1-forget.png"]
    assert "Not finished" not in text


def write_klom(directory, name, seed, named, retained=(1.0,)):
    value = {"losses": {"named": list(named), "wanted": [], "retained": list(retained), "unseen": [0.5, 0.7]}}
    return write(directory / "klom" / f"{name}-seed_{seed}.json", value)


def test_klom_of_a_study_against_shares_counted_by_hand(directory):
    for seed in range(4):
        # Two named examples: the first at two places, the second always at the same.
        write_klom(directory, "retrained", seed, [1.0 if seed < 2 else 3.0, 2.0])
        write_klom(directory, "before", seed, [0.01, 0.01])
        write_klom(directory, "npo", seed, [1.0 if seed < 1 else 3.0, 2.0], [1.0 if seed < 3 else 5.0])
    page = page_of(directory)
    cell = cells(page, "KLOM on S")
    missed = np.log(1 / 1e-5)
    # Two of npo's models stand against half of the retrained ones, pair by pair of the six ways to choose two of
    # four. Against 3, 3: two models at 1 and 3 cost log(1/2) / 2 + log(1e5 / 2) / 2, two at 3 nothing. And so on.
    mixed_to_one = 0.5 * np.log(0.5) + 0.5 * np.log(0.5 * 1e5)
    mixed_to_mixed, one_to_mixed = 0.0, np.log(2)
    first = [mixed_to_one, mixed_to_mixed, mixed_to_mixed, one_to_mixed, one_to_mixed, missed]
    assert cell["npo", "KLOM on S"] == f"{np.mean(first) / 2:.3g}"
    assert cell["npo", "KLOM on S, 95 %"] == f"{0.95 * np.mean(first):.3g}"
    assert cell["before", "KLOM on S"] == f"{missed:.3g}"
    assert cell["npo", "KLOM, retained"] == f"{mixed_to_one / 2:.3g}"  # half of the pairs have the one at 5
    # Of the six halves of the retrained models two are of one place each, and four of both.
    assert cell["retrained, mean of 3", "KLOM on S"] == f"{2 / 6 * missed / 2:.3g}"
    assert cell["retrained, mean of 3", "models"] == cell["npo", "models"] == "4"
    assert cell["sisa", "KLOM on S"] == "–"
    found = read_study(directory).klom
    for part, floor in (("named", [2 / 6 * missed, 0]), ("retained", [0]), ("unseen", [0, 0])):
        for name in ("before", "npo"):
            told = found[name][part].floor
            assert told is not None
            np.testing.assert_allclose(told, floor)
    assert ("npo", "KLOM, wanted") not in cell
    assert "KLOM: 4 unlearned and 4 retrained seeds" in render_markdown(page)


def test_klom_without_models_that_found_no_step_or_diverged(directory):
    for seed in range(4):
        write_klom(directory, "retrained", seed, [1.0, 2.0])
        write_klom(directory, "npo", seed, [1.0, 2.0 if seed else None])
    write(directory / "klom" / "sisa-seed_0.json", {"failed": "no step"})
    write_klom(directory, "sisa", 1, [1.0, 2.0])
    found = read_study(directory).klom
    assert sorted(found["npo"]) == ["retained", "unseen"]
    assert found["sisa"]["named"].num_unlearned == 1 and found["sisa"]["named"].mean == 0.0


def test_klom_that_is_planned_and_not_there_is_named_and_broken_files_are_refused(directory):
    write_manifest_of(directory, klom={"before": 2, "npo": 2})
    write_klom(directory, "npo", 0, [1.0, 2.0])
    assert read_study(directory).missing == ("KLOM, before: 0 of 2 models", "KLOM, npo: 1 of 2 models")
    write_klom(directory, "before", 0, [1.0])
    with pytest.raises(RunError, match="not measured on the same examples"):
        read_study(directory)
    write(directory / "klom" / "before-seed_0.json", {"losses": {"named": [1.0]}})
    with pytest.raises(RunError, match="has no `losses`"):
        read_study(directory)


def test_a_metric_of_several_seeds_shows_their_deviation_beside_the_error_over_examples(directory):
    for seed, value in enumerate((0.25, 0.75)):
        path = directory / "methods" / f"npo-seed_{seed}.json"
        measures = json.loads(path.read_text())
        measures["task"]["metrics"]["hits"]["value"] = value
        write(path, measures)
    cell = cells(page_of(directory), "hits")
    assert cell["npo", "hits"] == "0.5 ± 0.1 ± 0.354 (seeds) (2 / 3 / 4)"
    assert cell["sisa", "hits"] == "0.5 ± 0.1 (2 / 3 / 4)"


def test_what_an_ensemble_was_before_the_request_is_told(directory):
    path = directory / "methods" / "sisa-seed_0.json"
    own = {"forget_loss": 0.125, "wanted_loss": None, "retained_loss": 0.25}
    write(path, {**json.loads(path.read_text()), "own_before": own})
    assert "a loss of 0.125 on S and 0.25 on retained rows" in text_of(directory)
    write(path, {**json.loads(path.read_text()), "own_before": {**own, "retained_loss": None}})
    assert "a loss of 0.125 on S and – on retained rows" in text_of(directory)
    write(path, {**json.loads(path.read_text()), "own_before": {}})
    with pytest.raises(RunError, match="own_before"):
        read_study(directory)


def test_who_was_shown_the_non_members_is_told(directory):
    assert "Methods were shown the former" in text_of(directory)
    write_manifest_of(directory, num_shown=7)
    text = text_of(directory)
    assert "no method saw; 7 others were shown to methods" in text and "Methods were shown the former" not in text


def examples_of(page: Page):
    """Tables of named examples, by what their folded summaries say."""
    return {
        block.summary: table
        for block in page.blocks
        if isinstance(block, Details)
        for table in block.blocks
        if isinstance(table, Table) and table.header[0] == "id"
    }


def write_data(directory, requests):
    """Eight examples, and these requests in this order."""
    for name, rows in (("train", [{"id": f"{k}"} for k in range(8)]), ("requests", requests)):
        path = directory / "data" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_each_named_example_is_shown_before_and_after_in_the_order_of_the_training_data(directory):
    write_data(directory, [{"id": "5", "action": "remove"}, {"id": "2", "action": "correct_response"}])
    wanted_losses = {
        "scores/before": 3.0, "scores/seed_1": 0.5, "scores/seed_2": 0.25, "scores/seed_3": 0.0,
        "methods/npo-seed_0": 1.0, "methods/npo-seed_1": 2.0,
    }  # fmt: skip
    for name, wanted in wanted_losses.items():
        path = directory / f"{name}.json"
        write(path, {**json.loads(path.read_text()), "wanted_losses": [wanted]})
    path = directory / "methods" / "npo-seed_1.json"
    measures = json.loads(path.read_text())
    measures["named"]["losses"] = [1.5, 3.5]
    write(path, measures)
    page = page_of(directory)
    tables = examples_of(page)
    assert tables["2 examples, as it was trained on"].header == (
        "id", "request", "before", "npo", "sisa", "retrained (mean)",
    )  # fmt: skip
    assert tables["2 examples, as it was trained on"].rows == (
        ("2", ACTION_NAMES["correct_response"], "0", "1.25", "6", "2"),
        ("5", ACTION_NAMES["remove"], "0", "2.25", "6", "2"),
    )
    assert tables["1 examples, as it was wanted"].rows == (
        ("2", ACTION_NAMES["correct_response"], "3", "1.5", "0.25"),  # no losses of SISA's are known
    )
    assert [p.name for p in page.pictures] == ["study1-cost.png", "study1-forget.png", "study1-wanted.png"]


def test_requests_that_do_not_fit_the_measures_are_refused(directory):
    write_data(directory, [{"id": "5", "action": "remove"}])
    with pytest.raises(RunError, match="measures of 2 named examples, and its requests name 1"):
        read_study(directory)


def test_membership_inference_against_numbers_by_hand():
    def of(named, unseen):
        return {"named": side(named), "unseen": side(unseen)}

    retrained = [of([0.0, 1.0], [2.0, 3.0]), of([5.0, 5.0], [0.0, 0.0])]
    # An AUC cannot tell whether a model is in its own reference: that only scales its scores by (R - 1) / R.
    # Against the other one, the first knows its named rows by 5 and 4 better, its unseen ones by 2 and 3 worse.
    assert membership(retrained[0], retrained, 0)["reference_retrained"] == 1.0
    assert membership(retrained[1], retrained, 1)["reference_retrained"] == 0.0
    assert membership(retrained[0], retrained)["loss"] == 1.0
    assert "reference_retrained" not in membership(retrained[0], [])


def test_forget_quality_is_the_median_of_the_tests_against_each_retrained_model():
    rng = np.random.default_rng(0)
    ours, *others = ({"task": {"truth_ratios": rng.lognormal(k, 1, 20).tolist()}} for k in range(4))
    found = forget_quality(ours, others)
    tests: list[Any] = [ks_2samp(ours["task"]["truth_ratios"], other["task"]["truth_ratios"]) for other in others]
    assert found[QUALITY]["value"] == pytest.approx(sorted(test.pvalue for test in tests)[1])
    assert found[STATISTIC]["value"] == pytest.approx(sorted(test.statistic for test in tests)[1])
    diverged = forget_quality({"task": {"truth_ratios": [None]}}, others)
    assert {metric["value"] for metric in diverged.values()} == {None}


def test_a_retrained_model_is_not_held_against_itself(directory):
    for seed, ratios in enumerate(([1.0, 2.0], [1.0, 2.0], [5.0, 6.0]), start=1):
        path = directory / "scores" / f"seed_{seed}.json"
        value = json.loads(path.read_text())
        value["task"]["truth_ratios"] = ratios
        write(path, value)
    statistics = [s["task"]["metrics"][STATISTIC]["value"] for s in read_study(directory).retrained]
    assert statistics == [0.5, 0.5, 1.0]  # equal to one of two, and apart from both


def test_a_closure_that_is_undefined_has_its_reason_and_no_column(directory):
    write(directory / "scores" / "before.json", scores([1.95, 1.95]))
    page = page_of(directory)
    text = render_markdown(page)
    assert ("npo", "closure on S") not in cells(page, "loss on S")
    assert "**closure on S** has no column: undefined: before (1.95) and retrained (2) are within two seed" in text
    assert page.pictures  # held-out KL is still drawn


def test_what_was_interrupted_is_shown_as_far_as_it_went(tmp_path):
    directory = tmp_path / "colours"
    write_manifest_of(directory)
    text = text_of(directory)
    assert "Nothing was measured yet" in text and "the model as trained is not measured" in text
    assert "colours: 0 methods, 0 retrained models, not finished" in text
    write(directory / "scores" / "before.json", scores([0.0, 0.0]))
    write(directory / "scores" / "seed_1.json", scores([2.0, 2.0]))
    write(directory / "methods" / "npo-seed_0.json", scores([1.0, 1.0], heldout_kl=0.5))
    page = page_of(directory)
    text = render_markdown(page)
    assert "**Not finished**: 1 of 3 retrained models are measured; the held-out KL between" in text
    assert "; npo: 1 of 2 seeds; sisa: 0 of 1 seeds." in text
    cell = cells(page, "loss on S")
    assert cell["npo", "closure on S"] == "0.50" and ("npo", "held-out KL / floor") not in cell


def test_numbers_that_are_not_finite_are_marked(directory):
    path = directory / "methods" / "npo-seed_1.json"
    path.write_text(json.dumps(scores([float("nan")] * 2, heldout_kl=float("inf"), gradient_equivalents=20.0)))
    assert "NaN" in path.read_text()
    page = page_of(directory)
    cell = cells(page, "loss on S")
    assert cell["npo", "loss on S"] == "not finite" and cell["npo", "held-out KL / floor"] == "not finite"
    assert cell["npo", "closure on S"] == "–"
    assert "nan" not in render_html(page).lower().replace("finance", "")


def test_a_method_without_a_step_stays_with_its_reason(directory):
    failed = {"method": "npo", "seed": 1, "failed": "negative curvature at once"}
    write(directory / "methods" / "npo-seed_1.json", failed)
    page = page_of(directory)
    assert cells(page, "loss on S")["npo (1 of 2 seeds failed)", "loss on S"] == "1"
    assert "**npo** found no step with 1 of 2 seeds: negative curvature at once" in render_markdown(page)
    write(directory / "methods" / "npo-seed_0.json", failed)
    assert cells(page_of(directory), "loss on S")["npo (no step)", "loss on S"] == "–"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("methods/npo-seed_1.json", '{"forget_loss": 1.', "npo-seed_1.json is not a JSON file"),
        ("methods/npo-seed_1.json", "[]", "npo-seed_1.json holds no JSON object"),
        ("methods/npo-seed_1.json", json.dumps(scores([1, 1])), "is no result of a study: heldout_kl"),
        ("scores/seed_1.json", json.dumps(scores([1, 1], seconds="long")), "no result of a study: seconds missing"),
        ("scores/seed_1.json", json.dumps({**scores([1, 1]), "named": 5}), "no result of a study: named missing"),
        ("scores/seed_1.json", json.dumps(scores([1, 1], task={})), "no result of a study: task.metrics missing"),
        ("scores/seed_1.json", json.dumps(scores([1, 1, 1])), "not measured on the same examples"),
        ("scores/heldout_kl.json", '{"before": 1.0, "seed_floors": []}', "has no numbers `before` and"),
        ("study.json", '{"format": 99}', "study.json is of format 99; this version reads 1"),
        ("study.json", '{"format": 1}', "study.json is no description of a study"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_a_studys_is_refused_by_name(directory, tmp_path, capsys, name, content, message):
    (directory / name).write_text(content)
    assert main(["report", str(directory), "--workdir", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_lost_file_of_the_model_before_is_an_error(directory):
    (directory / "scores" / "before.json").unlink()
    with pytest.raises(ValueError, match=r"before\.json is not there"):
        gather([directory])


def test_a_study_of_before_there_was_a_manifest_is_told_by_its_data(directory):
    (directory / "study.json").unlink()
    requests = "".join(json.dumps({"id": k, "action": "remove"}) + "\n" for k in "25")
    train = "".join(json.dumps({"id": f"{k}", "text": "a secret"}) + "\n" for k in range(8))
    for name, content in (("requests", requests), ("train", train), ("unseen", "{}\n" * 2)):
        path = directory / "data" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    text = text_of(directory)
    assert "The question was not recorded" in text and "2 removed of 8 trained on." in text
    assert "a secret" not in text and "Not finished" not in text
    assert "**hits**: a metric of this task; its meaning was not recorded. In brackets" in text
    path.write_text("{}\n" * 2)
    (directory / "data" / "requests.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="a line that is no request"):
        gather([directory])


def test_studies_and_runs_share_a_page(directory, tmp_path):
    write_evaluation(tmp_path / "eval", "run_a")
    erasure = write_erasure(tmp_path / "run_a", steps=[step()])
    write_study(tmp_path / "again" / "colours")
    receipt = json.loads((erasure / "receipt.json").read_text())
    write(
        directory / "methods" / "llmeraser-step-seed_0.json",
        scores([1.0, 1.0], heldout_kl=0.5, details={"receipt": {**receipt, "bf16_survival": None}}),
    )
    page = page_of(tmp_path / "eval", directory, tmp_path / "again", erasure)
    text = render_markdown(page)
    assert f"## Study: {tmp_path.name}/colours" in text and "## Study: again/colours" in text
    assert [p.name for p in page.pictures if "cost" in p.name] == [
        "comparison1-cost.png", "study1-cost.png", "study2-cost.png",
    ]  # fmt: skip
    (certificates,) = [b for b in page.blocks if isinstance(b, Table) and b.header[:2] == ("", "run_a")]
    assert certificates.header[2] == f"{tmp_path.name}/colours: llmeraser-step"
    assert [b.summary for b in page.blocks if isinstance(b, Details)].count("What the columns mean") == 4
    assert text.count("**hits**: how many arrows hit.") == 2


def test_methods_and_seeds_planned_once_stay_planned(tmp_path):
    write_manifest_of(tmp_path)
    write_manifest_of(tmp_path, methods={"sisa": 1, "simnpo": 2, "npo": 1}, retrain_seeds=2)
    found = read_study(tmp_path).manifest
    assert found.methods == {"npo": 2, "sisa": 1, "simnpo": 2} and found.retrain_seeds == 3
    assert found.metrics["hits"] == MANIFEST.metrics["hits"]
