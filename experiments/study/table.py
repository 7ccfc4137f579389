"""Owns how a study is read: Markdown tables of utility, fidelity and forgetting, and a plot, from `run_study`."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

from llmeraser_jax.evaluation.closure import gap_closure, seed_standard_deviation

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

QUANTITIES = ("forget_loss", "wanted_loss")
ATTACKS = ("loss", "min-k%", "min-k%++", "reference")
Row = tuple[str, Sequence[Mapping[str, Any]]]


def render_tables(results: Mapping[str, Any]) -> str:
    """Two tables with one row per model: what it can do and what it cost, and what it still knows.

    Args:
        results: from `run_study`.
    """
    done, failed = _rows(results)
    metrics = list(results["before"]["task"]["metrics"])
    floor = float(np.mean(results["kl"]["seed_floors"]))
    retrained = results["retrained"]
    spent = np.mean([r["gradient_equivalents"] for r in retrained])

    def kl(name: str, scores: Sequence[Mapping[str, Any]]) -> str:
        if name == "before":
            return f"{results['kl']['before']:.3f} ({results['kl']['before'] / floor:.2f})"
        if name.startswith("retrained"):
            return _number(results["kl"]["seed_floors"])
        return f"{_number([s['heldout_kl'] for s in scores])} ({np.mean([s['kl_over_floor'] for s in scores]):.2f})"

    def cost(name: str, scores: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
        values = [s["gradient_equivalents"] for s in scores]
        ahead = [s.get("preparation_gradient_equivalents", 0) for s in scores]
        relative = "–" if name == "before" or not spent else f"{np.mean(values) / spent:.3f}"
        prepared = f"{np.mean(ahead) / spent:.2f}" if np.mean(ahead) else "–"
        return relative, prepared, f"{np.mean([s['seconds'] for s in scores]):.0f}"

    utility = _table(
        ("model", "seeds", *metrics, "retained loss", "held-out KL (over floor)", "cost", "prepared", "seconds"),
        [
            (
                name,
                str(len(scores)),
                *(_metric(scores, metric) for metric in metrics),
                _number([s["retained_loss"] for s in scores]),
                kl(name, scores),
                *cost(name, scores),
            )
            for name, scores in done
        ],
        failed,
    )
    forgetting = _table(
        (
            "model",
            "loss on S",
            "closure",
            "wanted loss",
            "closure",
            *(f"AUC, {attack}" for attack in ATTACKS),
            "extraction",
            "loss on S, 4 bits",
            "relearned",
        ),
        [
            (
                name,
                *(
                    cell
                    for key in QUANTITIES
                    for cell in (_number([s[key] for s in scores]), _closure(results, name, scores, key))
                ),
                *(_number([s["membership"].get(attack) for s in scores], 2) for attack in ATTACKS),
                _number([s["extraction_strength"] for s in scores], 2),
                *(
                    _number([s[key] for s in scores if key in s])
                    for key in ("forget_loss_4_bit", "forget_loss_relearned")
                ),
            )
            for name, scores in done
        ],
        failed,
    )
    return f"Utility, fidelity and cost\n\n{utility}\nForgetting\n\n{forgetting}"


def _rows(results: Mapping[str, Any]) -> tuple[list[Row], dict[str, str]]:
    """Models with what is known of each, and methods that found no step with the reason."""
    retrained = results["retrained"]
    done: list[Row] = [("before", [results["before"]]), ("retrained", retrained)]
    failed = {}
    for name, seeds in results["methods"].items():
        moved = [scores for scores in seeds if "failed" not in scores]
        reasons = [scores["failed"] for scores in seeds if "failed" in scores]
        if moved:
            done.append((f"{name} ({len(reasons)} seeds failed)" if reasons else name, moved))
        else:
            failed[name] = reasons[0]
    return done, failed


def _closure(results: Mapping[str, Any], name: str, scores: Sequence[Mapping[str, Any]], key: str) -> str:
    """Mean closure of the gap to retraining, over seeds."""
    before, retrained = results["before"][key], [r[key] for r in results["retrained"]]
    if before is None or name in ("before", "retrained"):
        return "–"
    values = [gap_closure(before, s[key], retrained).value for s in scores if s[key] is not None]
    known = [value for value in values if value is not None]
    return _number(known, 2) if known and len(known) == len(scores) else "undefined"


def _number(values: Sequence[float | None], digits: int = 3) -> str:
    """Mean over seeds with their standard deviation; a number that was not finite makes it `diverged`."""
    if not len(values):
        return "–"
    if any(value is None for value in values):
        return "–" if all(value is None for value in values) else "diverged"
    numbers = [float(value) for value in values if value is not None]
    deviation = seed_standard_deviation(numbers)
    spread = "" if deviation is None or len(numbers) < 2 else f" ± {deviation:.{digits}f}"
    return f"{np.mean(numbers):.{digits}f}{spread}"


def _metric(scores: Sequence[Mapping[str, Any]], name: str) -> str:
    """`mean (standard error over examples) correct / valid / N`, the counts as means over the seeds measured."""
    found = [s["task"]["metrics"].get(name) for s in scores if "task" in s]
    if any(metric is None or metric["value"] is None for metric in found):
        return "–"
    known = [metric for metric in found if metric is not None]
    errors = [metric.get("standard_error") for metric in known]
    error = "" if any(e is None for e in errors) else f" ({np.mean(errors):.3f})"
    counts = ""
    if known[0].get("correct") is not None:
        counts = " " + " / ".join(f"{np.mean([m[k] for m in known]):g}" for k in ("correct", "valid", "total"))
    return f"{np.mean([m['value'] for m in known]):.3f}{error}{counts}"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], failed: Mapping[str, str]) -> str:
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in rows]
    lines += [f"| {name} | no step: {reason} |" + " |" * (len(titles) - 2) for name, reason in failed.items()]
    return "\n".join(lines) + "\n"


def render_plot(results: Mapping[str, Any]) -> bytes:
    """A PNG: cost against closure on S, and harm against closure; one marker per method, bars over seeds."""
    done, _ = _rows(results)
    key = "forget_loss"
    before, retrained = results["before"][key], [r[key] for r in results["retrained"]]
    spent = np.mean([r["gradient_equivalents"] for r in results["retrained"]])
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), sharey=True, constrained_layout=True)
    colours: Any = plt.get_cmap("tab20")
    panels: tuple[tuple[str, Callable[[Mapping[str, Any]], float]], ...] = (
        ("cost, in retrainings (gradient equivalents)", lambda s: s["gradient_equivalents"] / spent),
        ("held-out KL over the seed floor", lambda s: s["kl_over_floor"]),
    )
    for position, (name, scores) in enumerate(done[2:]):
        closures = [gap_closure(before, s[key], retrained).value for s in scores if s[key] is not None]
        if any(value is None for value in closures) or not closures:
            continue
        for axis, (_, of) in zip(axes, panels, strict=True):
            # Below -1 a closure says only that the model is far away.
            height = np.clip(np.array(closures, np.float64), -1, 2)
            axis.errorbar(
                np.mean([of(s) for s in scores]),
                height.mean(),
                yerr=height.std(ddof=1) if len(height) > 1 else None,
                marker="os^Dv<>P*X"[position % 10],
                color=colours(position % 20),
                markersize=9,
                linestyle="none",
                label=name,
            )
    for axis, (title, _) in zip(axes, panels, strict=True):
        axis.axhline(1, color="0.6", linewidth=1)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel(title)
        axis.set_ylim(-1.1, 2.1)
    axes[1].axvline(1, color="0.6", linewidth=1)
    axes[0].set_ylabel("closure of the loss on S (1 is retraining; cut at -1 and 2)")
    if axes[1].get_legend_handles_labels()[0]:
        axes[1].legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8)
    else:
        why = "Closure is undefined for every method:\nbefore is within the spread of the retrained models."
        axes[0].text(0.5, 0.5, why, transform=axes[0].transAxes, ha="center")
    figure.suptitle(results["scenario"]["name"])
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    plt.close(figure)
    return out.getvalue()
