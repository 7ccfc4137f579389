"""Any number of results as one page: what `llmeraser report` shows.

Evaluations are put side by side where they are about the same request on the same run, judged on the same held-out
examples; nothing else is compared. A receipt belongs to an evaluation by the hash of its run, wherever either lies.
The page holds no text of any example: what was asked to be forgotten must not live on in the report about it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmeraser_jax import files
from llmeraser_jax.evaluation.blocks import (
    Block,
    Bullets,
    Details,
    Heading,
    Page,
    Picture,
    Table,
    Text,
    render_html,
    render_markdown,
)
from llmeraser_jax.evaluation.certificates import certificate_blocks
from llmeraser_jax.evaluation.gather import Erasure, Evaluation, Gathered, gather
from llmeraser_jax.evaluation.overview_plots import Point, plot_cost_against_fidelity, plot_each_example
from llmeraser_jax.evaluation.page import metric_cell, show_number
from llmeraser_jax.evaluation.plots import ACTION_NAMES
from llmeraser_jax.runs import Run

HTML_FILE, MARKDOWN_FILE = "report.html", "report.md"
_SHOWN_EXAMPLES = 200
_OPEN_EXAMPLES = 30  # a longer table of examples is folded
_MISSING = "–"

Json = Mapping[str, Any]


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
    groups = _groups(found.evaluations)
    for number, group in enumerate(groups, start=1):
        blocks += _comparison_blocks(group, number, len(groups))
    if not groups:
        blocks.append(
            Text(
                "No evaluation was given, so that nothing says how close to retraining the results are; make one "
                "with `llmeraser evaluate` and name its directory too."
            )
        )
    if found.erasures:
        blocks += certificate_blocks([(_name(erasure.run.path), erasure.receipt) for erasure in found.erasures])
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
    return Table(("directory", "made by", "what it is"), tuple(rows))


def _request(erasure: Erasure) -> str:
    counts = erasure.receipt["counts"]
    named = [f"{count} {ACTION_NAMES.get(action, action)}" for action, count in counts.items() if count]
    return f"{', '.join(named)} of {erasure.receipt['num_examples_before']} examples"


def _groups(evaluations: Sequence[Evaluation]) -> list[list[Evaluation]]:
    """Evaluations that can be compared: of one run, one request and one held-out set."""
    groups: dict[Any, list[Evaluation]] = {}
    for place, evaluation in enumerate(evaluations):
        runs = evaluation.report.get("runs")
        key = place if runs is None else (runs["before"]["sha256"], runs["requests_sha256"], runs["heldout_sha256"])
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
        Heading("Methods by metrics", 3),
    ]
    models = _models(group, labels, first)
    for title, columns in (
        ("How close to retraining, and at what cost.", _FIDELITY),
        ("How much of S is left.", _FORGETTING),
        ("What else the model can do.", _task_columns(models)),
    ):
        shown = [column for column in columns if any(column.cell(m, first) != _MISSING for m in models)]
        if not shown:
            continue
        rows = tuple((model.label, *(column.cell(model, first) for column in shown)) for model in models)
        emphasised = tuple(k for k, model in enumerate(models) if model.kind == "retrained")
        blocks += [
            Text(f"**{title}**"),
            Table(("model", *(column.title for column in shown)), rows, emphasised),
            Bullets(tuple(f"**{column.title}**: {column.meaning}" for column in shown)),
        ]
    blocks.append(Bullets(_rows_explained(models)))
    blocks += [Heading("What these numbers can and cannot tell", 3), Bullets(_limits(first))]
    points = _points(models, first)
    picture = plot_cost_against_fidelity(points)
    if picture is not None:
        blocks += [
            Heading("Cost against fidelity", 3),
            Picture(
                f"comparison{number}-cost.png",
                "Each mark is a model; further left is cheaper. Closure on S, where it is defined: how much of the "
                "gap between before and retrained is closed, 1 is the retrained level. Held-out KL / seed floor: "
                "distance from retraining on held-out prompts, 1 is as far as another retraining is.",
                picture,
            ),
        ]
    blocks += _example_blocks(group, labels, first, number)
    return blocks


class _Model:
    """One row of the tables: a model with its entries in the report it is from."""

    def __init__(self, label: str, kind: str, entry: Json, closure: Json | None, cost: Json | None, report: Json):
        self.label, self.kind, self.entry, self.closure, self.cost = label, kind, entry, closure, cost
        self.report = report


def _models(group: Sequence[Evaluation], labels: Sequence[str], first: Json) -> list[_Model]:
    """Before, then each unlearned model with its controls, and the retrained mean at the end."""
    models = [_Model("before", "before", first["models"]["before"], None, None, first)]
    for label, evaluation in zip(labels, group, strict=True):
        report = evaluation.report
        closure, cost = report["gap_closure"], report["cost"]
        models.append(_Model(label, "unlearned", report["models"]["unlearned"], closure, cost["unlearn"], report))
        for name, entry in report["models"]["controls"].items():
            title = f"control: {name}" if len(group) == 1 else f"control: {name}, as far as {label}"
            models.append(
                _Model(title, "control", entry, closure["controls"].get(name), cost["controls"].get(name), report)
            )
    retrained = first["models"]["retrained"]
    if retrained["seeds"]:
        title = f"retrained, mean of {retrained['seeds']}" if retrained["seeds"] > 1 else "retrained, one seed"
        models.append(_Model(title, "retrained", retrained, None, first["cost"]["retrain"], first))
    return models


class _Column:
    """One column of the tables: its title, a sentence on what it means, and its cell for a model."""

    def __init__(self, title: str, meaning: str, cell: Callable[[_Model, Json], str]):
        self.title, self.meaning, self.cell = title, meaning, cell


def _scalar(key: str) -> Callable[[_Model, Json], str]:
    def cell(model: _Model, first: Json) -> str:
        deviation = model.entry.get("seed_standard_deviation", {}).get(key)
        return show_number(model.entry.get(key)) + (f" ± {show_number(deviation)}" if deviation is not None else "")

    return cell


def _closure(key: str) -> Callable[[_Model, Json], str]:
    def cell(model: _Model, first: Json) -> str:
        value = None if model.closure is None else model.closure.get(key)
        return _MISSING if value is None else f"{value + 0.0:.2f}"

    return cell


def _kl_over_floor(entry: Json, report: Json) -> float | None:
    """Held-out KL in multiples of the seed floor."""
    kl, floor = entry.get("heldout_kl_to_retrained"), report["seed_floor"].get("heldout_kl")
    return kl / floor if kl is not None and floor else None


def _kl_cell(model: _Model, first: Json) -> str:
    return show_number(_kl_over_floor(model.entry, model.report))


def _share_of_retraining(model: _Model) -> float | None:
    spent = None if model.cost is None else model.cost.get("gradient_equivalents")
    whole = model.report["cost"]["retrain"].get("gradient_equivalents")
    return spent / whole if spent is not None and whole else None


def _cost_cell(key: str) -> Callable[[_Model, Json], str]:
    def cell(model: _Model, first: Json) -> str:
        return _MISSING if model.cost is None else show_number(model.cost.get(key))

    return cell


def _auc(name: str) -> Callable[[_Model, Json], str]:
    return lambda model, first: metric_cell(model.entry["membership_auc"].get(name))


_FIDELITY = (
    _Column(
        "loss on S",
        "how improbable the model finds the named answers as it was trained on them (nats per token). Far below "
        "the retrained value is still remembered, far above it is damaged.",
        _scalar("forget_loss"),
    ),
    _Column(
        "closure on S",
        "1 - |model - retrained| / |before - retrained| of that loss: 1 is the retrained level, 0 no nearer than "
        "before, negative further away. Empty where before and retrained differ by no more than two standard "
        "deviations of the seeds.",
        _closure("forget_loss"),
    ),
    _Column(
        "loss as wanted",
        "for edits, the loss on the edited examples: low once the edit was taken up.",
        _scalar("wanted_loss"),
    ),
    _Column("closure, wanted", "the same closure for the loss as wanted.", _closure("wanted_loss")),
    _Column(
        "held-out KL / floor",
        "how far predictions on prompts that nobody trained on are from the retrained models' (Kullback-Leibler "
        "divergence), divided by the same distance for a retrained model left out. 1 is what a change of seed "
        "does; less than 1 is closer to the mean of the retrained models than one of them is.",
        _kl_cell,
    ),
    _Column(
        "cost / retraining",
        "gradient equivalents over those of one retraining; one is a forward and backward pass of one example.",
        lambda model, first: show_number(_share_of_retraining(model)),
    ),
    _Column("seconds", "wall-clock time, compilation included; it depends on the machine.", _cost_cell("seconds")),
)
_FORGETTING = (
    _Column(
        "probability",
        "mean over S of exp(-loss), the typical probability of a token of the named answers.",
        _scalar("forget_probability"),
    ),
    _Column(
        "extraction",
        "extraction strength: the share of a named answer that the model says by itself once the beginning was "
        "given away. 1: the question suffices; 0: nothing.",
        _scalar("extraction_strength"),
    ),
    _Column(
        "AUC, loss",
        "membership inference: how well S is told from held-out examples by the loss (0.5 is chance, 1 "
        "perfectly, 0 the wrong way round). In this and the next columns the target is the retrained row, not "
        "0.5, since S may be easier or harder than the held-out examples; ± is the standard error over examples, "
        "in the retrained row the deviation between seeds.",
        _auc("loss"),
    ),
    _Column("AUC, min-k%", "the same by the least probable 20 % of the tokens.", _auc("min_k")),
    _Column(
        "AUC, min-k%++",
        "the same after standardising each token by the model's own prediction at its place.",
        _auc("min_k_plus_plus"),
    ),
    _Column(
        "AUC, base",
        "the same by how much better the model knows an example than the base without adapter does, which takes "
        "out how hard the example is.",
        _auc("reference_base"),
    ),
    _Column(
        "AUC, retrained",
        "the same relative to the mean loss of the retrained models (each retrained model against the others).",
        _auc("reference_retrained"),
    ),
)


def _task_columns(models: Sequence[_Model]) -> tuple[_Column, ...]:
    names = dict.fromkeys(name for model in models for name in model.entry["task_metrics"])
    columns = [
        _Column(
            name.replace("_", " "),
            _TASK_MEANINGS.get(name, "the task's own metric on the held-out examples")
            + " (correct / valid / asked for); ± is the standard error over examples, in the retrained row the "
            "deviation between seeds.",
            lambda model, first, name=name: metric_cell(model.entry["task_metrics"].get(name)),
        )
        for name in names
    ]
    columns.append(
        _Column(
            "held-out loss",
            "loss on examples of the same kind that no model was trained on (nats per token).",
            _scalar("heldout_loss"),
        )
    )
    return tuple(columns)


_TASK_MEANINGS = {
    "accuracy": "share of held-out questions for which the right answer is the more probable one",
    "auc": "how well the log-odds of yes rank held-out questions (an AUC)",
    "exact_match": "share of held-out questions answered word for word",
    "hit_ratio@1": "share of held-out questions for which the right candidate was named",
}


def _rows_explained(models: Sequence[_Model]) -> tuple[str, ...]:
    told = ["**before**: the model as trained, with the named examples in its training data."]
    if any(model.kind == "control" for model in models):
        told.append(
            "**control**: a simpler way that moved exactly as far as the method: along the difference of gradients "
            "in one step (`c*b`), or in ten (gradient ascent). A method has to beat them."
        )
    if any(model.kind == "retrained" for model in models):
        told.append(
            "**retrained**: trained anew on the edited data with other seeds: the target. ± is between seeds."
        )
    return tuple(told)


def _limits(report: Json) -> tuple[str, ...]:
    """What the sizes of this comparison allow to conclude."""
    named, heldout = report["named"]["total"], report["heldout"]["examples"]
    seeds = report["models"]["retrained"]["seeds"]
    told = [
        f"S has {named} examples; a mean over S hides what happened to each, which the table of examples shows."
    ]
    if heldout:
        told.append(
            f"{heldout} held-out examples: one of them more or less right moves a share by {1 / heldout:.3g}. "
            "Differences smaller than two standard errors are not seen."
        )
    else:
        told.append("No held-out examples were given: utility, membership and held-out KL are not measured.")
    if seeds == 0:
        told.append("No model was retrained: how close to retraining anything is cannot be told.")
    elif seeds == 1:
        told.append("One retrained model: how far seeds alone move a model is not known, nor is the held-out KL.")
    else:
        told.append(
            f"{seeds} retrained models: their deviation is itself known to about "
            f"{100 / (2 * (seeds - 1)) ** 0.5:.0f} % of itself only."
        )
    if report["gap_closure"].get("forget_loss") is None:
        told.append(f"Closure on S: {report['gap_closure'].get('reason', {}).get('forget_loss', 'not defined')}.")
    return tuple(told)


def _points(models: Sequence[_Model], first: Json) -> list[Point]:
    points = []
    for model in models:
        closure = 1.0 if model.kind == "retrained" else 0.0 if model.kind == "before" else None
        if closure is None:
            closure = None if model.closure is None else model.closure.get("forget_loss")
        points.append(
            Point(
                label=model.label,
                kind=model.kind,
                cost=_share_of_retraining(model) if model.kind != "before" else None,
                closure=closure,
                kl_over_floor=_kl_over_floor(model.entry, model.report),
            )
        )
    return points


def _example_blocks(group: Sequence[Evaluation], labels: Sequence[str], first: Json, number: int) -> list[Block]:
    """Every named example before and after, as it was trained on and as it was wanted."""
    blocks: list[Block] = [Heading("Each named example, before and after", 3)]
    seeds = first["models"]["retrained"]["seeds"]
    target = ("retrained (mean)",) if seeds else ()
    rows_of = [{row["id"]: row for row in evaluation.report["named_examples"]} for evaluation in group]
    named = first["named_examples"]
    for quantity, title, meaning in (
        ("forget_loss", "as it was trained on", "it should rise to the retrained value, not beyond"),
        ("wanted_loss", "as it was wanted", "it should fall to the retrained value"),
    ):
        chosen = [row for row in named if quantity in row]
        if not chosen:
            continue
        picture = plot_each_example(
            {label: [rows.get(row["id"], {}).get(quantity, {}) for row in chosen]
             for label, rows in zip(labels, rows_of, strict=True)}
        )  # fmt: skip
        if picture is not None:
            file = f"comparison{number}-{quantity.replace('_loss', '')}.png"
            blocks.append(
                Picture(
                    file,
                    f"Loss of each example {title}: under the retrained models (across) and under the model "
                    "(up). On the line nothing is left to do; below it the answer is more probable than "
                    "retraining would make it, above it less.",
                    picture,
                )
            )
        table = []
        for row in chosen[:_SHOWN_EXAMPLES]:
            losses = [rows.get(row["id"], {}).get(quantity, {}).get("unlearned") for rows in rows_of]
            cells = [row[quantity].get("before"), *losses, *([row[quantity].get("retrained")] if seeds else [])]
            table.append((row["id"], ACTION_NAMES[row["action"]], *map(show_number, cells)))
        shown = Table(("id", "request", "before", *labels, *target), tuple(table))
        left = len(chosen) - len(table)
        note = f" The other {left} are in the `report.json` of each evaluation." if left else ""
        text = Text(f"Loss (nats per token) of each named example **{title}**: {meaning}.{note}")
        if len(table) > _OPEN_EXAMPLES:
            blocks += [text, Details(f"{len(table)} examples, {title}", (shown,))]
        else:
            blocks += [text, shown]
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
    return (_name(run.path), kind, *cost, _MISSING if memory is None else show_number(memory / 2**20))
