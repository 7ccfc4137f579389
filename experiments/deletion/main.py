"""Twenty deletion requests one after the other, against retraining and against one joint request.

    python -m experiments.deletion.main --workdir DIR

Each request names one person of the fidelity experiment's population. The chain of erasures is compared with
retrainings after some of them, and the drift that receipts record with the gap that is measured. Killed at any
moment, the same command goes on.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments.common import claim_settings, load_demo_base, log_progress
from experiments.fidelity.profiles import ProfilesTask, make_profiles
from llmeraser_jax import data, files
from llmeraser_jax.data import Action, Example, Request
from llmeraser_jax.evaluation.render import MISSING, Table, render_text, show_number
from llmeraser_jax.evaluation.scoring import heldout_kl_of, score_examples
from llmeraser_jax.models import Model
from llmeraser_jax.runs import RUN_FILE, Run, load_run
from llmeraser_jax.training.job import finetune_run
from llmeraser_jax.training.retrain import retrain
from llmeraser_jax.unlearning import erase_run
from llmeraser_jax.unlearning.receipt import read_receipt

RESULTS_FILE = "results.json"
_log = logging.getLogger("deletion")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Main:
    """What is run.

    Attributes:
        workdir: everything is kept there.
        num_rows: of the population; two per person.
        requests: how many, one person each.
        retrain_after: retrain after so many requests.
        retrain_seeds: retrainings each.
        calibration: held-out rows that erasures are shown; the other ones are measured.
        chunk_size: examples per micro-batch of erasures.
        seed: of the population, the training and the order of requests.
    """

    workdir: Path
    num_rows: int = 120
    requests: int = 20
    retrain_after: tuple[int, ...] = (1, 5, 10, 20)
    retrain_seeds: int = 3
    calibration: int = 60
    chunk_size: int = 32
    seed: int = 0


def request_lists(config: Main, examples: Sequence[Example]) -> list[list[Request]]:
    """For each request the rows of one person, in a seeded order."""
    people = np.random.default_rng([config.seed, 25]).permutation(len(examples) // 2)[: config.requests]
    return [[Request(id=examples[2 * p + k].id, action=Action.REMOVE) for k in range(2)] for p in people.tolist()]


def write_requests(path: Path, requests: Sequence[Request]) -> Path:
    """A request file."""
    files.atomic_write_text(path, "".join(data.request_to_json(request) + "\n" for request in requests))
    return path


def erased(config: Main, run: Run, requests: Sequence[Request], name: str, model: Model) -> Run:
    """The run of an erasure, made where it is not there."""
    path = config.workdir / name
    if not (path / RUN_FILE).exists():
        file = write_requests(config.workdir / "data" / f"{name}.jsonl", requests)
        erase_run(
            run,
            file,
            path,
            chunk_size=config.chunk_size,
            model=model,
            calibration_path=config.workdir / "data" / "calibration.jsonl",
        )
        _log.info("%s: %s", name, (read_receipt(load_run(path)) or {})["outcome"])
    return load_run(path)


class Measured:
    """Mean losses of groups of rows, and the held-out KL to retrained models."""

    def __init__(self, run: Run, model: Model, examples: Sequence[Example], heldout: Sequence[Example]):
        self.model = model
        self.examples, self.heldout = run.encode(examples, model.tokenizer), run.encode(heldout, model.tokenizer)
        self.place = {example.id: k for k, example in enumerate(examples)}

    def losses(self, run: Run, forgotten: Sequence[str], retained: Sequence[str]) -> dict[str, float]:
        """Of the rows forgotten so far, of rows that no request names, and of rows that were never trained on."""
        lora = run.load_adapter(self.model)

        def mean(ids: Sequence[str]) -> float:
            rows = np.array([self.place[id_] for id_ in ids])
            return float(score_examples(self.model, lora, self.examples, rows).losses.mean())

        heldout = float(score_examples(self.model, lora, self.heldout).losses.mean())
        return {"forgotten": mean(forgotten), "retained": mean(retained), "heldout": heldout}

    def divergence(self, run: Run, retrained: Sequence[Run]) -> tuple[float, float]:
        """Held-out KL of the retrained models to a run, and to each other."""
        loras = [other.load_adapter(self.model) for other in retrained]
        result = heldout_kl_of(self.model, self.heldout, {"": run.load_adapter(self.model)}, loras)
        return float(result.heldout_kl("")), float(np.mean(result.retrained_left_out))


def main(config: Main) -> None:
    """Runs what the workdir lacks and prints the table."""
    log_progress("deletion")
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k != "workdir"}
    claim_settings(config.workdir, settings)
    task = ProfilesTask(num_rows=config.num_rows, seed=config.seed)
    profiles = make_profiles(config.num_rows, config.seed)
    people = [row for row in profiles.heldout if row.id.startswith("h")]
    calibration, heldout = people[: config.calibration], people[config.calibration :]
    directory = config.workdir / "data"
    directory.mkdir(exist_ok=True)
    data.save_examples(directory / "train.jsonl", profiles.train)
    data.save_examples(directory / "calibration.jsonl", calibration)
    model = load_demo_base()
    before = finetune_run(
        model, directory / "train.jsonl", config.workdir / "before", recipe=task.recipe, lora=task.lora,
        config=task.train,
    )  # fmt: skip
    _log.info("trained: loss %.4f", before.result["loss"])
    lists = request_lists(config, profiles.train)
    chain = [before]
    for number, requests in enumerate(lists, start=1):
        chain.append(erased(config, chain[-1], requests, f"request_{number:02d}", model))
    everything = [request for requests in lists for request in requests]
    joint = erased(config, before, everything, "joint", model)
    retrained = {}
    for count in config.retrain_after:
        so_far = [request for requests in lists[:count] for request in requests]
        retrained[count] = retrain(
            before, so_far, config.workdir / f"retrained_{count:02d}", seeds=config.retrain_seeds, model=model
        )
        _log.info("retrained after %d requests", count)

    measured = Measured(before, model, profiles.train, heldout)
    named = {request.id for request in everything}
    retained = [example.id for example in profiles.train if example.id not in named]
    rows = []
    for count in range(1, config.requests + 1):
        ids = [request.id for requests in lists[:count] for request in requests]
        receipt = read_receipt(chain[count]) or {}
        row: dict[str, Any] = {
            "requests": count,
            "chain": measured.losses(chain[count], ids, retained),
            "drift": receipt["drift"],
            "outcome": receipt["outcome"],
            "seconds": receipt["seconds"],
            "gradient_equivalents": receipt["gradient_equivalents"],
        }
        if count in retrained:
            each = [measured.losses(run, ids, retained) for run in retrained[count]]
            row["retrained"] = {name: float(np.mean([losses[name] for losses in each])) for name in each[0]}
            row["retrained_deviation"] = {name: float(np.std([x[name] for x in each], ddof=1)) for name in each[0]}
            row["kl"], row["kl_between_retrained"] = measured.divergence(chain[count], retrained[count])
            row["retraining_seconds"] = float(np.mean([run.result["seconds"] for run in retrained[count]]))
        rows.append(row)
    receipt = read_receipt(joint) or {}
    together: dict[str, Any] = {
        "losses": measured.losses(joint, [request.id for request in everything], retained),
        "outcome": receipt["outcome"],
        "drift": receipt["drift"],
        "seconds": receipt["seconds"],
    }
    if config.requests in retrained:
        together["kl"], _ = measured.divergence(joint, retrained[config.requests])
    start = measured.losses(before, [request.id for request in everything], retained)
    results = {"before": start, "rows": rows, "joint": together, "trained_loss": before.result["loss"]}
    files.atomic_write_json(config.workdir / RESULTS_FILE, results)
    sys.stdout.write(render_text([table_of(results)]))


def table_of(results: Mapping[str, Any]) -> Table:
    """A row for each number of requests that was retrained after, and one for the joint request."""
    header = (
        "requests", "forgotten", "retrained", "retained", "retrained ", "held out", "retrained  ", "KL",
        "KL of seeds", "rise, bounds", "distance", "cost", "advice",
    )  # fmt: skip
    shown = []
    for row in results["rows"]:
        if "retrained" not in row:
            continue
        losses, other = row["chain"], row["retrained"]
        cells = [show_number(value) for name in losses for value in (losses[name], other[name])]
        cells += [show_number(row["kl"]), show_number(row["kl_between_retrained"])]
        shown.append((str(row["requests"]), *cells, *_drift_cells(row["drift"])))
    joint = results["joint"]
    cells = [cell for name in joint["losses"] for cell in (show_number(joint["losses"][name]), MISSING)]
    shown.append(("joint", *cells, show_number(joint.get("kl")), MISSING, *_drift_cells(joint["drift"])))
    return Table(header, tuple(shown))


def _drift_cells(drift: Mapping[str, Any]) -> tuple[str, ...]:
    distance = drift["product_distance"] / drift["product_norm"]
    rise = drift["retained_rise"] / drift["harm_bound"]
    return (show_number(rise), show_number(distance), show_number(drift["cost"]), drift["advice"])


if __name__ == "__main__":
    main(tyro.cli(Main))
