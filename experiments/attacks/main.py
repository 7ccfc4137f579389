"""What attackers look for in models that forgot, and whether retrained models show the same.

    python -m experiments.attacks.main --workdir DIR

Removes people's rows from the population of `experiments.fidelity`, by each method from many models, each trained
with a seed of its own, and retrains as many. A second call computes what is missing. Besides what the fidelity
experiment keeps, the cell's directory holds `probes/<model>.json`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments.common import claim_settings, load_demo_base, log_progress
from experiments.fidelity.main import FRONTIER, CellId, study_of
from experiments.fidelity.profiles import MAX_SHARE, ProfilesTask
from experiments.study import Study, check_methods
from llmeraser_jax import files
from llmeraser_jax.checks import check_at_least
from llmeraser_jax.convert import dequantized, quantize
from llmeraser_jax.evaluation.attacks import Attack, classifier_attack, likelihood_ratio_attack
from llmeraser_jax.evaluation.klom import response_margins
from llmeraser_jax.evaluation.records import BEFORE, RETRAINED, read_comparison, write_plan
from llmeraser_jax.evaluation.render import Block, Heading, Page, Table, Text, render_text, show_number, write_page
from llmeraser_jax.evaluation.robustness import relearn
from llmeraser_jax.evaluation.scoring import score_examples
from llmeraser_jax.lora import Lora, merge_lora
from llmeraser_jax.models import Model
from llmeraser_jax.unlearning.task import take

PARTS = ("named", "retained", "heldout")  # of a KLOM record
STEPS = (1, 5, 20, 100)
STORAGES = ("nf4", "int8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttacksConfig:
    """What is attacked.

    Attributes:
        workdir: everything is kept there.
        num_rows: of the population.
        share: of the rows that are removed.
        methods: of `experiments.fidelity`.
        num_models: trained, retrained, and unlearned by each method.
    """

    workdir: Path
    num_rows: int = 400
    share: float = 0.05
    methods: tuple[str, ...] = ("auto", "finetune-edited", "npo", "k-fade")
    num_models: int = 16

    def __post_init__(self) -> None:
        check_methods(self.methods, FRONTIER)
        check_at_least(self, num_rows=40, num_models=4)
        if not 0 < self.share <= MAX_SHARE:
            msg = f"share is {self.share}; it must lie in (0, {MAX_SHARE}]."
            raise ValueError(msg)


def probe(cell: Study, params: Lora) -> dict[str, Any]:
    """Mean losses on removed rows after rounding the merged weights, and after training goes on.

    Returns:
        `stored`: on all of them, as the weights are stored. `relearned_retained`: the same after each number of
        steps on retained rows. `relearned_half`: on one half after steps on the other.
    """
    problem, model = cell.bench.problem, cell.model
    data: Any = problem.examples

    def loss(model: Model, params: Any, rows: np.ndarray) -> float:
        return float(score_examples(model, params, data, rows).losses.mean())

    def curve(on: np.ndarray, tested: np.ndarray) -> list[float]:
        batch_size = len(on) // STEPS[-1] or len(on)  # fresh rows in every step, or all of them
        config = dataclasses.replace(cell.scenario.train, batch_size=batch_size, microbatch_size=None)
        again = (relearn(model, params, take(data, on), config, num_steps=steps) for steps in STEPS)
        return [loss(model, params, tested), *(loss(model, lora, tested) for lora in again)]

    mixed = np.random.default_rng(0).permutation(problem.named)
    first, second = np.array_split(mixed, 2)
    merged = merge_lora(model.base, params)
    stored = {"float32": loss(model, params, problem.named)}
    for storage in STORAGES:
        layers = {
            name: {**leaves, "kernel": dequantized(quantize(leaves["kernel"], storage))}
            if "kernel" in leaves
            else leaves
            for name, leaves in merged["layers"].items()
        }
        stored[storage] = loss(dataclasses.replace(model, base={**merged, "layers": layers}), None, problem.named)
    return {
        "stored": stored,
        "relearned_retained": curve(problem.retained, problem.named),
        "relearned_half": curve(first, second),
    }


def _margins(records: Sequence[Any], part: str) -> np.ndarray:
    return response_margins(np.array([record.scores[part]["losses"] for record in records], np.float64))


def attack_table(found: Any, methods: Sequence[str]) -> Table:
    """Both attacks on each method, and on the models before, which an attacker tells easily."""
    by_name: dict[str, list[Any]] = {}
    for record in found.klom_records:
        if not record.failed:
            by_name.setdefault(record.model, []).append(record)

    def auc(attack: Attack) -> str:
        return f"{attack.success[0]:.2f} ({attack.chance:.2f})"

    rows = []
    for name in (BEFORE, *methods):
        ours, theirs = ({part: _margins(by_name[of], part) for part in PARTS} for of in (name, RETRAINED))
        by_row = likelihood_ratio_attack(ours["named"], theirs["named"])
        told = (auc(classifier_attack(ours[part], theirs[part])) for part in PARTS)
        accuracy = f"{by_row.success.mean():.2f} ({by_row.chance:.2f})"
        rows.append((name, str(len(by_name[name])), accuracy, f"{by_row.success.max():.2f}", *told))
    header = ("model", "models", "U-LiRA, removed rows", "worst row",
              *(f"classifier, {part}" for part in ("removed rows", "retained", "held-out")))  # fmt: skip
    return Table(header, tuple(rows))


def probe_tables(probes: Mapping[str, Mapping[str, Any]]) -> list[Block]:
    """Rounding, and two curves of relearning."""

    def table(of: Callable[[Mapping[str, Any]], Sequence[float]], header: Sequence[str]) -> Table:
        rows = ((name, *map(show_number, of(told))) for name, told in probes.items())
        return Table(("model", *header), tuple(rows))

    steps = ("now", *(f"{count} steps" for count in STEPS))
    return [
        Heading("Mean loss on removed rows, as the merged weights are stored", 3),
        table(lambda told: list(told["stored"].values()), ("float32", *STORAGES)),
        Heading("The same after training on retained rows", 3),
        table(lambda told: told["relearned_retained"], steps),
        Heading("Mean loss on half of the removed rows after training on the other half", 3),
        table(lambda told: told["relearned_half"], steps),
    ]


def run(config: AttacksConfig, task: ProfilesTask, model: Model) -> list[Block]:
    """Computes what the workdir lacks and returns the tables."""
    claim_settings(config.workdir / "tasks" / task.name, {"train": task.train.to_mapping()})
    id_ = CellId(task=task.name, category="removal", share=config.share)
    cell = study_of(config.workdir, id_, task, model, retrain_seeds=3)
    klom = dict.fromkeys((BEFORE, RETRAINED, *config.methods), config.num_models)
    write_plan(cell.workdir, cell.plan(dict.fromkeys(config.methods, 1), klom))
    probes = {}
    made: dict[str, Callable[[], Any]] = {BEFORE: lambda: cell.lora}
    made |= {name: lambda name=name: cell.fit(name, 0)[0].params for name in config.methods}
    made |= {f"{RETRAINED}, seed {k}": lambda k=k: cell.bench.retrained[k] for k in range(3)}
    for name, params in made.items():
        if name in config.methods:
            cell.run(name, 0)
        path = cell.workdir / "probes" / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            files.atomic_write_json(path, probe(cell, params()))
        probes[name] = files.read_json(path)
    cell.measure_klom(config.methods, config.num_models)
    found = read_comparison(cell.workdir)
    told = (
        f"{len(found.ids)} of {found.num_examples} rows removed. U-LiRA: balanced accuracy of telling, row by row, "
        "unlearned models from retrained ones. Classifier: AUC of telling the same from losses on many rows. In "
        "brackets what 95 of 100 attacks with labels dealt out anew stay below."
    )
    return [Text(told), attack_table(found, config.methods), *probe_tables(probes)]


def main(config: AttacksConfig) -> None:
    """Runs the attacks, prints the tables and writes them as a page."""
    log_progress("study")
    config.workdir.mkdir(parents=True, exist_ok=True)
    blocks = run(config, ProfilesTask(num_rows=config.num_rows), load_demo_base())
    write_page(Page("What do attackers tell of models that forgot?", tuple(blocks)), config.workdir)
    sys.stdout.write(render_text(blocks))


if __name__ == "__main__":
    main(tyro.cli(AttacksConfig))
