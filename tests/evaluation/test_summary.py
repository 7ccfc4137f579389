"""The summary: numbers by hand, required keys, strict JSON, reasons for what is absent, atomic writing."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from llmeraser_jax.evaluation.forgetting import heldout_kl
from llmeraser_jax.evaluation.job import page_of, write_report
from llmeraser_jax.evaluation.page import rows_of
from llmeraser_jax.evaluation.records import Comparison, Record
from llmeraser_jax.evaluation.render import Details, Table, render_markdown, render_text
from llmeraser_jax.evaluation.summary import summarise
from llmeraser_jax.evaluation.tasks import count_metric

ACTIONS = ("remove", "modify_query", "remove", "correct_response")
PLOTS = {"report-examples.png", "report-cost.png"}


def _scores(forget, wanted, *, heldout=(1.0, 2.0), correct=3, **changes):
    metric = dataclasses.asdict(count_metric("accuracy", correct=correct, valid=8, total=10))
    side = {"losses": list(heldout), "min_k": [-x for x in heldout], "min_k_plus_plus": [-x for x in heldout]}
    named = {"losses": list(forget), "min_k": [-x for x in forget], "min_k_plus_plus": [-x for x in forget]}
    task = {"metrics": {"accuracy": metric}}
    return {"named": named, "wanted": {"losses": list(wanted)}, "heldout": side, "task": task, **changes}


def _cost(seconds, gradient_equivalents, memory=None):
    return {"seconds": seconds, "gradient_equivalents": gradient_equivalents, "peak_memory_bytes": memory,
            "diagnostic_gradient_equivalents": 0.0}  # fmt: skip


def _step(status="converged", residual=0.04, history=(0.5, 0.2, 0.04), **changes):
    step = {
        "weight_before": 1.0, "weight_after": 0.5, "scale": 1.0, "ritz_extremes": [0.008, 2.5], "error_bound": 0.05,
        "forget_loss": 0.3, "wanted_loss": None, "probe_loss": 0.1, "negative_curvature": False,
    }  # fmt: skip
    own = {"status": status, "iterations": len(history), "relative_residual": residual}
    return {**step, **own, "residual_history": list(history), **changes}


def _receipt(*steps, **changes):
    """What `erase` writes, of a path with these solves."""
    before = {"mean": 0.01, "median": 0.01, "percentile_95": 0.03, "worst": 0.05}
    change = {
        "before": before,
        "after": {**before, "mean": 0.02},
        "rise": before,
        "num_rows": 64,
        "predicted": None,
    }
    row = {"id": "17", "part": "removed", "before": 0.01, "target": 1.5, "after": 1.25, "arrived": True}
    return {
        "format": 1,
        "config": {"curvature": "gauss-newton", "curvature_data": "sample", "damping": 0.007},
        "counts": {"remove": 2, "modify_query": 0, "correct_response": 1},
        "num_examples_before": 120,
        "method": "path",
        "outcome": "complete: the weight was taken out",
        "validity": {
            "verdict": "complete",
            "reasons": [],
            "rows": [{**row, "whole_before": 0.01, "whole_after": 1.25, "copies": []}],
            "retained": change,
            "calibration": None,
            "harm_bound": 0.1,
        },
        "step_standard_error": 0.125,
        "solver": {
            "status": "not converged: max_steps reached",
            "iterations": sum(s["iterations"] for s in steps),
            "relative_residual": max((s["relative_residual"] for s in steps), default=0.0),
            "negative_curvature": any(s["negative_curvature"] for s in steps),
        },
        "steps": list(steps),
        "delta_norm": 0.9,
        "adapter_norm_before": 8.0,
        "bf16_survival": 0.875,
        "edited_gradient_norm_before": 0.5,
        "edited_gradient_norm_after": 0.25,
        "gradient_equivalents": {"total": 491.0},
        "seconds": 6.5,
        "peak_memory_bytes": None,
        **changes,
    }


STEPS = (_step(), _step("max_steps reached", 0.3, (0.6, 0.3)))


def _comparison(*, seeds=3, controls=True, unlearned=(0.5, 1.5, 0.5, 3.5), steps=STEPS):
    """Losses in the order of `ACTIONS`; the retrained seeds lie 0.1 apart."""
    models = {"before": [0.1, 0.9], "unlearned": [0.4, 0.6], "gradient ascent": [0.01, 0.99]}
    rows = [[0.5, 0.5], [0.48, 0.52], [0.52, 0.48]][:seeds]
    kl = heldout_kl(
        {name: np.log(np.array([row])) for name, row in models.items()},
        [np.log(np.array([row])) for row in rows],
        np.array([True]),
    ) if seeds > 1 else None  # fmt: skip

    def of(name, kind, forget, wanted, *, cost=None, seed=None, left_out=None, receipt=None, **changes):
        scores = _scores(forget, wanted, **changes)
        if kl is not None:
            scores["heldout_kl"] = kl.heldout_kl(name) if left_out is None else kl.retrained_left_out[left_out]
        return Record(model=name, kind=kind, seed=seed, scores=scores, cost=cost, receipt=receipt)

    records = [
        of("before", "before", [0.0] * 4, [2.0, 4.0], correct=5),
        of("unlearned", "unlearned", unlearned, [1.0, 0.5], cost=_cost(5.0, 120.0), receipt=_receipt(*steps)),
    ]
    for s in range(seeds):
        forget, wanted = np.array([1.0, 1.0, 1.0, 2.0]) + 0.1 * (s - 1), np.array([0.5, 0.5]) + 0.1 * (s - 1)
        cost = _cost(10.0 + s, 400.0, 2**30)
        records.append(
            of("retrained", "retrained", forget, wanted, correct=4 + s, cost=cost, seed=s + 1, left_out=s)
        )
    if controls:
        records.append(of("gradient ascent", "control", [4.0] * 4, [4.0, 4.0]))
    ids = ("7", "8", "9", "10")
    # No non-members here: membership inference has tests of its own.
    return Comparison(name="tiny", ids=ids, actions=ACTIONS, nonmembers=(False, False), records=tuple(records),
                      facts={"Base model": "tiny"})  # fmt: skip


def _with(comparison, name, **scores):
    """The comparison with other scores of one model."""
    records = [dataclasses.replace(r, scores={**r.scores, **scores}) if r.model == name else r
               for r in comparison.records]  # fmt: skip
    return dataclasses.replace(comparison, records=tuple(records))


def _markdown(report):
    return render_markdown(page_of(report))


def _nulls_without_reason(node, path=""):
    if isinstance(node, dict):
        for key, value in node.items():
            holds_null = value is None or (isinstance(value, list) and None in value)
            if holds_null and not node.get("reason", {}).get(key):
                yield f"{path}.{key}"
            yield from _nulls_without_reason(value, f"{path}.{key}")
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _nulls_without_reason(value, f"{path}[{i}]")


def _strict(report):
    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(json.dumps(report, allow_nan=False), parse_constant=refuse)


def test_the_required_keys_hold_numbers():
    report = summarise(_comparison())
    for model in ("before", "unlearned", "retrained"):
        for key in ("forget_loss", "heldout_loss", "heldout_kl_to_retrained"):
            assert isinstance(report["models"][model][key], float), (model, key)
        assert set(report["models"][model]["task_metrics"]["accuracy"]) >= {
            "value",
            "correct",
            "valid",
            "total",
            "standard_error",
        }
    assert isinstance(report["seed_floor"]["heldout_kl"], float)
    assert isinstance(report["gap_closure"]["forget_loss"], float)
    assert isinstance(report["gap_closure"]["heldout_kl"], float)
    for who in ("unlearn", "retrain"):
        assert isinstance(report["cost"][who]["seconds"], float)
        assert isinstance(report["cost"][who]["gradient_equivalents"], float)
    assert set(report["solver"]) >= {"status", "iterations", "relative_residual", "negative_curvature"}


def test_a_held_out_metric_that_fell_is_part_of_the_verdict():
    from llmeraser_jax.evaluation.summary import _fallen

    report = summarise(_comparison())
    assert not any("got worse" in line for line in report["verdict"])
    entry = report["models"]["unlearned"]
    accuracy = {"value": 0.393, "correct": 393, "standard_error": 0.015}
    other = {
        **report["models"]["retrained"],
        "task_metrics": {"accuracy": {"value": 0.482, "standard_error": 0.016}},
    }
    models = {**report["models"], "retrained": other}

    def lines(value):
        changed = {**entry, "task_metrics": {"accuracy": {**accuracy, "value": value}}}
        return _fallen({**report, "models": models}, "erasing", changed)

    assert lines(0.393) == ["**accuracy got worse** with erasing: 0.393, retrained 0.482; sampling explains 0.044."]
    assert lines(0.45) == [] and lines(0.6) == []


def test_losses_split_by_action_and_average_over_seeds():
    models = summarise(_comparison())["models"]
    assert models["unlearned"]["forget_loss"] == pytest.approx(1.5)
    assert models["unlearned"]["forget_loss_by_action"] == pytest.approx(
        {"remove": 0.5, "modify_query": 1.5, "correct_response": 3.5}
    )
    assert models["unlearned"]["wanted_loss_by_action"] == pytest.approx(
        {"modify_query": 1.0, "correct_response": 0.5}
    )
    assert models["retrained"]["forget_loss"] == pytest.approx(1.25)
    assert [seed["forget_loss"] for seed in models["retrained"]["per_seed"]] == pytest.approx([1.15, 1.25, 1.35])
    assert models["retrained"]["seed_standard_deviation"]["forget_loss"] == pytest.approx(0.1)
    assert models["retrained"]["task_metrics"]["accuracy"]["value"] == pytest.approx(0.5)
    assert models["retrained"]["task_metrics"]["accuracy"]["seed_standard_deviation"] == pytest.approx(0.1)
    assert models["controls"]["gradient ascent"]["forget_loss"] == 4.0


def test_closures_by_hand_overall_per_action_and_for_controls():
    closure = summarise(_comparison())["gap_closure"]
    # Overall: before 0, retrained 1.25, unlearned 1.5. Removed: 0, 1, 0.5. Corrected: 0, 2, 3.5 (overshoot).
    assert closure["forget_loss"] == pytest.approx(1 - 0.25 / 1.25)
    assert closure["by_action"]["remove"]["forget_loss"] == pytest.approx(0.5)
    assert closure["by_action"]["modify_query"]["forget_loss"] == pytest.approx(0.5)
    assert closure["by_action"]["correct_response"]["forget_loss"] == pytest.approx(1 - 1.5 / 2)
    # Wanted: corrected falls from 4 to 0.5 as the retrained models' does; modified from 2 to 1, target 0.5.
    assert closure["by_action"]["correct_response"]["wanted_loss"] == pytest.approx(1.0)
    assert closure["by_action"]["modify_query"]["wanted_loss"] == pytest.approx(1 - 0.5 / 1.5)
    assert "wanted_loss" not in closure["by_action"]["remove"]
    assert closure["controls"]["gradient ascent"]["forget_loss"] == pytest.approx(1 - 2.75 / 1.25)


def test_r_squared_of_forget_rows_is_of_the_other_retrained_models():
    report = summarise(_comparison())
    # Retrained means are 1, 1, 1 and 2: their squared deviations sum to 0.75, the errors' squares to 0 and 3.
    assert report["models"]["before"]["forget_r2"] == pytest.approx(1 - 7 / 0.75)
    assert report["models"]["unlearned"]["forget_r2"] == pytest.approx(1 - 3 / 0.75)
    # Seeds lie 0.15, 0 and 0.15 from the mean of the other two.
    seeds = [entry["forget_r2"] for entry in report["models"]["retrained"]["per_seed"]]
    assert seeds == pytest.approx([1 - 4 * 0.0225 / 0.75, 1, 1 - 4 * 0.0225 / 0.75])
    report = summarise(_comparison(seeds=1))
    assert report["models"]["unlearned"]["forget_r2"] == pytest.approx(1 - (0.16 + 0.36 + 0.16 + 2.56) / 0.75)
    assert report["models"]["retrained"]["forget_r2"] is None


def test_held_out_kl_of_the_retrained_column_is_the_seed_floor():
    comparison = _comparison()
    report = summarise(comparison)
    before, unlearned, *seeds = (record.scores["heldout_kl"] for record in comparison.records)
    seeds = seeds[:3]
    floor = np.mean(seeds)
    assert report["models"]["retrained"]["heldout_kl_to_retrained"] == pytest.approx(floor)
    assert report["seed_floor"]["heldout_kl"] == pytest.approx(floor)
    per_seed = [seed["heldout_kl_to_retrained"] for seed in report["models"]["retrained"]["per_seed"]]
    assert per_seed == pytest.approx(seeds)
    expected = 1 - abs(unlearned - floor) / abs(before - floor)
    assert report["gap_closure"]["heldout_kl"] == pytest.approx(expected)


def test_costs_average_over_seeds_and_are_compared():
    cost = summarise(_comparison())["cost"]
    assert cost["retrain"]["seconds"] == pytest.approx(11.0)
    assert cost["retrain"]["gradient_equivalents"] == 400.0
    assert cost["unlearn_over_retrain"]["gradient_equivalents"] == pytest.approx(0.3)
    assert cost["unlearn"]["peak_memory_bytes"] is None
    assert cost["unlearn"]["reason"] == {"peak_memory_bytes": "not measured"}


def test_solves_are_summed_up_by_the_worst():
    solver = summarise(_comparison())["solver"]
    assert solver["status"] == "converged (1 of 2 steps); max_steps reached (1 of 2 steps)"
    assert (solver["iterations"], solver["relative_residual"]) == (5, 0.3)
    assert solver["negative_curvature"] is False


def test_a_step_without_a_residual_is_not_hidden_by_the_others():
    broken = _step("not finite", float("nan"), (float("nan"),), negative_curvature=True)
    for steps in ((broken, *STEPS), (*STEPS, broken)):
        solver = summarise(_comparison(steps=steps))["solver"]
        assert solver["relative_residual"] is None
        assert solver["negative_curvature"] is True
        assert list(_nulls_without_reason(solver)) == []


@pytest.mark.parametrize("seeds", [0, 1, 2, 3])
@pytest.mark.parametrize("controls", [False, True])
def test_every_null_has_a_reason_and_the_json_is_strict(seeds, controls):
    report = summarise(_comparison(seeds=seeds, controls=controls))
    assert list(_nulls_without_reason({k: v for k, v in report.items() if k != "receipts"})) == []
    assert _strict(report) == report
    page = _markdown(report)
    assert "nan" not in page.lower().split()
    assert "None" not in page


def test_without_retrained_models_all_that_needs_no_oracle_is_there():
    report = summarise(_comparison(seeds=0))
    assert report["models"]["unlearned"]["forget_loss"] == pytest.approx(1.5)
    assert report["models"]["retrained"]["forget_loss"] is None
    assert report["gap_closure"]["forget_loss"] is None
    assert report["gap_closure"]["reason"]["forget_loss"] == "no retrained model was given"
    assert report["gap_closure"]["by_action"]["remove"]["reason"]["forget_loss"]
    assert report["seed_floor"]["reason"]["heldout_kl"] == "no retrained model was given"
    page = page_of(report)
    assert {picture.name for picture in page.pictures} == {"report-examples.png", "receipt1-residual.png"}
    assert "No retrained model was given" in render_markdown(page)


def test_one_retrained_model_gives_closure_with_a_caveat_and_no_kl():
    report = summarise(_comparison(seeds=1))
    # The one seed's losses are 0.1 below the middle one's: mean 1.15.
    assert report["gap_closure"]["forget_loss"] == pytest.approx(1 - 0.35 / 1.15)
    assert "no deviation between seeds is known" in report["gap_closure"]["reason"]["forget_loss"]
    assert report["gap_closure"]["heldout_kl"] is None
    assert "at least two" in report["seed_floor"]["reason"]["heldout_kl"]


def test_diverged_losses_become_null_with_the_value_in_words():
    lists = {name: [np.nan, 1.0, np.inf, 1.0] for name in ("losses", "min_k", "min_k_plus_plus")}
    report = summarise(_with(_comparison(), "unlearned", named=lists))
    assert report["models"]["unlearned"]["forget_loss"] is None
    assert report["models"]["unlearned"]["reason"]["forget_loss"] == "the value is nan"
    assert report["gap_closure"]["forget_loss"] is None
    assert list(_nulls_without_reason({k: v for k, v in report.items() if k != "receipts"})) == []
    _strict(report)
    assert "not finite" in _markdown(report)


def test_removals_only_have_no_loss_on_replacements_and_no_empty_columns():
    comparison = _comparison()

    def without_edits(record):
        named = {name: [values[0], values[2]] for name, values in record.scores["named"].items()}
        return dataclasses.replace(record, scores={**record.scores, "named": named, "wanted": {"losses": []}})

    report = summarise(
        dataclasses.replace(
            comparison,
            ids=("7", "9"),
            actions=("remove", "remove"),
            records=tuple(map(without_edits, comparison.records)),
        )
    )
    assert report["models"]["before"]["wanted_loss"] is None
    assert report["gap_closure"]["reason"]["wanted_loss"] == "no edit was requested"
    assert list(_nulls_without_reason({k: v for k, v in report.items() if k != "receipts"})) == []
    page = page_of(report)
    assert not any("replacement" in title for table in _tables(page.blocks) if table.header[0] == "model"
                   for title in table.header)  # fmt: skip
    assert not any("By kind of request" in getattr(block, "text", "") for block in page.blocks)


def _tables(blocks):
    return [
        t for b in blocks for t in (_tables(b.blocks) if isinstance(b, Details) else [b]) if isinstance(t, Table)
    ]


def test_the_page_has_a_row_per_model_and_names_every_plot():
    report = summarise(_comparison())
    page = page_of(report)
    first = next(table for table in _tables(page.blocks) if table.header[0] == "model")
    place = first.header.index("loss on the forget set")
    assert {row[0]: row[place] for row in first.rows} == {
        "before": "0",
        "unlearned": "1.5",
        "control: gradient ascent": "4",
        "retrained, mean of 3": "1.25 ± 0.1",
    }
    seeds = next(table for table in _tables(page.blocks) if table.rows[0][0] == "retrained, seed 1")
    place = seeds.header.index("loss on the forget set")
    assert [row[place] for row in seeds.rows] == ["1.15", "1.25", "1.35"]
    kinds = next(table for table in _tables(page.blocks) if "removed: loss" in table.header)
    cell = dict(zip(kinds.header, kinds.rows[1], strict=True))
    assert cell["removed: loss"] == "0.5 (0.50)"
    assert cell["response corrected: replacement's loss"] == "0.5 (1.00)"
    text = render_markdown(page)
    assert "0.3 ± 0.14 (3 / 8 / 10)" in text
    assert {picture.name for picture in page.pictures} == PLOTS | {"receipt1-residual.png"}
    for picture in page.pictures:
        assert f"]({picture.name})" in text
        with Image.open(io.BytesIO(picture.content)) as image:
            assert image.format == "PNG"
            assert min(image.size) > 200


def test_the_verdict_stands_first_and_is_of_the_kind_of_request_that_went_worst():
    report = summarise(_comparison())
    first = _markdown(report).split("\n\n")[1]
    assert first.startswith("* **The unlearned model comes part of the way to retraining**")
    assert "25 % on corrected examples" in first
    assert "0.3 of one retraining" in first
    terminal = " ".join(render_text(page_of(report).blocks).split())
    assert "25 % on corrected examples" in terminal and "<" not in terminal and "**" not in terminal


def test_rendering_is_a_function_of_the_report():
    report = summarise(_comparison())
    assert page_of(report) == page_of(_strict(report))
    assert [row.label for row in rows_of(report)][-1] == "retrained, mean of 3"


def test_a_report_is_written_beside_and_moved_into_place(tmp_path):
    page = write_report(tmp_path / "deep" / "eval", summarise(_comparison()))
    assert page == tmp_path / "deep" / "eval" / "report.html"
    names = {"report.json", "report.html", "report.md", "receipt1-residual.png"} | PLOTS
    assert {path.name for path in page.parent.iterdir()} == names
    assert [path.name for path in page.parent.parent.iterdir()] == ["eval"]
    with pytest.raises(FileExistsError, match="already holds"):
        write_report(page.parent, summarise(_comparison()))


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    report = summarise(_comparison())
    report["models"]["before"]["forget_loss"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        write_report(tmp_path / "eval", report)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actions": ("delete",) * 4}, "delete"),
        ({"ids": ("7",)}, "1 ids for 4 actions"),
        ({"actions": ("remove",) * 4}, r"before: 2 losses of `wanted` where 0 are expected"),
        ({"records": (Record(model="before", kind="before"),) * 2}, "one record"),
    ],
)
def test_measurements_that_do_not_fit_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(_comparison(), **changes)


def test_impossible_costs_are_refused():
    with pytest.raises(ValueError, match="finite and not negative"):
        Record(model="m", kind="unlearned", cost=_cost(-1.0, 1.0))
