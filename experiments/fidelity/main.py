"""How close each method comes to retraining, and what it costs: a grid of comparisons by one command.

    python -m experiments.fidelity.main --workdir DIR

A cell is one population, category, share and request, and a comparison by itself (`experiments.study`). Several
requests of a kind show how much of a difference is chance. A second call computes what is missing and renders
everything anew. A workdir holds

    tasks/<population>/trained/                 run directory, shared by all cells of a population
    tasks/<population>/retrained/<cell>/seed_*/ run directories, shared by all methods of a cell
    cells/<population>/<cell>/                  a comparison: see `llmeraser_jax.evaluation.records`
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import json
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments import study
from experiments.common import claim_settings, load_demo_base, log_progress
from experiments.fidelity import frontier, profiles
from experiments.fidelity.profiles import CATEGORIES, LARGE, NUM_HELDOUT_PEOPLE, Category, ProfilesTask
from llmeraser_jax import files, trees
from llmeraser_jax.checks import check_at_least
from llmeraser_jax.environment import describe_devices, library_versions
from llmeraser_jax.evaluation import measures
from llmeraser_jax.evaluation.job import held_out_task
from llmeraser_jax.evaluation.page import Column, Row, grid_blocks
from llmeraser_jax.evaluation.records import MetricMeaning, read_comparison, record_path, write_plan
from llmeraser_jax.evaluation.render import Block, Details, Page, Text, render_text, show_number, write_page
from llmeraser_jax.evaluation.summary import summarise
from llmeraser_jax.models import Model
from llmeraser_jax.rivals import EqualLengthAscent, FinetuneEdited, get_method
from llmeraser_jax.solvers import ConjugateGradients
from llmeraser_jax.unlearning import (
    PAPER_STEP,
    PUBLIC_SCRIPT,
    Auto,
    Corrected,
    CurvatureSpec,
    KroneckerPreconditioner,
    Step,
    TargetMatching,
)
from llmeraser_jax.unlearning import Path as InfluencePath

logger = logging.getLogger("fidelity")
REFERENCE_METHOD = "target-matching"
PAPER_EPOCHS = 5
PAPER_SHARE = 1 / 31  # of a retraining: the cost that the paper states
RETAINED_METRICS = {
    "retained: exact_match": MetricMeaning(
        meaning="the same measure on training examples that stay.", better="retrained"
    )
}


def within_paper_share(cell: study.Study) -> study.Budgeted:
    """Target matching with a budget: the paper's share of a retraining of five epochs."""
    budget = PAPER_SHARE * PAPER_EPOCHS / cell.scenario.train.epochs
    return study.Budgeted(method=TargetMatching(), budget=budget)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Control:
    """Normalised steps along the right-hand side, as long together as target matching of the same cell moved.

    Attributes:
        num_steps: how many.
        difference: whether to descend on retained examples too.
    """

    num_steps: int = 10
    difference: bool = False

    def __call__(self, cell: study.Study) -> EqualLengthAscent:
        """The control for one cell."""
        share = cell.distance_moved(REFERENCE_METHOD) / float(trees.tree_norm(cell.lora))
        return EqualLengthAscent(num_steps=self.num_steps, difference=self.difference, length=share)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rival:
    """A rival with the learning rate or the strength that ends nearest to what a user would want, or to retraining.

    Attributes:
        name: of `llmeraser_jax.rivals.RIVALS`.
        oracle: choose by the retrained models, not by what every method is given.
        as_costly: epochs until it has cost what the default costs, where its own cost less.
    """

    name: str
    oracle: bool = False
    as_costly: bool = False

    def __call__(self, cell: study.Study) -> Any:
        """The rival for one cell."""
        method = cell.in_steps(get_method(self.name))
        if self.as_costly:
            more = cell.spent(DEFAULT) / cell.spent(self.name)
            method = dataclasses.replace(method, epochs=max(round(more * method.epochs), method.epochs))
        return cell.nearest(self.name, method, oracle=self.oracle)


def as_cheap(cell: study.Study) -> study.Budgeted:
    """The default with the budget that the cheapest rival needed."""
    retraining = cell.task().cost_of_retraining
    assert retraining is not None
    return study.Budgeted(method=Auto(), budget=cell.spent(CHEAPEST) / retraining)


# The default and rivals, which are compared over several requests: `frontier.py`.
DEFAULT, CHEAPEST, BUDGETED = "auto", "k-fade", "auto-as-cheap"
AS_COSTLY, ORACLE = "-as-costly", "-oracle"
_DESCENTS = ("npo", "simnpo", "gradient-difference")
_STRONGEST = (*_DESCENTS, "k-fade", "msa")
FRONTIER: Mapping[str, Any] = {
    DEFAULT: Auto(),
    "finetune-edited": FinetuneEdited(),
    **{name: Rival(name=name) for name in _STRONGEST},
    BUDGETED: as_cheap,
    **{f"{name}{AS_COSTLY}": Rival(name=name, as_costly=True) for name in ("finetune-edited", *_DESCENTS)},
    **{f"{name}{ORACLE}": Rival(name=name, oracle=True) for name in _STRONGEST},
}

METHODS: Mapping[str, Any] = {
    **FRONTIER,
    "target-matching": TargetMatching(),
    "matching-without-restoration": TargetMatching(restoration_steps=0),
    "matching-within-budget": within_paper_share,
    "path": InfluencePath(),
    "paper-step": PAPER_STEP,
    "paper-step-sample": Step(curvature=CurvatureSpec(kind="hessian"), trust_region=None),
    "step-gauss-newton": Step(trust_region=None),
    "ekfac": Step(
        curvature=CurvatureSpec(sample_size=256),
        solver=ConjugateGradients(max_steps=1, preconditioner=KroneckerPreconditioner()),
        trust_region=None,
    ),
    "newton": Step(rhs="newton"),
    "newton-corrected": Corrected(method=Step(rhs="newton"), max_steps=3),
    "public-script": PUBLIC_SCRIPT,
    "cb-as-matched": Control(num_steps=1),
    "ascent-as-matched": Control(),
    "difference-as-matched": Control(difference=True),
}
OVER_ALL_ROWS = ("paper-step", "public-script")  # several retrainings each in a large population


@dataclasses.dataclass(frozen=True, kw_only=True)
class CellId:
    """Which cell."""

    task: str
    category: Category
    share: float
    request: int = 0

    @property
    def directory(self) -> str:
        """Below `cells/<task>` and `tasks/<task>/retrained`."""
        return f"{self.category}-{self.share:g}" + (f"-{self.request}" if self.request else "")

    def path_of(self, method: str) -> str:
        """What a subset's patterns are matched with."""
        return f"{self.task}/{self.directory}/{method}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FidelityConfig:
    """Which cells.

    Attributes:
        workdir: everything is kept there.
        num_rows: sizes of the populations.
        categories: of requests.
        shares: of the training rows, for populations below 1000 rows.
        large_shares: for populations of 1000 rows and more.
        num_requests: of each kind, which name other rows.
        retrain_seeds: retrained models of each cell, at least 2.
        subset: patterns of `<population>/<category>-<share>/<method>`; only what matches one is computed.
    """

    workdir: Path
    num_rows: tuple[int, ...] = (400, 4000)
    categories: tuple[Category, ...] = CATEGORIES
    shares: tuple[float, ...] = (0.01, 0.05, 0.1)
    large_shares: tuple[float, ...] = (0.01,)
    num_requests: int = 1
    retrain_seeds: int = 3
    subset: tuple[str, ...] = ("*",)

    def __post_init__(self):
        check_at_least(self, retrain_seeds=2, num_requests=1)
        for share in (*self.shares, *self.large_shares):
            if not 0 < share <= profiles.MAX_SHARE:
                msg = f"A share is {share}; it must lie in (0, {profiles.MAX_SHARE}]."
                raise ValueError(msg)

    def plan(self) -> dict[CellId, list[str]]:
        """The methods of each cell that the subset holds: one request of each kind, then the next of each."""
        plan: dict[CellId, list[str]] = {}
        for request, size in itertools.product(range(self.num_requests), sorted(self.num_rows)):
            names = [name for name in METHODS if size < LARGE or name not in OVER_ALL_ROWS]
            shares = self.large_shares if size >= LARGE else self.shares
            for share, category in itertools.product(shares, self.categories):
                task = ProfilesTask(num_rows=size).name
                id_ = CellId(task=task, category=category, share=share, request=request)
                chosen = [n for n in names if any(fnmatch.fnmatch(id_.path_of(n), p) for p in self.subset)]
                if chosen:
                    plan[id_] = chosen
        return plan


def study_of(workdir: Path, id_: CellId, task: ProfilesTask, model: Model, retrain_seeds: int) -> study.Study:
    """The comparison of one cell; all cells of a population share the trained model."""
    drawn = task.draw()
    requests = profiles.make_requests(drawn, id_.category, id_.share, id_.request)
    named = {request.id for request in requests}
    stay = [example for example in drawn.train if example.id not in named]
    size = min(measures.NUM_RETAINED_SCORED, len(stay))
    retained = [stay[k] for k in np.sort(np.random.default_rng(0).choice(len(stay), size, replace=False))]
    like_train = 2 * NUM_HELDOUT_PEOPLE  # rows of people; general facts follow
    shared = workdir / "tasks" / id_.task

    def make_task(model: Model, encode: study.Encode) -> measures.Task:
        outside = held_out_task(model, encode(drawn.heldout[like_train:] or drawn.heldout))
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
        chunk_size=32,
        examples=drawn.train,
        requests=requests,
        shown=drawn.heldout[:like_train],
        heldout=drawn.heldout,
        num_nonmembers=min(like_train, len(drawn.heldout)),
        make_task=make_task,
        methods=METHODS,
        probed=False,
        question=f"{100 * id_.share:g} % of the examples, {id_.category}.",
        metrics=RETAINED_METRICS,
        before=shared / "trained",
        retrained=shared / "retrained" / id_.directory,
    )
    return study.Study(scenario, workdir / "cells" / id_.task / id_.directory, retrain_seeds=retrain_seeds)


def run_cells(config: FidelityConfig, model: Model) -> None:
    """Computes what the plan lacks."""
    plan, done, started = config.plan(), 0, time.perf_counter()
    tasks = {task.name: task for task in (ProfilesTask(num_rows=size) for size in config.num_rows)}
    total = sum(map(len, plan.values()))
    for id_, names in plan.items():
        task = tasks[id_.task]
        claim_settings(config.workdir / "tasks" / id_.task, {"train": task.train.to_mapping()})
        cell = study_of(config.workdir, id_, task, model, config.retrain_seeds)
        write_plan(cell.workdir, cell.plan(dict.fromkeys(names, 1)))
        for name in names:
            done += 1
            if record_path(cell.workdir, name, 0).exists():
                continue
            try:
                record = cell.run(name, 0)
            except study.NotYetError as error:
                logger.info("%s is left out: %s", id_.path_of(name), error)
                continue
            told = f"no step ({record.failed})" if record.failed else f"{(record.cost or {})['seconds']:.0f} s"
            minutes = (time.perf_counter() - started) / 60
            logger.info("[%d/%d, %.1f min] %s: %s", done, total, minutes, id_.path_of(name), told)


def _of_five_epochs(row: Row) -> float | None:
    share, epochs = row.share("gradient_equivalents"), row.report.get("epochs")
    return None if share is None or epochs is None else share * epochs / PAPER_EPOCHS


def _of_floor(row: Row) -> float | None:
    steps = len(row.report.get("receipts", {}).get(row.label, {}).get("steps", ()))
    spent, named = (row.cost or {}).get("gradient_equivalents"), row.report["named"]
    pairs = 2 * named["total"] - named["remove"]
    return spent / (steps * pairs) if steps and spent is not None else None


EXTRA_COLUMNS = (
    Column(
        "cost / 5 epochs",
        "lower",
        lambda row: show_number(_of_five_epochs(row)),
        "gradient equivalents over those of a retraining of five epochs, the paper's.",
    ),
    Column(
        "cost / floor",
        "lower",
        lambda row: show_number(_of_floor(row)),
        "gradient equivalents over one for each row and replacement that is named, in each step taken: what the "
        "right-hand sides cost alone.",
    ),
)


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
        kinds: dict[str, list[dict[str, Row]]] = {}
        for name, report in reports:
            population, directory = name.split("/")
            kind = "-".join(directory.split("-")[:2])  # see `CellId.directory`
            kinds.setdefault(f"{population}/{kind}", []).append(frontier.methods_of(report))
        blocks = [*frontier.blocks(kinds, DEFAULT, "grid"), *grid_blocks(reports, "grid", EXTRA_COLUMNS)]
    write_page(Page("Fidelity: how close to retraining, at what cost", tuple(blocks)), workdir)
    told = {"results": dict(reports), "versions": library_versions(), "devices": describe_devices()}
    files.atomic_write_json(workdir / "results.json", told)
    return blocks


def main(config: FidelityConfig) -> None:
    """Runs the cells and prints the tables."""
    log_progress("study", "fidelity")
    config.workdir.mkdir(parents=True, exist_ok=True)
    run_cells(config, load_demo_base())
    tables = [block for block in render(config.workdir) if not isinstance(block, Details)]
    sys.stdout.write(f"\n{render_text(tables)}\n{describe_devices()}; {json.dumps(library_versions())}\n")


if __name__ == "__main__":
    main(tyro.cli(FidelityConfig))
