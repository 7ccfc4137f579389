"""Owns what the numbers are read as: the table, the targets, the plot."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

matplotlib.use("Agg")

Cell = dict[str, Any]  # groups of one size and dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A ratio and what it is to be at most.

    Attributes:
        name: in words.
        bound: at most this.
        value: as measured; None where an entry is missing.
    """

    name: str
    bound: float
    value: float | None

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        return "met" if self.value <= self.bound else "missed"


def _seconds(cell: Cell, group: str, *keys: str) -> float | None:
    """Least median of the entries that there are."""
    entries = cell.get(group, {}).get("entries", {})
    found = [entries[key]["seconds"] for key in keys if key in entries and "seconds" in entries[key]]
    return min(found) if found else None


def _field(cell: Cell, group: str, key: str, field: str) -> float | None:
    return cell.get(group, {}).get("entries", {}).get(key, {}).get(field)


def _ratio(over: float | None, under: float | None, scale: float = 1.0) -> float | None:
    return None if over is None or not under else scale * over / under


def _per_product(cell: Cell, *keys: str) -> float | None:
    """Seconds of a solve over its products, one for each iteration and one for the true residual; the least."""
    entries = cell.get("cg", {}).get("entries", {})
    found = [entries[key] for key in keys if "seconds" in entries.get(key, {})]
    return min((entry["seconds"] / entry["facts"]["products"] for entry in found), default=None)


_TORCH_HESSIAN = ("torch: hessian reverse-over-reverse", "torch: hessian forward-over-reverse")

_TORCH_SOLVES = ("torch: cg hessian reverse-over-reverse", "torch: cg hessian kept")

_TORCH_GAUSS_NEWTON = ("torch: gauss-newton shared", "torch: gauss-newton separate")

_TORCH_ERASURES = ("torch: erase", "torch: erase kept")


def _torch_hessian(cell: Cell) -> float | None:
    """Seconds of PyTorch's fastest Hessian product beside the solves, by itself or inside of one."""
    found = (_seconds(cell, "cg", *_TORCH_HESSIAN), _per_product(cell, *_TORCH_SOLVES))
    return min((seconds for seconds in found if seconds is not None), default=None)


def targets(cell: Cell) -> list[Target]:
    """The ratios that the benchmark is for. The two sides of each were timed in turn, in one group."""
    gradient = _seconds(cell, "products", "jax: gradient")
    recomputed = _seconds(cell, "products", "jax: hessian recomputed")
    memory = {
        name: _field(cell, "products", f"jax: {name}", "temp_bytes")
        for name in ("gradient", "hessian recomputed", "gauss-newton recomputed")
    }
    return [
        Target(
            name="one CG iteration (Hessian, the better of recomputed and cached) / PyTorch's best Hessian product",
            bound=0.6,
            value=_ratio(
                _per_product(cell, "jax: cg hessian cached", "jax: cg hessian recomputed"),
                _torch_hessian(cell),
            ),
        ),
        Target(
            name="one CG iteration (Gauss-Newton, the default) / PyTorch's best Hessian product",
            bound=0.6,
            value=_ratio(_per_product(cell, "jax: cg gauss-newton cached"), _torch_hessian(cell)),
        ),
        Target(name="Hessian product recomputed / gradient", bound=2.2, value=_ratio(recomputed, gradient)),
        Target(
            name="Hessian product cached / gradient",
            bound=1.1,
            value=_ratio(_seconds(cell, "products", "jax: hessian cached"), gradient),
        ),
        Target(
            name="Gauss-Newton product recomputed / gradient",
            bound=1.8,
            value=_ratio(_seconds(cell, "products", "jax: gauss-newton recomputed"), gradient),
        ),
        Target(
            name="one of 8 right-hand sides / one alone (Hessian, recomputed)",
            bound=0.6,
            value=_ratio(
                _seconds(cell, "many", "jax: hessian recomputed k=8"),
                _seconds(cell, "many", "jax: hessian recomputed"),
                1 / 8,
            ),
        ),
        Target(
            name="memory: Hessian product recomputed / gradient",
            bound=2.0,
            value=_ratio(memory["hessian recomputed"], memory["gradient"]),
        ),
        Target(
            name="memory: Gauss-Newton product recomputed / gradient",
            bound=1.1,
            value=_ratio(memory["gauss-newton recomputed"], memory["gradient"]),
        ),
        Target(
            name="whole erasure, compilation apart / PyTorch's faster one",
            bound=0.5,
            value=_ratio(_seconds(cell, "erase", "jax: erase"), _seconds(cell, "erase", *_TORCH_ERASURES)),
        ),
    ]


def hessian_share(cell: Cell, dtype: str) -> float | None:
    """Arithmetic of a recomputed Hessian product through the frozen matrices, over the ceiling of `dtype`.

    With bfloat16 it is the product with bfloat16 operands, of group "operands", else that of group "products".
    Four passes (primal and tangent, forward and backward) of 2 operations for each weight of the decoder's layers
    and real token. Attention, adapter, head, padding and rematerialisation are left out, so that it is a lower
    bound of the arithmetic done.
    """
    narrow = dtype == "bfloat16"
    group = "operands" if narrow else "products"
    name = "jax: hessian recomputed" + (", bfloat16 operands" if narrow else "")
    seconds = _seconds(cell, group, name)
    ceiling = cell.get("ceiling", {}).get("entries", {}).get(f"jax: matmul {dtype}", {})
    if seconds is None or "seconds" not in ceiling:
        return None
    products = cell[group]
    flops = 8 * products["decoder_parameters"] * products["jax"]["tokens"]
    return flops / seconds / (ceiling["facts"]["flops"] / ceiling["seconds"])


def render_table(results: dict[str, Cell]) -> str:
    """All entries and targets as markdown."""
    lines: list[str] = []
    for name, cell in results.items():
        some = next(iter(cell.values()))
        settings = some["settings"]
        lines += [
            f"## {name}",
            "",
            f"{some['decoder_parameters'] / 1e6:.1f} M parameters in the decoder's layers, base {some['dtype']}, "
            f"adapter of rank {settings['rank']} on all seven projections, vocabulary {settings['vocab_size']}; "
            f"{settings['examples']} rows ({some['jax']['tokens']} tokens) in micro-batches of "
            f"{settings['chunk_size']} (PyTorch {settings['torch_chunk_size']}); "
            f"{settings['threads']} threads; jax on {some['jax']['devices']}, torch "
            f"{some['torch']['versions']['torch']} on {some['torch']['devices']}.",
            "",
            "| group | measured | median ms | CPU ms | / own gradient | first call s | compiling s | working MiB "
            "(compiler) | arguments MiB | peak MiB (measured) |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for group, result in cell.items():
            for key, entry in result["entries"].items():
                lines.append(_row(cell, group, key, entry))
        lines += ["", "| target | at most | measured | |", "|---|---|---|---|"]
        for target in targets(cell):
            value = "–" if target.value is None else f"{target.value:.2f}"
            lines.append(f"| {target.name} | {target.bound} | {value} | {target.verdict} |")
        for dtype in ("float32", "bfloat16"):
            share = hessian_share(cell, dtype)
            if share is not None:
                told = f"Hessian product recomputed, {dtype} operands, share of that ceiling (lower bound)"
                lines.append(f"| {told} | – | {share:.2f} | |")
        lines.append("")
    return "\n".join(lines) + "\n"


def _row(cell: Cell, group: str, key: str, entry: dict[str, Any]) -> str:
    if entry["unsupported"]:
        return f"| {group} | {key} | unsupported: {entry['unsupported'].replace('|', '/')} | | | | | | | |"
    if "seconds" not in entry:
        return f"| {group} | {key} | not measured | | | | | | | |"
    side = key.split(":")[0]
    own = _ratio(entry["seconds"], _seconds(cell, "products", f"{side}: gradient"))
    relative = "–" if group in ("ceiling", "erase") or own is None else f"{own:.2f}"
    return (
        f"| {group} | {key}{_remark(entry)} | {1e3 * entry['seconds']:.1f} | {1e3 * entry['cpu_seconds']:.1f} "
        f"| {relative} | {_number(entry['first_seconds'])} | {_number(entry['compile_seconds'])} "
        f"| {_mib(entry['temp_bytes'])} | {_mib(entry['argument_bytes'])} | {_mib(entry['memory_bytes'])} |"
    )


def _remark(entry: dict[str, Any]) -> str:
    facts = entry["facts"]
    if "flops" in facts:
        return f" ({facts['flops'] / entry['seconds'] / 1e9:.0f} GFLOP/s)"
    if "products" in facts:
        return f" ({facts['products']} products, {1e3 * entry['seconds'] / facts['products']:.1f} ms each)"
    if "gradient_equivalents" in facts:
        total = facts["gradient_equivalents"] + facts["diagnostics"]
        return f" ({facts['iterations']} iterations, {total:.0f} gradient equivalents with diagnostics)"
    return ""


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _mib(value: float | None) -> str:
    return "–" if value is None else f"{value / 2**20:.1f}"


_BARS = (
    ("gradient", "products", ("jax: gradient",), ("torch: gradient",)),
    ("Hessian\nrecomputed", "products", ("jax: hessian recomputed",), _TORCH_HESSIAN),
    ("Hessian\ncached", "products", ("jax: hessian cached",), (*_TORCH_HESSIAN, "torch: hessian kept")),
    (
        "Gauss-Newton\nrecomputed",
        "products",
        ("jax: gauss-newton recomputed",),
        _TORCH_GAUSS_NEWTON,
    ),
    (
        "Gauss-Newton\ncached",
        "products",
        ("jax: gauss-newton cached",),
        (*_TORCH_GAUSS_NEWTON, "torch: gauss-newton kept"),
    ),
    ("CG solve\n(Hessian)", "cg", ("jax: cg hessian cached",), _TORCH_SOLVES),
    ("whole\nerasure", "erase", ("jax: erase",), _TORCH_ERASURES),
)


def render_plot(results: dict[str, Cell], path: str | os.PathLike[str]) -> None:
    """Seconds of the package over those of PyTorch's best eager mode, one group of bars for each thing measured."""
    figure = Figure(figsize=(10, 4))
    axes = figure.subplots()
    width = 0.8 / max(len(results), 1)
    for i, (name, cell) in enumerate(results.items()):
        ratios = [
            _ratio(_seconds(cell, group, *ours), _seconds(cell, group, *theirs)) for _, group, ours, theirs in _BARS
        ]
        heights = [np.nan if ratio is None else ratio for ratio in ratios]
        axes.bar(np.arange(len(_BARS)) + (i - (len(results) - 1) / 2) * width, heights, width, label=name)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(_BARS)), [bar[0] for bar in _BARS])
    axes.set_ylabel("seconds, JAX / PyTorch eager (best mode)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(Path(path), dpi=150)
