"""`llmeraser report`: what is found, what is refused, what is put side by side, and a page that stands alone."""

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from llmeraser_jax.cli import main
from llmeraser_jax.data import Recipe
from llmeraser_jax.evaluation.blocks import (
    Bullets,
    Details,
    Page,
    Picture,
    Table,
    Text,
    render_html,
    render_markdown,
)
from llmeraser_jax.evaluation.gather import gather
from llmeraser_jax.evaluation.overview import build_overview, write_overview
from llmeraser_jax.evaluation.overview_plots import Point, plot_cost_against_fidelity, plot_each_example
from llmeraser_jax.evaluation.report import build_report, write_report
from llmeraser_jax.evaluation.tasks import auc_metric
from llmeraser_jax.lora import LoraConfig
from llmeraser_jax.runs import RunError
from llmeraser_jax.training import TrainConfig
from tests.evaluation.test_report import _comparison


def reference(name):
    return {"path": f"/somewhere/{name}", "sha256": name * 3}


def write_evaluation(
    directory, origin, *, unlearned=(0.5, 1.5, 0.5, 3.5), heldout="h", retrained=("seed",), nonmembers=2, **changes
):
    """A directory of `evaluate` on the comparison of the report's tests, the unlearned model with these losses."""
    comparison = _comparison(**changes)
    aucs = (auc_metric("loss", np.array([1.0, 2.0]), np.array([0.0, 1.0])),)
    model = dataclasses.replace(
        comparison.unlearned,
        forget_losses=np.array(unlearned),
        extraction_strengths=np.array([0.0, 0.5, 1.0, 0.5]),
        membership_aucs=aucs,
    )
    report = build_report(dataclasses.replace(comparison, unlearned=model, num_nonmembers=nonmembers))
    report["method"] = "path"
    report["context"]["Outcome"] = f"what {origin} reached"
    report["runs"] = {
        "before": reference("before"),
        "unlearned": reference(origin),
        "retrained": [reference(seed) for seed in retrained],
        "heldout_sha256": heldout,
        "requests_sha256": "r",
    }
    write_report(directory, report)
    return directory


def write_run(directory, kind, *, seed=1):
    """What `load_run` reads, without arrays."""
    (directory / "adapter").mkdir(parents=True)
    recorded = {
        "format_version": 1,
        "kind": kind,
        "model": {"path": "base", "dtype": "float32", "sha256": "m"},
        "recipe": Recipe().to_mapping(),
        "normalizer": None,
        "lora": dataclasses.asdict(LoraConfig()),
        "train": TrainConfig(seed=seed, epochs=5).to_mapping(),
        "unstated": [],
        "initial_adapter_known": False,
        "result": {"seconds": 12.5, "gradient_equivalents": 500.0, "peak_memory_bytes": 2**30},
        "parent": None,
        "receipts": [],
        "versions": {},
        "data": {"path": "train.jsonl", "ids": ["7"], "sha256": ["x"]},
    }
    (directory / "run.json").write_text(json.dumps(recorded))
    return directory


def step(**changes):
    return {
        "weight_before": 1.0,
        "weight_after": 0.5,
        "scale": 1.0,
        "status": "converged",
        "iterations": 7,
        "relative_residual": 0.04,
        "negative_curvature": False,
        "ritz_extremes": [0.008, 2.5],
        "error_bound": 0.05,
        "forget_loss": 0.3,
        "wanted_loss": None,
        "probe_loss": 0.1,
        **changes,
    }


def write_erasure(directory, *, steps):
    write_run(directory, "erase")
    change = {"before": 0.01, "after": 1.25, "predicted": 0.75}
    receipt = {
        "format": 1,
        "config": {"curvature": "gauss-newton", "curvature_data": "sample", "damping": 0.007},
        "counts": {"remove": 2, "modify_query": 0, "correct_response": 1},
        "num_examples_before": 120,
        "method": "path",
        "outcome": "complete: the weight was taken out",
        "range_check": {
            "verdict": "passed: retained rows stayed",
            "forget": change,
            "wanted": None,
            "probe": change,
        },
        "solver": {
            "status": "not converged: max_steps reached",
            "iterations": sum(s["iterations"] for s in steps),
            "relative_residual": max(s["relative_residual"] for s in steps),
            "negative_curvature": any(s["negative_curvature"] for s in steps),
        },
        "steps": steps,
        "delta_norm": 0.9,
        "adapter_norm_before": 8.0,
        "bf16_survival": 0.875,
        "edited_gradient_norm_before": 0.5,
        "edited_gradient_norm_after": 0.25,
        "gradient_equivalents": {"total": 491.0},
        "seconds": 6.5,
        "peak_memory_bytes": None,
    }
    (directory / "receipt.json").write_text(json.dumps(receipt))
    return directory


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Two methods on one request, one on another held-out set, an erasure and two retrained seeds."""
    root = tmp_path_factory.mktemp("results")
    write_evaluation(root / "eval_a", "run_a")
    write_evaluation(root / "eval_b", "run_b", unlearned=(1.0, 1.0, 1.0, 2.0))
    write_evaluation(root / "eval_other", "run_a", heldout="another")
    write_erasure(root / "run_a", steps=[step(), step(iterations=3, error_bound=0.2, ritz_extremes=[-0.5, 2.0])])
    for seed in (1, 2):
        write_run(root / "retrained" / f"seed_{seed}", "retrain", seed=seed)
    return root


@pytest.fixture(scope="module")
def page(results):
    names = ("eval_a", "eval_b", "eval_other", "run_a", "retrained")
    return build_overview(gather([results / name for name in names]))


def tables(page, title):
    """Tables whose header begins so."""
    flat = [inner for block in page.blocks for inner in (block.blocks if isinstance(block, Details) else (block,))]
    return [block for block in flat if isinstance(block, Table) and block.header[: len(title)] == title]


def test_each_directory_is_told_by_its_files(results):
    found = gather([results / "eval_a", results / "run_a", results / "retrained", results / "retrained" / "seed_1"])
    assert [e.path.name for e in found.evaluations] == ["eval_a"]
    assert [e.run.path.name for e in found.erasures] == ["run_a"]
    assert [run.path.name for run in found.retrainings] == ["seed_1", "seed_2"]  # named twice, counted once
    everything = gather([results])
    assert len(everything.evaluations) == 3 and len(everything.erasures) == 1 and not everything.retrainings


def test_what_is_no_result_is_refused_by_name_and_nothing_is_written(results, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "report.json").write_text('{"format": 99}')
    arguments = [str(tmp_path / "photos"), str(results / "eval_a"), str(tmp_path / "old"), str(tmp_path / "gone")]
    assert main(["report", *arguments, "--workdir", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "photos was not made by" in error and "cat.png" in error
    assert "report.json is no report" in error and "gone is not there" in error
    assert not (tmp_path / "out").exists()
    with pytest.raises(RunError, match="No directory"):
        gather([])


def test_other_non_members_and_other_retrained_models_are_another_comparison(results, tmp_path):
    write_evaluation(tmp_path / "shown", "run_b", nonmembers=1)
    write_evaluation(tmp_path / "seeds", "run_b", retrained=("seed", "other"))
    found = gather([results / "eval_a", results / "eval_b", tmp_path / "shown", tmp_path / "seeds"])
    assert len(tables(build_overview(found), ("model", "loss on S"))) == 3


def test_only_one_request_on_one_held_out_set_is_put_side_by_side(page):
    with_both, alone = tables(page, ("model", "loss on S"))
    labels = [row[0] for row in with_both.rows]
    assert labels == [
        "before",
        "run_a (path)",
        "control: gradient ascent, as far as run_a (path)",
        "run_b (path)",
        "control: gradient ascent, as far as run_b (path)",
        "retrained, mean of 3",
    ]
    assert [row[0] for row in alone.rows] == [
        "before",
        "run_a (path)",
        "control: gradient ascent",
        "retrained, mean of 3",
    ]
    assert with_both.emphasised == (5,)


def test_cells_are_the_evaluations_numbers(page):
    table, _ = tables(page, ("model", "loss on S"))
    cell = {(row[0], title): value for row in table.rows for title, value in zip(table.header, row, strict=True)}
    assert cell["run_a (path)", "loss on S"] == "1.5" and cell["run_b (path)", "loss on S"] == "1.25"
    # Before 0, retrained 1.25: 1 - 0.25 / 1.25, and nothing left.
    assert cell["run_a (path)", "closure on S"] == "0.80" and cell["run_b (path)", "closure on S"] == "1.00"
    assert cell["retrained, mean of 3", "loss on S"] == "1.25 ± 0.1"
    assert cell["run_a (path)", "cost / retraining"] == "0.3"  # 120 of 400
    assert cell["before", "cost / retraining"] == "–"
    assert float(cell["retrained, mean of 3", "held-out KL / floor"].split(" ± ")[0]) == 1.0
    forgetting, _ = tables(page, ("model", "probability"))
    cell = {
        (row[0], title): value
        for row in forgetting.rows
        for title, value in zip(forgetting.header, row, strict=True)
    }
    assert float(cell["run_b (path)", "probability"]) == pytest.approx((3 * np.exp(-1) + np.exp(-2)) / 4, abs=5e-4)
    assert cell["run_a (path)", "extraction"] == "0.5"
    assert cell["run_a (path)", "AUC, loss"].startswith("0.875 ±")


def test_every_column_and_every_certificate_is_explained(page):
    explained = "\n".join(item for block in page.blocks if isinstance(block, Bullets) for item in block.items)
    for table in tables(page, ("model",)):
        for title in table.header[1:]:
            assert f"**{title}**: " in explained
    (certificates,) = tables(page, ("", "run_a"))
    assert certificates.header[-1] == "how to read it" and all(row[-1] for row in certificates.rows)


def test_certificates_are_the_worst_of_the_steps(page):
    (certificates,) = tables(page, ("", "run_a"))
    value = {row[0]: row[1] for row in certificates.rows}
    assert value["solver status"] == "not converged: max_steps reached (10 iterations in 2 solves)"
    assert value["error bound"] == "0.2 (certifies nothing)"
    assert value["Ritz extremes"] == "-0.5 to 2.5"
    assert value["negative curvature"] == "no"
    assert value["range check"].startswith("passed")
    assert value["loss on S"] == "0.01 → 1.25 (predicted 0.75)"
    assert "loss as wanted" not in value  # nothing was edited
    (steps,) = tables(page, ("step",))
    assert [row[6] for row in steps.rows] == ["0.008", "-0.5"]


def test_each_example_stands_before_and_after_every_method(page):
    trained, wanted, *_ = tables(page, ("id", "request"))
    assert trained.header[2:] == ("before", "run_a (path)", "run_b (path)", "retrained (mean)")
    assert trained.rows[3] == ("10", "response corrected", "0", "3.5", "2", "2")
    assert [row[0] for row in wanted.rows] == ["8", "10"]


def test_limits_follow_from_the_sizes(page):
    told = "\n".join(item for block in page.blocks if isinstance(block, Bullets) for item in block.items)
    assert "S has 4 examples" in told
    assert "2 held-out examples: one of them more or less right moves a share by 0.5" in told
    assert "about 50 % of itself" in told  # three seeds: 1 / sqrt(2 * 2)


def test_without_evaluations_the_page_says_what_is_missing(results):
    page = build_overview(gather([results / "run_a"]))
    assert any(isinstance(block, Text) and "No evaluation was given" in block.text for block in page.blocks)
    assert tables(page, ("", "run_a"))


class _References(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_no_other_file_and_the_markdown_links_the_pictures_beside_it(results, tmp_path):
    out = tmp_path / "page"
    assert write_overview([results / "eval_a", results / "eval_b", results / "run_a"], out) == out / "report.html"
    text = (out / "report.html").read_text()
    parser = _References()
    parser.feed(text)
    assert parser.open == [] and len(parser.found) == 3
    pictures = sorted(path.name for path in out.glob("*.png"))
    assert pictures == ["comparison1-cost.png", "comparison1-forget.png", "comparison1-wanted.png"]
    embedded = [base64.b64decode(found.removeprefix("data:image/png;base64,")) for found in parser.found]
    assert sorted(embedded) == sorted((out / name).read_bytes() for name in pictures)
    for content in embedded:
        with Image.open(io.BytesIO(content)) as image:
            assert image.format == "PNG" and min(image.size) > 300
    markdown = (out / "report.md").read_text()
    assert set(re.findall(r"\]\((.*?\.png)\)", markdown)) == set(pictures)
    with pytest.raises(FileExistsError, match="already holds"):
        write_overview([results / "eval_a"], out)


def test_text_is_shown_as_it_stands_and_tables_must_be_rectangular():
    nasty = "<script>alert(1)</script> & | **bold** `code`"
    page = Page(
        nasty, (Text(nasty), Table(("a", "b"), (("x|y", nasty),), (0,)), Picture("p.png", nasty, b"\x89PNG"))
    )
    text = render_html(page)
    assert "<script>" not in text and "&lt;script&gt;" in text
    assert "<strong>bold</strong>" in text and "<code>code</code>" in text and 'class="reference"' in text
    assert "x\\|y" in render_markdown(page)
    with pytest.raises(ValueError, match=r"\[3\] cells"):
        Table(("a", "b"), (("1", "2", "3"),))


def test_plots_without_anything_to_show_are_left_out():
    retrained = Point(label="retrained", kind="retrained", cost=1.0, closure=1.0, kl_over_floor=1.0)
    method = Point(label="m", kind="unlearned", cost=0.1, closure=None, kl_over_floor=None)
    assert plot_cost_against_fidelity([retrained, method]) is None
    assert plot_cost_against_fidelity([retrained, dataclasses.replace(method, closure=-7.0)]) is not None
    assert plot_each_example({"m": [{"before": 1.0, "unlearned": 2.0}]}) is None
    assert plot_each_example({"m": [{"before": 1.0, "unlearned": 2.0, "retrained": None}]}) is None
