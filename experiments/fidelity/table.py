"""Owns what is shown of the cells: one Markdown table and one plot, from their JSON files alone."""

from __future__ import annotations

import io
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from experiments.fidelity.cells import REFERENCE_FILE
from llmeraser_jax import files

TARGET_CLOSURE = 0.9
TARGET_COST = 1 / 31
# Below this closure a point is drawn at the edge, as a triangle pointing down would be lost among markers.
LOWEST_CLOSURE = -0.5

# Okabe and Ito's colours, which colour-blind readers tell apart.
_COLOURS = {"removal": "#0072B2", "query": "#009E73", "correction": "#D55E00"}
_MARKERS = [
    "*",
    "s",
    "D",
    "^",
    "v",
    "P",
    "X",
    "<",
    ">",
    "o",
    "h",
    "p",
    "8",
    "d",
    "H",
    "$a$",
    "$b$",
    "$c$",
    "$d$",
    "$e$",
]

Row = Mapping[str, Any]


def load_results(workdir: Path) -> list[dict[str, Any]]:
    """Every method's JSON below `cells/`, in a fixed order."""
    paths = sorted(path for path in (workdir / "cells").glob("*/*/*.json") if path.name != REFERENCE_FILE)
    return [files.read_json(path) for path in paths]


def _mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def _show(values: Sequence[float | None], digits: int = 3) -> str:
    """The mean over requests, with their standard deviation where there are several."""
    found = [value for value in values if value is not None]
    if not found:
        return "–"
    spread = f" ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 else ""
    missing = f" [{len(found)} of {len(values)}]" if len(found) < len(values) else ""
    return f"{_mean(found):.{digits}f}{spread}{missing}"


def _losses(rows: Sequence[Row], name: str) -> str:
    found = [row for row in rows if name in row["retrained"]]
    if not found:
        return "–"
    deviation = _mean([row["retrained"][name]["standard_deviation"] for row in found])
    return (
        " → ".join(
            (
                _show([row["before"][name] for row in found]),
                _show([row["after"][name] for row in found]),
            )
        )
        + f" ({_show([row['retrained'][name]['mean'] for row in found])} ± {_show([deviation])})"
    )


def _metric(rows: Sequence[Row], kind: str, word: str = "") -> str:
    names = [name for name in rows[0]["after"][kind] if word in name.lower()]
    if not names:
        return "–"
    name = names[0]
    metrics = [row["after"][kind][name] for row in rows]
    first = metrics[0]
    counts = "" if first["correct"] is None else f", {first['correct']}/{first['valid']}/{first['total']}"
    wanted = [row[f"retrained_{kind}"].get(name, {}).get("value") for row in rows]
    before = [row["before"][kind][name]["value"] for row in rows]
    error = _mean([metric["standard_error"] for metric in metrics])
    value = f"{_show([metric['value'] for metric in metrics])} (se {_show([error])}{counts}"
    return f"{value}; before {_show(before)}, retrained {_show(wanted)})"


def _kl(rows: Sequence[Row]) -> str:
    ratio, before = (_show([row[name] for row in rows], 2) for name in ("kl_over_floor", "before_kl_over_floor"))
    kl, floor = _show([row["after"]["heldout_kl"] for row in rows]), _show([row["seed_floor"] for row in rows])
    return f"{ratio} = {kl} / {floor} (before {before})"


def _auc(rows: Sequence[Row], name: str) -> str:
    values = [row["after"][name] for row in rows]
    return f"{_show(values, 2)} ({_show([row['retrained'][name]['mean'] for row in rows], 2)})"


def _outcome(rows: Sequence[Row]) -> str:
    outcomes = sorted({row["outcome"] for row in rows})
    return "; ".join(outcomes).replace("|", "/")


COLUMNS: Mapping[str, Callable[[Sequence[Row]], str]] = {
    "closure, S": lambda rows: _show([row["closure"].get("forget_loss") for row in rows], 2),
    "closure, wanted": lambda rows: _show([row["closure"].get("wanted_loss") for row in rows], 2),
    "loss on S": lambda rows: _losses(rows, "forget_loss"),
    "loss on wanted": lambda rows: _losses(rows, "wanted_loss"),
    "held-out KL / floor": _kl,
    "retained loss": lambda rows: _losses(rows, "retained_loss"),
    "task": lambda rows: _metric(rows, "task_metrics"),
    "retained task": lambda rows: _metric(rows, "retained_metrics"),
    "MIA AUC, loss": lambda rows: _auc(rows, "membership_loss_auc"),
    "MIA AUC, min-k%": lambda rows: _auc(rows, "membership_min_k_auc"),
    "cost": lambda rows: _show([row["cost"] for row in rows]),
    "cost / 5 epochs": lambda rows: _show([row["cost_of_5_epochs"] for row in rows]),
    "seconds / retraining": lambda rows: _show([row["cost_seconds"] for row in rows]),
    "delta norm": lambda rows: _show([row["delta_norm"] for row in rows], 2),
    "outcome": _outcome,
}


def _groups(results: Sequence[Row]) -> dict[tuple, list[Row]]:
    """Results that differ in the request's seed alone."""
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in results:
        groups[row["task"], row["category"], row["share"], row["method"]].append(row)
    return groups


def render_table(results: Sequence[Row], methods: Sequence[str] = ()) -> str:
    """One row per task, category, share and method, in Markdown; means over requests.

    Args:
        results: from `load_results`.
        methods: the order; others follow by name.
    """
    order = {name: position for position, name in enumerate(methods)}
    titles = ("task", "category", "share (named / n)", "method", "requests", *COLUMNS)
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    groups = _groups(results)
    for key in sorted(groups, key=lambda k: (*k[:3], order.get(k[3], len(order)), k[3])):
        task, category, share, method = key
        rows = [row for row in groups[key] if "failed" not in row]
        first = groups[key][0]
        named = f"{100 * share:g} % ({first['num_named']} / {first['num_rows']})"
        count = f"{len(rows)}" if len(rows) == len(groups[key]) else f"{len(rows)} of {len(groups[key])}"
        oracle = " (oracle)" if any(row["chosen_with_oracle"] for row in rows) else ""
        if rows:
            cells = [show(rows) for show in COLUMNS.values()]
        else:
            reason = groups[key][0]["failed"].replace("|", "/").replace("\n", " ")
            cells = ["–"] * (len(COLUMNS) - 1) + [f"no step: {reason}"]
        lines.append("| " + " | ".join((task, category, named, method + oracle, count, *cells)) + " |")
    return "\n".join(lines) + "\n"


def render_plot(results: Sequence[Row], methods: Sequence[str]) -> bytes:
    """The frontier as PNG: cost (of five epochs) against closure on S, a panel per task, the two targets as lines.

    Mean over requests; the number beside a point is its share in percent. Closures below -0.5 are drawn there.

    Args:
        results: from `load_results`.
        methods: the order of the markers.
    """
    groups = {k: [r for r in rows if "failed" not in r] for k, rows in _groups(results).items()}
    tasks = sorted({key[0] for key in groups}) or ["no results"]
    names = [name for name in methods if any(key[3] == name for key in groups)]
    names += sorted({key[3] for key in groups} - set(names))
    markers = {name: _MARKERS[position % len(_MARKERS)] for position, name in enumerate(names)}
    figure = Figure(figsize=(1.8 + 5.2 * len(tasks), 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    for axes, task in zip(panels, tasks, strict=True):
        axes.axhline(TARGET_CLOSURE, color="#555555", linewidth=1, linestyle="--")
        axes.axvline(TARGET_COST, color="#555555", linewidth=1, linestyle="--")
        axes.set(xscale="log", title=task, xlabel="cost / retraining of 5 epochs (gradient equivalents)")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(LOWEST_CLOSURE - 0.08, 1.08)
        axes.grid(color="#DDDDDD", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        for (of, category, share, method), rows in sorted(groups.items()):
            cost = _mean([row["cost_of_5_epochs"] for row in rows])
            closure = _mean([row["closure"].get("forget_loss") for row in rows])
            if of != task or cost is None or closure is None or cost <= 0:
                continue
            at = (cost, max(closure, LOWEST_CLOSURE))
            oracle = any(row["chosen_with_oracle"] for row in rows)
            axes.plot(
                *at,
                marker=markers[method],
                markersize=7,
                markerfacecolor="none" if oracle else _COLOURS[category],
                markeredgecolor=_COLOURS[category],
                linestyle="none",
                alpha=0.85,
            )
            axes.annotate(f"{100 * share:g}", at, xytext=(5, 3), textcoords="offset points", fontsize=6)
    panels[0].set_ylabel("closure on S")
    handles = [
        Line2D([], [], marker=markers[name], color="#333333", linestyle="none", label=name) for name in names
    ]
    handles += [
        Line2D([], [], marker="o", color=colour, linestyle="none", label=category)
        for category, colour in _COLOURS.items()
    ]
    handles.append(
        Line2D(
            [], [], marker="o", color="#333333", markerfacecolor="none", linestyle="none", label="oracle's choice"
        )
    )
    handles.append(Line2D([], [], color="#555555", linestyle="--", label="targets: 0.9, 1/31"))
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()
