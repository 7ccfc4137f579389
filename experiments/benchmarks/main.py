"""Speed and memory beside PyTorch: one command, one table.

    python -m experiments.benchmarks.main --workdir DIR [--sizes 1m 10m] [--dtypes float32]
    python -m experiments.benchmarks.main --workdir DIR --quick

Each group of measurements of one size and dtype is one JSON file; a second call computes what is missing and
renders the table anew. Within a group the repetitions of all entries alternate between the two libraries, so that a
busy machine hits both.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from pathlib import Path
from typing import Any

import tyro

from experiments.benchmarks.timing import Worker, measure_group
from experiments.benchmarks.workload import ERASE_ROWS, GROUPS, PASSES, SHAPES, Workload
from experiments.common import log_progress
from llmeraser_jax import files
from llmeraser_jax.checks import check_at_least
from llmeraser_jax.evaluation.render import MISSING, Block, Heading, Page, Table, Text, render_text, write_page

logger = logging.getLogger("benchmarks")
Cell = dict[str, Any]  # groups of one size and dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What is measured.

    Attributes:
        workdir: models, measurements and tables.
        sizes: any of toy, 1m, 10m (2 CPU cores), 110m, 1b, 7b (a GPU): parameters of the decoder's layers.
        dtypes: of the base.
        groups: any of ceiling, products, many, cg, erase, default.
        repeats: repetitions of each entry; an erasure has half as many, at least 2, and the one by default 1.
        rows: of the training set that the default method erases one in a hundred of.
        threads: CPU threads of both libraries; None is all CPUs of this process.
        devices: that the package shares the rows of each micro-batch out over; on a CPU each is one thread.
        quick: a dry run: everything once, at size toy with a bfloat16 base and 64 rows.
    """

    workdir: Path
    sizes: tuple[str, ...] = ("1m", "10m")
    dtypes: tuple[str, ...] = ("float32",)
    groups: tuple[str, ...] = tuple(GROUPS)
    repeats: int = 5
    rows: int = 2000
    threads: int | None = None
    devices: int = 1
    quick: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("sizes", SHAPES), ("groups", GROUPS), ("dtypes", ("float32", "bfloat16"))):
            unknown = [value for value in getattr(self, name) if value not in allowed]
            if unknown:
                msg = f"{name} has {', '.join(unknown)}; choose from {', '.join(allowed)}."
                raise ValueError(msg)
        check_at_least(self, repeats=1, rows=4, threads=1, devices=1)


def run(config: BenchmarkConfig) -> dict[str, Cell]:
    """Measures what is missing and returns everything, by `size-dtype` and group."""
    if config.quick:
        config = dataclasses.replace(config, sizes=("toy",), dtypes=("bfloat16",), repeats=1, rows=64)
    results: dict[str, Cell] = {}
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = min(config.threads or available, available)
    for size, dtype in ((size, dtype) for size in config.sizes for dtype in config.dtypes):
        shape = SHAPES[size]
        rows = max(ERASE_ROWS, shape.examples)
        directory = config.workdir / "models" / f"{size}-n{rows}"
        workload = Workload(directory=directory, shape=shape, dtype=dtype, rows=config.rows)
        settings = {**dataclasses.asdict(shape), "rows": config.rows, "threads": threads, "devices": config.devices}
        workers: dict[str, Worker] = {}
        for group in config.groups:
            path = config.workdir / "results" / f"{size}-{dtype}-{group}.json"
            if path.exists() and files.read_json(path)["settings"] != settings:
                msg = f"{path} was measured with other settings; give another workdir or delete it."
                raise ValueError(msg)
            if not path.exists():
                logger.info("%s %s %s", size, dtype, group)
                for side in ("jax", "torch"):  # the first one writes the files
                    workers[side] = workers.get(side) or Worker(side, workload, threads, config.devices)
                repeats = {"erase": max(2, config.repeats // 2), "default": 1}.get(group, config.repeats)
                found: dict[str, Any] = {"settings": settings, "repeats": repeats, "dtype": dtype}
                found |= {side: worker.description for side, worker in workers.items()}
                found["entries"] = measure_group(workers, group, repeats)
                found["decoder_parameters"] = shape.decoder_parameters
                path.parent.mkdir(parents=True, exist_ok=True)
                files.atomic_write_json(path, found)
            results.setdefault(f"{size}-{dtype}", {})[group] = files.read_json(path)
        for worker in workers.values():
            worker.close()
    return results


def _seconds(cell: Cell, group: str, *keys: str) -> float | None:
    """Least median of the entries that there are; of a solve for each of its products."""
    entries = cell.get(group, {}).get("entries", {})
    found = [entries[key] for key in keys if "seconds" in entries.get(key, {})]
    return min((entry["seconds"] / entry["facts"].get("products", 1) for entry in found), default=None)


def _ratio(over: float | None, under: float | None, scale: float = 1.0) -> float | None:
    return None if over is None or not under else scale * over / under


def _speed(cell: Cell, key: str) -> tuple[float | None, float | None]:
    """Tokens a second of a product, and its matrix products' share of what the library's fastest one reaches."""
    side, _, name = key.partition(": ")
    seconds, result = _seconds(cell, "products", key), cell["products"]
    if seconds is None:
        return None, None
    tokens = result["jax"]["tokens"]
    ceiling = max(
        (
            entry["facts"]["flops"] / entry["seconds"]
            for other, entry in cell.get("ceiling", {}).get("entries", {}).items()
            if other.startswith(f"{side}:") and "seconds" in entry
        ),
        default=None,
    )
    flops = 2.0 * PASSES[name] * result["decoder_parameters"] * tokens
    return tokens / seconds, _ratio(flops / seconds, ceiling)


_TORCH_HESSIAN = ("torch: cg hessian recomputed", "torch: cg hessian kept")
_TORCH_ERASURES = ("torch: erase recomputed", "torch: erase kept")


def targets(cell: Cell) -> list[tuple[str, float, float | None]]:
    """The ratios that the benchmark is for: name, at most, measured. Both sides of each were timed in one group."""

    def product(name: str) -> float | None:
        return _ratio(_seconds(cell, "products", f"jax: {name}"), _seconds(cell, "products", "jax: gradient"))

    def memory(name: str) -> float | None:
        entries = cell.get("products", {}).get("entries", {})
        each = [entries.get(f"jax: {key}", {}).get("temp_bytes") for key in (name, "gradient")]
        return _ratio(*each)

    hessian = _seconds(cell, "cg", *_TORCH_HESSIAN)
    best = _seconds(cell, "cg", "jax: cg hessian kept", "jax: cg hessian recomputed")
    many = [_seconds(cell, "many", f"jax: hessian recomputed{k}") for k in (" k=8", "")]
    erasures = _seconds(cell, "erase", "jax: erase"), _seconds(cell, "erase", *_TORCH_ERASURES)
    default = _seconds(cell, "cg", "jax: cg gauss-newton kept")
    return [
        ("one CG iteration (Hessian, the better one) / PyTorch's best Hessian product", 0.6, _ratio(best, hessian)),
        ("one CG iteration (Gauss-Newton) / PyTorch's best Hessian product", 0.6, _ratio(default, hessian)),
        ("Hessian product recomputed / gradient", 2.2, product("hessian recomputed")),
        ("Hessian product kept / gradient", 1.1, product("hessian kept")),
        ("Gauss-Newton product recomputed / gradient", 1.8, product("gauss-newton recomputed")),
        ("one of 8 right-hand sides / one alone (Hessian, recomputed)", 0.6, _ratio(*many, scale=1 / 8)),
        ("memory: Hessian product recomputed / gradient", 2.0, memory("hessian recomputed")),
        ("memory: Gauss-Newton product recomputed / gradient", 1.1, memory("gauss-newton recomputed")),
        ("whole erasure, compilation apart / PyTorch's faster one", 0.5, _ratio(*erasures)),
    ]


def tables(results: dict[str, Cell]) -> list[Block]:
    """All entries and targets."""
    blocks: list[Block] = []
    for name, cell in results.items():
        some = next(iter(cell.values()))
        millions, tokens = some["decoder_parameters"] / 1e6, some["jax"]["tokens"]
        devices = f"jax on {some['jax']['devices']}, torch on {some['torch']['devices']}"
        told = (
            f"{millions:.1f} M decoder weights, {tokens} tokens; {devices}; {some['settings']['threads']} threads."
        )
        rows = []
        for group, result in cell.items():
            for key, entry in result["entries"].items():
                own = _seconds(cell, "products", f"{key.split(':')[0]}: gradient")
                relative = _ratio(entry.get("seconds"), own) if group in ("products", "many", "cg") else None
                numbers = [_show(entry.get("seconds"), 1e3), _show(entry.get("cpu_seconds"), 1e3), _show(relative)]
                tokens_each, share = _speed(cell, key) if group == "products" else (None, None)
                numbers += [_show(tokens_each, digits=0), _show(share, 100.0)]
                sizes = [_show(entry.get(field), 2**-20) for field in ("temp_bytes", "memory_bytes")]
                first = _show(entry.get("first_seconds"))
                rows.append((group, f"{key}{_remark(entry)}", *numbers, first, *sizes))
        header = ("group", "measured", "median ms", "CPU ms", "/ own gradient", "tokens/s", "% of ceiling",
                  "first call s", "working MiB (compiler)", "peak MiB (measured)")  # fmt: skip
        bounds = tuple((title, str(bound), _show(value, digits=2)) for title, bound, value in targets(cell))
        blocks += [Heading(name), Text(told), Table(header, tuple(rows))]
        blocks.append(Table(("target", "at most", "measured"), bounds))
    return blocks


def _show(value: float | None, scale: float = 1.0, digits: int = 1) -> str:
    return MISSING if value is None else f"{scale * value:.{digits}f}"


def _remark(entry: dict[str, Any]) -> str:
    facts = entry.get("facts", {})
    if entry.get("unsupported"):
        return f" (unsupported: {entry['unsupported']})"
    if "flops" in facts:
        return f" ({facts['flops'] / entry['seconds'] / 1e9:.0f} GFLOP/s)"
    if "products" in facts:
        return f" ({1e3 * entry['seconds'] / facts['products']:.1f} ms for each product)"
    if "gradient_equivalents" in facts:
        return f" ({facts['gradient_equivalents'] + facts['diagnostics']:.0f} gradient equivalents)"
    return ""


def main(config: BenchmarkConfig) -> None:
    """Measures, prints the tables, and writes them as `report.md` and `report.html`."""
    log_progress("benchmarks")
    blocks = tables(run(config))
    sys.stdout.write(render_text(blocks))
    write_page(Page("Speed and memory beside PyTorch", tuple(blocks)), config.workdir)


if __name__ == "__main__":
    main(tyro.cli(BenchmarkConfig))
