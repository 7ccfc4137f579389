"""Target matching: influence steps whose coefficients are solved for, so that every forget row reaches its target.

Influence functions move the adapter by `(C + rho I)^-1 sum_i a_i g_i` with `a_i = 1/n`. How far that takes a row
depends on damping, sample and curvature, and on a memorised row it is hardly ever the right distance. Here the same
directions are kept and the `a_i` are solved for: the step is the solution of

    minimise 1/2 d'(C_R + rho I) d   subject to   h_i . d = t_i   for every row i,

`C_R` the Gauss-Newton matrix of retained examples, `h_i` the gradient of row i's log-odds and `t_i` its share of
the way left. In the dual that is `d = C^-1 H' a`, `(H C^-1 H' + kappa I) a = t`, with one gradient per row and
step; C is factored into random rows and shrunk towards its diagonal, so that its inverse costs no further pass
through the network where rows are stored, and a few where they do not fit into memory (`unlearning.matching_rows`).

A quadratic model does not see how retained rows change along the way. So restoration steps follow the K steps: the
same constrained solve, with a fresh sample of retained rows constrained to their original loss. Forget rows that
overshot are constrained back to their targets. A fresh sample is harmed as much as the rows outside of it, so its
mean harm says without bias what is left to restore; restoration ends when that is negligible.

Targets are worked out in `unlearning.targets`.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any, Literal

import jax
import numpy as np

from llmeraser_jax import trees
from llmeraser_jax.checks import check_at_least, check_positive
from llmeraser_jax.curvature.row_sets import ROW_MEMORY_BYTES, rows_fit
from llmeraser_jax.losses import forward_values, per_example
from llmeraser_jax.types import ExampleStack, LoraParams
from llmeraser_jax.unlearning.budget import BACKWARD, FORWARD, GRADIENT, BudgetSpent
from llmeraser_jax.unlearning.inverse import measure_asymmetry
from llmeraser_jax.unlearning.judged import run_judged
from llmeraser_jax.unlearning.matching_rows import MatchingRows, MatchingStep, SketchedRows, StoredRows
from llmeraser_jax.unlearning.records import MatchingRecord, Moved, NoStepError
from llmeraser_jax.unlearning.result import Result
from llmeraser_jax.unlearning.targets import Role, RowTargets, loss_of
from llmeraser_jax.unlearning.task import UnlearningTask
from llmeraser_jax.unlearning.workspace import Workspace

logger = logging.getLogger(__name__)

# Rows this close to their targets (share of the way, in log-odds) have arrived.
ARRIVED = 0.1
_DEFAULT_STEPS = 4
_CORRECT_ABOVE = 0.03  # further off than this is worth another step
_HARM_BELOW = 0.02  # nats per token that retained rows may have lost on average before restoration is worth a step
_LEAST_CONSTRAINTS = 16  # retained rows; a restoration step with fewer is not worth it
_MAX_LOG_ODDS_STEP = 4.0  # a linearisation reaches no further
_MAX_OVERSHOOT = 1.5  # of the predicted move, before a step is shortened
_MAX_HALVINGS = 5
_MAX_STEPS = 12  # that rows far down ask for
_LEAST_GAIN = 0.9  # of the standard error by joining a sample; less is no gain
_MAX_SAMPLES = 4  # curvature samples that the first step may join to lower its standard error
# Of a constrained retained row: its loss as trained, its gradient, and its loss after the step.
_CONSTRAINT_COST = GRADIENT + 2 * FORWARD


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetMatching:
    """Influence steps that end every forget row at its target, and restoration steps for retained rows.

    The curvature is a factored Gauss-Newton matrix of a sample of retained rows.

    Attributes:
        num_steps: K; None is 4, more where rows have far to go, and 3 or 2 where a budget would leave no room for a
            restoration step.
        sample_size: retained rows in a curvature sample, or `all`; None is as many as there are forget rows, but 96
            at least and 256 at most.
        num_roots: random curvature rows per sampled example.
        refresh_every: steps between fresh curvature samples.
        max_standard_error: the first sample grows until the first step's standard error over its norm is at most
            this; inf never grows it.
        damping: rho, added to the curvature besides the L2 term's lambda.
        shrinkage: of the curvature towards its diagonal: from 0, the sample's matrix, to 1, the diagonal alone.
        row_ridge: how far rows may miss their targets to spare the others: a ridge relative to their mean influence
            on themselves.
        restoration_steps: at most so many, in which fresh retained rows are constrained to their original loss.
            They end early where a fresh sample lost less than 0.02 nats per token and the forget rows have arrived.
        restoration_rows: retained rows in each; None is as many as there are forget rows, but 128 at least and 256
            at most.
        memory_budget_bytes: rows are stored where they fit into so much per device; else they are computed when
            needed, at one to three more passes per step over them and the curvature's sample.
    """

    num_steps: int | None = None
    sample_size: int | Literal["all"] | None = None
    num_roots: int = 1
    refresh_every: int = 2
    max_standard_error: float = 0.2
    damping: float = 7e-3
    shrinkage: float = 0.5
    row_ridge: float = 0.01
    restoration_steps: int = 5
    restoration_rows: int | None = None
    memory_budget_bytes: int = ROW_MEMORY_BYTES

    needs_targets = True

    def __post_init__(self) -> None:
        check_at_least(self, num_steps=1, num_roots=1, refresh_every=1, restoration_rows=1)
        check_at_least(self, damping=0, row_ridge=0, restoration_steps=0, memory_budget_bytes=0)
        check_positive(self, "max_standard_error")
        if not 0 <= self.shrinkage <= 1:
            msg = f"shrinkage is {self.shrinkage}; it must lie between 0 and 1."
            raise ValueError(msg)
        size = self.sample_size
        if not (size is None or size == "all" or (isinstance(size, int) and size >= 1)):
            msg = f"sample_size is {size!r}; it must be a whole number of at least 1, or 'all'."
            raise ValueError(msg)
        if self.restoration_rows is not None and self.restoration_steps == 0:
            msg = f"restoration_rows is {self.restoration_rows}, and restoration_steps 0: there is no such step."
            raise ValueError(msg)

    def run(self, task: UnlearningTask, workspace: Workspace) -> Result:
        """Moves the rows to their targets and judges the result.

        Raises:
            UnlearningError: no step moves the rows as predicted, or the budget does not cover the first.
            ValueError: there is a row without a target.
        """
        return run_judged(self, task, workspace)

    def move(self, task: UnlearningTask, workspace: Workspace, targets: RowTargets) -> Moved:
        """Moves the adapter until the rows are where their targets say, and restores retained rows.

        Returns:
            The outcome; without steps, and the adapter as it was, where no row has anywhere to go.

        Raises:
            NoStepError: no step moves the rows as predicted.
            BudgetSpent: the budget does not cover the first step.
        """
        return _Matching(self, task, workspace, targets).run()


@dataclasses.dataclass(frozen=True)
class _Point:
    """The targeted rows under one adapter."""

    here: np.ndarray  # log-odds
    rows: Any  # of their gradients, as `MatchingRows.measure` gives them; None where only losses were computed


@dataclasses.dataclass(frozen=True)
class _RetainConstraints:
    """Retained rows that a restoration step constrains to their original loss."""

    stack: ExampleStack
    trained: np.ndarray  # losses under the trained adapter
    losses: np.ndarray  # and now
    rows: Any  # of their gradients

    @property
    def asked(self) -> tuple[Any, np.ndarray]:
        """The rows, and that they get back what they lost."""
        return self.rows, np.minimum(self.trained - self.losses, 0)

    @property
    def harm(self) -> float:
        """Mean rise of the loss, nats per token."""
        return float((self.losses - self.trained).mean())


class _Matching:
    """One run: the rows, their targets, and what is measured about them on the way."""

    def __init__(self, method: TargetMatching, task: UnlearningTask, workspace: Workspace, targets: RowTargets):
        self.method, self.task, self.workspace, self.targets = method, task, workspace, targets
        self.way = targets.way
        self.asked = targets.roles != Role.STAYS
        self.rng = workspace.rng(3)
        problem = task.problem
        self.num_rows = len(targets.indices)
        self.num_retained = len(problem.retained)
        default = int(np.clip(len(problem.named), 96, 256))
        wanted = method.sample_size
        self.sample = None if wanted == "all" else default if wanted is None else wanted
        num_sampled = self.num_retained if self.sample is None else min(self.sample, self.num_retained)
        self.num_sampled = num_sampled
        self.curvature_cost = (FORWARD + method.num_roots * BACKWARD) * num_sampled
        default = int(np.clip(len(problem.named), 128, 256))
        self.restoration_rows = default if method.restoration_rows is None else method.restoration_rows
        self.least_constraints = min(_LEAST_CONSTRAINTS, self.restoration_rows, self.num_retained)
        options = {name: getattr(method, name) for name in ("damping", "shrinkage", "row_ridge", "num_roots")}
        self.stores = self.fit(0)
        self.rows: MatchingRows = (
            StoredRows(task.objective, workspace.mesh, **options)
            if self.stores
            else SketchedRows(task.objective, workspace.budget, seed=workspace.seed, **options)
        )
        # Rows that are not stored take the first sample's passes twice: its diagonal comes before its sketches.
        twice = not self.stores and method.shrinkage > 0
        self.first_curvature_cost = (2 if twice else 1) * self.curvature_cost
        self.lay_out = workspace.micro_batches if self.stores else workspace.stack
        self.stack = self.lay_out(targets.examples, targets.indices)

    def fit(self, num_joined: int) -> bool:
        """Whether the rows can be stored with so many samples joined to the first: all that are there at once.

        Rows before and after a step, constrained ones of this step and of the one before, and the curvature's.
        """
        method = self.method
        samples = math.ceil((method.num_steps or _DEFAULT_STEPS) / method.refresh_every) + num_joined
        num_rows = 2 * (self.num_rows + self.restoration_rows) + samples * self.num_sampled * method.num_roots
        return rows_fit(num_rows, self.task.adapter, self.workspace.mesh, method.memory_budget_bytes)

    def demand(self, point: _Point) -> np.ndarray:
        """What is asked of every row, in log-odds: what is left of its way, or back where it was taken too far.

        Not asked back are a pair that was past its end as trained, and a wanted one that is known too well.
        """
        left = self.targets.left(point.here)
        goes = self.targets.roles == Role.GOES
        return np.where(goes & (self.way != 0), self.targets.ends - point.here, left)

    def off(self, point: _Point) -> float:
        """How far rows are from their ends, on either side, over the whole way."""
        return float(np.abs(self.demand(point)[self.asked]).sum() / np.abs(self.way).sum())

    def left(self, point: _Point) -> float:
        """The share of the whole way that is left."""
        return float(np.abs(self.targets.left(point.here)[self.asked]).sum() / np.abs(self.way).sum())

    def measure(self, params: LoraParams, *, gradients: bool) -> _Point:
        """The rows under an adapter; gradients come with their log-odds at no further cost.

        Raises:
            BudgetSpent: it cannot be paid.
        """
        objective, budget = self.task.objective, self.workspace.budget
        if not gradients:
            budget.spend("trust_region", FORWARD * self.num_rows)
            rows = (self.targets.examples, self.targets.indices)
            return _Point(self.workspace.row_values(objective, params, *rows).log_odds, None)
        budget.spend("rhs", GRADIENT * self.num_rows)
        return _Point(*self.rows.measure(params, self.stack, "log-odds"))

    def draw_constraints(self, params: LoraParams) -> _RetainConstraints:
        """A fresh sample of retained rows, with their losses then and now and their gradients now.

        As many as are asked for, or fewer where the budget is nearly used up.

        Raises:
            BudgetSpent: not even a few can be paid.
        """
        problem, budget, objective = self.task.problem, self.workspace.budget, self.task.objective
        budget.reserve(self.restoration_cost(self.least_constraints))
        spare = budget.left - self.restoration_cost(0)
        size = min(self.restoration_rows, int(min(spare / _CONSTRAINT_COST, 1e9)))
        chosen = problem.trained_mean(size, self.rng, without_named=True).indices
        stack = self.lay_out(problem.examples, chosen)
        budget.spend("trust_region", (FORWARD + GRADIENT) * len(chosen))
        trained = per_example(forward_values, stack, objective, self.task.adapter)[0]
        return _RetainConstraints(stack, trained, *self.rows.measure(params, stack, "loss"))

    def add_curvature(self, params: LoraParams) -> None:
        """Joins a sample of retained rows to the curvature.

        The normaliser is that of the mean over all trained examples, as along the path. Rows of the steps before
        stay: at another adapter, but of other examples, they keep the step from harming more of the retained ones
        than one sample could.

        Raises:
            NoStepError: the damping is too small for float32.
            BudgetSpent: the sample cannot be paid.
        """
        problem, workspace = self.task.problem, self.workspace
        if self.num_retained == 0:
            self.rows.add_curvature(params, None, jax.random.key(0))
            return
        sample = problem.trained_mean(self.sample, self.rng, without_named=True)
        per_row = FORWARD + self.method.num_roots * BACKWARD
        workspace.budget.spend("curvature", per_row * len(sample.indices))
        key = jax.random.key(int(self.rng.integers(2**31)))
        self.rows.add_curvature(params, self.lay_out(problem.examples, sample), key)

    def restoration_cost(self, num_constraints: int) -> float:
        """Gradient equivalents of a last restoration step that is accepted at once; its gradients are there."""
        solve = self.rows.solve_cost(self.num_rows + num_constraints, self.num_sampled)
        return FORWARD * self.num_rows + _CONSTRAINT_COST * num_constraints + solve

    def affordable_steps(self) -> int:
        """K: what was asked for; else 4, or more where rows are far down, or fewer for the budget's sake."""
        method = self.method
        if method.num_steps is not None:
            return method.num_steps
        furthest = math.ceil(float(np.abs(self.way).max()) / _MAX_LOG_ODDS_STEP)
        wanted = max(_DEFAULT_STEPS, min(furthest, _MAX_STEPS))
        num_constraints = min(self.restoration_rows, self.num_retained) if method.restoration_steps else 0
        for num_steps in range(wanted, 2, -1):
            refreshed = math.ceil(num_steps / method.refresh_every) - 1
            needed = (num_steps + 1) * GRADIENT * self.num_rows + refreshed * self.curvature_cost
            needed += self.first_curvature_cost
            needed += num_steps * self.rows.solve_cost(self.num_rows, self.num_sampled)
            if needed + self.restoration_cost(num_constraints) <= self.workspace.budget.left:
                return num_steps
        return 2

    def run(self) -> Moved:
        """`TargetMatching.move`."""
        params, method, budget = self.task.adapter, self.method, self.workspace.budget
        reason = "gauss-newton: target matching factors it"
        if not np.any(self.way):
            stopped = "no forget row has anywhere to go"
            return Moved(params=params, steps=(), left=0.0, arrived=True, method="target matching", stopped=stopped)
        num_steps = self.affordable_steps()
        last = num_steps + method.restoration_steps
        records: list[MatchingRecord] = []
        stopped, asymmetry = "", math.nan
        point: _Point | None = None
        for step in range(last):
            restoring = step >= num_steps
            try:
                if point is None:
                    # A step that cannot be looked at afterwards is not worth its rows.
                    budget.reserve((FORWARD + GRADIENT) * self.num_rows + self.first_curvature_cost)
                    self.add_curvature(params)  # it scales the rows
                    point = self.measure(params, gradients=True)
                elif not restoring and step % method.refresh_every == 0:
                    budget.reserve(FORWARD * self.num_rows + self.curvature_cost)
                    self.add_curvature(params)
                constraints = self.draw_constraints(params) if restoring and self.num_retained else None
                harmless = constraints is None or constraints.harm <= _HARM_BELOW
                if restoring and harmless and self.off(point) <= _CORRECT_ABOVE:
                    break
                # A restoration step takes all that is left; the steps before it their share.
                share = 1 / max(num_steps - step, 1)
                demand = np.clip(share * self.demand(point), -_MAX_LOG_ODDS_STEP, _MAX_LOG_ODDS_STEP)
                solved = self.rows.solve(point.rows, demand, constraints.asked if constraints else None)
                if not records and self.num_retained:
                    solved = self.settled(params, point, demand, solved)
                # The rows' gradients after a step check it and begin the next, where there is to be one.
                pending = GRADIENT * self.num_rows + FORWARD * (len(constraints.losses) if constraints else 0)
                ahead = self.restoration_cost(self.least_constraints if step + 1 >= num_steps else 0)
                affordable = pending + ahead <= budget.left
                another = affordable and step + 1 < last
                scale, after = self.accepted(params, solved, point, constraints, gradients=another)
            except (BudgetSpent, NoStepError) as error:
                if not records:
                    raise
                stopped = str(error)
                break
            if not records and isinstance(self.rows, StoredRows) and self.rows.inverse is not None:
                curvature = self.rows.inverse.curvature
                asymmetry = measure_asymmetry(curvature, params, seed=self.workspace.seed, jitted=False)
            params = trees.tree_axpy(scale, solved.delta, params)
            record = self.record(solved, point, after, scale, constraints)
            records.append(record)
            self.workspace.on_step(record)
            point = after
            if not affordable and step + 1 < last:
                stopped = f"the budget of {budget.limit:.0f} gradient equivalents has no room for another step"
            if not another:
                break
        return Moved(
            params=params,
            steps=tuple(records),
            left=records[-1].way_left_after,
            arrived=records[-1].way_left_after <= ARRIVED,
            method="target matching",
            stopped=stopped,
            curvature_reason=reason,
            asymmetry=asymmetry,
        )

    def settled(self, params: LoraParams, point: _Point, demand: np.ndarray, solved: MatchingStep) -> MatchingStep:
        """The first step, with samples joined to the curvature until its standard error is low enough.

        Up to four samples in all, no more than leaves half of the budget for what follows or than fit where rows
        are stored, and none after one that did not help.
        """
        method, budget = self.method, self.workspace.budget
        before = math.inf
        for number in range(1, _MAX_SAMPLES + 1):
            error = self.rows.standard_error(point.rows, demand, solved)
            solved = dataclasses.replace(solved, standard_error=error)
            another = self.curvature_cost + self.rows.solve_cost(self.num_rows, self.num_sampled)
            half_spent = budget.cost.total + another > 0.5 * budget.limit
            enough = not error > method.max_standard_error or error > _LEAST_GAIN * before
            if enough or number == _MAX_SAMPLES or half_spent or (self.stores and not self.fit(number)):
                break
            before = error
            self.add_curvature(params)
            solved = self.rows.solve(point.rows, demand, None)
        return solved

    def accepted(
        self,
        params: LoraParams,
        solved: MatchingStep,
        before: _Point,
        constraints: _RetainConstraints | None,
        *,
        gradients: bool,
    ) -> tuple[float, _Point]:
        """The largest of 1, 1/2, 1/4, ... times the step that does what it should, and the rows there.

        A step must not move the rows far beyond the prediction, nor backwards. A restoration step must not undo the
        rows' way or harm its retained rows.

        Raises:
            NoStepError: even the shortest step does not.
            BudgetSpent: the next length cannot be paid.
        """
        scale, weight = 1.0, np.where(self.way != 0, np.sign(solved.predicted), 0.0)
        for _ in range(_MAX_HALVINGS + 1):
            trial = trees.tree_axpy(scale, solved.delta, params)
            after = self.measure(trial, gradients=gradients)
            if constraints is None:
                moved, hoped = float(weight @ (after.here - before.here)), scale * float(weight @ solved.predicted)
                good = 0 < moved <= _MAX_OVERSHOOT * hoped
            else:
                self.workspace.budget.spend("trust_region", FORWARD * len(constraints.losses))
                losses = per_example(forward_values, constraints.stack, self.task.objective, trial)[0]
                harm = float((losses - constraints.trained).mean())
                good = harm <= max(constraints.harm, _HARM_BELOW)
                good = good and self.off(after) <= max(self.off(before), ARRIVED)
            if good and np.all(np.isfinite(after.here)):
                return scale, after
            scale *= 0.5
        msg = "No length of the step moves the forget rows as predicted; raise sample_size, damping or num_steps."
        raise NoStepError(msg)

    def record(
        self,
        solved: MatchingStep,
        before: _Point,
        after: _Point,
        scale: float,
        constraints: _RetainConstraints | None,
    ) -> MatchingRecord:
        """What an accepted step did."""
        losses, roles = loss_of(after.here), self.targets.roles
        return MatchingRecord(
            way_left_before=self.left(before),
            way_left_after=self.left(after),
            scale=scale,
            rhs_norm=solved.rhs_norm,
            delta_norm=scale * float(trees.tree_norm(solved.delta)),
            relative_residual=solved.relative_residual,
            error_bound=solved.error_bound,
            predicted_move=float(np.mean(np.abs(solved.predicted))) * scale,
            actual_move=float(np.mean(np.sign(solved.predicted) * (after.here - before.here))),
            restoration=constraints is not None,
            forget_loss=_mean(losses[roles == Role.GOES]),
            wanted_loss=_mean(losses[roles == Role.WANTED]),
            retained_loss=math.nan if constraints is None else float(constraints.losses.mean()),
            standard_error=solved.standard_error,
        )


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
