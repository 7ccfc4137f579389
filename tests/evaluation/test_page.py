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
from llmeraser_jax.evaluation.job import build_overview, gather, page_of, write_overview, write_report
from llmeraser_jax.evaluation.page import METHOD_MEANINGS
from llmeraser_jax.evaluation.plots import Point, plot_cost_against_fidelity, plot_examples
from llmeraser_jax.evaluation.render import (
    Bullets,
    Details,
    Page,
    Picture,
    Table,
    Text,
    render_html,
    render_markdown,
    render_text,
)
from llmeraser_jax.evaluation.summary import summarise
from llmeraser_jax.lora import LoraConfig
from llmeraser_jax.rivals import RIVALS
from llmeraser_jax.runs import Run, RunError
from llmeraser_jax.training import TrainConfig
from llmeraser_jax.unlearning import METHODS
from tests.evaluation.test_summary import _comparison, _receipt, _step, _with


def reference(name):
    return {"path": f"/somewhere/{name}", "sha256": name * 3}


def write_evaluation(
    directory, origin, *, unlearned=(0.5, 1.5, 0.5, 3.5), heldout="h", retrained=("seed",), nonmembers=2, **changes
):
    """A directory of `evaluate` on the comparison of the summary's tests, the unlearned model with these losses."""
    comparison = _comparison(unlearned=unlearned, steps=(), **changes)
    records = [dataclasses.replace(record, receipt=None) for record in comparison.records]
    comparison = dataclasses.replace(comparison, records=tuple(records), nonmembers=(True, True))
    named = {"losses": list(unlearned), "min_k": [-x for x in unlearned], "min_k_plus_plus": [-x for x in
             unlearned], "extraction": [0.0, 0.5, 1.0, 0.5]}  # fmt: skip
    report = summarise(_with(comparison, "unlearned", named=named))
    report["heldout"]["nonmembers"] = nonmembers
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


def write_erasure(directory, *, steps):
    write_run(directory, "erase")
    (directory / "receipt.json").write_text(json.dumps(_receipt(*steps)))
    return directory


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Two methods on one request, one on another held-out set, an erasure and two retrained seeds."""
    root = tmp_path_factory.mktemp("results")
    write_evaluation(root / "eval_a", "run_a")
    write_evaluation(root / "eval_b", "run_b", unlearned=(1.0, 1.0, 1.0, 2.0))
    write_evaluation(root / "eval_other", "run_a", heldout="another")
    write_erasure(
        root / "run_a", steps=[_step(iterations=7), _step(iterations=3, error_bound=0.2, ritz_extremes=[-0.5, 2.0])]
    )
    for seed in (1, 2):
        write_run(root / "retrained" / f"seed_{seed}", "retrain", seed=seed)
    return root


@pytest.fixture(scope="module")
def page(results):
    names = ("eval_a", "eval_b", "eval_other", "run_a", "retrained")
    return build_overview(gather([results / name for name in names]))


def flat(page):
    return [inner for block in page.blocks for inner in (block.blocks if isinstance(block, Details) else (block,))]


def tables(page, title):
    """Tables whose header begins so."""
    return [block for block in flat(page) if isinstance(block, Table) and block.header[: len(title)] == title]


def test_each_directory_is_told_by_its_files(results):
    found = gather([results / "eval_a", results / "run_a", results / "retrained", results / "retrained" / "seed_1"])
    # Named twice, counted once.
    assert [path.name for path in found] == ["eval_a", "run_a", "seed_1", "seed_2"]
    assert [found.kind if isinstance(found, Run) else "report" for found in found.values()] == [
        "report", "erase", "retrain", "retrain",
    ]  # fmt: skip
    everything = [entry.kind if isinstance(entry, Run) else "report" for entry in gather([results]).values()]
    assert sorted(everything) == ["erase", "report", "report", "report"]


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
    assert len(tables(build_overview(found), ("model", "seeds"))) == 3


def test_only_one_request_on_one_held_out_set_is_put_side_by_side(page):
    with_both, alone = tables(page, ("model", "seeds"))
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
    table, _ = tables(page, ("model", "seeds"))
    cell = {(row[0], title): value for row in table.rows for title, value in zip(table.header, row, strict=True)}
    assert (
        cell["run_a (path)", "loss on the forget set"] == "1.5"
        and cell["run_b (path)", "loss on the forget set"] == "1.25"
    )
    # Before 0, retrained 1.25: 1 - 0.25 / 1.25, and nothing left.
    assert (
        cell["run_a (path)", "closure, forget set"] == "0.80"
        and cell["run_b (path)", "closure, forget set"] == "1.00"
    )
    assert cell["retrained, mean of 3", "loss on the forget set"] == "1.25 ± 0.1"
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
    assert cell["run_a (path)", "AUC, loss"].startswith("0.625 ±")  # 5 of 8 pairs


def test_every_column_and_every_certificate_is_explained(page):
    explained = "\n".join(item for block in flat(page) if isinstance(block, Bullets) for item in block.items)
    for table in tables(page, ("model",)):
        for title in table.header[1:]:
            assert f"**{title}**: " in explained
    (certificates,) = tables(page, ("", "run_a"))
    assert certificates.header[-1] == "how to read it" and all(row[-1] for row in certificates.rows)


def test_every_method_of_the_package_is_explained():
    assert METHOD_MEANINGS.keys() == {*METHODS, *RIVALS}


def test_certificates_are_the_worst_of_the_steps(page):
    (certificates,) = tables(page, ("", "run_a"))
    value = {row[0]: row[1] for row in certificates.rows}
    assert value["solver status"] == "not converged: max_steps reached (10 iterations in 2 solves)"
    assert value["error bound"] == "0.2 (certifies nothing)"
    assert value["Ritz extremes"] == "-0.5 to 2.5"
    assert value["negative curvature"] == "no"
    assert value["loss on retained examples"] == "mean 0.01 → 0.02, 95 % 0.03 → 0.03, worst 0.05 → 0.05"
    assert value["validity check"] == "complete" and value["standard error"] == "0.125"
    assert "loss on replacements" not in value  # nothing was edited
    (steps,) = tables(page, ("step",))
    assert [row[6] for row in steps.rows] == ["0.008", "-0.5"]


def test_each_example_stands_before_and_after_every_method(page):
    trained, wanted, *_ = tables(page, ("id", "request"))
    assert trained.header[2:] == ("before", "run_a (path)", "run_b (path)", "retrained (mean)")
    assert trained.rows[3] == ("10", "response corrected", "0", "3.5", "2", "2")
    assert [row[0] for row in wanted.rows] == ["8", "10"]


def test_limits_follow_from_the_sizes(page):
    told = "\n".join(item for block in page.blocks if isinstance(block, Bullets) for item in block.items)
    assert "The forget set has 4 examples" in told
    assert "10 examples: one of them more or less right moves a share by 0.1" in told
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
    assert pictures == ["comparison1-cost.png", "comparison1-examples.png", "receipt1-residual.png"]
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
    markdown = render_markdown(page)
    assert "x\\|y" in markdown
    assert "<script>" not in markdown and "&lt;script>" in markdown and "**bold** `code`" in markdown
    link = render_markdown(Page("t", (Bullets(("[click](javascript:x)\n# no heading",)),)))
    assert "\\[click]" in link and "\n#" not in link
    assert "\x1b" not in render_text((Text("\x1b[31mred"), Table(("a", "b"), (("1", "\x1b[0m"),))))
    with pytest.raises(ValueError, match=r"\[3\] cells"):
        Table(("a", "b"), (("1", "2", "3"),))


def test_plots_without_anything_to_show_are_left_out():
    retrained = Point(label="retrained", kind="retrained", cost=1.0, closure=1.0, kl_over_floor=1.0)
    method = Point(label="m", kind="unlearned", cost=0.1, closure=None, kl_over_floor=None)
    assert plot_cost_against_fidelity([retrained, method]) is None
    assert plot_cost_against_fidelity([retrained, dataclasses.replace(method, closure=-7.0)]) is not None
    kinds = {"before": "before", "m": "unlearned"}
    assert plot_examples({"trained": {"removed": {"before": [None], "m": [None, float("nan")]}}}, kinds) is None
    assert plot_examples({"trained": {"removed": {"before": [1.0], "m": [None]}}, "wanted": {}}, kinds) is not None


def test_texts_and_answers_are_shown_where_they_are_kept_and_stay_text():
    comparison = _comparison(steps=())
    texts = [{"query": "<b>who?</b>", "trained": "an answer", "wanted_query": "who else?", "wanted": "another"}] * 4
    said = {"named": ["I forgot"] * 4, "wanted": ["another"] * 2}
    comparison = dataclasses.replace(_with(comparison, "unlearned", answers=said), texts=tuple(texts))
    records = [dataclasses.replace(record, receipt=None) for record in comparison.records]
    report = summarise(dataclasses.replace(comparison, records=tuple(records)))
    page = page_of(report)
    (table,) = tables(page, ("request", "question"))
    assert table.rows[0] == ("removed", "<b>who?</b>", "an answer", "I forgot")
    assert table.rows[2] == ("  its replacement", "who else?", "another", "another")
    assert "<b>" not in render_html(page) and "<b>" not in render_markdown(page)
    assert not tables(page_of(summarise(_comparison())), ("request", "question"))
