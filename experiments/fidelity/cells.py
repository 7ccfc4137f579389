"""Owns a cell: one task, category, share and request, with the trained and retrained models that cells share.

A workdir holds

    tasks/<task>/settings.json              what the task was run with; other settings are refused
    tasks/<task>/data/<key>/                training and held-out rows
    tasks/<task>/trained/<key>/             run directory, shared by all cells of equal training rows
    tasks/<task>/retrained/<cell>/seed_*/   run directories, shared by all methods of a cell
    cells/<task>/<cell>/requests.jsonl
    cells/<task>/<cell>/reference.json      before and retrained, measured
    cells/<task>/<cell>/<method>.json       one method; a file that is there is not computed again

with `<cell>` = `<category>-<share>`, and `-request<k>` after it for all requests but the first.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.fidelity.methods import PAPER_EPOCHS, Method, NotYetError, Setting
from experiments.fidelity.profiles import Category, write_requests, write_rows
from experiments.fidelity.tasks import Task
from llmeraser_jax import files, trees
from llmeraser_jax.baselines import retrain
from llmeraser_jax.data import TokenDataset, apply_requests, load_requests
from llmeraser_jax.evaluation.closure import gap_closure, seed_mean, seed_standard_deviation
from llmeraser_jax.evaluation.forgetting import membership_loss_auc, membership_min_k_auc
from llmeraser_jax.evaluation.scoring import TaskMetrics, heldout_kl_of, make_task_metrics, score_examples
from llmeraser_jax.lora import Lora
from llmeraser_jax.models import Model
from llmeraser_jax.runs import Run
from llmeraser_jax.training.job import finetune_run
from llmeraser_jax.unlearning import UnlearningError, make_problem
from llmeraser_jax.unlearning.problem import EditProblem

logger = logging.getLogger("fidelity")

NUM_RETAINED_SCORED = 100
REFERENCE_FILE = "reference.json"
QUANTITIES = ("forget_loss", "wanted_loss")


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


class Cell:
    """The models and data of a cell, made or loaded when first needed.

    Args:
        workdir: of the whole experiment.
        id_: which cell.
        task: whose.
        model: the base, loaded.
        num_retrained: retraining seeds.
    """

    def __init__(self, workdir: Path, id_: CellId, task: Task, model: Model, *, num_retrained: int = 3):
        self.id = id_
        self.task = task
        self.model = model
        self.num_retrained = num_retrained
        self.directory = workdir / "cells" / id_.task / id_.directory
        self._task_directory = workdir / "tasks" / id_.task

    def result_path(self, method: str) -> Path:
        """Of a method's JSON."""
        return self.directory / f"{method}.json"

    @functools.cached_property
    def _drawn(self):
        return self.task.draw(self.id.category, self.id.share, self.id.request_seed)

    @functools.cached_property
    def before(self) -> Run:
        """The trained model; shared between cells of equal training rows."""
        drawn = self._drawn
        data = self._task_directory / "data" / drawn.trained_key
        if not (data / "train.jsonl").exists():
            write_rows(data, drawn.train, drawn.heldout)
        return finetune_run(
            self.model,
            data / "train.jsonl",
            self._task_directory / "trained" / drawn.trained_key,
            recipe=self.task.recipe,
            lora=self.task.lora,
            config=self.task.train,
        )

    @functools.cached_property
    def requests(self):
        """Of this cell, validated."""
        path = self.directory / "requests.jsonl"
        write_requests(path, self._drawn.requests)
        return load_requests(path, self._drawn.train)

    @functools.cached_property
    def retrained(self) -> tuple[Run, ...]:
        """Retrained models, resumable."""
        directory = self._task_directory / "retrained" / self.id.directory
        return retrain(self.before, self.requests, directory, seeds=self.num_retrained, model=self.model)

    @functools.cached_property
    def retrained_loras(self) -> tuple[Lora, ...]:
        """Their adapters."""
        return tuple(run.load_adapter(self.model) for run in self.retrained)

    @functools.cached_property
    def lora(self) -> Lora:
        """The trained adapter."""
        return self.before.load_adapter(self.model)

    @functools.cached_property
    def dataset(self) -> TokenDataset:
        """The training set as it stood."""
        return self.before.encode(self._drawn.train, self.model.tokenizer)

    @functools.cached_property
    def heldout(self) -> TokenDataset:
        """Rows that no model saw."""
        return self.before.encode(self._drawn.heldout, self.model.tokenizer)

    @functools.cached_property
    def problem(self) -> EditProblem[TokenDataset]:
        """The requests as index arrays."""
        return make_problem(self.model, self.dataset, self.requests)

    @functools.cached_property
    def _heldout_task(self) -> TaskMetrics:
        rows = self._drawn.heldout[self._drawn.num_like_train :] or self._drawn.heldout
        return make_task_metrics(self.model, self.before.encode(rows, self.model.tokenizer))

    @functools.cached_property
    def _retained_task(self) -> TaskMetrics:
        """On rows that every model was trained on: what unlearning must not take with it."""
        retained = self.problem.retained
        size = min(NUM_RETAINED_SCORED, len(retained))
        chosen = np.sort(np.random.default_rng(0).choice(retained, size, replace=False))
        examples = [self.dataset.examples[int(i)] for i in chosen]
        return make_task_metrics(self.model, self.before.encode(examples, self.model.tokenizer))

    def losses(self, lora: Lora) -> dict[str, float | None]:
        """Mean loss on S as trained and, for edits, on the wanted pairs."""
        examples = self.problem.examples
        named = score_examples(self.model, lora, examples, self.problem.named).losses
        wanted = score_examples(self.model, lora, examples, self.problem.wanted).losses
        return {"forget_loss": float(named.mean()), "wanted_loss": float(wanted.mean()) if len(wanted) else None}

    def score(self, lora: Lora) -> dict[str, Any]:
        """Everything about one adapter but its held-out KL, JSON-like."""
        problem, examples = self.problem, self.problem.examples
        named = score_examples(self.model, lora, examples, problem.named)
        outside = score_examples(self.model, lora, self.heldout)
        like_train = slice(self._drawn.num_like_train)
        retained = self._retained_task
        return {
            **self.losses(lora),
            "forget_losses": named.losses.tolist(),
            "heldout_loss": float(outside.losses.mean()),
            "retained_loss": float(score_examples(self.model, lora, retained.heldout).losses.mean()),
            "task_metrics": {m.name: dataclasses.asdict(m) for m in self._heldout_task(lora)},
            "retained_metrics": {m.name: dataclasses.asdict(m) for m in retained(lora)},
            "membership_loss_auc": membership_loss_auc(named.losses, outside.losses[like_train]).value,
            "membership_min_k_auc": membership_min_k_auc(named.min_k, outside.min_k[like_train]).value,
        }

    def reference(self) -> dict[str, Any]:
        """Before and retrained, measured once."""
        path = self.directory / REFERENCE_FILE
        if path.exists():
            return files.read_json(path)
        kl = heldout_kl_of(self.model, self.heldout, {"before": self.lora}, self.retrained_loras)
        runs = self.retrained
        reference = {
            "task": self.id.task,
            "category": self.id.category,
            "share": self.id.share,
            "request_seed": self.id.request_seed,
            "num_rows": len(self.dataset),
            "num_rows_edited": self.problem.num_edited_total,
            "num_named": len(self.problem.named),
            "epochs": self.task.train.epochs,
            "training": {"loss": self.before.result["loss"], "seconds": self.before.result["seconds"]},
            "adapter_norm": float(trees.tree_norm(self.lora)),
            "before": {**self.score(self.lora), "heldout_kl": kl.heldout_kl("before")},
            "retrained": [self.score(lora) for lora in self.retrained_loras],
            "seed_floor": kl.seed_floor,
            "seed_floors": list(kl.retrained_left_out),
            "retrain_gradient_equivalents": seed_mean([run.result["gradient_equivalents"] for run in runs]),
            "retrain_seconds": seed_mean([run.result["seconds"] for run in runs]),
        }
        files.atomic_write_json(path, reference)
        return reference

    def distance_to_retraining(self, lora: Lora) -> float:
        """The largest share of a gap to retraining that is left, over the losses on S and on the wanted pairs."""
        reference, losses = self.reference(), self.losses(lora)
        return distance_left(reference["before"], losses, reference["retrained"])

    def distance_of(self, method: str) -> float:
        """How far a method moved.

        Raises:
            NotYetError: it has no result, or moved nothing.
        """
        path = self.result_path(method)
        norm = files.read_json(path).get("delta_norm") if path.exists() else None
        if norm is None:
            msg = f"{self.id.path_of(method)} has no length to move as far as; run it first."
            raise NotYetError(msg)
        return norm

    def setting(self) -> Setting:
        """What methods are given."""
        edited = apply_requests(self._drawn.train, self.requests)
        return Setting(
            model=self.model,
            lora=self.lora,
            dataset=self.dataset,
            edited=self.before.encode(edited, self.model.tokenizer),
            unseen=self.before.encode(self._drawn.heldout[: self._drawn.num_like_train], self.model.tokenizer),
            requests=self.requests,
            problem=self.problem,
            train=self.before.train_config,
            erase=self.task.erase,
            distance_to_retraining=self.distance_to_retraining,
            distance_of=self.distance_of,
        )

    def run(self, name: str, method: Method) -> dict[str, Any]:
        """Runs a method and writes its JSON, or reads it where it is there.

        A method that finds no step is a result too: its JSON has `failed`, the reason.
        """
        path = self.result_path(name)
        if path.exists():
            return files.read_json(path)
        reference = self.reference()
        started = time.perf_counter()
        result: dict[str, Any] = {
            "method": name,
            **{k: v for k, v in reference.items() if k not in ("before", "retrained")},
        }
        try:
            moved = method(self.setting())
        except (UnlearningError, FloatingPointError) as error:
            result["failed"] = str(error)
        else:
            scores = self.score(moved.lora)
            kl = heldout_kl_of(self.model, self.heldout, {"after": moved.lora}, self.retrained_loras)
            scores["heldout_kl"] = kl.heldout_kl("after")
            result |= {
                "after": scores,
                **comparison(reference, scores),
                "gradient_equivalents": moved.gradient_equivalents,
                "seconds": moved.seconds,
                **costs(reference, moved.gradient_equivalents, moved.seconds),
                "delta_norm": float(trees.tree_norm(trees.tree_sub(moved.lora, self.lora))),
                "outcome": moved.outcome,
                "chosen_with_oracle": moved.chosen_with_oracle,
                "details": moved.details,
            }
        result["cell_seconds"] = time.perf_counter() - started
        files.atomic_write_json(path, files.finite_json(result))
        return files.finite_json(result)


def distance_left(
    before: Mapping[str, Any], losses: Mapping[str, float | None], retrained: Sequence[Mapping[str, Any]]
) -> float:
    """The largest of `1 - closure` over the losses; those whose closure is undefined count where all are.

    Args:
        before: losses of the trained model.
        losses: of the model that is judged.
        retrained: of each retrained model.
    """
    defined, others = [], []
    for name in QUANTITIES:
        if (value := losses[name]) is None:
            continue
        targets = [scores[name] for scores in retrained]
        left = abs(value - seed_mean(targets)) / max(abs(before[name] - seed_mean(targets)), 1e-6)
        is_defined = gap_closure(before[name], before[name], targets).value is not None
        (defined if is_defined else others).append(left)
    worst = max(defined or others)
    return worst if np.isfinite(worst) else 1e30  # what diverged is last, and JSON has no infinity


def comparison(reference: Mapping[str, Any], scores: Mapping[str, Any]) -> dict[str, Any]:
    """Closures, held-out KL over the seed floor, and what the retrained models have, from measured numbers.

    Args:
        reference: from `Cell.reference`.
        scores: from `Cell.score`, with `heldout_kl`.
    """
    before, retrained = reference["before"], reference["retrained"]
    closures, reasons = {}, {}
    for name in QUANTITIES:
        if before[name] is None:
            continue
        closure = gap_closure(before[name], scores[name], [r[name] for r in retrained])
        closures[name] = closure.value
        if closure.reason:
            reasons[name] = closure.reason
    numbers = (*QUANTITIES, "heldout_loss", "retained_loss", "membership_loss_auc", "membership_min_k_auc")
    metrics = {
        f"retrained_{kind}": {
            name: {
                "value": seed_mean([r[kind][name]["value"] for r in retrained]),
                "standard_error": seed_mean([r[kind][name]["standard_error"] for r in retrained]),
            }
            for name in before[kind]
            if all(r[kind][name]["value"] is not None for r in retrained)
        }
        for kind in ("task_metrics", "retained_metrics")
    }
    return {
        "closure": closures,
        "closure_reasons": reasons,
        "kl_over_floor": scores["heldout_kl"] / reference["seed_floor"],
        "before_kl_over_floor": before["heldout_kl"] / reference["seed_floor"],
        "before": {name: before[name] for name in (*numbers, "heldout_kl", "task_metrics", "retained_metrics")},
        "retrained": {
            name: {
                "mean": seed_mean([r[name] for r in retrained]),
                "standard_deviation": seed_standard_deviation([r[name] for r in retrained]),
            }
            for name in numbers
            if before[name] is not None
        },
        **metrics,
    }


def costs(reference: Mapping[str, Any], gradient_equivalents: float, seconds: float) -> dict[str, float]:
    """Cost over that of one retraining: of the task's own epochs and of five, in gradients and seconds."""
    five = PAPER_EPOCHS / reference["epochs"]
    relative = gradient_equivalents / reference["retrain_gradient_equivalents"]
    relative_seconds = seconds / reference["retrain_seconds"]
    return {
        "cost": relative,
        "cost_of_5_epochs": relative / five,
        "cost_seconds": relative_seconds,
        "cost_seconds_of_5_epochs": relative_seconds / five,
    }
