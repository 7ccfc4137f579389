"""The page of a report: `report.md`, written for a reader who did not run the comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmeraser_jax.evaluation.closure import Number
from llmeraser_jax.evaluation.plots import ACTION_NAMES

_MISSING = "–"
_PLOT_TITLES = {
    "named_examples.png": "Loss on the named examples",
    "heldout_kl.png": "Held-out KL and the seed floor",
    "solver_residual.png": "Residual of every linear solve",
    "cost.png": "Cost of unlearning, retraining and the controls",
}
_READING = """\
* **Loss on the named examples, as trained**: how improbable the model finds what it was asked to forget. Too
  low means still remembered, far above *retrained* means damaged. The target is the retrained model, not
  infinity.
* **Loss, as wanted**: for edits, the loss on the edited example. Lower means that the edit was taken up.
* **Held-out KL**: on prompts that neither training nor the request names, how far the model's predictions
  are from the mean prediction of all retrained models but one, averaged over the one left out. The **seed
  floor** is the same distance for the retrained model left out: what a change of seed alone amounts to, so
  that differences below it mean nothing.
* **Closure**: 1 - |unlearned - retrained| / |before - retrained|. 1 is the retrained model's level, 0 is no
  nearer than before, negative is further away; overshooting counts as much as undershooting. It is undefined
  where before and retrained differ by no more than two standard deviations of the retraining seeds, and for
  the KL also where the model before does not exceed the seed floor.
* **Probability per token**: exp(-loss), averaged over the named examples. **Extraction strength**: the share of
  an answer that the model says by itself once the beginning was given away; 1 means that the question suffices.
* **Membership AUC**: how well the named examples can be told from held-out ones by a score. The target is the
  retrained model's value, not 0.5. Scores: the loss; *min_k*, the least probable 20 % of the tokens;
  *min_k_plus_plus*, the same after standardising by the model's own prediction; *reference*, the loss of a model
  that never saw the example (the base without adapter, or the mean of the retrained models, a retrained model
  never its own) minus the loss.
* **Gradient equivalents**: 1 is a forward and backward pass of one example. It compares costs across
  machines.
* **± after a task metric** is the standard error over test examples; ± after a mean over seeds is the
  standard deviation between seeds. *correct / valid / N*: right answers, answers that parse, answers asked
  for."""


def render_page(report: Mapping[str, Any], plots: Sequence[str]) -> str:
    """The page in Markdown.

    Args:
        report: from `report.build_report`.
        plots: names of the PNG files that lie beside the page.
    """
    sections = [
        "# Unlearning compared with retraining",
        _context(report),
        "## In short",
        _summary(report),
        "## Every model",
        _models_table(report),
        _plot("named_examples.png", plots),
        _plot("heldout_kl.png", plots),
        "## Closure: how much of the gap to retraining was closed",
        _closure_table(report),
        "## Cost",
        _cost_table(report),
        _plot("cost.png", plots),
        "## Solver",
        _solver_section(report),
        _plot("solver_residual.png", plots),
        "## How to read this",
        _READING,
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _context(report: Mapping[str, Any]) -> str:
    return "\n".join(f"* {key}: {value}" for key, value in report["context"].items())


def _plot(name: str, plots: Sequence[str]) -> str:
    return f"![{_PLOT_TITLES[name]}]({name})" if name in plots else ""


def show_number(value: Number | None) -> str:
    """Three significant digits, thousands separated; a dash for nothing."""
    if value is None:
        return _MISSING
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _summary(report: Mapping[str, Any]) -> str:
    models, closure, cost = report["models"], report["gap_closure"], report["cost"]
    named = report["named"]
    parts = [f"{named[action]} {name}" for action, name in ACTION_NAMES.items() if named[action]]
    lines = [f"* **Request**: {named['total']} training example(s): {', '.join(parts)}."]
    seeds = models["retrained"]["seeds"]
    for key, title in (
        ("forget_loss", "Loss on them as trained"),
        ("wanted_loss", "Loss on the edited ones as wanted"),
    ):
        if models["before"][key] is None and key == "wanted_loss" and not models["before"][f"{key}_by_action"]:
            continue
        line = f"* **{title}**: {show_number(models['before'][key])} before, "
        line += f"{show_number(models['unlearned'][key])} unlearned"
        if seeds:
            line += f", {show_number(models['retrained'][key])} retrained (mean of {seeds} seed(s))"
        lines.append(f"{line}. Closure {_closure_words(closure, key)}.")
    floor = report["seed_floor"]["heldout_kl"]
    if floor is None:
        lines.append(
            f"* **Held-out KL to retraining**: not available; {_reason(report['seed_floor'], 'heldout_kl')}."
        )
    else:
        before, after = (models[name]["heldout_kl_to_retrained"] for name in ("before", "unlearned"))
        lines.append(
            f"* **Held-out KL to retraining**: {show_number(before)} before, {show_number(after)} unlearned; the "
            f"seed floor is {show_number(floor)}. Closure {_closure_words(closure, 'heldout_kl')}."
        )
    ratio = cost["unlearn_over_retrain"]["gradient_equivalents"]
    spent = cost["unlearn"]["gradient_equivalents"]
    if ratio is not None:
        lines.append(
            f"* **Cost**: {show_number(spent)} gradient equivalents, {show_number(ratio)} times one retraining "
            f"({show_number(cost['unlearn']['seconds'])} s against {show_number(cost['retrain']['seconds'])} s)."
        )
    elif spent is not None:
        lines.append(
            f"* **Cost**: {show_number(spent)} gradient equivalents, {show_number(cost['unlearn']['seconds'])} s."
        )
    return "\n".join(lines)


def _reason(node: Mapping[str, Any], key: str) -> str:
    return node.get("reason", {}).get(key, "")


def _closure_number(value: float | None) -> str:
    return _MISSING if value is None else f"{round(value, 2) + 0.0:.2f}"  # + 0.0 turns -0.00 into 0.00


def _closure_words(closure: Mapping[str, Any], key: str) -> str:
    value, reason = closure[key], _reason(closure, key)
    if value is None:
        return f"{_MISSING} ({reason})"
    return f"{_closure_number(value)} ({reason})" if reason else _closure_number(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rule = "|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def _models_table(report: Mapping[str, Any]) -> str:
    """One column per model, one row per quantity."""
    models = report["models"]
    retrained = models["retrained"]
    seeds = retrained["per_seed"]
    columns = {"before": models["before"], "unlearned": models["unlearned"]}
    columns |= {f"retrained, {seed['name']}": seed for seed in seeds}
    if seeds:
        columns["retrained, mean ± sd"] = retrained
    columns |= {f"control: {name}": control for name, control in models["controls"].items()}
    rows: list[list[str]] = []

    def add(title: str, cell: Callable[[Mapping[str, Any]], str]) -> None:
        cells = [cell(model) for model in columns.values()]
        if any(text != _MISSING for text in cells):
            rows.append([title, *cells])

    def scalar(key: str) -> Callable[[Mapping[str, Any]], str]:
        def cell(model: Mapping[str, Any]) -> str:
            deviation = model.get("seed_standard_deviation", {}).get(key)
            return show_number(model.get(key)) + (f" ± {show_number(deviation)}" if deviation is not None else "")

        return cell

    for key, title in (("forget_loss", "Loss as trained"), ("wanted_loss", "Loss as wanted")):
        by_action = f"{key}_by_action"
        actions = [action for action in ACTION_NAMES if action in models["before"][by_action]]
        what = "all named examples" if key == "forget_loss" else "all edited examples"
        add(f"{title}, {what}", scalar(key))
        for action in actions if len(actions) > 1 else ():
            add(
                f"{title}, {ACTION_NAMES[action]}",
                lambda model, by_action=by_action, action=action: show_number(model[by_action].get(action)),
            )
    add("Probability per token as trained", scalar("forget_probability"))
    add("Extraction strength as trained", scalar("extraction_strength"))
    add(f"Loss on {report['heldout']['examples']} held-out examples", scalar("heldout_loss"))
    add("Held-out KL to retrained (mean column: seed floor)", scalar("heldout_kl_to_retrained"))
    for group, title in (("membership_auc", "Membership AUC"), ("task_metrics", "Task")):
        names = dict.fromkeys(name for model in columns.values() for name in model[group])
        for name in names:
            add(
                f"{title}: {name}",
                lambda model, group=group, name=name: metric_cell(model[group].get(name)),
            )
    table = _table(["", *columns], rows)
    if not seeds:
        table += "\n\nNo retrained model was given: closure and held-out KL need one and are absent."
    return f"Losses are in nats per response token, KL in nats per response position.\n\n{table}"


def metric_cell(metric: Mapping[str, Any] | None) -> str:
    """A metric of a report with its error and, where it counts answers, `(correct / valid / N)`."""
    if metric is None:
        return _MISSING
    text = show_number(metric["value"])
    deviation = metric.get("seed_standard_deviation")
    error = deviation if "seed_standard_deviation" in metric else metric["standard_error"]
    if error is not None:
        text += f" ± {show_number(error)}"
    if metric.get("deviation_over_seeds") is not None:
        text += f" ± {show_number(metric['deviation_over_seeds'])} (seeds)"
    counts = [_count(metric.get(key)) for key in ("correct", "valid", "total")]
    if metric.get("correct") is not None:
        text += f" ({' / '.join(counts)})"
    elif metric.get("valid") != metric.get("total"):
        text += f" (valid {counts[1]} of {counts[2]})"
    return text


def _count(value: Number | None) -> str:
    """A count, or a mean of counts over seeds."""
    if value is None:
        return _MISSING
    return f"{value:.0f}" if value == int(value) else f"{value:.1f}"


def _closure_table(report: Mapping[str, Any]) -> str:
    closure = report["gap_closure"]
    columns = {"unlearned": closure}
    columns |= {f"control: {name}": control for name, control in closure["controls"].items()}
    wanted = bool(report["models"]["before"]["wanted_loss_by_action"])
    quantities = [("forget_loss", "Loss as trained")] + ([("wanted_loss", "Loss as wanted")] if wanted else [])
    lines: list[tuple[str, Callable[[Mapping[str, Any]], Mapping[str, Any]], str]] = []
    for key, title in quantities:
        lines.append((f"{title}, all", lambda node: node, key))
        actions = [action for action in ACTION_NAMES if key in closure["by_action"].get(action, {})]
        for action in actions:
            lines.append((f"{title}, {ACTION_NAMES[action]}", lambda node, a=action: node["by_action"][a], key))
    lines.append(("Held-out KL", lambda node: node, "heldout_kl"))
    notes: list[str] = []
    rows = []
    for title, select, key in lines:
        cells = []
        for node in columns.values():
            entry = select(node)
            text, reason = _closure_number(entry[key]), _reason(entry, key)
            if reason:
                if reason not in notes:
                    notes.append(reason)
                text += f" [{notes.index(reason) + 1}]"
            cells.append(text)
        rows.append([title, *cells])
    table = _table(["", *columns], rows)
    return table + "".join(f"\n\n[{i}] {note}." for i, note in enumerate(notes, start=1))


def _cost_table(report: Mapping[str, Any]) -> str:
    cost = report["cost"]
    rows = [("unlearning", cost["unlearn"]), ("one retraining (mean over seeds)", cost["retrain"])]
    rows += [(f"control: {name}", entry) for name, entry in cost["controls"].items()]
    cells = []
    for title, entry in rows:
        memory = entry["peak_memory_bytes"]
        cells.append(
            [
                title,
                show_number(entry["gradient_equivalents"]),
                show_number(entry["diagnostic_gradient_equivalents"]),
                show_number(entry["seconds"]),
                _MISSING if memory is None else show_number(memory / 2**20),
            ]
        )
    return _table(["", "gradient equivalents", "for diagnostics, besides", "seconds", "peak memory (MiB)"], cells)


def _solver_section(report: Mapping[str, Any]) -> str:
    solver = report["solver"]
    steps = solver["steps"]
    if not steps:
        return f"Nothing to show: {_reason(solver, 'status')}."
    text = (
        f"Status: {solver['status']}. {solver['iterations']} iterations in {len(steps)} solve(s); largest "
        f"relative residual {show_number(solver['relative_residual'])} (recomputed after each solve; 0 is "
        f"exact, 1 is nothing solved); negative curvature "
        f"{'met' if solver['negative_curvature'] else 'not met'}."
    )
    rows = [
        [
            str(number),
            step["status"],
            str(step["iterations"]),
            show_number(step["relative_residual"]),
            "yes" if step["negative_curvature"] else "no",
        ]
        for number, step in enumerate(steps, start=1)
    ]
    header = ["path step", "status", "iterations", "relative residual", "negative curvature"]
    return f"{text}\n\n{_table(header, rows)}"
