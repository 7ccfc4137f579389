"""The plots of a report, drawn from its dict with matplotlib's object interface (no pyplot, no global state).

Colours are Okabe and Ito's, which colour-blind readers tell apart; markers and labels repeat what colours
say.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from llmeraser_jax.evaluation.closure import Number

COLOURS = {"before": "#0072B2", "unlearned": "#D55E00", "retrained": "#009E73", "control": "#7F7F7F"}
MARKERS = {"before": "s", "unlearned": "o", "retrained": "D", "control": "^"}
ACTION_NAMES = {
    "remove": "removed",
    "modify_query": "query modified",
    "correct_response": "response corrected",
}
_DPI = 150
_GRID = {"color": "#DDDDDD", "linewidth": 0.8}


def render_plots(report: Mapping[str, Any]) -> dict[str, bytes]:
    """PNG files, name to content. A plot without data is left out.

    Args:
        report: from `report.build_report`.
    """
    makers = {
        "named_examples.png": _plot_named_examples,
        "heldout_kl.png": _plot_heldout_kl,
        "solver_residual.png": _plot_solver,
        "cost.png": _plot_cost,
    }
    figures = {name: make(report) for name, make in makers.items()}
    return {name: to_png(figure) for name, figure in figures.items() if figure is not None}


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def style_axes(axes: Axes, *, grid: Literal["x", "y", "both"]) -> None:
    """What all plots share: no box, a pale grid behind the marks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, **_GRID)
    axes.set_axisbelow(True)


def _plot_named_examples(report: Mapping[str, Any]) -> Figure:
    """One dot per named example and model, and the mean as a bar; wanted losses in a second panel."""
    rows = report["named_examples"]
    edited = [row for row in rows if "wanted_loss" in row]
    panels = [("forget_loss", rows, "on the examples as they were trained")]
    if edited:
        panels.append(("wanted_loss", edited, "on the edited examples as wanted"))
    groups = [list(dict.fromkeys(row["action"] for row in members)) for _, members, _ in panels]
    figure = Figure(figsize=(max(7.5, 2.4 + 2.1 * sum(map(len, groups))), 4.8), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=[len(group) for group in groups])[0]
    rng = np.random.default_rng(0)
    for axes, (quantity, members, title), actions in zip(all_axes, panels, groups, strict=True):
        models = [name for name in ("before", "unlearned", "retrained") if name in rows[0]["forget_loss"]]
        offsets = dict(zip(models, np.linspace(-0.27, 0.27, len(models)), strict=True))
        for position, action in enumerate(actions):
            for model in models:
                values = [row[quantity][model] for row in members if row["action"] == action]
                finite = np.array([value for value in values if value is not None])
                if not finite.size:
                    continue
                centre = position + offsets[model]
                jitter = rng.uniform(-0.06, 0.06, finite.size) if finite.size > 1 else np.zeros(1)
                style = {"color": COLOURS[model], "linewidths": 0}
                axes.scatter(centre + jitter, finite, s=22, marker=MARKERS[model], alpha=0.5, **style)
                axes.hlines(finite.mean(), centre - 0.11, centre + 0.11, color=COLOURS[model], linewidth=3)
        counts = [sum(row["action"] == action for row in members) for action in actions]
        axes.set_xticks(
            range(len(actions)),
            [f"{ACTION_NAMES[a]}\n(n = {n})" for a, n in zip(actions, counts, strict=True)],
        )
        axes.set_xlim(-0.55, len(actions) - 0.45)
        top = axes.get_ylim()[1]
        axes.set_ylim(-0.03 * top, top)  # room for the marks of losses near 0
        axes.set_title(title, fontsize=10)
        style_axes(axes, grid="y")
    all_axes[0].set_ylabel("loss (nats per response token)")
    handles = [_dot(model, label=_with_seeds(model, report)) for model in models]
    handles.append(Line2D([], [], color="#444444", linewidth=3, label="mean"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle("Loss on the named examples", fontweight="bold")
    return figure


def _with_seeds(model: str, report: Mapping[str, Any]) -> str:
    seeds = report["models"]["retrained"]["seeds"]
    if model != "retrained":
        return model
    return f"retrained (mean of {seeds} seeds)" if seeds > 1 else "retrained (one seed)"


def _dot(model: str, label: str) -> Line2D:
    return Line2D([], [], color=COLOURS[model], marker=MARKERS[model], linestyle="none", label=label)


def _plot_heldout_kl(report: Mapping[str, Any]) -> Figure | None:
    """One row per model, the seed floor as a line and the spread of the retrained models as a band."""
    floor = report["seed_floor"]["heldout_kl"]
    if floor is None:
        return None
    models = report["models"]
    entries = [("before", "before", models["before"]), ("unlearned", "unlearned", models["unlearned"])]
    entries += [("retrained", seed["name"], seed) for seed in models["retrained"]["per_seed"]]
    entries += [("control", name, control) for name, control in models["controls"].items()]
    known = [
        (kind, name, entry["heldout_kl_to_retrained"])
        for kind, name, entry in entries
        if entry["heldout_kl_to_retrained"] is not None
    ]
    figure = Figure(figsize=(7.5, 1.9 + 0.42 * len(known)), layout="constrained")
    axes = figure.subplots()
    seeds = [value for kind, _, value in known if kind == "retrained"]
    green = COLOURS["retrained"]
    axes.axvspan(min(seeds), max(seeds), color=green, alpha=0.15, linewidth=0, label="range of the seeds")
    axes.axvline(floor, color=green, linestyle="--", label=f"seed floor {floor:.3g}")
    for row, (kind, _, value) in enumerate(known):
        axes.plot([0, value], [row, row], color=COLOURS[kind], linewidth=1.5, alpha=0.6)
        axes.plot(value, row, color=COLOURS[kind], marker=MARKERS[kind], markersize=8)
        axes.annotate(
            f"{value:.3g}", (value, row), xytext=(9, 0), textcoords="offset points", va="center", fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8},
        )  # fmt: skip
    labels = {"retrained": "retrained, ", "control": "control: "}
    axes.set_yticks(range(len(known)), [f"{labels.get(kind, '')}{name}" for kind, name, _ in known])
    axes.set_ylim(len(known) - 0.5, -0.5)
    axes.set_xlim(0, 1.15 * max([value for _, _, value in known] + [1e-9]))
    axes.set_xlabel("held-out KL to the retrained models (nats per response position)")
    style_axes(axes, grid="x")
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle("Distance to retraining on held-out prompts (smaller is closer)", fontweight="bold")
    return figure


def _plot_solver(report: Mapping[str, Any]) -> Figure | None:
    """Relative residual after each iteration, one line per path step; hollow marks are recomputed."""
    steps = report["solver"]["steps"]
    if not steps:
        return None
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    # Without its pale end, which a white page swallows; one band of the colour bar per step.
    palette = ListedColormap(mpl.colormaps["viridis"](np.linspace(0, 0.85, len(steps))))
    norm = BoundaryNorm(np.arange(len(steps) + 1) + 0.5, len(steps))
    plotted = False
    for number, step in enumerate(steps, start=1):
        colour = palette(number - 1) if len(steps) > 1 else COLOURS["unlearned"]
        curve = np.array([np.nan if value is None else value for value in [1.0, *step["history"]]])
        curve[curve <= 0] = np.nan  # a logarithmic axis has no zero
        axes.plot(np.arange(curve.size), curve, color=colour, linewidth=1.6)
        residual = step["relative_residual"]
        if residual:
            flagged = step["negative_curvature"]
            axes.plot(
                step["iterations"], residual, color=colour, marker="X" if flagged else "o", markersize=9,
                markerfacecolor=colour if flagged else "white", markeredgewidth=1.6, linestyle="none",
            )  # fmt: skip
        plotted = plotted or residual is not None or bool(np.isfinite(curve[1:]).any())
    if not plotted:
        return None
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 1e3 else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("solver iteration")
    axes.set_ylabel("relative residual (1 = nothing solved)")
    style_axes(axes, grid="both")
    marks = [
        Line2D([], [], color="#444444", label="recurrence"),
        Line2D([], [], color="#444444", marker="o", markerfacecolor="white", linestyle="none", label="recomputed"),
    ]
    if report["solver"]["negative_curvature"]:
        marks.append(
            Line2D([], [], color="#444444", marker="X", linestyle="none", label="negative curvature: stopped")
        )
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False)
    if len(steps) > 1:
        stride = -(-len(steps) // 12)  # at most twelve labels
        figure.colorbar(
            ScalarMappable(norm=norm, cmap=palette),
            ax=axes,
            label="path step",
            ticks=np.arange(1, len(steps) + 1, stride),
            drawedges=len(steps) <= 12,
        ).minorticks_off()
    count = f"{len(steps)} path steps" if len(steps) > 1 else "one step"
    figure.suptitle(f"How far each linear system was solved ({count})", fontweight="bold")
    return figure


def _plot_cost(report: Mapping[str, Any]) -> Figure | None:
    """Gradient equivalents and seconds of unlearning, of one retraining and of the controls."""
    cost = report["cost"]
    entries = [("unlearned", "unlearning", cost["unlearn"]), ("retrained", "one retraining", cost["retrain"])]
    entries += [("control", f"control: {name}", entry) for name, entry in cost["controls"].items()]
    panels = [
        ("gradient_equivalents", "gradient equivalents\n(1 = forward and backward pass of one example)"),
        ("seconds", "seconds"),
    ]
    known = [entry for entry in entries if any(entry[2][quantity] is not None for quantity, _ in panels)]
    if not known:
        return None
    figure = Figure(figsize=(9.5, 1.7 + 0.5 * len(known)), layout="constrained")
    for axes, (quantity, label) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        values = [entry[quantity] for _, _, entry in known]
        for row, ((kind, _, _), value) in enumerate(zip(known, values, strict=True)):
            axes.barh(row, value or 0.0, color=COLOURS[kind], height=0.6)
            text = "unknown" if value is None else _short(value)
            axes.annotate(
                text, (value or 0.0, row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9
            )
        axes.set_yticks(range(len(known)), [name for _, name, _ in known])
        axes.set_ylim(len(known) - 0.4, -0.6)
        axes.set_xlim(0, 1.22 * max([value or 0.0 for value in values] + [1e-9]))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        axes.set_xlabel(label)
        axes.tick_params(axis="y", length=0)
        style_axes(axes, grid="x")
    figure.suptitle("Cost", fontweight="bold")
    return figure


def _short(value: Number) -> str:
    """Three significant digits, thousands separated, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
