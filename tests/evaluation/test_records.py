"""Comparisons of experiments from their files: cells against numbers by hand, gaps named, broken files refused."""

import dataclasses
import json
import re
from typing import Any

import numpy as np
import pytest
from scipy.stats import ks_2samp

from llmeraser_jax.cli import main
from llmeraser_jax.evaluation.job import build_overview, gather
from llmeraser_jax.evaluation.membership import attacks
from llmeraser_jax.evaluation.page import ACTION_NAMES
from llmeraser_jax.evaluation.records import (
    Comparison,
    MetricMeaning,
    Record,
    read_comparison,
    write_plan,
    write_record,
)
from llmeraser_jax.evaluation.render import Page, Table, render_html, render_markdown
from llmeraser_jax.evaluation.summary import QUALITY, STATISTIC, forget_quality, klom_of, summarise
from llmeraser_jax.runs import RunError
from tests.evaluation.test_page import write_erasure, write_evaluation
from tests.evaluation.test_summary import _receipt, _step

PLAN = Comparison(
    name="colours",
    question="Can a model forget two colours?",
    facts={"Model": "`tiny`, LoRA of rank 4"},
    ids=("2", "5"),
    actions=("remove", "remove"),
    num_examples=8,
    retrain_seeds=3,
    methods={"npo": 2, "sisa": 1},
    metrics={"hits": MetricMeaning(meaning="how many arrows hit.", better="higher")},
)


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def side(losses):
    return {"losses": losses, "min_k": [-x for x in losses], "min_k_plus_plus": [-x for x in losses]}


def scores(named, heldout=(2.0, 3.0), **changes):
    """Measures of a model with these losses."""
    return {
        "named": {**side(list(named)), "extraction": [0.25, 0.25]},
        "wanted": {"losses": []},
        "retained": {"losses": [0.25, 0.75]},
        "heldout": side(list(heldout)),
        "task": {"metrics": {"hits": {"value": 0.5, "standard_error": 0.1, "correct": 2, "valid": 3, "total": 4}}},
        **changes,
    }


def record(
    name, seed, named, *, cost=(200.0, 10.0), prepared=None, failed="", receipt=None, details=None, **changes
):
    """A model with these losses."""
    kind: Any = name if name in ("before", "retrained") else "unlearned"
    made = {"gradient_equivalents": cost[0], "seconds": cost[1], "preparation_gradient_equivalents": prepared}
    return Record(
        model=name, kind=kind, seed=seed, scores=scores(named, **changes), cost=made, failed=failed,
        receipt=receipt, details=details or {},
    )  # fmt: skip


def rewrite(directory, name, seed, edit):
    """Changes what a record's file holds."""
    path = directory / "records" / (f"{name}.json" if seed is None else f"{name}-seed_{seed}.json")
    value = json.loads(path.read_text())
    edit(value)
    return write(path, value)


def write_study(directory, **changes):
    """Before at a loss of 0, retrained at 1.9, 2 and 2.1; npo at 1 and 1.5, SISA at 6."""
    write_plan(directory, dataclasses.replace(PLAN, **changes))
    write_record(directory, record("before", None, [0.0, 0.0], heldout_kl=1.0, forget_loss_relearned=0.125))
    for seed, loss in enumerate((1.9, 2.0, 2.1), start=1):
        write_record(directory, record("retrained", seed, [loss, loss], heldout_kl=0.3 + 0.1 * seed))
    for seed, loss in enumerate((1.0, 1.5)):
        chosen = {"chosen": {"learning_rate": 0.001}}
        npo = record("npo", seed, [loss, loss], cost=(20.0, 10.0), heldout_kl=0.5 + seed, details=chosen)
        write_record(directory, npo)
    write_record(directory, record("sisa", 0, [6.0, 6.0], prepared=300.0, heldout_kl=0.25))
    return directory


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
    cell = cells(page, "loss on the forget set")
    assert cell["npo", "loss on the forget set"] == "1.25 ± 0.35"  # 1 and 1.5
    assert cell["npo", "closure, forget set"] == "0.62 ± 0.18"  # 1/2 and 3/4
    assert cell["sisa", "closure, forget set"] == "-1.00"  # twice as far beyond as before is below
    assert cell["retrained, mean of 3", "loss on the forget set"] == "2 ± 0.1"
    assert cell["before", "held-out KL / floor"] == "2"
    assert cell["npo", "held-out KL / floor"] == "2 ± 1.4"  # 0.5 and 1.5 over 0.5
    assert cell["retrained, mean of 3", "held-out KL / floor"] == "1 ± 0.2"
    assert cell["npo", "cost / retraining"] == "0.1"
    took = cells(page, "prepared / retraining")
    assert took["sisa", "prepared / retraining"] == "1.5" and took["npo", "prepared / retraining"] == "–"
    assert [cell[name, "seeds"] for name in ("npo", "sisa", "retrained, mean of 3")] == ["2", "1", "3"]
    # A closure that rounds to zero from below.
    write_record(directory, record("sisa", 0, [-1e-4, -1e-4], heldout_kl=0.5))
    assert cells(page_of(directory), "loss on the forget set")["sisa", "closure, forget set"] == "0.00"
    forgetting = cells(page, "probability")
    assert forgetting["before", "probability"] == "1"
    assert forgetting["before", "AUC, loss"] == "1 ± 0"  # both below both unseen ones
    # Named losses 1.9 and 2 stand below 2 and 3 in all pairs but a tie, 2.1 in half of them.
    aucs = [1.0, 0.75, 0.5]
    assert forgetting["retrained, mean of 3", "AUC, loss"] == f"0.75 ± {np.std(aucs, ddof=1):.3g}"
    assert forgetting["before", "loss on the forget set, relearned"] == "0.125"
    assert forgetting["sisa", "loss on the forget set, relearned"] == "–"
    assert cells(page, "hits")["sisa", "hits"] == "0.5 ± 0.1 (2 / 3 / 4)"


def test_a_page_says_what_was_asked_of_what_and_which_way_is_good(directory):
    page = page_of(directory)
    text = render_markdown(page)
    for told in (
        "Can a model forget two colours?",
        "2 removed of 8 training examples",
        "`tiny`, LoRA of rank 4",
        "**hits**: how many arrows hit. In brackets: correct / valid / asked for. Higher is better.",
        "**Learning rates** (npo 0.001)",
        "4 examples: one of them more or less right",
        "**Nearest to retraining** in the mean loss on the forget set: npo (0.62)",
    ):
        assert told in text
    for table in (block for block in page.blocks if isinstance(block, Table) and block.header[0] == "model"):
        for title in table.header[1:]:
            assert f"* **{title}**: " in text
    assert [picture.name for picture in page.pictures] == ["comparison1-cost.png", "comparison1-examples.png"]
    assert "Not finished" not in text


def write_klom(directory, name, seed, named, retained=(1.0,)):
    losses = {"named": named, "wanted": [], "retained": retained, "heldout": [0.5, 0.7]}
    kind: Any = name if name in ("before", "retrained") else "unlearned"
    parts = {part: {"losses": list(values)} for part, values in losses.items()}
    write_record(directory, Record(model=name, kind=kind, seed=seed, scores=parts), "klom")


def test_klom_of_a_study_against_shares_counted_by_hand(directory):
    for seed in range(4):
        # Two named examples: the first at two places, the second always at the same.
        write_klom(directory, "retrained", seed, [1.0 if seed < 2 else 3.0, 2.0])
        write_klom(directory, "before", seed, [0.01, 0.01])
        write_klom(directory, "npo", seed, [1.0 if seed < 1 else 3.0, 2.0], [1.0 if seed < 3 else 5.0])
    page = page_of(directory)
    cell = cells(page, "KLOM, forget set")
    missed = np.log(1 / 1e-5)
    # Two of npo's models stand against half of the retrained ones, pair by pair of the six ways to choose two of
    # four. Against 3, 3: two models at 1 and 3 cost log(1/2) / 2 + log(1e5 / 2) / 2, two at 3 nothing. And so on.
    mixed_to_one = 0.5 * np.log(0.5) + 0.5 * np.log(0.5 * 1e5)
    mixed_to_mixed, one_to_mixed = 0.0, np.log(2)
    first = [mixed_to_one, mixed_to_mixed, mixed_to_mixed, one_to_mixed, one_to_mixed, missed]
    assert cell["npo", "KLOM, forget set"] == f"{np.mean(first) / 2:.3g}"
    assert cell["npo", "KLOM, forget set, 95 %"] == f"{0.95 * np.mean(first):.3g}"
    assert cell["before", "KLOM, forget set"] == f"{missed:.3g}"
    assert cell["npo", "KLOM, retained"] == f"{mixed_to_one / 2:.3g}"  # half of the pairs have the one at 5
    # Of the six halves of the retrained models two are of one place each, and four of both.
    assert cell["retrained, mean of 3", "KLOM, forget set"] == f"{2 / 6 * missed / 2:.3g}"
    assert cell["retrained, mean of 3", "models"] == cell["npo", "models"] == "4"
    assert cell["sisa", "KLOM, forget set"] == "–"
    found = klom_of(read_comparison(directory))
    for part, floor in (("named", [2 / 6 * missed, 0]), ("retained", [0]), ("heldout", [0, 0])):
        for name in ("before", "npo"):
            told = found[name][part].floor
            assert told is not None
            np.testing.assert_allclose(told, floor)
    assert ("npo", "KLOM, replacements") not in cell
    assert "KLOM: 4 unlearned and 4 retrained seeds" in render_markdown(page)


def test_klom_without_models_that_found_no_step_or_diverged(directory):
    for seed in range(4):
        write_klom(directory, "retrained", seed, [1.0, 2.0])
        write_klom(directory, "npo", seed, [1.0, 2.0 if seed else None])
    write_record(directory, Record(model="sisa", kind="unlearned", seed=0, failed="no step"), "klom")
    write_klom(directory, "sisa", 1, [1.0, 2.0])
    found = klom_of(read_comparison(directory))
    assert sorted(found["npo"]) == ["heldout", "retained"]
    assert found["sisa"]["named"].num_unlearned == 1 and found["sisa"]["named"].values.mean() == 0.0


def test_klom_that_is_planned_and_not_there_is_named_and_broken_files_are_refused(directory):
    write_plan(directory, dataclasses.replace(PLAN, klom={"before": 2, "npo": 2}))
    write_klom(directory, "npo", 0, [1.0, 2.0])
    missing = ("KLOM, before: 0 of 2 models", "KLOM, npo: 1 of 2 models")
    assert read_comparison(directory).missing == missing
    write_klom(directory, "before", 0, [1.0])
    with pytest.raises(RunError, match="on the same examples"):
        read_comparison(directory)
    write(
        directory / "klom" / "before-seed_0.json", {"model": "before", "kind": "before", "scores": {"named": [1.0]}}
    )
    with pytest.raises(RunError, match=r"no record of a model: scores\.named"):
        read_comparison(directory)


def test_a_metric_of_several_seeds_shows_their_deviation_beside_the_error_over_examples(directory):
    for seed, value in enumerate((0.25, 0.75)):
        rewrite(
            directory,
            "npo",
            seed,
            lambda v, value=value: v["scores"]["task"]["metrics"]["hits"].update(value=value),
        )
    cell = cells(page_of(directory), "hits")
    assert cell["npo", "hits"] == "0.5 ± 0.1 ± 0.35 (seeds) (2 / 3 / 4)"
    assert cell["sisa", "hits"] == "0.5 ± 0.1 (2 / 3 / 4)"


def test_what_an_ensemble_was_before_the_request_is_told(directory):
    own = {"forget_loss": 0.125, "wanted_loss": None, "retained_loss": 0.25}
    rewrite(directory, "sisa", 0, lambda value: value.update(details={"own_before": own}))
    assert "a loss of 0.125 on the forget set and 0.25 on retained examples" in text_of(directory)
    rewrite(
        directory, "sisa", 0, lambda value: value.update(details={"own_before": {**own, "retained_loss": None}})
    )
    assert "a loss of 0.125 on the forget set and – on retained examples" in text_of(directory)


def test_each_example_is_shown_before_and_after_means_over_seeds(tmp_path):
    directory = write_study(tmp_path / "colours", actions=("correct_response", "remove"))
    wanted = {("before", None): 3.0, ("retrained", 1): 0.5, ("retrained", 2): 0.25, ("retrained", 3): 0.0,
              ("npo", 0): 1.0, ("npo", 1): 2.0}  # fmt: skip
    for (name, seed), loss in wanted.items():
        rewrite(directory, name, seed, lambda v, loss=loss: v["scores"].update(wanted={"losses": [loss]}))
    rewrite(directory, "sisa", 0, lambda v: v["scores"].pop("wanted"))  # no losses of SISA's are known
    rewrite(directory, "npo", 1, lambda v: v["scores"]["named"].update(losses=[1.5, 3.5]))
    page = page_of(directory)
    trained, replaced = (b for b in page.blocks if isinstance(b, Table) and b.header[0] == "id")
    assert trained.header == ("id", "request", "before", "npo", "sisa", "retrained (mean)")
    assert trained.rows == (
        ("2", ACTION_NAMES["correct_response"], "0", "1.25", "6", "2"),
        ("5", ACTION_NAMES["remove"], "0", "2.25", "6", "2"),
    )
    assert replaced.rows == (("2", ACTION_NAMES["correct_response"], "3", "1.5", "0.25"),)
    assert cells(page, "removed: loss")["npo", "response corrected: replacement's loss"] == "1.5 (0.55 ± 0.26)"


def test_requests_that_do_not_fit_the_measures_are_refused(directory):
    plan = json.loads((directory / "comparison.json").read_text())
    write(directory / "comparison.json", {**plan, "ids": ["5"], "actions": ["remove"]})
    with pytest.raises(RunError, match=r"2 losses of `named` where 1 are expected"):
        read_comparison(directory)


def test_membership_inference_against_numbers_by_hand():
    def of(named, heldout):
        return {"named": side(named), "heldout": side(heldout)}

    def auc(name, *arguments, **options):
        return {metric.name: metric.value for metric in attacks(*arguments, **options)}.get(name)

    retrained = [of([0.0, 1.0], [2.0, 3.0]), of([5.0, 5.0], [0.0, 0.0])]
    # An AUC cannot tell whether a model is in its own reference: that only scales its scores by (R - 1) / R.
    # Against the other one, the first knows its named rows by 5 and 4 better, its unseen ones by 2 and 3 worse.
    assert auc("reference_retrained", retrained[0], retrained=retrained, left_out=0) == 1.0
    assert auc("reference_retrained", retrained[1], retrained=retrained, left_out=1) == 0.0
    assert auc("loss", retrained[0], retrained=retrained) == 1.0
    assert auc("reference_retrained", retrained[0]) is None


def test_forget_quality_is_the_median_of_the_tests_against_each_retrained_model():
    rng = np.random.default_rng(0)
    ours, *others = ({"truth_ratios": rng.lognormal(k, 1, 20).tolist()} for k in range(4))
    found = forget_quality(ours, others)
    tests: list[Any] = [ks_2samp(ours["truth_ratios"], other["truth_ratios"]) for other in others]
    assert found[QUALITY]["value"] == pytest.approx(sorted(test.pvalue for test in tests)[1])
    assert found[STATISTIC]["value"] == pytest.approx(sorted(test.statistic for test in tests)[1])
    diverged = forget_quality({"truth_ratios": [None]}, others)
    assert {metric["value"] for metric in diverged.values()} == {None}


def test_a_retrained_model_is_not_held_against_itself(directory):
    for seed, ratios in enumerate(([1.0, 2.0], [1.0, 2.0], [5.0, 6.0]), start=1):
        rewrite(directory, "retrained", seed, lambda v, r=ratios: v["scores"]["task"].update(truth_ratios=r))
    seeds = summarise(read_comparison(directory))["models"]["retrained"]["per_seed"]
    # Equal to one of two, and apart from both.
    assert [seed["task_metrics"][STATISTIC]["value"] for seed in seeds] == [0.5, 0.5, 1.0]


def test_a_closure_that_is_undefined_has_its_reason_and_no_column(directory):
    write_record(directory, record("before", None, [1.95, 1.95], heldout_kl=1.0))
    page = page_of(directory)
    text = render_markdown(page)
    assert ("npo", "closure, forget set") not in cells(page, "loss on the forget set")
    told = (
        "**Closure on the forget set** has no value: undefined: before (1.95) and retrained (2) are within two seed"
    )
    assert told in text
    assert page.pictures  # held-out KL is still drawn


def test_what_was_interrupted_is_shown_as_far_as_it_went(tmp_path):
    directory = tmp_path / "colours"
    write_plan(directory, PLAN)
    text = text_of(directory)
    assert "Nothing was measured yet" in text and "the model before is not measured" in text
    assert "colours: 0 methods, 0 retrained models, not finished" in text
    write_record(directory, record("before", None, [0.0, 0.0]))
    write_record(directory, record("retrained", 1, [2.0, 2.0]))
    write_record(directory, record("npo", 0, [1.0, 1.0]))
    page = page_of(directory)
    text = render_markdown(page)
    assert "**Not finished**: 1 of 3 retrained models are measured; npo: 1 of 2 seeds; sisa: 0 of 1 seeds." in text
    cell = cells(page, "loss on the forget set")
    assert cell["npo", "closure, forget set"] == "0.50" and ("npo", "held-out KL / floor") not in cell


def test_numbers_that_are_not_finite_are_marked(directory):
    nan = float("nan")
    diverged = record("npo", 1, [nan, nan], cost=(20.0, 10.0), heldout_kl=float("inf"))
    write_record(directory, diverged)
    assert json.loads((directory / "records" / "npo-seed_1.json").read_text())["scores"]["heldout_kl"] is None
    page = page_of(directory)
    cell = cells(page, "loss on the forget set")
    assert (
        cell["npo", "loss on the forget set"] == "not finite" and cell["npo", "held-out KL / floor"] == "not finite"
    )
    assert cell["npo", "closure, forget set"] == "–"
    assert not re.search(r"\bnan\b", re.sub(r"base64,[^\"]*", "", render_html(page)).lower())


def test_a_method_without_a_step_stays_with_its_reason(directory):
    why = "negative curvature at once"
    write_record(directory, Record(model="npo", kind="unlearned", seed=1, failed=why))
    page = page_of(directory)
    assert cells(page, "seeds")["npo (1 of 2 seeds failed)", "loss on the forget set"] == "1"
    assert f"**npo** found no step with 1 of 2 seeds: {why}" in render_markdown(page)
    write_record(directory, Record(model="npo", kind="unlearned", seed=0, failed=why))
    assert cells(page_of(directory), "seeds")["npo (no step)", "loss on the forget set"] == "–"
    assert f"**npo** found no step with 2 of 2 seeds: {why}" in text_of(directory)


def _broken(**changes):
    value = {"model": "npo", "kind": "unlearned", "seed": 1, "scores": scores([1.0, 1.0]), **changes}
    return json.dumps(value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("records/npo-seed_1.json", '{"model": 1.', "npo-seed_1.json is not a JSON file"),
        ("records/npo-seed_1.json", "[]", "npo-seed_1.json holds no JSON object"),
        ("records/npo-seed_1.json", _broken(kind="rival"), "is no record of a model: kind"),
        ("records/npo-seed_1.json", _broken(cost={"seconds": "long"}), "is no record of a model: cost"),
        ("records/npo-seed_1.json", _broken(scores={"named": 5}), "is no record of a model: scores.named"),
        ("records/npo-seed_1.json", _broken(scores=scores([1, 1], task={})), "no record of a model: scores.task"),
        (
            "records/npo-seed_1.json",
            _broken(scores=scores([1, 1], heldout_kl="x")),
            "of a model: scores.heldout_kl",
        ),
        ("records/npo-seed_1.json", _broken(scores=scores([1, 1, 1])), "measured on the same examples"),
        ("comparison.json", '{"format": 99}', "comparison.json is of format 99; this version reads 1"),
        ("comparison.json", '{"format": 1}', "comparison.json is no description of a comparison"),
    ],
)
def test_a_file_that_is_no_record_is_refused_by_name(directory, tmp_path, capsys, name, content, message):
    (directory / name).write_text(content)
    assert main(["report", str(directory), "--workdir", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_lost_file_of_the_model_before_is_an_error(directory):
    (directory / "records" / "before.json").unlink()
    with pytest.raises(ValueError, match=r"before\.json is not there"):
        gather([directory])


def test_comparisons_and_runs_share_a_page(directory, tmp_path):
    write_evaluation(tmp_path / "eval", "run_a")
    erasure = write_erasure(tmp_path / "run_a", steps=[_step()])
    write_study(tmp_path / "again" / "colours")
    receipt = _receipt(_step(), bf16_survival=None)
    write_record(directory, record("step", 0, [1.0, 1.0], heldout_kl=0.5, receipt=receipt))
    page = page_of(tmp_path / "eval", directory, tmp_path / "again", erasure)
    text = render_markdown(page)
    assert f"## Comparison: {tmp_path.name}/colours" in text and "## Comparison: again/colours" in text
    assert [p.name for p in page.pictures if "cost" in p.name] == [
        "comparison1-cost.png", "comparison2-cost.png", "comparison3-cost.png",
    ]  # fmt: skip
    (receipts,) = [b for b in page.blocks if isinstance(b, Table) and b.header[:2] == ("", "run_a")]
    assert receipts.header[2] == f"{tmp_path.name}/colours: step"
    assert text.count("**hits**: how many arrows hit.") == 2


def test_methods_and_seeds_planned_once_stay_planned(tmp_path):
    write_plan(tmp_path, PLAN)
    write_plan(tmp_path, dataclasses.replace(PLAN, methods={"sisa": 1, "simnpo": 2, "npo": 1}, retrain_seeds=2))
    found = read_comparison(tmp_path)
    assert found.methods == {"npo": 2, "sisa": 1, "simnpo": 2} and found.retrain_seeds == 3
    assert found.metrics["hits"] == PLAN.metrics["hits"]
