"""Speed and memory beside PyTorch: one command, one table, one plot.

    python -m experiments.benchmarks.main --workdir DIR [--sizes 1m 10m] [--dtypes float32 bfloat16] [--quick]

Each group of measurements of one size and dtype is one JSON file; a second call computes what is missing and
renders table and plot anew. Within a group the repetitions of all entries alternate between the two libraries, each
in a process of its own, so that a busy machine hits both.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro

from experiments.benchmarks.sides import GROUPS, SIDES, Prepared, Timed
from experiments.benchmarks.table import render_plot, render_table
from experiments.benchmarks.worker import Worker, WorkerError, WorkerSpec
from experiments.benchmarks.workload import SHAPES, VOCAB_SIZE, Workload
from llmeraser_jax import files

_SMALL = ("1m", "10m")  # measured with a float32 base too, where no dtypes are given


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What is measured.

    Attributes:
        workdir: models, measurements, table and plot.
        sizes: any of 1m, 10m (2 CPU cores), 110m, 1b, 7b (a GPU): parameters of the decoder's layers.
        dtypes: of the base; none given is float32 and bfloat16 for 1m and 10m, bfloat16 above.
        groups: any of ceiling, products, operands, many, cg, erase, compile; none given is all for the first cell,
            all but compile for the first dtype of a size, and products, cg and erase for its second one.
        repeats: repetitions of each entry; an erasure has half as many, at least 2.
        threads: CPU threads of both libraries; None is all CPUs of this process.
        devices: that the package shares the rows of each micro-batch out over; on a CPU each is one thread.
        examples: rows behind a gradient or a product; None is the size's own number.
        chunk_size: rows of the package's micro-batches; None is the size's own, at which it is fastest.
        torch_chunk_size: the same of PyTorch.
        erase_rows: rows of the training set of an erasure.
        erase_sample: rows behind its curvature.
        cg_steps: iterations of each solve.
        rank: of the adapter, on all seven projections.
        vocab_size: tokens.
        timeout: seconds that one call may take, compilation included, before it is given up.
        quick: few rows and repetitions, to see that everything runs.
        render_only: compute nothing; table and plot from what is there.
    """

    workdir: Path
    sizes: tuple[str, ...] = _SMALL
    dtypes: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    repeats: int = 5
    threads: int | None = None
    devices: int = 1
    examples: int | None = None
    chunk_size: int | None = None
    torch_chunk_size: int | None = None
    erase_rows: int = 32
    erase_sample: int = 16
    cg_steps: int = 5
    rank: int = 8
    vocab_size: int = VOCAB_SIZE
    timeout: float = 600.0
    quick: bool = False
    render_only: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("sizes", SHAPES), ("groups", GROUPS), ("dtypes", ("float32", "bfloat16"))):
            unknown = [value for value in getattr(self, name) if value not in allowed]
            if unknown:
                msg = f"{name} has {', '.join(unknown)}; choose from {', '.join(allowed)}."
                raise ValueError(msg)
        counts = (
            "repeats",
            "threads",
            "devices",
            "examples",
            "chunk_size",
            "torch_chunk_size",
            "erase_rows",
            "erase_sample",
            "cg_steps",
            "rank",
        )
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                msg = f"{name} is {value}; it must be at least 1."
                raise ValueError(msg)

    @property
    def num_threads(self) -> int:
        """Threads of each library."""
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(self.threads or available, available)

    def cells(self) -> Iterator[tuple[str, str]]:
        """Size and dtype of the base, in the order of measuring."""
        for size in self.sizes:
            default = ("float32", "bfloat16") if size in _SMALL else ("bfloat16",)
            for dtype in self.dtypes or default:
                yield size, dtype

    def groups_of(self, size: str, dtype: str) -> tuple[str, ...]:
        """What is measured of a cell."""
        if self.groups:
            return self.groups
        cells = list(self.cells())
        if (size, dtype) == cells[0]:
            return tuple(GROUPS)
        first_of_size = next(cell for cell in cells if cell[0] == size)
        if (size, dtype) == first_of_size:
            return tuple(group for group in GROUPS if group != "compile")
        return ("products", "cg", "erase")

    def workload(self, size: str, dtype: str) -> Workload:
        """The files of a cell; those of other numbers of rows lie apart."""
        shape = SHAPES[size]
        examples = self.examples or (2 if self.quick else shape.examples)
        rows = min(self.erase_rows, 16) if self.quick else self.erase_rows
        name = f"{size}-r{self.rank}-v{self.vocab_size}-n{max(rows, examples)}"
        return Workload(
            directory=self.workdir / "models" / name,
            dtype=dtype,
            examples=examples,
            chunk_size=self.chunk_size or shape.chunk_size,
            torch_chunk_size=self.torch_chunk_size or shape.torch_chunk_size,
            erase_rows=rows,
            erase_sample=min(self.erase_sample, 4) if self.quick else self.erase_sample,
            cg_steps=self.cg_steps,
        )

    def repeats_of(self, group: str) -> int:
        """Repetitions of each entry."""
        repeats = 1 if self.quick else self.repeats
        return max(2, repeats // 2) if group == "erase" and not self.quick else repeats


class Workers:
    """The two workers of a cell, started when first needed and again after one was lost."""

    def __init__(self, config: BenchmarkConfig, size: str, workload: Workload):
        self._make = lambda side: Worker(
            WorkerSpec(
                side=side,
                workload=workload,
                size=size,
                rank=config.rank,
                num_threads=config.num_threads,
                num_devices=config.devices,
                vocab_size=config.vocab_size,
            ),
            config.timeout,
        )
        self._running: dict[str, Worker] = {}

    def __getitem__(self, side: str) -> Worker:
        for needed in SIDES[: SIDES.index(side) + 1]:  # the first one writes the files
            if needed not in self._running:
                self._running[needed] = self._make(needed)
        return self._running[side]

    def lose(self, side: str) -> None:
        """Ends one that did not answer."""
        worker = self._running.pop(side, None)
        if worker is not None:
            worker.close()

    def forget(self) -> None:
        """Lets both let go of what they prepared."""
        for side, worker in list(self._running.items()):
            try:
                worker.forget()
            except WorkerError:
                self.lose(side)

    def close(self) -> None:
        """Ends both."""
        for side in list(self._running):
            self.lose(side)


def measure_group(workers: Workers, group: str, repeats: int) -> dict[str, Any]:
    """One group: everything prepared, then `repeats` rounds over its entries in turn."""
    prepared: dict[str, Prepared] = {}
    runs: dict[str, list[Timed]] = {}
    for side, name in GROUPS[group]:
        key = f"{side}: {name}"
        try:
            prepared[key] = workers[side].prepare(name)
        except WorkerError as error:
            prepared[key] = Prepared(unsupported=str(error))
            _restart(workers, side, prepared)
        _say(f"    {key}: {_first(prepared[key])}")
    ready = [(side, name) for side, name in GROUPS[group] if not prepared[f"{side}: {name}"].unsupported]
    for _ in range(repeats):
        for side, name in ready:
            key = f"{side}: {name}"
            if prepared[key].unsupported:
                continue
            try:
                runs.setdefault(key, []).append(workers[side].run(name))
            except WorkerError as error:
                prepared[key] = Prepared(unsupported=str(error))
                runs.pop(key)
                _restart(workers, side, prepared)
    workers.forget()
    return {
        key: {
            **dataclasses.asdict(prepared[key]),
            "runs": [dataclasses.asdict(run) for run in runs.get(key, [])],
            **_medians(runs.get(key, [])),
        }
        for key in prepared
    }


def _restart(workers: Workers, side: str, prepared: dict[str, Prepared]) -> None:
    """A new worker for one that was lost, with all prepared that the old one had."""
    workers.lose(side)
    for key, what in prepared.items():
        owner, name = key.split(": ", 1)
        if owner == side and not what.unsupported:
            workers[side].prepare(name)


def _medians(runs: list[Timed]) -> dict[str, Any]:
    if not runs:
        return {}
    memory = [run.memory_bytes for run in runs if run.memory_bytes is not None]
    return {
        "seconds": statistics.median(run.seconds for run in runs),
        "cpu_seconds": statistics.median(run.cpu_seconds for run in runs),
        "memory_bytes": max(memory) if memory else None,
        "facts": runs[-1].facts,
    }


def _first(prepared: Prepared) -> str:
    if prepared.unsupported:
        return f"unsupported ({prepared.unsupported})"
    assert prepared.first_seconds is not None
    return f"first call {prepared.first_seconds:.1f} s"


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def result_path(config: BenchmarkConfig, size: str, dtype: str, group: str) -> Path:
    """Where a group's numbers are kept; quick ones apart, so that they are never taken for others."""
    return config.workdir / ("quick" if config.quick else "results") / f"{size}-{dtype}-{group}.json"


def run(config: BenchmarkConfig) -> dict[str, dict[str, Any]]:
    """Measures what is missing and returns everything, by `size-dtype` and group."""
    started = time.perf_counter()
    results: dict[str, dict[str, Any]] = {}
    for size, dtype in config.cells():
        workload = config.workload(size, dtype)
        settings = {
            "examples": workload.examples,
            "chunk_size": workload.chunk_size,
            "torch_chunk_size": workload.torch_chunk_size,
            "erase_rows": workload.erase_rows,
            "erase_sample": workload.erase_sample,
            "cg_steps": workload.cg_steps,
            "rank": config.rank,
            "vocab_size": config.vocab_size,
            "threads": config.num_threads,
            "devices": config.devices,
        }
        workers = Workers(config, size, workload)
        try:
            for group in config.groups_of(size, dtype):
                path = result_path(config, size, dtype, group)
                if path.exists() and files.read_json(path)["settings"] != settings:
                    msg = f"{path} was measured with other settings; give another workdir or delete it."
                    raise ValueError(msg)
                if not path.exists() and not config.render_only:
                    _say(f"[{time.perf_counter() - started:5.0f} s] {size} {dtype} {group}")
                    entries = measure_group(workers, group, config.repeats_of(group))
                    path.parent.mkdir(parents=True, exist_ok=True)
                    files.atomic_write_json(
                        path,
                        {
                            "size": size,
                            "decoder_parameters": SHAPES[size].decoder_parameters,
                            "dtype": dtype,
                            "group": group,
                            "settings": settings,
                            "repeats": config.repeats_of(group),
                            "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
                            "jax": workers["jax"].description,
                            "torch": workers["torch"].description,
                            "entries": entries,
                        },
                    )
                if path.exists():
                    results.setdefault(f"{size}-{dtype}", {})[group] = files.read_json(path)
        finally:
            workers.close()
    _say(f"[{time.perf_counter() - started:5.0f} s] done")
    return results


def main(config: BenchmarkConfig) -> int:
    """Measures, prints the table, and writes table and plot; returns the exit status."""
    results = run(config)
    if not results:
        sys.stderr.write("There is nothing to show.\n")
        return 1
    table = render_table(results)
    sys.stdout.write(table)
    suffix = "-quick" if config.quick else ""
    files.atomic_write_text(config.workdir / f"table{suffix}.md", table)
    files.atomic_write_json(config.workdir / f"results{suffix}.json", results)
    render_plot(results, config.workdir / f"benchmark{suffix}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(BenchmarkConfig)))
