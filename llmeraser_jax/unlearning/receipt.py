"""The receipt: what was asked, what was done, what it cost, and how far to trust it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmeraser_jax import files, trees
from llmeraser_jax.environment import library_versions, peak_memory_bytes
from llmeraser_jax.lora import Lora, product_norms
from llmeraser_jax.parallel import to_host
from llmeraser_jax.runs import Run
from llmeraser_jax.solvers import Status, describe
from llmeraser_jax.text import short_repr
from llmeraser_jax.types import LoraParams
from llmeraser_jax.unlearning.budget import GRADIENT, Cost
from llmeraser_jax.unlearning.problem import EditProblem
from llmeraser_jax.unlearning.records import (
    CERTIFIED_BELOW,
    MatchingRecord,
    Moved,
    SolveRecord,
    StepRecord,
    UnlearningError,
    record_to_mapping,
)
from llmeraser_jax.unlearning.targets import RowTargets, TargetLosses, row_id
from llmeraser_jax.unlearning.task import UnlearningTask
from llmeraser_jax.unlearning.validity import ValidityCheck
from llmeraser_jax.unlearning.workspace import Workspace

RECEIPT_FILE = "receipt.json"
RECEIPT_FORMAT = 4
_DIAGNOSTIC_SAMPLE = 64  # examples behind the reported gradient norms

# Worst first: the status that stands for a path is the worst of its steps'.
_SEVERITY = (
    Status.NEGATIVE_CURVATURE,
    Status.RESIDUAL_DRIFT,
    Status.MAX_STEPS,
    Status.LEAST_SQUARES,
    Status.CONVERGED,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedExample:
    """One request as it was carried out.

    The receipt in a run directory also has `hash_before`, a hash of the example as trained on under the directory's
    key, and `hash_after` of its replacement (null for a removal).

    Attributes:
        id: of the training example.
        action: `remove`, `modify_query` or `correct_response`.
    """

    id: str
    action: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolverSummary:
    """All solves together.

    Attributes:
        status: in words, of the solve that ended worst.
        converged: whether every solve met its tolerance.
        iterations: over all solves; 0 where steps were solved for directly.
        relative_residual: the largest true one.
        negative_curvature: whether any solve met it.
        error_bound: the largest of the solves' bounds on their relative error; None where some has none.
        certified: whether it is below `records.CERTIFIED_BELOW`: every solve is within so much of the exact step of
            its own sampled operator. Says nothing about the sample or the linearisation.
    """

    status: str
    converged: bool
    iterations: int
    relative_residual: float
    negative_curvature: bool
    error_bound: float | None
    certified: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Receipt:
    """What `erase` did.

    Attributes:
        config: what was asked for: the method with every choice, seed, micro-batch size and budget.
        counts: forget rows per action.
        named: the requests.
        num_examples_before, num_examples_after: n and n'.
        method: what was done; `config` has what was asked for.
        validity: what the change did, row by row; None where the adapter is unchanged.
        targets: what the rows' targets come from.
        complete: whether the validity check says so, or nothing had to change.
        outcome: in words.
        left: weight of the forget rows at the end, 1 as trained, 0 gone; of target matching the share of the forget
            rows' way to their targets that is left.
        rhs_norm: Euclidean norm of the first step's right-hand side, scaled to the whole request; 0 without steps.
        solver: all solves together.
        steps: one record per step; none where every row was at its target, and the adapter is unchanged.
        num_correctors: how many of `steps`, the last ones, are Newton steps on the edited objective.
        corrected: why they ended; empty where none were asked for.
        attempts: methods that were tried and given up, with the reason; their cost is counted.
        curvature_reason: which curvature was solved with, and why.
        step_standard_error: of the first step over its norm, from the curvature sample's two halves: how much
            another seed would change it; None where it was not measured.
        product_asymmetry: `|u'Av - v'Au| / (||u|| ||Av||)` of the first operator for random u and v; conjugate
            gradients need it well below their tolerance. None where it was not measured.
        delta_norm, adapter_norm_before, adapter_norm_after: Euclidean norms.
        product_change_norm, product_norm_before: Frobenius norms of the change of `scaling * B A` over all modules
            and of that product before: what the network sees, whatever basis the adapter is written in. None where
            the parameters are no LoRA adapter.
        bf16_survival: share of the delta that is left after rounding both adapters to bfloat16:
            `<round(new) - round(old), delta> / ||delta||^2`.
        edited_gradient_norm_before, edited_gradient_norm_after: `||grad L'||`, on `gradient_norm_examples`
            examples of the edited data.
        seconds: wall-clock time, compilation included.
        peak_memory_bytes: of the process (CPU) or of the first device.
        gradient_equivalents: cost.
        versions: of the interpreter and the libraries.
    """

    format: int = RECEIPT_FORMAT
    config: Mapping[str, Any]
    counts: Mapping[str, int]
    named: tuple[NamedExample, ...]
    num_examples_before: int
    num_examples_after: int
    method: str
    complete: bool
    validity: ValidityCheck | None
    targets: TargetLosses | None
    outcome: str
    left: float
    rhs_norm: float
    solver: SolverSummary
    steps: tuple[StepRecord, ...]
    num_correctors: int
    corrected: str
    attempts: tuple[str, ...]
    curvature_reason: str
    step_standard_error: float | None
    product_asymmetry: float | None
    delta_norm: float
    adapter_norm_before: float
    adapter_norm_after: float
    product_change_norm: float | None
    product_norm_before: float | None
    bf16_survival: float
    edited_gradient_norm_before: float
    edited_gradient_norm_after: float
    gradient_norm_examples: int
    seconds: float
    peak_memory_bytes: int | None
    gradient_equivalents: Cost
    versions: Mapping[str, str | None]

    def __repr__(self) -> str:
        counts = {action: count for action, count in self.counts.items() if count}
        return short_repr(
            self,
            outcome=self.outcome,
            complete=self.complete,
            method=self.method,
            counts=counts,
            steps=len(self.steps),
            cost=round(self.gradient_equivalents.total, 1),
        )

    def to_mapping(self) -> dict[str, Any]:
        """A JSON-ready dict. Numbers that do not exist (no probe, no trust region) are null."""
        mapping = dataclasses.asdict(self)
        mapping["gradient_equivalents"] = self.gradient_equivalents.to_mapping()
        mapping["steps"] = [record_to_mapping(step) for step in self.steps]
        for group in ("retained", "calibration"):
            change = (mapping["validity"] or {}).get(group)
            if change and math.isnan(change["predicted"]):
                change["predicted"] = None
        return mapping


def read_receipt(run: Run) -> dict[str, Any] | None:
    """What is in the receipt file of a run; None where a training made the run."""
    return files.read_json(run.path / RECEIPT_FILE) if run.kind == "erase" else None


def method_to_mapping(method: Any) -> dict[str, Any]:
    """A method with every choice, nested, each with the name of its class; JSON-ready."""

    def value_of(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return method_to_mapping(value)
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, float) and math.isinf(value):
            return "inf"  # JSON has no infinity
        return value

    values = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    # A loop that a solver runs in is no choice that changes results.
    fields = {name: value_of(value) for name, value in values.items() if name != "while_loop"}
    return {"type": type(method).__name__, **fields}


def make_receipt(
    method: object,
    task: UnlearningTask,
    workspace: Workspace,
    moved: Moved,
    targets: RowTargets,
    check: ValidityCheck | None,
    *,
    seconds: float,
    attempts: tuple[str, ...],
    complete: bool,
) -> Receipt:
    """The receipt of a judged move.

    Args:
        method: what was asked for.
        task: the task.
        workspace: its budget has the cost; the gradient norms measured here are added as diagnostics.
        moved: the move.
        targets: where rows were to end.
        check: what the change did; None of an adapter that did not change.
        seconds: wall-clock time.
        attempts: methods that were tried and given up.
        complete: whether to call it that.

    Raises:
        UnlearningError: the change is zero or not finite.
    """
    delta = trees.tree_sub(moved.params, task.adapter)
    delta_norm = float(trees.tree_norm(delta))
    if not math.isfinite(delta_norm) or (moved.steps and not delta_norm > 0):
        msg = f"The whole change has norm {delta_norm}; nothing was forgotten, and no adapter is written."
        raise UnlearningError(msg)
    norms, num_sampled = _edited_gradient_norms(task, workspace, moved.params)
    named = _named(task)
    actions = [example.action for example in named]
    products = product_norms(task.adapter, delta) if isinstance(delta, Lora) else None
    error = moved.steps[0].standard_error if moved.steps else math.nan
    limit, cost = workspace.budget.limit, workspace.budget.cost
    return Receipt(
        config={
            "method": method_to_mapping(method),
            "seed": workspace.seed,
            "chunk_size": workspace.chunk_size,
            "budget_gradient_equivalents": "inf" if math.isinf(limit) else limit,
            "target_loss": task.target_loss,
        },
        counts={action: actions.count(action) for action in ("remove", "modify_query", "correct_response")},
        named=named,
        num_examples_before=task.problem.num_trained,
        num_examples_after=task.problem.num_edited_total,
        method=moved.method,
        complete=complete,
        validity=check,
        targets=targets.losses,
        outcome=_outcome(moved, check, attempts),
        left=moved.left,
        rhs_norm=moved.steps[0].rhs_norm_of_request if moved.steps else 0.0,
        solver=summarise_solves(moved.steps),
        steps=moved.steps,
        num_correctors=moved.num_correctors,
        corrected=moved.corrected,
        attempts=attempts,
        curvature_reason=moved.curvature_reason,
        step_standard_error=None if math.isnan(error) else error,
        product_asymmetry=None if math.isnan(moved.asymmetry) else moved.asymmetry,
        delta_norm=delta_norm,
        adapter_norm_before=float(trees.tree_norm(task.adapter)),
        adapter_norm_after=float(trees.tree_norm(moved.params)),
        product_change_norm=None if products is None else products[0],
        product_norm_before=None if products is None else products[1],
        bf16_survival=bf16_survival(task.adapter, delta),
        edited_gradient_norm_before=norms[0],
        edited_gradient_norm_after=norms[1],
        gradient_norm_examples=num_sampled,
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(),
        gradient_equivalents=cost,
        versions=library_versions(),
    )


def _named(task: UnlearningTask) -> tuple[NamedExample, ...]:
    if isinstance(task.requests, EditProblem):
        rows = zip(task.problem.named.tolist(), task.problem.replacements, task.query_changes, strict=True)
        return tuple(
            NamedExample(
                id=row_id(task.problem.examples, row),
                action="remove" if new < 0 else "modify_query" if modified else "correct_response",
            )
            for row, new, modified in rows
        )
    return tuple(NamedExample(id=request.id, action=str(request.action)) for request in task.requests)


def _edited_gradient_norms(
    task: UnlearningTask, workspace: Workspace, params: LoraParams
) -> tuple[list[float], int]:
    """`||grad L'||` before and after on the same sample; counted as diagnostics."""
    problem = task.problem
    weighted = problem.edited_mean(None if workspace.audit else _DIAGNOSTIC_SAMPLE, workspace.rng(2**31))
    norms = [
        float(trees.tree_norm(workspace.gradient(task.objective, adapter, problem.examples, weighted)))
        for adapter in (task.adapter, params)
    ]
    workspace.budget.spend("diagnostics", 2 * GRADIENT * len(weighted.indices))
    return norms, len(weighted.indices)


def bf16_survival(old: LoraParams, delta: LoraParams) -> float:
    """`<round(old + delta) - round(old), delta> / ||delta||^2`, rounding to bfloat16: 1 where nothing is lost."""
    survived = size = 0.0
    for before, step in zip(*map(jax.tree.leaves, to_host((old, delta))), strict=True):
        after, rounded = ((x.astype(jnp.bfloat16).astype(np.float64)) for x in (before + step, before))
        survived += float(np.vdot(after - rounded, step.astype(np.float64)))
        size += float(np.vdot(step, step))
    return survived / size if size > 0 else 1.0


def _outcome(moved: Moved, check: ValidityCheck | None, attempts: tuple[str, ...]) -> str:
    if check is None:
        return (
            "complete: the adapter is unchanged; the forget rows are already where retraining would be expected to "
            "leave them"
        )
    notes = []
    shortened = sum(step.scale < 1 for step in moved.steps)
    if moved.left > 0:
        what = "way to their targets" if isinstance(moved.steps[0], MatchingRecord) else "weight"
        notes.append(f"{moved.left:.2g} of the forget rows' {what} is left")
    if shortened:
        notes.append(f"{shortened} of {len(moved.steps)} steps shortened by the trust region")
    if moved.stopped:
        notes.append(f"stopped early: {moved.stopped}")
    if attempts:
        notes.append(f"tried and not kept: {'; '.join(attempts)}")
    return f"{check.words} ({'; '.join(notes)})" if notes else check.words


def summarise_solves(steps: tuple[StepRecord, ...]) -> SolverSummary:
    """One summary of several solves: worst status, largest residual, sum of iterations."""
    bounds = [step.error_bound for step in steps]
    bound = math.nan if any(map(math.isnan, bounds)) else max(bounds, default=0.0)
    solves = [step for step in steps if isinstance(step, SolveRecord)]
    worst = min((step.status for step in solves), key=_SEVERITY.index, default=Status.CONVERGED)
    status = describe(worst)
    if not solves:
        status = "solved directly, by the factored curvature" if steps else "nothing to solve"
    return SolverSummary(
        status=status,
        converged=worst is Status.CONVERGED,
        iterations=sum(step.iterations for step in solves),
        relative_residual=max((step.relative_residual for step in steps), default=0.0),
        negative_curvature=any(step.negative_curvature for step in solves),
        error_bound=None if math.isnan(bound) else bound,
        certified=bound < CERTIFIED_BELOW,
    )
