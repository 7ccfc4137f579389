"""How close each method comes to retraining, and what it costs: one command, one table, one plot.

    python -m experiments.fidelity.main --workdir DIR [--tallrec DIR --tallrec-base DIR]

A cell is one task, category, share and request; each method of a cell is one JSON file. A second call computes what
is missing and renders everything anew.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import logging
import sys
import time
from collections.abc import Callable
from importlib.resources import as_file
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import tyro

from experiments.fidelity.cells import Cell, CellId
from experiments.fidelity.methods import METHODS, NotYetError
from experiments.fidelity.profiles import CATEGORIES, Category
from experiments.fidelity.table import load_results, render_plot, render_table
from experiments.fidelity.tasks import LARGE, TallrecTask, Task, profiles_task
from experiments.study import check_methods
from experiments.workdirs import claim_settings
from llmeraser_jax import files
from llmeraser_jax.environment import describe_devices, library_versions
from llmeraser_jax.models import Model, load_model

logger = logging.getLogger("fidelity")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FidelityConfig:
    """Which cells; the defaults are the subset that the README reports.

    Attributes:
        workdir: everything is kept there.
        tallrec: TALLRec's movie data; None leaves the task out.
        tallrec_base: its base model, a directory in Hugging Face layout.
        tallrec_rows: its training rows.
        tallrec_epochs: its epochs.
        profiles_rows: sizes of the populations, one task each; none leaves them out.
        profiles_epochs: of all of them, instead of the recipe's.
        categories: of requests.
        shares: of the training rows, for populations below 1000 rows.
        tallrec_shares: for tallrec, where 1 % of the rows is a single one.
        large_shares: for populations of 1000 rows and more.
        large_methods: methods of those; those that take all rows for each product cost several
            retrainings there.
        request_seeds: draws of the rows that are named, for each category and share.
        retrain_seeds: retrainings of each cell, at least 2.
        subset: patterns of `<task>/<category>-<share>/<method>`; only what matches one is computed.
        render_only: compute nothing; table and plot from what is there.
    """

    workdir: Path
    tallrec: Path | None = None
    tallrec_base: Path | None = None
    tallrec_rows: int = 120
    tallrec_epochs: int = 24
    profiles_rows: tuple[int, ...] = (400, 4000)
    profiles_epochs: int | None = None
    categories: tuple[Category, ...] = CATEGORIES
    shares: tuple[float, ...] = (0.01, 0.05, 0.1)
    tallrec_shares: tuple[float, ...] = (0.05, 0.1)
    large_shares: tuple[float, ...] = (0.01,)
    large_methods: tuple[str, ...] = tuple(
        name for name in METHODS if name not in ("paper-step", "reference-compat")
    )
    request_seeds: int = 1
    retrain_seeds: int = 3
    subset: tuple[str, ...] = ("*",)
    render_only: bool = False

    def __post_init__(self):
        if (self.tallrec is None) != (self.tallrec_base is None):
            msg = "Give both tallrec (the data) and tallrec_base (the model), or neither."
            raise ValueError(msg)
        if self.retrain_seeds < 2:
            msg = f"retrain_seeds is {self.retrain_seeds}; the held-out KL needs at least 2."
            raise ValueError(msg)
        if self.request_seeds < 1:
            msg = f"request_seeds is {self.request_seeds}; it must be at least 1."
            raise ValueError(msg)
        for share in (*self.shares, *self.tallrec_shares, *self.large_shares):
            if not 0 < share <= 0.2:
                msg = f"A share is {share}; it must lie in (0, 0.2]."
                raise ValueError(msg)
        check_methods(self.large_methods, METHODS)

    def tasks(self) -> dict[str, Task]:
        """By name, the small ones first."""
        found: list[Task] = [profiles_task(n, self.profiles_epochs) for n in sorted(self.profiles_rows)]
        if self.tallrec is not None:
            found.insert(1, TallrecTask(data=self.tallrec, num_rows=self.tallrec_rows, epochs=self.tallrec_epochs))
        return {task.name: task for task in found}


def planned(config: FidelityConfig) -> dict[CellId, list[str]]:
    """The methods of each cell that the subset holds, in the order of computing. Seeds of requests come last."""
    plan: dict[CellId, list[str]] = {}
    large_tasks = {f"profiles-{n}" for n in config.profiles_rows if n >= LARGE}
    for request_seed in range(config.request_seeds):
        for task in config.tasks():
            large = task in large_tasks
            shares = config.large_shares if large else config.shares
            for share in config.tallrec_shares if task == "tallrec" else shares:
                for category in config.categories:
                    id_ = CellId(task=task, category=category, share=share, request_seed=request_seed)
                    names = [name for name in METHODS if not large or name in config.large_methods]
                    names = [
                        name for name in names if any(fnmatch.fnmatch(id_.path_of(name), p) for p in config.subset)
                    ]
                    if names:
                        plan[id_] = names
    return plan


def run_cells(config: FidelityConfig, models: Callable[[str], Model], say: Callable[[str], None]) -> None:
    """Computes what the plan lacks.

    Args:
        config: what.
        models: the base of a task by its name.
        say: takes each line of progress.
    """
    tasks, plan = config.tasks(), planned(config)
    total, done, computed, started = sum(map(len, plan.values())), 0, 0, time.perf_counter()
    for id_, names in plan.items():
        task = tasks[id_.task]
        claim_settings(config.workdir / "tasks" / id_.task, task.settings())
        cell = None
        for name in names:
            done += 1
            directory = config.workdir / "cells" / id_.task / id_.directory
            if (directory / f"{name}.json").exists():
                continue
            if cell is None:
                cell = Cell(config.workdir, id_, task, models(id_.task), num_retrained=config.retrain_seeds)
                reference_started = time.perf_counter()
                say(
                    f"{id_.task}/{id_.directory}: {_told(cell.reference())}; "
                    f"{time.perf_counter() - reference_started:.0f} s"
                )
            try:
                result = cell.run(name, METHODS[name])
            except NotYetError as error:
                say(f"{id_.path_of(name)} is left out: {error}")
                continue
            computed += 1
            elapsed = time.perf_counter() - started
            left = elapsed / computed * (total - done) / 60
            say(
                f"[{done}/{total}] {id_.path_of(name)}: {_told_result(result)}; {elapsed / 60:.1f} min so far, "
                f"about {left:.0f} to go"
            )


def _told(reference: dict[str, Any]) -> str:
    loss, seeds = reference["before"]["forget_loss"], [r["forget_loss"] for r in reference["retrained"]]
    return (
        f"{reference['num_named']} of {reference['num_rows']} rows, loss on S {loss:.3f}, "
        f"retrained {', '.join(f'{seed:.3f}' for seed in seeds)}, {reference['retrain_seconds']:.0f} s each"
    )


def _told_result(result: dict[str, Any]) -> str:
    seconds = f"{result['cell_seconds']:.0f} s"
    if "failed" in result:
        return f"no step ({result['failed']}), {seconds}"
    closures = " / ".join("undefined" if c is None else f"{c:.2f}" for c in result["closure"].values())
    return f"closure {closures}, KL {result['kl_over_floor']:.2f} x floor, cost {result['cost']:.3f}, {seconds}"


def render(workdir: Path) -> str:
    """Writes `table.md`, `results.json` and `frontier.png` from the cells that are there; returns the table."""
    results = load_results(workdir)
    table = render_table(results, tuple(METHODS))
    files.atomic_write_text(workdir / "table.md", table)
    files.atomic_write_json(
        workdir / "results.json",
        {"results": results, "versions": library_versions(), "devices": describe_devices()},
    )
    (workdir / "frontier.png").write_bytes(render_plot(results, tuple(METHODS)))
    return table


class _Models:
    """Base models by task, each loaded once."""

    def __init__(self, config: FidelityConfig, demo_base: Path):
        self._paths = dict.fromkeys(config.tasks(), demo_base)
        if config.tallrec_base is not None:
            self._paths["tallrec"] = config.tallrec_base
        self._loaded: dict[Path, Model] = {}

    def __call__(self, task: str) -> Model:
        path = self._paths[task]
        if path not in self._loaded:
            self._loaded[path] = load_model(path)
        return self._loaded[path]


def main(config: FidelityConfig) -> None:
    """Runs the cells and prints the table."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr, force=True)
    logger.setLevel(logging.INFO)
    # Each encoding would tell anew that tallrec's prompts are cut; the README does.
    logging.getLogger("llmeraser_jax.data").setLevel(logging.ERROR)
    config.workdir.mkdir(parents=True, exist_ok=True)
    if not config.render_only:
        with as_file(resources("llmeraser_jax.demo") / "base") as base:
            run_cells(config, _Models(config, base), logger.info)
    sys.stdout.write(f"\n{render(config.workdir)}\n")
    sys.stdout.write(f"{describe_devices()}; {json.dumps(library_versions())}\n")


if __name__ == "__main__":
    main(tyro.cli(FidelityConfig))
