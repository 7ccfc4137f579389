"""Removal by user and correction of flipped labels on TALLRec's movie data, compared with retraining.

    python -m experiments.tallrec_movie.main --base DIR --data DIR --workdir DIR

fine-tunes, erases by each method, retrains and evaluates; a second call goes on where the first one stopped.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from experiments.tallrec_movie import prepare
from llmeraser_jax import files
from llmeraser_jax.baselines import retrain
from llmeraser_jax.data import Example, Recipe, Request, load_requests, request_to_json, save_examples
from llmeraser_jax.environment import describe_devices, library_versions
from llmeraser_jax.evaluation.job import evaluate_runs
from llmeraser_jax.lora import LoraConfig
from llmeraser_jax.models import Model, load_model
from llmeraser_jax.parallel import parse_mesh
from llmeraser_jax.runs import RUN_FILE, Run, load_run
from llmeraser_jax.training import TrainConfig
from llmeraser_jax.training.job import finetune_run
from llmeraser_jax.unlearning import EraseConfig, UnlearningError, erase_run

logger = logging.getLogger("tallrec_movie")

Scenario = Literal["removal", "correction"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TallrecConfig:
    """The experiment; the defaults are what the README reports.

    Attributes:
        base: base model, a directory in Hugging Face layout.
        data: directory with TALLRec's train and test, `.json` and `.csv`.
        workdir: everything is kept there.
        scenarios: which to run.
        num_rows: training rows.
        rows_per_user: of each user at most.
        num_heldout: rows of test.json.
        removed_share: of the rows, all those of one set of users.
        flipped_share: of the rows, trained on with the wrong label.
        seed: of the rows, the users, the labels flipped, training and erasing.
        retrain_seeds: retrainings of each scenario.
        max_length: tokens; longer prompts lose their beginning, the question at their end stays.
        rank: of the adapter, on all projections.
        epochs: of training.
        learning_rate: of training.
        l2: lambda.
        damping: rho of every method.
        num_steps: K of the path.
        sample_size: training examples behind the curvature besides the named ones, for every method.
        cg_max_steps: conjugate-gradient steps per solve, for every method.
    """

    base: Path
    data: Path
    workdir: Path
    scenarios: tuple[Scenario, ...] = ("removal", "correction")
    num_rows: int = 120
    rows_per_user: int = 3
    num_heldout: int = 200
    removed_share: float = 0.05
    flipped_share: float = 0.1
    seed: int = 0
    retrain_seeds: int = 3
    max_length: int = 160
    rank: int = 8
    epochs: int = 24
    learning_rate: float = 4e-3
    l2: float = 1e-3
    damping: float = 5e-3
    num_steps: int = 6
    sample_size: int = 16
    cg_max_steps: int = 6

    def __post_init__(self):
        for name in ("removed_share", "flipped_share"):
            if not 0 < getattr(self, name) < 1:
                msg = f"{name} is {getattr(self, name)}; it must lie between 0 and 1."
                raise ValueError(msg)

    def load(self, split: Literal["train", "test"]) -> tuple[tuple[Example, ...], tuple[str, ...]]:
        """The rows of a split, and the user of each: what is removed together."""
        return prepare.load_rows(self.data, split)

    @property
    def recipe(self) -> Recipe:
        """Instruction, history and question in lines, and the answer, without EOS.

        stories260K was never trained to end: it gives EOS 1e-11, which an adapter cannot raise above 1e-2, and
        that one token would be all of the loss.
        """
        return Recipe(template="plain", add_eos=False, max_length=self.max_length, truncation_side="left")

    @property
    def lora(self) -> LoraConfig:
        """The adapter."""
        return LoraConfig(rank=self.rank, alpha=2.0 * self.rank, target_modules="all-linear")

    @property
    def train(self) -> TrainConfig:
        """Small micro-batches, since float32 on a CPU is bound by memory."""
        return TrainConfig(
            epochs=self.epochs,
            batch_size=8,
            microbatch_size=2,
            learning_rate=self.learning_rate,
            warmup_ratio=0.1,
            l2=self.l2,
            seed=self.seed,
            checkpoint_every_steps=100,
        )

    @property
    def methods(self) -> dict[str, EraseConfig]:
        """The path, and the paper's single step, which has no trust region, with either curvature."""
        path = EraseConfig(
            method="path",
            damping=self.damping,
            num_steps=self.num_steps,
            sample_size=self.sample_size,
            cg_max_steps=self.cg_max_steps,
            l2=self.l2,
            chunk_size=2,
            seed=self.seed,
            diagnostic_sample=16,
        )
        step = dataclasses.replace(path, method="step", trust_region=False)
        return {
            "path": path,
            "step-hessian": dataclasses.replace(step, curvature="hessian"),
            "step-gauss-newton": dataclasses.replace(step, curvature="gauss-newton"),
        }


def write_scenario(config: TallrecConfig, scenario: Scenario, directory: Path) -> None:
    """Writes `train.jsonl`, `heldout.jsonl` and `requests.jsonl` of one scenario, the same for every call."""
    all_rows, all_users = config.load("train")
    chosen = prepare.choose_rows(all_users, config.num_rows, config.rows_per_user, config.seed)
    examples = tuple(all_rows[row] for row in chosen)
    users = [all_users[row] for row in chosen]
    requests: tuple[Request, ...]
    if scenario == "removal":
        gone = prepare.choose_users(users, round(config.removed_share * len(examples)), config.seed)
        requests = prepare.removal_requests(examples, users, gone)
        logger.info("removal of users %s: %d of %d rows", ", ".join(gone), len(requests), len(examples))
    else:
        examples, requests = prepare.flip_labels(examples, round(config.flipped_share * len(examples)), config.seed)
    test_rows, _ = config.load("test")
    heldout_rows = np.random.default_rng(config.seed).choice(len(test_rows), config.num_heldout, replace=False)
    heldout: tuple[Example, ...] = tuple(test_rows[row] for row in sorted(heldout_rows.tolist()))
    directory.mkdir(parents=True, exist_ok=True)
    save_examples(directory / "train.jsonl", examples)
    save_examples(directory / "heldout.jsonl", heldout)
    files.atomic_write_text(directory / "requests.jsonl", "".join(request_to_json(r) + "\n" for r in requests))


def run_scenario(config: TallrecConfig, scenario: Scenario, model: Model) -> dict[str, Any]:
    """Runs one scenario, or what is missing of it.

    Returns:
        Per method its report, or under `failed` why there is no step.
    """
    directory = config.workdir / scenario
    data = directory / "data"
    write_scenario(config, scenario, data)
    before = finetune_run(
        model,
        data / "train.jsonl",
        directory / "before",
        recipe=config.recipe,
        lora=config.lora,
        config=config.train,
    )
    logger.info("%s: fine-tuned, %s", scenario, _told(before))
    erased = {name: _erase(before, directory, name, chosen, model) for name, chosen in config.methods.items()}
    requests = load_requests(data / "requests.jsonl", before.load_examples())
    retrained = retrain(before, requests, directory / "retrained", seeds=config.retrain_seeds, model=model)
    for run in retrained:
        logger.info("%s: retrained, %s", scenario, _told(run))
    results: dict[str, Any] = {}
    for name, after in erased.items():
        if isinstance(after, str):
            results[name] = {"failed": after}
            continue
        report_path = directory / f"report-{name}"
        if not (report_path / "report.json").exists():
            evaluate_runs(
                before, after, report_path, retrained=retrained, heldout_path=data / "heldout.jsonl", model=model
            )
        results[name] = files.read_json(report_path / "report.json")
    return results


def _told(run: Run) -> str:
    result = run.result
    return f"{len(run.data_ids)} rows, loss {result['loss']:.4f}, {result['seconds']:.0f} s"


def _erase(before: Run, directory: Path, name: str, config: EraseConfig, model: Model) -> Run | str:
    """The erased run, or the reason why there is none."""
    workdir = directory / f"unlearned-{name}"
    if (workdir / RUN_FILE).exists():
        return load_run(workdir)
    try:
        after, result = erase_run(before, directory / "data" / "requests.jsonl", workdir, config, model=model)
    except UnlearningError as error:
        logger.warning("%s: no step: %s", name, error)
        return str(error)
    logger.info("%s: %s, %.0f s", name, result.receipt.outcome, result.receipt.seconds)
    return after


def render_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One Markdown row per model: before, each method, its controls, and the mean of the retrained models."""
    titles = (
        "model",
        "loss, as trained",
        "loss, wanted",
        "closure (trained / wanted)",
        "held-out KL",
        "accuracy",
        "AUC",
        "gradient equivalents",
        "seconds",
    )
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    reports = {name: report for name, report in results.items() if "failed" not in report}
    for name, report in results.items():
        if "failed" in report:
            lines.append(f"| {name} | no step: {report['failed']} |" + " |" * (len(titles) - 2))
    for position, (name, report) in enumerate(reports.items()):
        models, cost = report["models"], report["cost"]
        if position == 0:
            lines.append(_row("before", models["before"]))
            lines.append(_row("retrained", models["retrained"], cost=cost["retrain"]))
        lines.append(
            _row(
                name,
                models["unlearned"],
                closure=report["gap_closure"],
                cost=cost["unlearn"],
                reference=cost["retrain"],
            )
        )
        lines += [
            _row(
                f"{control}, as far as {name}",
                scores,
                closure=report["gap_closure"]["controls"][control],
                cost=cost["controls"][control],
                reference=cost["retrain"],
            )
            for control, scores in models["controls"].items()
        ]
    return "\n".join(lines) + "\n"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _row(
    name: str,
    scores: Mapping[str, Any],
    *,
    closure: Mapping[str, Any] | None = None,
    cost: Mapping[str, Any] | None = None,
    reference: Mapping[str, Any] | None = None,
) -> str:
    spread = scores.get("seed_standard_deviation", {})

    def with_spread(key: str) -> str:
        return _number(scores[key]) + (f" ± {_number(spread[key])}" if spread.get(key) is not None else "")

    def metric(word: str) -> str:
        found = [value for key, value in scores["task_metrics"].items() if word in key.lower()]
        return f"{_number(found[0]['value'])} ({_number(found[0]['standard_error'])})" if found else "–"

    def spent(key: str) -> str:
        if cost is None or cost[key] is None:
            return "–"
        ratio = f" ({cost[key] / reference[key]:.2f})" if reference is not None and reference[key] else ""
        return f"{cost[key]:.0f}{ratio}"

    cells = (
        name,
        with_spread("forget_loss"),
        with_spread("wanted_loss"),
        "–" if closure is None else f"{_number(closure['forget_loss'], 2)} / {_number(closure['wanted_loss'], 2)}",
        with_spread("heldout_kl_to_retrained"),
        metric("accuracy"),
        metric("auc"),
        spent("gradient_equivalents"),
        spent("seconds"),
    )
    return "| " + " | ".join(cells) + " |"


def main(config: TallrecConfig, *, dtype: str = "float32", mesh: str = "") -> None:
    """Runs the scenarios and prints their tables.

    Args:
        config: the experiment.
        dtype: storage of the base.
        mesh: devices, e.g. data=4,model=2; empty is one device.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr, force=True)
    logger.setLevel(logging.INFO)
    model = load_model(config.base, dtype=dtype, mesh=parse_mesh(mesh))
    for scenario in config.scenarios:
        results = run_scenario(config, scenario, model)
        table = render_table(results)
        files.atomic_write_text(config.workdir / scenario / "table.md", table)
        sys.stdout.write(f"\n{scenario}\n\n{table}")
    sys.stdout.write(f"\n{describe_devices()}; {json.dumps(library_versions())}\n")


if __name__ == "__main__":
    main(tyro.cli(TallrecConfig))
