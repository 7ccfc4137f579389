"""How close each method comes to retraining, and what it costs: a grid of comparisons by one command.

    python -m experiments.fidelity.main --workdir DIR [--tallrec DIR --tallrec-base DIR]

A cell is one task, category, share and request, and a comparison by itself (`experiments.study`). A second call
computes what is missing and renders everything anew.
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

import numpy as np
import tyro

from experiments import study
from experiments.fidelity.methods import METHODS, PAPER_EPOCHS, distance_left
from experiments.fidelity.profiles import CATEGORIES, Category
from experiments.fidelity.tasks import LARGE, CellData, TallrecTask, Task, profiles_task
from experiments.workdirs import claim_settings
from llmeraser_jax import files
from llmeraser_jax.data import Example
from llmeraser_jax.environment import describe_devices, library_versions
from llmeraser_jax.evaluation import measures
from llmeraser_jax.evaluation.job import held_out_task
from llmeraser_jax.evaluation.page import Column, Row, grid_blocks
from llmeraser_jax.evaluation.records import MetricMeaning, read_comparison, record_path, write_plan
from llmeraser_jax.evaluation.render import Block, Details, Page, Text, render_text, show_number, write_page
from llmeraser_jax.evaluation.summary import summarise
from llmeraser_jax.models import Model, load_model

logger = logging.getLogger("fidelity")
RETAINED_METRICS = {
    f"retained: {name}": MetricMeaning(
        meaning="the same measure on training examples that stay.", better="retrained"
    )
    for name in ("exact_match", "accuracy", "auc")
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CellId:
    """Which cell."""

    task: str
    category: Category
    share: float
    request_seed: int = 0

    @property
    def directory(self) -> str:
        """Below `cells/<task>` and `tasks/<task>/retrained`."""
        suffix = f"-request{self.request_seed}" if self.request_seed else ""
        return f"{self.category}-{self.share:g}{suffix}"

    def path_of(self, method: str) -> str:
        """What a subset's patterns are matched with."""
        return f"{self.task}/{self.directory}/{method}"


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
        render_only: compute nothing; the page from what is there.
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
        study.check_methods(self.large_methods, METHODS)

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


def study_of(workdir: Path, id_: CellId, task: Task, model: Model, retrain_seeds: int) -> study.Study:
    """The comparison of one cell; cells of equal training examples share the trained model.

    A workdir holds

        tasks/<task>/settings.json              what the task was run with; other settings are refused
        tasks/<task>/trained/<key>/             run directory, shared by all cells of equal training examples
        tasks/<task>/retrained/<cell>/seed_*/   run directories, shared by all methods of a cell
        cells/<task>/<cell>/                    a comparison: see `llmeraser_jax.evaluation.records`
    """
    drawn = task.draw(id_.category, id_.share, id_.request_seed)
    shared = workdir / "tasks" / id_.task

    def make_task(model: Model, encode: study.Encode) -> measures.Task:
        retained = _some_retained(drawn)
        outside = held_out_task(model, encode(drawn.heldout[drawn.num_like_train :] or drawn.heldout))
        inside = held_out_task(model, encode(retained))

        def measure(model: Model, params: Any) -> dict[str, Any]:
            kept = {f"retained: {name}": value for name, value in inside(model, params)["metrics"].items()}
            return {"metrics": {**outside(model, params)["metrics"], **kept}}

        return measure

    scenario = study.Scenario(
        name=f"{id_.task}/{id_.directory}",
        model=model,
        recipe=task.recipe,
        lora=task.lora,
        train=task.train,
        erase=task.erase,
        examples=drawn.train,
        requests=drawn.requests,
        shown=drawn.heldout[: drawn.num_like_train],
        heldout=drawn.heldout,
        num_nonmembers=drawn.num_like_train,
        make_task=make_task,
        baselines=METHODS,
        distance=distance_left,
        probed=False,
        question=f"{100 * id_.share:g} % of the examples, {id_.category}.",
        metrics=RETAINED_METRICS,
        before=shared / "trained" / drawn.trained_key,
        retrained=shared / "retrained" / id_.directory,
    )
    return study.Study(scenario, workdir / "cells" / id_.task / id_.directory, retrain_seeds=retrain_seeds)


def _some_retained(drawn: CellData) -> list[Example]:
    """Those that every model is measured on besides: what unlearning must not take with it."""
    named = {request.id for request in drawn.requests}
    rows = np.array([place for place, example in enumerate(drawn.train) if example.id not in named])
    size = min(measures.NUM_RETAINED_SCORED, len(rows))
    return [
        drawn.train[int(place)] for place in np.sort(np.random.default_rng(0).choice(rows, size, replace=False))
    ]


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
        cell = study_of(config.workdir, id_, task, models(id_.task), config.retrain_seeds)
        write_plan(cell.workdir, cell.plan(dict.fromkeys(names, 1)))
        for name in names:
            done += 1
            if record_path(cell.workdir, name, 0).exists():
                continue
            try:
                record = cell.run(name, 0)
            except study.NotYetError as error:
                say(f"{id_.path_of(name)} is left out: {error}")
                continue
            computed += 1
            elapsed = time.perf_counter() - started
            left = elapsed / computed * (total - done) / 60
            told = f"no step ({record.failed})" if record.failed else f"{(record.cost or {})['seconds']:.0f} s"
            say(
                f"[{done}/{total}] {id_.path_of(name)}: {told}; {elapsed / 60:.1f} min so far, about {left:.0f} "
                "to go"
            )


FIVE_EPOCHS = Column(
    "cost / 5 epochs",
    "gradient equivalents over those of a retraining of five epochs, the paper's.",
    "lower",
    lambda row: show_number(_of_five_epochs(row)),
)


def _of_five_epochs(row: Row) -> float | None:
    share, epochs = row.share("gradient_equivalents"), row.report.get("epochs")
    return None if share is None or epochs is None else share * epochs / PAPER_EPOCHS


def load_reports(workdir: Path) -> list[tuple[str, Any]]:
    """Every cell's name and summary, in a fixed order."""
    found = []
    for path in sorted((workdir / "cells").glob("*/*/comparison.json")):
        comparison = read_comparison(path.parent)
        if comparison.of("before"):
            settings = files.read_json(workdir / "tasks" / path.parent.parent.name / "settings.json")
            found.append((comparison.name, {**summarise(comparison), "epochs": settings["train"]["epochs"]}))
    return found


def render(workdir: Path) -> list[Block]:
    """Writes `report.html`, `report.md` and `results.json` from the cells that are there; returns the tables."""
    reports = load_reports(workdir)
    blocks: list[Block] = [Text("No cell was measured yet.")]
    if reports:
        blocks = grid_blocks(reports, "grid", (FIVE_EPOCHS,))
    write_page(Page("Fidelity: how close to retraining, at what cost", tuple(blocks)), workdir)
    told = {"results": dict(reports), "versions": library_versions(), "devices": describe_devices()}
    files.atomic_write_json(workdir / "results.json", told)
    return blocks


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
    """Runs the cells and prints the tables."""
    study.set_up_logging()
    logger.setLevel(logging.INFO)
    config.workdir.mkdir(parents=True, exist_ok=True)
    if not config.render_only:
        with as_file(resources("llmeraser_jax.demo") / "base") as base:
            run_cells(config, _Models(config, base), logger.info)
    tables = [block for block in render(config.workdir) if not isinstance(block, Details)]
    sys.stdout.write(f"\n{render_text(tables)}\n{describe_devices()}; {json.dumps(library_versions())}\n")


if __name__ == "__main__":
    main(tyro.cli(FidelityConfig))
