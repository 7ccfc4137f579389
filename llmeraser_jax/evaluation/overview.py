"""Any number of results as one page: what `llmeraser report` shows.

Evaluations are put side by side where they are about the same request on the same run, judged on the same held-out
examples; nothing else is compared, and a study is a section of its own. A receipt belongs to an evaluation by the
hash of its run, wherever either lies. The page holds no text of any example: what was asked to be forgotten must
not live on in the report about it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmeraser_jax import files
from llmeraser_jax.evaluation.blocks import (
    Block,
    Bullets,
    Heading,
    Page,
    Table,
    Text,
    render_html,
    render_markdown,
)
from llmeraser_jax.evaluation.certificates import certificate_blocks
from llmeraser_jax.evaluation.example_blocks import NamedLosses, Quantity, example_blocks
from llmeraser_jax.evaluation.gather import Erasure, Evaluation, Gathered, gather
from llmeraser_jax.evaluation.model_tables import MISSING, Json, Kind, ModelRow, comparison_blocks, limits
from llmeraser_jax.evaluation.page import show_number
from llmeraser_jax.evaluation.plots import ACTION_NAMES
from llmeraser_jax.evaluation.study_page import study_blocks, study_receipts, study_sources, study_titles
from llmeraser_jax.runs import Run

HTML_FILE, MARKDOWN_FILE = "report.html", "report.md"


def write_overview(directories: Sequence[str | os.PathLike[str]], workdir: str | os.PathLike[str]) -> Path:
    """Gathers directories into `report.html`, which needs no other file, `report.md` and PNG files.

    Args:
        directories: see `gather`.
        workdir: new or empty; written whole or not at all.

    Returns:
        The path of `report.html`.

    Raises:
        RunError: a directory that is no result.
        FileExistsError: `workdir` holds something.
    """
    files.require_empty(workdir)
    page = build_overview(gather(directories))
    with files.atomic_directory(workdir) as temporary:
        (temporary / HTML_FILE).write_text(render_html(page), encoding="utf-8")
        (temporary / MARKDOWN_FILE).write_text(render_markdown(page), encoding="utf-8")
        for picture in page.pictures:
            (temporary / picture.name).write_bytes(picture.content)
    return Path(workdir) / HTML_FILE


def build_overview(found: Gathered) -> Page:
    """The page of what was gathered."""
    blocks: list[Block] = [
        Text(
            "A language model was fine-tuned on some examples; then it was asked to forget a few of them, or to "
            "learn them differently. **Unlearning** edits the trained adapter for that. The model to match is one "
            "that was **retrained** from the start on the edited data, which is what unlearning is meant to save. "
            "The named examples are called **S** below."
        ),
        Heading("What was read"),
        _sources(found),
    ]
    groups, titles = _groups(found.evaluations), study_titles(found.studies)
    for number, group in enumerate(groups, start=1):
        blocks += _comparison_blocks(group, number, len(groups))
    if not groups and not found.studies:
        blocks.append(
            Text(
                "No evaluation was given, so that nothing says how close to retraining the results are; make one "
                "with `llmeraser evaluate` and name its directory too."
            )
        )
    for number, study in enumerate(found.studies, start=1):
        fold = number > 1 or bool(groups)
        blocks += study_blocks(study, titles[number - 1], f"study{number}", fold=fold)
    receipts = [(_name(erasure.run.path), erasure.receipt) for erasure in found.erasures]
    receipts += [receipt for study, title in zip(found.studies, titles, strict=True)
                 for receipt in study_receipts(study, title)]  # fmt: skip
    if receipts:
        blocks += certificate_blocks(receipts)
    blocks += _cost_blocks(found)
    return Page("Unlearning report", tuple(blocks))


def _name(path: Path) -> str:
    return path.name or str(path)


def _label(evaluation: Evaluation) -> str:
    """What the unlearned model of an evaluation is called: the method, and the directory it came from."""
    runs = evaluation.report.get("runs")
    origin = Path(runs["unlearned"]["path"]).name if runs else _name(evaluation.path)
    method = evaluation.report.get("method", "")
    return f"{origin} ({method})" if method and method not in origin else origin


def _sources(found: Gathered) -> Table:
    rows = []
    for evaluation in found.evaluations:
        report = evaluation.report
        seeds = report["models"]["retrained"]["seeds"]
        told = f"{_label(evaluation)} against {seeds} retrained models" if seeds else f"{_label(evaluation)} alone"
        rows.append((_name(evaluation.path), "evaluation", told))
    for erasure in found.erasures:
        rows.append((_name(erasure.run.path), "erasure", f"{erasure.receipt['method']}: {_request(erasure)}"))
    for run in found.retrainings:
        told = f"seed {run.train_config.seed}, {len(run.data_ids)} examples, {run.train_config.epochs} epochs"
        rows.append((_name(run.path), "retraining", told))
    for run in found.trainings:
        rows.append((_name(run.path), run.kind, f"{len(run.data_ids)} examples, {run.train_config.epochs} epochs"))
    rows += study_sources(found.studies)
    return Table(("directory", "made by", "what it is"), tuple(rows))


def _request(erasure: Erasure) -> str:
    counts = erasure.receipt["counts"]
    named = [f"{count} {ACTION_NAMES.get(action, action)}" for action, count in counts.items() if count]
    return f"{', '.join(named)} of {erasure.receipt['num_examples_before']} examples"


def _groups(evaluations: Sequence[Evaluation]) -> list[list[Evaluation]]:
    """Evaluations that can be compared: of one run and request, on the same held-out rows and retrained models."""
    groups: dict[Any, list[Evaluation]] = {}
    for place, evaluation in enumerate(evaluations):
        runs = evaluation.report.get("runs")
        key: Any = place
        if runs is not None:
            key = (
                runs["before"]["sha256"],
                runs["requests_sha256"],
                runs["heldout_sha256"],
                evaluation.report["heldout"].get("nonmembers"),
                tuple(sorted(run["sha256"] for run in runs["retrained"])),
            )
        groups.setdefault(key, []).append(evaluation)
    return list(groups.values())


def _distinct_labels(group: Sequence[Evaluation]) -> list[str]:
    labels = [_label(evaluation) for evaluation in group]
    return [
        label if labels.count(label) == 1 else f"{label}, {_name(evaluation.path)}"
        for label, evaluation in zip(labels, group, strict=True)
    ]


def _comparison_blocks(group: Sequence[Evaluation], number: int, of: int) -> list[Block]:
    first = max(group, key=lambda evaluation: evaluation.report["models"]["retrained"]["seeds"]).report
    labels = _distinct_labels(group)
    title = "Comparison with retraining" if of == 1 else f"Comparison {number} of {of}"
    hidden = ("Method", "Outcome", "Devices", "Request")
    asked = [
        f"{first['named'][action]} {words}" for action, words in ACTION_NAMES.items() if first["named"][action]
    ]
    facts = {**{key: value for key, value in first["context"].items() if key not in hidden}, "S": ", ".join(asked)}
    outcomes = [evaluation.report["context"].get("Outcome", "outcome not recorded") for evaluation in group]
    blocks: list[Block] = [
        Heading(title),
        Bullets(tuple(f"**{key}**: {value}" for key, value in facts.items())),
        Bullets(tuple(f"**{label}**: {outcome}" for label, outcome in zip(labels, outcomes, strict=True))),
    ]
    models = _models(group, labels, first)
    spread = (
        "± after a loss or the held-out KL is the standard deviation between seeds; after an AUC or a task's "
        "metric it is the standard error over examples, in the retrained row the deviation between seeds."
    )
    sizes = limits(
        named=first["named"]["total"],
        heldout=first["heldout"]["examples"],
        seeds=first["models"]["retrained"]["seeds"],
        undefined=_undefined(first),
    )
    blocks += comparison_blocks(models, told=(spread,), sizes=sizes, picture=f"comparison{number}-cost.png")
    blocks += _example_blocks(group, labels, first, number)
    return blocks


def _undefined(report: Json) -> str:
    """Why the closure on S has no value."""
    if report["gap_closure"].get("forget_loss") is not None:
        return ""
    return report["gap_closure"].get("reason", {}).get("forget_loss", "not defined")


def _models(group: Sequence[Evaluation], labels: Sequence[str], first: Json) -> list[ModelRow]:
    """Before, then each unlearned model with its controls, and the retrained mean at the end."""

    def row(label: str, kind: Kind, entry: Json, closure: Json | None, cost: Json | None, report: Json) -> ModelRow:
        return ModelRow(
            label=label,
            kind=kind,
            entry=entry,
            closure=closure,
            cost=cost,
            seed_floor=report["seed_floor"].get("heldout_kl"),
            retraining=report["cost"]["retrain"].get("gradient_equivalents"),
        )

    models = [row("before", "before", first["models"]["before"], None, None, first)]
    for label, evaluation in zip(labels, group, strict=True):
        report = evaluation.report
        closure, cost = report["gap_closure"], report["cost"]
        models.append(row(label, "unlearned", report["models"]["unlearned"], closure, cost["unlearn"], report))
        for name, entry in report["models"]["controls"].items():
            title = f"control: {name}" if len(group) == 1 else f"control: {name}, as far as {label}"
            closure_of, cost_of = closure["controls"].get(name), cost["controls"].get(name)
            models.append(row(title, "control", entry, closure_of, cost_of, report))
    retrained = first["models"]["retrained"]
    if retrained["seeds"]:
        title = f"retrained, mean of {retrained['seeds']}" if retrained["seeds"] > 1 else "retrained, one seed"
        models.append(row(title, "retrained", retrained, None, first["cost"]["retrain"], first))
    return models


def _example_blocks(group: Sequence[Evaluation], labels: Sequence[str], first: Json, number: int) -> list[Block]:
    """Every named example before and after, as it was trained on and as it was wanted."""
    blocks: list[Block] = [Heading("Each named example, before and after", 3)]
    rows_of = [{row["id"]: row for row in evaluation.report["named_examples"]} for evaluation in group]
    quantities: tuple[Quantity, ...] = ("forget", "wanted")
    for quantity in quantities:
        key = f"{quantity}_loss"
        chosen = [row for row in first["named_examples"] if key in row]
        if not chosen:
            continue
        losses = NamedLosses(
            quantity=quantity,
            ids=[row["id"] for row in chosen],
            requests=[ACTION_NAMES[row["action"]] for row in chosen],
            before=[row[key].get("before") for row in chosen],
            models={
                label: [rows.get(row["id"], {}).get(key, {}).get("unlearned") for row in chosen]
                for label, rows in zip(labels, rows_of, strict=True)
            },
            retrained=[row[key].get("retrained") for row in chosen]
            if first["models"]["retrained"]["seeds"]
            else None,
        )
        picture = f"comparison{number}-{quantity}.png"
        blocks += example_blocks(losses, picture, pictured=labels, left="the `report.json` of each evaluation")
    return blocks


def _cost_blocks(found: Gathered) -> list[Block]:
    rows = []
    for erasure in found.erasures:
        receipt = erasure.receipt
        rows.append(_cost_row(erasure.run, f"erasure, {receipt['method']}", receipt.get("peak_memory_bytes")))
    for run in (*found.retrainings, *found.trainings):
        rows.append(_cost_row(run, run.kind, run.result.get("peak_memory_bytes")))
    if not rows:
        return []
    return [
        Heading("What each run took"),
        Table(("directory", "made by", "gradient equivalents", "seconds", "peak memory (MiB)"), tuple(rows)),
        Bullets(
            (
                "**gradient equivalents**: 1 is a forward and backward pass of one example; diagnostics are not "
                "in it. Training costs epochs times examples.",
                "**seconds**: wall-clock time, compilation included. **peak memory**: of the process, or of the "
                "first device where that keeps count; a process that had done other work before shows its peak "
                "too.",
            )
        ),
    ]


def _cost_row(run: Run, kind: str, memory: int | None) -> tuple[str, ...]:
    cost = [show_number(run.result.get(key)) for key in ("gradient_equivalents", "seconds")]
    return (_name(run.path), kind, *cost, MISSING if memory is None else show_number(memory / 2**20))
