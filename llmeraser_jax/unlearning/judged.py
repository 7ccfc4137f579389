"""What the package's own methods share: targets first, then the move, then the validity check and the receipt."""

from __future__ import annotations

import dataclasses
import time
from typing import Protocol, runtime_checkable

from llmeraser_jax.unlearning.budget import BudgetSpent
from llmeraser_jax.unlearning.receipt import make_receipt
from llmeraser_jax.unlearning.records import Moved, UnlearningError
from llmeraser_jax.unlearning.result import Result
from llmeraser_jax.unlearning.targets import RowTargets, find_targets
from llmeraser_jax.unlearning.task import UnlearningTask
from llmeraser_jax.unlearning.validity import Validity, ValidityCheck
from llmeraser_jax.unlearning.workspace import Workspace


@runtime_checkable
class Mover(Protocol):
    """A method of the package's own: it moves, and `run_judged` does the rest."""

    def move(self, task: UnlearningTask, workspace: Workspace, targets: RowTargets) -> Moved:
        """The parameters after the move; `targets` are where rows should end.

        Raises:
            UnlearningError, BudgetSpent: there is no usable step.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """A move with its targets and what the validity check says; None of an adapter that did not change."""

    moved: Moved
    targets: RowTargets
    check: ValidityCheck | None


def judge(
    method: Mover, task: UnlearningTask, workspace: Workspace, *, targets: RowTargets | None = None
) -> Judged:
    """Finds targets, moves, and checks what that did.

    Args:
        method: how to move.
        task: the task.
        workspace: where to compute.
        targets: those that an earlier method found.

    Raises:
        UnlearningError: nothing was done.
        ValueError: the method needs targets and there are none; a row whose loss is not finite.
    """
    needs_targets = getattr(method, "needs_targets", False)
    try:
        if targets is None:
            targets = find_targets(task, workspace, diagnostic=not needs_targets)
        if needs_targets and not targets.known:
            raise ValueError(_no_targets(task))
        validity = Validity(task, workspace, targets)
        moved = method.move(task, workspace, targets)
    except BudgetSpent as error:
        raise UnlearningError(str(error)) from error
    return Judged(moved=moved, targets=targets, check=validity.check(moved.params) if moved.steps else None)


def conclude(
    method: object,
    task: UnlearningTask,
    workspace: Workspace,
    judged: Judged,
    started: float,
    *,
    attempts: tuple[str, ...] = (),
    complete: bool | None = None,
) -> Result:
    """The result of a judged move, with its receipt.

    Args:
        method: what was asked for.
        task: the task.
        workspace: its budget has the cost.
        judged: the move.
        started: `time.perf_counter()` at the start.
        attempts: methods that were tried and given up, with the reason.
        complete: None asks the validity check.

    Raises:
        UnlearningError: the change is zero or not finite.
    """
    seconds = time.perf_counter() - started
    if complete is None:
        complete = judged.moved.arrived if judged.check is None else judged.check.passed
    receipt = make_receipt(
        method,
        task,
        workspace,
        judged.moved,
        judged.targets,
        judged.check,
        seconds=seconds,
        attempts=attempts,
        complete=complete,
    )
    return Result(
        params=judged.moved.params,
        before=task.adapter,
        cost=workspace.budget.cost,
        seconds=seconds,
        receipt=receipt,
        model=task.base_model,
    )


def run_judged(method: Mover, task: UnlearningTask, workspace: Workspace) -> Result:
    """`Method.run` of the package's own methods."""
    started = time.perf_counter()
    return conclude(method, task, workspace, judge(method, task, workspace), started)


def _no_targets(task: UnlearningTask) -> str:
    if task.objective.log_odds_fn is None:
        return (
            "Target matching needs an objective with a log_odds_fn: targets are log-odds of a negative "
            "log-likelihood. Use Path or Step."
        )
    return (
        "Target matching has nothing that shows where removed rows should end: give calibration rows or "
        "target_loss, or use Path or Step."
    )
