"""The plots of the overview: cost against fidelity, and each named example against retraining."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from llmeraser_jax.evaluation.plots import COLOURS, style_axes, to_png

LOWEST_CLOSURE = -0.5  # points further down are drawn there, with their value beside them
# Okabe and Ito's colours besides those of before, retrained and the controls.
_METHOD_COLOURS = ("#D55E00", "#CC79A7", "#56B4E9", "#E69F00", "#F0E442", "#000000")
_METHOD_MARKERS = ("o", "D", "v", "P", "X", "h", "<", ">")
_CONTROL_MARKERS = ("^", "s", "p", "*", "d", "8")
_TALLEST = 10.0  # held-out KL beyond ten floors is drawn there


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One model of the plot of cost against fidelity.

    Attributes:
        label: as in the tables.
        kind: "before", "unlearned", "control" or "retrained".
        cost: over one retraining's; None where unknown.
        closure: on S; None where undefined.
        kl_over_floor: held-out KL in multiples of the seed floor; None where it was not measured.
        closure_deviation: of the closure, between seeds; None where it is not known.
        kl_deviation: the same of the held-out KL.
    """

    label: str
    kind: str
    cost: float | None
    closure: float | None
    kl_over_floor: float | None
    closure_deviation: float | None = None
    kl_deviation: float | None = None


def plot_cost_against_fidelity(points: Sequence[Point]) -> bytes | None:
    """A PNG with a panel for closure and one for the held-out KL; None where neither has a method to show.

    Args:
        points: of one comparison; the model before has no cost and is a line.
    """
    drawn = [p for p in points if p.kind != "before" and p.cost is not None and p.cost > 0]
    methods = [p for p in drawn if p.kind == "unlearned"]
    panels = [name for name in ("closure", "kl_over_floor") if any(getattr(p, name) is not None for p in methods)]
    if not panels:
        return None
    looks = _looks(drawn)
    before = next((p for p in points if p.kind == "before"), None)
    figure = Figure(figsize=(max(8.0, 1.5 + 4.6 * len(panels)), 4.4 + 0.22 * len(drawn)), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.set_xscale("log")
        _style_cost(axes)
        if name == "closure":
            axes.set_ylabel("closure on S (1 = the retrained level)")
            axes.set_ylim(LOWEST_CLOSURE - 0.1, 1.15)
            axes.axhline(0.0, color=COLOURS["before"], linestyle=":", linewidth=1.5)
        else:
            axes.set_ylabel("held-out KL / seed floor (1 = another seed)")
            shown = [p.kl_over_floor for p in (*drawn, *([] if before is None else [before]))]
            tallest = max([1.2, *(value for value in shown if value is not None)])
            axes.set_ylim(0, 1.12 * min(_TALLEST, tallest))
            if before is not None and before.kl_over_floor is not None:
                level = min(before.kl_over_floor, _TALLEST)
                axes.axhline(level, color=COLOURS["before"], linestyle=":", linewidth=1.5)
        axes.axhline(1.0, color=COLOURS["retrained"], linestyle="--", linewidth=1.2)
        for point in drawn:
            value = getattr(point, name)
            if value is None or point.cost is None:
                continue
            shown = max(value, LOWEST_CLOSURE) if name == "closure" else min(value, _TALLEST)
            colour, marker = looks[point.label]
            deviation = point.closure_deviation if name == "closure" else point.kl_deviation
            if deviation is not None and shown == value:
                axes.errorbar(point.cost, shown, yerr=deviation, color=colour, linewidth=1.2, capsize=2)
            axes.plot(
                point.cost, shown, marker=marker, color=colour, markersize=14 if marker == "*" else 10,
                linestyle="none", markeredgecolor="white", markeredgewidth=0.8, alpha=0.95,
            )  # fmt: skip
            if shown != value:
                axes.annotate(
                    f"{value:.3g}", (point.cost, shown), xytext=(8, 0), textcoords="offset points", fontsize=8,
                    va="center",
                )  # fmt: skip
        # After the points: a margin on either side, so that no mark sits on the frame.
        costs = [p.cost for p in drawn if p.cost is not None]
        axes.set_xlim(min(costs) / 1.8, max(costs) * 1.8)
    handles = [_mark(p.label, *looks[p.label]) for p in drawn]
    if before is not None:
        line = {"color": COLOURS["before"], "linestyle": ":", "linewidth": 1.5}
        handles.append(Line2D([], [], label="before (no cost)", **line))
    handles.append(Line2D([], [], color=COLOURS["retrained"], linestyle="--", label="target"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return to_png(figure)


def _looks(points: Sequence[Point]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each model: methods in colours, controls grey, both told apart by markers too."""
    looks = {}
    counts = {"unlearned": 0, "control": 0}
    for point in points:
        if point.kind == "retrained":
            looks[point.label] = (COLOURS["retrained"], "*")
            continue
        place = counts[point.kind]
        counts[point.kind] += 1
        if point.kind == "unlearned":
            looks[point.label] = (
                _METHOD_COLOURS[place % len(_METHOD_COLOURS)],
                _METHOD_MARKERS[place % len(_METHOD_MARKERS)],
            )
        else:
            looks[point.label] = (COLOURS["control"], _CONTROL_MARKERS[place % len(_CONTROL_MARKERS)])
    return looks


def _mark(label: str, colour: str, marker: str) -> Line2D:
    """A model's entry in a legend."""
    return Line2D([], [], color=colour, marker=marker, linestyle="none", markersize=8, label=label)


def _style_cost(axes: Axes) -> None:
    axes.set_xlabel("cost / one retraining (gradient equivalents)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    style_axes(axes, grid="both")


def plot_each_example(losses: Mapping[str, Sequence[Mapping[str, float | None]]]) -> bytes | None:
    """Each named example's loss under the retrained models (across) and a model (up); None without retraining.

    Args:
        losses: for each method the examples in order, each with `before`, `unlearned` and `retrained`; entries that
            are missing or None are left out.
    """
    pairs: dict[str, np.ndarray] = {}
    for label, rows in losses.items():
        for key, name in (("before", "before"), ("unlearned", label)):
            found = [(row.get("retrained"), row.get(key)) for row in rows]
            known = [pair for pair in found if None not in pair]
            if known and name not in pairs:
                pairs[name] = np.array(known, np.float64)
    if not pairs or set(pairs) == {"before"}:
        return None
    figure = Figure(figsize=(6.4, 5.4), layout="constrained")
    axes = figure.subplots()
    top = 1.06 * max(float(values.max()) for values in pairs.values()) + 1e-3
    axes.plot([0, top], [0, top], color=COLOURS["retrained"], linestyle="--", linewidth=1.2)
    looks = _looks([Point(label=name, kind="unlearned", cost=None, closure=None, kl_over_floor=None)
                    for name in pairs if name != "before"])  # fmt: skip
    looks["before"] = (COLOURS["before"], "s")
    for name, values in pairs.items():
        colour, marker = looks[name]
        axes.scatter(values[:, 0], values[:, 1], color=colour, marker=marker, s=38, alpha=0.7, linewidths=0)
    if "before" in pairs and len(pairs) == 2:
        (name,) = set(pairs) - {"before"}
        if len(pairs[name]) == len(pairs["before"]):
            for start, end in zip(pairs["before"], pairs[name], strict=True):
                axes.plot([start[0], end[0]], [start[1], end[1]], color="#BBBBBB", linewidth=0.8, zorder=0)
    axes.set(xlim=(-0.03 * top, top), ylim=(-0.03 * top, top))
    axes.set_xlabel("loss under the retrained models, mean (nats per token)")
    axes.set_ylabel("loss under the model (nats per token)")
    style_axes(axes, grid="both")
    handles = [_mark(name, *looks[name]) for name in pairs]
    handles.append(Line2D([], [], color=COLOURS["retrained"], linestyle="--", label="as retrained"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return to_png(figure)
