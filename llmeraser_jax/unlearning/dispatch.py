"""`unlearn`: chooses the way to move and runs it, and checks afterwards what the move did."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from llmeraser_jax.losses import Objective, real_rows
from llmeraser_jax.types import ExampleSet, LoraParams
from llmeraser_jax.unlearning.config import EraseConfig
from llmeraser_jax.unlearning.correctors import correct
from llmeraser_jax.unlearning.cost import CostMeter
from llmeraser_jax.unlearning.evaluator import Evaluator
from llmeraser_jax.unlearning.matched import unlearn_matched
from llmeraser_jax.unlearning.path import influence_path, single_step
from llmeraser_jax.unlearning.problem import EditProblem, Weighted
from llmeraser_jax.unlearning.range_check import check_range
from llmeraser_jax.unlearning.steps import NoStepError, StepRecord, TargetLosses, Unlearned, UnlearningError
from llmeraser_jax.unlearning.trust_region import Check

logger = logging.getLogger(__name__)

_NUM_HELDOUT = 128  # held-out rows whose mean loss is the target of removed ones
_NUM_KNOWN = 64  # retained rows whose mean loss is the target of wanted ones


def unlearn(
    objective: Objective,
    params: LoraParams,
    problem: EditProblem,
    config: EraseConfig,
    *,
    mesh: Mesh | None = None,
    heldout: ExampleSet | None = None,
    modified: np.ndarray | None = None,
    retrain_cost: float | None = None,
    checkpoint_directory: Path | None = None,
    factors_directory: Path | None = None,
    on_step: Callable[[StepRecord], None] = lambda record: None,
) -> Unlearned:
    """Moves the adapter as `config.method` says.

    With `auto`, a matched move that fails its range check, or finds no step, is given up for the path, whose cost
    comes on top; both together may cost one retraining, where its cost is known and no budget says otherwise. Where
    the path fails too, the matched move is what is returned, not called complete.

    Args:
        objective: the loss that was trained.
        params: theta_hat, the adapter trained on the data as they stood.
        problem: the request.
        config: how to move.
        mesh: devices; None is one.
        heldout: examples of the same kind that were not trained on: the matched way takes from them where
            removed rows should end.
        modified: for each named example, whether its query is what changes; None is nowhere. The matched way
            treats the two kinds of edits apart.
        retrain_cost: gradient equivalents of a retraining, which a budget is a share of.
        checkpoint_directory: where `config.stream` saves its solves.
        factors_directory: where solver `ekfac` keeps its factors: read where they are there, else made and saved;
            None makes them anew.
        on_step: called after every accepted step.

    Returns:
        The new adapter with the record of every step.

    Raises:
        UnlearningError: nothing was done: a solve or its trust region failed at the first step. A later failure
            ends the path early, and `final_weight` and `stopped` tell how far it came and why.
        ValueError: the matched way was asked for and has no targets.
    """
    modified = np.zeros(len(problem.named), bool) if modified is None else np.asarray(modified, bool)
    knows_unknown = heldout is not None or config.target_loss is not None
    knows_targets = knows_unknown or bool(np.all(problem.replacements >= 0))
    may_go_on = config.method == "auto"
    if may_go_on:
        config = dataclasses.replace(config, method="matched" if knows_targets else "path")
    elif config.method == "matched" and not knows_targets:
        msg = (
            "method is 'matched', but there is nothing to tell where removed rows should end: give held-out "
            "examples or target_loss, or use method 'path'."
        )
        raise ValueError(msg)
    move = _Way(
        objective,
        params,
        problem,
        modified,
        mesh,
        heldout,
        retrain_cost,
        checkpoint_directory,
        factors_directory,
        on_step,
    )
    if not (may_go_on and config.method == "matched"):
        return move(config)
    # Whoever would pay more than a retraining is better served by one.
    budget = 1.0 if config.budget is None and retrain_cost is not None else config.budget
    along_the_path = dataclasses.replace(config, method="path", sample_size=None, num_steps=None, budget=budget)
    cost = CostMeter()
    try:
        moved = move(config, cost=cost)
    except NoStepError as error:
        logger.warning("The matched way found no step (%s); going along the path instead.", error)
        return move(along_the_path, attempts=(f"matched: {error}",), cost=cost)
    if moved.range_check is None or moved.range_check.passed:
        return moved
    logger.warning("Matched steps left the range (%s); trying the path.", moved.range_check.verdict)
    try:
        again = move(along_the_path, attempts=(f"matched: {moved.range_check.verdict}",), cost=cost)
    except UnlearningError as error:
        return dataclasses.replace(moved, complete=False, attempts=(f"path: {error}",))
    if again.range_check is not None and again.range_check.passed:
        return again
    verdict = again.range_check.verdict if again.range_check is not None else again.stopped
    verdict += f"; {again.stopped}" if again.stopped else ""
    return dataclasses.replace(moved, complete=False, cost=again.cost, attempts=(f"path: {verdict}",))


@dataclasses.dataclass(frozen=True)
class _Way:
    """Everything about a move but its configuration."""

    objective: Objective
    params: LoraParams
    problem: EditProblem
    modified: np.ndarray
    mesh: Mesh | None
    heldout: ExampleSet | None
    retrain_cost: float | None
    checkpoint_directory: Path | None
    factors_directory: Path | None
    on_step: Callable[[StepRecord], None]

    def __call__(
        self, config: EraseConfig, *, attempts: tuple[str, ...] = (), cost: CostMeter | None = None
    ) -> Unlearned:
        """Moves, corrects, and checks what that did; `cost` is what was spent already."""
        evaluator = Evaluator(
            self.objective,
            self.problem,
            config,
            self.mesh,
            retrain_cost=self.retrain_cost,
            checkpoint_directory=self.checkpoint_directory,
            factors_directory=self.factors_directory,
        )
        if cost is not None:
            evaluator.cost = cost
        check = None
        if config.correctors or (config.trust_region and config.method != "matched"):
            rng = np.random.default_rng([config.seed, 0])
            probe = self.problem.trained_mean(evaluator.curvature_sample, rng, without_named=True).indices
            check = Check(evaluator, probe)
        if config.method == "matched":
            targets = _target_losses(evaluator, self.params, self.heldout)
            moved = unlearn_matched(evaluator, self.params, targets, self.modified, on_step=self.on_step)
            if not moved.steps:
                return moved
        else:
            run = influence_path if config.method == "path" else single_step
            moved = run(evaluator, check if config.trust_region else None, self.params, self.on_step)
        if config.correctors and check is not None:
            params, records, why = correct(
                evaluator, check, self.params, moved.params, moved.final_weight, self.on_step
            )
            moved = dataclasses.replace(
                moved,
                params=params,
                steps=(*moved.steps, *records),
                num_correctors=len(records),
                corrected=why,
            )
        return dataclasses.replace(
            moved,
            range_check=check_range(evaluator, self.params, moved.params, asked=moved.asked),
            attempts=attempts,
            curvature_reason=evaluator.curvature_reason,
            asymmetry=evaluator.asymmetry,
        )


def _target_losses(evaluator: Evaluator, params: LoraParams, heldout: ExampleSet | None) -> TargetLosses:
    """Mean losses of held-out and of retained examples under the adapter as trained."""
    config, problem = evaluator.config, evaluator.problem
    rng = np.random.default_rng([config.seed, 4])
    unknown = config.target_loss
    if unknown is None and heldout is not None:
        if len(heldout) == 0:
            msg = "The held-out set is empty; it has to show where removed rows should end."
            raise ValueError(msg)
        chosen = np.sort(rng.choice(len(heldout), size=min(_NUM_HELDOUT, len(heldout)), replace=False))
        unknown = _mean_loss(evaluator, params, heldout, chosen)
    known = problem.retained
    if len(known) > _NUM_KNOWN:
        known = np.sort(rng.choice(known, size=_NUM_KNOWN, replace=False))
    asked = len(problem.wanted) > 0 and len(known) > 0
    known_loss = _mean_loss(evaluator, params, problem.examples, known) if asked else None
    return TargetLosses(unknown=unknown, known=known_loss)


def _mean_loss(evaluator: Evaluator, params: LoraParams, examples: ExampleSet, indices: np.ndarray) -> float:
    stack = evaluator.place(examples, Weighted(indices, np.ones(len(indices))))
    losses = evaluator.example_losses(params, stack)
    return float(losses[real_rows(stack)].mean())
