"""The plots of a page, drawn with matplotlib's object interface (no pyplot, no global state).

Colours are Okabe and Ito's, which colour-blind readers tell apart; markers and labels repeat what colours say.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from llmeraser_jax.evaluation.closure import Number

COLOURS = {"before": "#0072B2", "retrained": "#009E73", "control": "#7F7F7F"}
LOWEST_CLOSURE = -0.5  # points further down are drawn there, with their value beside them
_METHOD_COLOURS = ("#D55E00", "#CC79A7", "#56B4E9", "#E69F00", "#F0E442", "#000000")
_METHOD_MARKERS = ("o", "D", "v", "P", "X", "h", "<", ">")
_CONTROL_MARKERS = ("^", "s", "p", "*", "d", "8")
_TALLEST = 10.0  # held-out KL beyond ten floors is drawn there
_DPI = 150


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One model of the plot of cost against fidelity.

    Attributes:
        label: as in the tables; models with the same label look the same.
        kind: "before", "unlearned", "control" or "retrained".
        cost: over one retraining's; None where unknown.
        closure: on the forget set; None where undefined.
        kl_over_floor: held-out KL in multiples of the seed floor; None where it was not measured.
        retained: accuracy on retained examples less that of the retrained models; None where it was not measured.
        closure_deviation, kl_deviation: between seeds; None where not known.
    """

    label: str
    kind: str
    cost: Number | None
    closure: Number | None
    kl_over_floor: Number | None
    retained: Number | None = None
    closure_deviation: Number | None = None
    kl_deviation: Number | None = None


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def _style(axes: Axes, grid: Any) -> None:
    """What all plots share: no box, a pale grid behind the marks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)


def _looks(kinds: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each label: methods in colours, controls grey, both told apart by markers too."""
    looks = {}
    counts = {"unlearned": 0, "control": 0}
    for label, kind in kinds.items():
        if kind in ("before", "retrained"):
            looks[label] = (COLOURS[kind], "s" if kind == "before" else "*")
            continue
        place = counts[kind]
        counts[kind] += 1
        if kind == "control":
            looks[label] = (COLOURS["control"], _CONTROL_MARKERS[place % len(_CONTROL_MARKERS)])
        else:
            looks[label] = (
                _METHOD_COLOURS[place % len(_METHOD_COLOURS)],
                _METHOD_MARKERS[place % len(_METHOD_MARKERS)],
            )
    return looks


def _mark(label: str, colour: str, marker: str) -> Line2D:
    """A model's entry in a legend."""
    return Line2D([], [], color=colour, marker=marker, linestyle="none", markersize=8, label=label)


def plot_cost_against_fidelity(points: Sequence[Point]) -> bytes | None:
    """A PNG with a panel for each of closure, held-out KL and retained accuracy; None without a method to show.

    Args:
        points: of one comparison, or of several; a model before has no cost and is a line.
    """
    drawn = [p for p in points if p.kind != "before" and p.cost is not None and p.cost > 0]
    methods = [p for p in drawn if p.kind == "unlearned"]
    names = ("closure", "kl_over_floor", "retained")
    panels = [name for name in names if any(getattr(p, name) is not None for p in methods)]
    if not panels:
        return None
    looks = _looks({p.label: p.kind for p in drawn})
    before = next((p for p in points if p.kind == "before"), None)
    height = 4.4 + 0.22 * len(looks)
    figure = Figure(figsize=(max(8.0, 1.5 + 4.6 * len(panels)), height), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.set_xscale("log")
        axes.set_xlabel("cost / one retraining (gradient equivalents)")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        _style(axes, "both")
        level, target = 0.0, 1.0
        if name == "closure":
            axes.set_ylabel("closure on the forget set (1 = the retrained level)")
            axes.set_ylim(LOWEST_CLOSURE - 0.1, 1.15)
        elif name == "retained":
            axes.set_ylabel("accuracy on retained examples less retrained")
            level, target = None, 0.0
        else:
            axes.set_ylabel("held-out KL / seed floor (1 = another retraining)")
            shown = [p.kl_over_floor for p in (*drawn, *([] if before is None else [before]))]
            axes.set_ylim(0, 1.12 * min(_TALLEST, max([1.2, *(value for value in shown if value is not None)])))
            level = None if before is None or before.kl_over_floor is None else min(before.kl_over_floor, _TALLEST)
        if level is not None:
            axes.axhline(level, color=COLOURS["before"], linestyle=":", linewidth=1.5)
        axes.axhline(target, color=COLOURS["retrained"], linestyle="--", linewidth=1.2)
        for point in drawn:
            value = getattr(point, name)
            if value is None or point.cost is None:
                continue
            shown = max(value, LOWEST_CLOSURE) if name == "closure" else min(value, _TALLEST)
            colour, marker = looks[point.label]
            deviation = {"closure": point.closure_deviation, "kl_over_floor": point.kl_deviation}.get(name)
            if deviation is not None and shown == value:
                axes.errorbar(point.cost, shown, yerr=deviation, color=colour, linewidth=1.2, capsize=2)
            size = 14 if marker == "*" else 10
            look = {"marker": marker, "color": colour, "markersize": size, "markeredgecolor": "white"}
            axes.plot(point.cost, shown, linestyle="none", markeredgewidth=0.8, alpha=0.95, **look)
            if shown != value:
                place: Any = {"xytext": (8, 0), "textcoords": "offset points", "fontsize": 8, "va": "center"}
                axes.annotate(f"{value:.3g}", (point.cost, shown), **place)
        # After the points: a margin on either side, so that no mark sits on the frame.
        costs = [p.cost for p in drawn if p.cost is not None]
        axes.set_xlim(min(costs) / 1.8, max(costs) * 1.8)
    handles = [_mark(label, *look) for label, look in looks.items()]
    if before is not None:
        handles.append(Line2D([], [], label="before (no cost)", color=COLOURS["before"], linestyle=":"))
    handles.append(Line2D([], [], color=COLOURS["retrained"], linestyle="--", label="target"))
    figure.legend(handles=handles, loc="outside lower center", ncols=max(2, len(panels)), frameon=False, fontsize=9)
    return _png(figure)


def plot_examples(
    panels: Mapping[str, Mapping[str, Mapping[str, Sequence[Number | None]]]], kinds: Mapping[str, str]
) -> bytes | None:
    """A PNG with one dot per example and model and a bar at the mean; None where there is no number.

    Args:
        panels: title -> kind of request -> model -> losses of the examples.
        kinds: of the models, in the order of drawing.
    """
    shown = {title: groups for title, groups in panels.items() if any(map(_finite, _values(groups)))}
    if not shown:
        return None
    counts = [len(groups) for groups in shown.values()]
    width = 2.4 + max(0.35 * len(kinds), 1.4) * sum(counts)
    figure = Figure(figsize=(min(16.0, max(7.5, width)), 4.8), layout="constrained")
    looks, rng = _looks(kinds), np.random.default_rng(0)
    all_axes = figure.subplots(1, len(shown), squeeze=False, width_ratios=counts)[0]
    offsets = dict(zip(kinds, np.linspace(-0.3, 0.3, len(kinds)), strict=True))
    for axes, (title, groups) in zip(all_axes, shown.items(), strict=True):
        for position, by_model in enumerate(groups.values()):
            for model, losses in by_model.items():
                values = np.array([loss for loss in losses if _finite(loss)], np.float64)
                if not values.size:
                    continue
                (colour, marker), centre = looks[model], position + offsets[model]
                jitter = rng.uniform(-0.15, 0.15, values.size) / len(kinds) if values.size > 1 else np.zeros(1)
                axes.scatter(centre + jitter, values, s=22, marker=marker, color=colour, alpha=0.5, linewidths=0)
                half = 0.25 / len(kinds)
                axes.hlines(values.mean(), centre - half, centre + half, color=colour, linewidth=3)
        labels = [f"{name}\n(n = {max(map(len, found.values()), default=0)})" for name, found in groups.items()]
        axes.set_xticks(range(len(groups)), labels)
        axes.set_xlim(-0.55, len(groups) - 0.45)
        top = axes.get_ylim()[1]
        axes.set_ylim(-0.03 * top, top)  # room for the marks of losses near 0
        axes.set_title(title, fontsize=10)
        _style(axes, "y")
    all_axes[0].set_ylabel("loss (nats per response token)")
    handles = [_mark(label, *looks[label]) for label in kinds]
    handles.append(Line2D([], [], color="#444444", linewidth=3, label="mean"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False)
    return _png(figure)


def _values(groups: Mapping[str, Mapping[str, Sequence[Number | None]]]) -> list[Number | None]:
    return [loss for by_model in groups.values() for losses in by_model.values() for loss in losses]


def _finite(value: Number | None) -> bool:
    return value is not None and bool(np.isfinite(value))


def plot_residuals(steps: Sequence[Mapping[str, Any]]) -> bytes | None:
    """A PNG with the relative residual after each iteration, a line per solve; None where no solver iterated.

    Args:
        steps: `residual_history`, `relative_residual`, `iterations` and `negative_curvature` of each.
    """
    curves = [
        np.array([np.nan if value is None else value for value in [1.0, *s["residual_history"]]]) for s in steps
    ]
    if not any(np.isfinite(curve[1:]).any() for curve in curves):
        return None
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for place, (step, curve) in enumerate(zip(steps, curves, strict=True)):
        curve[curve <= 0] = np.nan  # a logarithmic axis has no zero
        # From dark to light: the first solve to the last.
        colour = (0.85 * place / max(1, len(steps) - 1), 0.35 + 0.4 * place / max(1, len(steps) - 1), 0.7)
        axes.plot(np.arange(curve.size), curve, color=colour, linewidth=1.4)
        if step["relative_residual"]:
            marker = "X" if step["negative_curvature"] else "o"
            axes.plot(step["iterations"], step["relative_residual"], color=colour, marker=marker, markersize=7)
    axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("solver iteration")
    axes.set_ylabel("relative residual (1 = nothing solved)")
    _style(axes, "both")
    return _png(figure)
