"""The comparison of the model before, the unlearned model, the retrained models and the controls.

`Comparison` is what was measured, `build_report` turns it into one JSON-ready dict, `render_report` turns
that dict into the files of a report directory, and `write_report` writes them whole or not at all. The page
and the plots are drawn from the dict alone, so that `report.json` holds every number that they show.

Every null in the dict has, in the same object under `reason`, a sentence that says why.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float

from llmeraser_jax.evaluation.closure import (
    Closure,
    Number,
    gap_closure,
    kl_gap_closure,
    seed_mean,
    seed_standard_deviation,
)
from llmeraser_jax.evaluation.forgetting import HeldOutKLResult
from llmeraser_jax.evaluation.page import render_page
from llmeraser_jax.evaluation.plots import render_plots
from llmeraser_jax.evaluation.tasks import Metric
from llmeraser_jax.types import Solution

Json: TypeAlias = dict[str, Any]

ACTIONS = ("remove", "modify_query", "correct_response")
FORMAT = 1
REPORT_FILE = "report.json"
SCALARS = (
    "forget_loss",
    "forget_probability",
    "extraction_strength",
    "wanted_loss",
    "heldout_loss",
    "heldout_kl_to_retrained",
)
_NO_RETRAINED = "no retrained model was given"
_ONE_SEED = "one retraining seed: no deviation between seeds is known"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What producing a model took.

    Attributes:
        seconds: wall-clock time, compilation included.
        gradient_equivalents: 1 is one forward and backward pass of one example.
        peak_memory_bytes: peak memory of the process or device; None where it was not measured.
        diagnostic_gradient_equivalents: spent on diagnostics, not contained in `gradient_equivalents`.
    """

    seconds: Number
    gradient_equivalents: Number
    peak_memory_bytes: int | None = None
    diagnostic_gradient_equivalents: Number = 0.0

    def __post_init__(self):
        numbers = (self.seconds, self.gradient_equivalents, self.diagnostic_gradient_equivalents)
        if not all(math.isfinite(number) and number >= 0 for number in numbers):
            msg = f"Costs must be finite and not negative, got {self}."
            raise ValueError(msg)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolverTrace:
    """One solve: one step of the path, or the only one.

    Attributes:
        status: in words.
        iterations: steps of the solver.
        relative_residual: ||b - A x|| / ||b||, recomputed at the end.
        negative_curvature: some direction p had p'Ap <= 0.
        history: the recurrence's relative residual after each iteration, [iterations].
    """

    status: str
    iterations: int
    relative_residual: Number
    negative_curvature: bool
    history: tuple[Number, ...] = ()

    @classmethod
    def from_solution(cls, solution: Solution, status: str) -> SolverTrace:
        """The trace of a `Solution`; its history is cut to the steps taken.

        Args:
            solution: of a solver.
            status: `solution.status` in words.
        """
        iterations = int(solution.num_steps)
        return cls(
            status=status,
            iterations=iterations,
            relative_residual=float(solution.relative_residual),
            negative_curvature=bool(solution.negative_curvature),
            history=tuple(np.asarray(solution.history, np.float64)[:iterations].tolist()),
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ModelScores:
    """What was measured on one model. Losses are token means in nats, without the L2 term.

    Attributes:
        name: the model's column, e.g. "before", "unlearned", "seed 1", "gradient ascent".
        forget_losses: loss on the named examples as trained, in the order of `Comparison.actions`.
        wanted_losses: loss on the named examples as they should have been, in the same order, removals left
            out.
        heldout_losses: loss on held-out examples; empty where there are none.
        extraction_strengths: of the named examples as trained (`evaluation.extraction`), in the same order; empty
            where it was not measured.
        task_metrics: on the held-out task, names distinct.
        membership_aucs: members S against non-members, names distinct.
        cost: what producing this model took; None where unknown (the model before).
    """

    name: str
    forget_losses: Float[np.ndarray, " named"]
    wanted_losses: Float[np.ndarray, " edited"] = dataclasses.field(default_factory=lambda: np.zeros(0))
    heldout_losses: Float[np.ndarray, " heldout"] = dataclasses.field(default_factory=lambda: np.zeros(0))
    extraction_strengths: Float[np.ndarray, " measured"] = dataclasses.field(default_factory=lambda: np.zeros(0))
    task_metrics: tuple[Metric, ...] = ()
    membership_aucs: tuple[Metric, ...] = ()
    cost: Cost | None = None

    def __post_init__(self):
        for metrics in (self.task_metrics, self.membership_aucs):
            names = [metric.name for metric in metrics]
            if len(set(names)) != len(names):
                msg = f"{self.name}: metric names must be distinct, got {names}."
                raise ValueError(msg)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """Everything a report is built from.

    Attributes:
        ids: of the named examples.
        actions: per named example, one of `ACTIONS`.
        before: the model that was edited.
        unlearned: the model after unlearning.
        retrained: one per seed; empty where none was trained.
        controls: simpler ways to move, to be beaten.
        num_nonmembers: held-out examples that membership inference tells S from.
        heldout_kl: of the models named `before.name`, `unlearned.name` and each control's; its retrained
            models in the order of `retrained`. None without two retrained models or without held-out
            examples.
        solves: one per step of the path, in order.
        context: what a reader has to know (model, data, method, seeds), shown on top of the page.
    """

    ids: tuple[str, ...]
    actions: tuple[str, ...]
    before: ModelScores
    unlearned: ModelScores
    retrained: tuple[ModelScores, ...] = ()
    controls: tuple[ModelScores, ...] = ()
    heldout_kl: HeldOutKLResult | None = None
    num_nonmembers: int = 0
    solves: tuple[SolverTrace, ...] = ()
    context: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        unknown = sorted(set(self.actions) - set(ACTIONS))
        if unknown or not self.actions:
            msg = f"Every named example needs one of the actions {ACTIONS}, got {unknown or 'no example'}."
            raise ValueError(msg)
        if len(self.ids) != len(self.actions):
            msg = f"Got {len(self.ids)} ids for {len(self.actions)} actions; they must pair up."
            raise ValueError(msg)
        models = (self.before, self.unlearned, *self.retrained, *self.controls)
        names = [model.name for model in models]
        if len(set(names)) != len(names):
            msg = f"Model names must be distinct, got {names}."
            raise ValueError(msg)
        num_edited = sum(action != "remove" for action in self.actions)
        for model in models:
            got = (model.forget_losses.shape, model.wanted_losses.shape)
            expected = ((len(self.actions),), (num_edited,))
            if got != expected:
                msg = f"{model.name}: expected forget and wanted losses of shapes {expected}, got {got}."
                raise ValueError(msg)
        if self.heldout_kl is not None:
            judged = {model.name for model in (self.before, self.unlearned, *self.controls)}
            missing = sorted(judged - set(self.heldout_kl.candidates))
            if missing or self.heldout_kl.num_retrained != len(self.retrained):
                msg = (
                    f"The held-out KL must cover every model (it lacks {missing}) and the "
                    f"{len(self.retrained)} retrained models (it has {self.heldout_kl.num_retrained})."
                )
                raise ValueError(msg)


class _Node:
    """A JSON object under construction, in which every null gets a reason."""

    def __init__(self, **data: Any) -> None:
        self.data: Json = dict(data)
        self.reasons: dict[str, str] = {}

    def number(self, key: str, value: Number | None, reason: str = "") -> None:
        """Files `value`, or null with `reason`; a number that JSON cannot hold becomes null by itself."""
        if value is not None and not math.isfinite(value):
            value, reason = None, f"the value is {value}"
        self.data[key] = value
        if value is None or reason:
            self.reasons[key] = reason

    def build(self) -> Json:
        return {**self.data, "reason": self.reasons} if self.reasons else self.data


def build_report(comparison: Comparison) -> Json:
    """One JSON-ready dict of everything compared.

    Args:
        comparison: the measurements.

    Returns:
        `models.{before,unlearned,retrained,controls.<name>}`, `seed_floor`, `gap_closure`, `cost`, `solver`,
        `named`, `named_examples`, `heldout`, `context`. Retrained values are means over seeds, each seed's
        own are under `models.retrained.per_seed`.
    """
    kl = comparison.heldout_kl
    named = {action: comparison.actions.count(action) for action in ACTIONS}
    return {
        "format": FORMAT,
        "context": dict(comparison.context),
        "named": {**named, "total": len(comparison.actions)},
        "heldout": {
            "examples": int(comparison.before.heldout_losses.size),
            "nonmembers": comparison.num_nonmembers,
            "response_positions": kl.num_positions if kl else 0,
        },
        "models": {
            "before": _model(comparison, comparison.before),
            "unlearned": _model(comparison, comparison.unlearned),
            "retrained": _retrained(comparison),
            "controls": {control.name: _model(comparison, control) for control in comparison.controls},
        },
        "seed_floor": _seed_floor(comparison),
        "gap_closure": {
            **_closures(comparison, comparison.unlearned),
            "controls": {control.name: _closures(comparison, control) for control in comparison.controls},
        },
        "cost": _costs(comparison),
        "solver": _solver(comparison.solves),
        "named_examples": _named_examples(comparison),
    }


def _why_no_kl(comparison: Comparison) -> str:
    if not comparison.retrained:
        return _NO_RETRAINED
    if len(comparison.retrained) < 2:
        return "the held-out KL needs at least two retrained models"
    return "the held-out KL was not measured"


def _action_losses(comparison: Comparison, model: ModelScores, quantity: str) -> dict[str, float]:
    """Mean loss per action that occurs, and over all of them under "all"; empty where no example has it."""
    if quantity == "forget_loss":
        losses, actions = model.forget_losses, np.asarray(comparison.actions)
    else:
        edited = [action for action in comparison.actions if action != "remove"]
        losses, actions = model.wanted_losses, np.asarray(edited)
    if not losses.size:
        return {}
    means = {action: _mean(losses[actions == action]) for action in ACTIONS if action in actions}
    return {"all": _mean(losses), **means}


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values, dtype=np.float64))


def _kl_of(comparison: Comparison, model: ModelScores) -> float | None:
    if comparison.heldout_kl is None:
        return None
    if model in comparison.retrained:
        return comparison.heldout_kl.retrained_left_out[comparison.retrained.index(model)]
    return comparison.heldout_kl.heldout_kl(model.name)


def _loss_numbers(comparison: Comparison, model: ModelScores) -> dict[str, float | None]:
    """The scalar entries of a model, None where there is nothing to average."""
    return {
        "forget_loss": _action_losses(comparison, model, "forget_loss")["all"],
        "wanted_loss": _action_losses(comparison, model, "wanted_loss").get("all"),
        "forget_probability": _mean(np.exp(-model.forget_losses)),
        "extraction_strength": _mean(model.extraction_strengths) if model.extraction_strengths.size else None,
        "heldout_loss": _mean(model.heldout_losses) if model.heldout_losses.size else None,
        "heldout_kl_to_retrained": _kl_of(comparison, model),
    }


def _missing_reasons(comparison: Comparison) -> dict[str, str]:
    return {
        "wanted_loss": "no edit was requested",
        "extraction_strength": "not measured",
        "heldout_loss": "no held-out example was given",
        "heldout_kl_to_retrained": _why_no_kl(comparison),
    }


def _model(comparison: Comparison, model: ModelScores) -> Json:
    node = _Node(name=model.name)
    reasons = _missing_reasons(comparison)
    for key, value in _loss_numbers(comparison, model).items():
        node.number(key, value, "" if value is not None else reasons.get(key, ""))
    for quantity in ("forget_loss", "wanted_loss"):
        by_action = _Node()
        for action, value in _action_losses(comparison, model, quantity).items():
            if action != "all":
                by_action.number(action, value)
        node.data[f"{quantity}_by_action"] = by_action.build()
    node.data["task_metrics"] = {metric.name: _metric(metric) for metric in model.task_metrics}
    node.data["membership_auc"] = {metric.name: _metric(metric) for metric in model.membership_aucs}
    return node.build()


def _metric(metric: Metric) -> Json:
    node = _Node(valid=metric.valid, total=metric.total, standard_error_method=metric.standard_error_method)
    for key in ("value", "correct", "standard_error"):
        value = getattr(metric, key)
        node.number(key, value, metric.reason if value is None else "")
    return node.build()


def _retrained(comparison: Comparison) -> Json:
    """Means over seeds, their standard deviations, and each seed's own entry."""
    seeds = comparison.retrained
    node, deviations = _Node(name="retrained", seeds=len(seeds)), _Node()
    reasons = _missing_reasons(comparison)
    rows = [_loss_numbers(comparison, seed) for seed in seeds]
    for key in SCALARS:
        values = [row[key] for row in rows]
        known = [value for value in values if value is not None]
        if known:
            node.number(key, seed_mean(known))
            deviation = seed_standard_deviation(known)
            unknown = _ONE_SEED if len(known) == 1 else "a seed's value is not finite"
            deviations.number(key, deviation, unknown if deviation is None else "")
        else:
            reason = reasons.get(key, "not measured") if seeds else _NO_RETRAINED
            node.number(key, None, reason)
            deviations.number(key, None, reason)
    for quantity in ("forget_loss", "wanted_loss"):
        per_seed = [_action_losses(comparison, seed, quantity) for seed in seeds]
        by_action = _Node()
        for action in ACTIONS:
            if per_seed and action in per_seed[0]:
                by_action.number(action, seed_mean([losses[action] for losses in per_seed]))
        node.data[f"{quantity}_by_action"] = by_action.build()
    node.data["seed_standard_deviation"] = deviations.build()
    node.data["task_metrics"] = _mean_metrics([seed.task_metrics for seed in seeds])
    node.data["membership_auc"] = _mean_metrics([seed.membership_aucs for seed in seeds])
    node.data["per_seed"] = [_model(comparison, seed) for seed in seeds]
    return node.build()


def _mean_metrics(per_seed: Sequence[tuple[Metric, ...]]) -> Json:
    """Means over seeds of each metric; `standard_error` is the mean of the seeds' own sampling errors."""
    names = dict.fromkeys(metric.name for metrics in per_seed for metric in metrics)
    result = {}
    for name in names:
        found = [metric for metrics in per_seed for metric in metrics if metric.name == name]
        node = _Node(standard_error_method=f"mean over seeds of: {found[0].standard_error_method}")
        for key in ("value", "correct", "valid", "total", "standard_error"):
            known = [value for value in (getattr(metric, key) for metric in found) if value is not None]
            complete = len(known) == len(per_seed)
            node.number(key, seed_mean(known) if complete else None, "" if complete else found[0].reason)
            if key == "value":
                deviation = seed_standard_deviation(known) if complete else None
                reason = "" if deviation is not None else (_ONE_SEED if complete else "a seed has no value")
                node.number("seed_standard_deviation", deviation, reason)
        result[name] = node.build()
    return result


def _seed_floor(comparison: Comparison) -> Json:
    kl, node = comparison.heldout_kl, _Node()
    node.number("heldout_kl", kl.seed_floor if kl else None, "" if kl else _why_no_kl(comparison))
    per_seed = _Node()
    for seed, value in zip(comparison.retrained, kl.retrained_left_out if kl else (), strict=False):
        per_seed.number(seed.name, value)
    node.data["per_seed"] = per_seed.build()
    return node.build()


def _closures(comparison: Comparison, model: ModelScores) -> Json:
    """Closure of each quantity for one model, over all named examples and per action."""
    node = _Node()
    by_action: dict[str, _Node] = {action: _Node() for action in ACTIONS if action in comparison.actions}
    for quantity in ("forget_loss", "wanted_loss"):
        before = _action_losses(comparison, comparison.before, quantity)
        after = _action_losses(comparison, model, quantity)
        seeds = [_action_losses(comparison, seed, quantity) for seed in comparison.retrained]
        if not before:
            node.number(quantity, None, "no edit was requested")
        for key in before:
            closure = gap_closure(before[key], after[key], [losses[key] for losses in seeds])
            target = node if key == "all" else by_action[key]
            target.number(quantity, closure.value, closure.reason)
    kl = comparison.heldout_kl
    if kl is None:
        closure = Closure(None, _why_no_kl(comparison))
    else:
        before_kl, after_kl = kl.heldout_kl(comparison.before.name), kl.heldout_kl(model.name)
        closure = kl_gap_closure(before_kl, after_kl, kl.retrained_left_out)
    node.number("heldout_kl", closure.value, closure.reason)
    node.data["by_action"] = {action: child.build() for action, child in by_action.items()}
    return node.build()


_COST_FIELDS = tuple(field.name for field in dataclasses.fields(Cost))


def _cost(cost: Cost | None, reason: str) -> Json:
    node = _Node()
    for key in _COST_FIELDS:
        value = getattr(cost, key) if cost else None
        node.number(key, value, "" if value is not None else ("not measured" if cost else reason))
    return node.build()


def _costs(comparison: Comparison) -> Json:
    """Costs of unlearning, of retraining (mean over seeds and each) and of the controls, and their ratio."""
    seeds = [seed.cost for seed in comparison.retrained]
    retrain, ratio = _Node(), _Node()
    unknown = _NO_RETRAINED if not seeds else "the cost of a retrained model is not known"
    for key in _COST_FIELDS:
        known = [getattr(cost, key) for cost in seeds if cost is not None]
        complete = bool(seeds) and len(known) == len(seeds) and None not in known
        missing = "not measured" if len(known) == len(seeds) and seeds else unknown
        retrain.number(key, seed_mean(known) if complete else None, "" if complete else missing)
    retrain.data["per_seed"] = [_cost(cost, unknown) for cost in seeds]
    unlearn = _cost(comparison.unlearned.cost, "the cost of unlearning is not known")
    for key in ("seconds", "gradient_equivalents"):
        spent, reference = unlearn[key], retrain.data[key]
        defined = spent is not None and bool(reference)
        ratio.number(key, spent / reference if defined else None, "" if defined else unknown)
    return {
        "unlearn": unlearn,
        "retrain": retrain.build(),
        "unlearn_over_retrain": ratio.build(),
        "controls": {
            control.name: _cost(control.cost, "the cost of this control is not known")
            for control in comparison.controls
        },
    }


def _solver(solves: Sequence[SolverTrace]) -> Json:
    """All solves as one, and each: iterations add up, the residual is the largest, the flag is any."""
    node = _Node(iterations=sum(solve.iterations for solve in solves))
    if not solves:
        missing = "no solve was recorded"
        node.data["status"], node.data["negative_curvature"] = None, None
        node.reasons.update(status=missing, negative_curvature=missing)
        node.number("relative_residual", None, missing)
        node.data["steps"] = []
        return node.build()
    statuses = dict.fromkeys(solve.status for solve in solves)
    if len(statuses) == 1:
        node.data["status"] = next(iter(statuses))
    else:
        counts = {status: sum(solve.status == status for solve in solves) for status in statuses}
        node.data["status"] = "; ".join(
            f"{status} ({count} of {len(solves)} steps)" for status, count in counts.items()
        )
    node.data["negative_curvature"] = any(solve.negative_curvature for solve in solves)
    residuals = [solve.relative_residual for solve in solves]
    # max() would skip over a nan depending on its place; a step without a residual must not be hidden.
    node.number("relative_residual", math.nan if any(map(math.isnan, residuals)) else max(residuals))
    steps = []
    for solve in solves:
        step = _Node(
            status=solve.status,
            iterations=solve.iterations,
            negative_curvature=solve.negative_curvature,
            history=[value if math.isfinite(value) else None for value in solve.history],
        )
        step.number("relative_residual", solve.relative_residual)
        if None in step.data["history"]:
            step.reasons["history"] = "null where the solver's residual was not finite"
        steps.append(step.build())
    node.data["steps"] = steps
    return node.build()


def _named_examples(comparison: Comparison) -> list[Json]:
    """Each named example's losses under the three models; retrained is the mean over seeds."""
    models: dict[str, tuple[ModelScores, ...]] = {
        "before": (comparison.before,),
        "unlearned": (comparison.unlearned,),
    }
    if comparison.retrained:
        models["retrained"] = comparison.retrained
    edited = [i for i, action in enumerate(comparison.actions) if action != "remove"]
    row_of_edit = {i: row for row, i in enumerate(edited)}
    rows = []
    for i, (example_id, action) in enumerate(zip(comparison.ids, comparison.actions, strict=True)):
        row: Json = {"id": example_id, "action": action}
        for quantity in ("forget_loss",) if action == "remove" else ("forget_loss", "wanted_loss"):
            node = _Node()
            for name, columns in models.items():
                if quantity == "forget_loss":
                    values = [float(model.forget_losses[i]) for model in columns]
                else:
                    values = [float(model.wanted_losses[row_of_edit[i]]) for model in columns]
                node.number(name, seed_mean(values))
            row[quantity] = node.build()
        rows.append(row)
    return rows


def render_report(report: Json) -> dict[str, bytes]:
    """The files of a report directory, name to content: `report.json`, `report.md` and the plots.

    Args:
        report: from `build_report`.

    Raises:
        ValueError: the report holds a nan or an infinity, which JSON cannot.
    """
    plots = render_plots(report)
    text = json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    page = render_page(report, tuple(plots))
    return {REPORT_FILE: text.encode(), "report.md": page.encode(), **plots}


def write_report(directory: str | os.PathLike[str], report: Json) -> Path:
    """Writes `report.json`, `report.md` and the plots, whole or not at all.

    The files are written beside `directory` and renamed into place in one move.

    Args:
        directory: must not exist, or be empty.
        report: from `build_report`.

    Returns:
        The path of `report.md`.

    Raises:
        FileExistsError: `directory` holds something.
        ValueError: as `render_report`.
    """
    target = Path(directory).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        msg = f"{target} exists and is not an empty directory; name a new one for the report."
        raise FileExistsError(msg)
    files = render_report(report)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    staging.mkdir()
    try:
        for name, content in files.items():
            (staging / name).write_bytes(content)
        os.replace(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return target / "report.md"
