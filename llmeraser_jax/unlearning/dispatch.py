"""`unlearn`: chooses the way to move and runs it, and checks afterwards what the move did."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from llmeraser_jax.losses import Objective
from llmeraser_jax.types import ExampleSet, LoraParams
from llmeraser_jax.unlearning.config import EraseConfig
from llmeraser_jax.unlearning.correctors import correct
from llmeraser_jax.unlearning.cost import BudgetSpent, CostMeter
from llmeraser_jax.unlearning.evaluator import Evaluator
from llmeraser_jax.unlearning.matched import unlearn_matched
from llmeraser_jax.unlearning.path import influence_path, single_step
from llmeraser_jax.unlearning.problem import EditProblem
from llmeraser_jax.unlearning.steps import NoStepError, StepRecord, Unlearned, UnlearningError
from llmeraser_jax.unlearning.targets import RowTargets, find_targets
from llmeraser_jax.unlearning.trust_region import Check
from llmeraser_jax.unlearning.validity import Validity

logger = logging.getLogger(__name__)


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

    With `auto`, a matched move that fails its validity check, or finds no step, is given up for the path, whose
    cost comes on top and is bounded by the same budget. Where the path fails too, the matched move is what is
    returned, not called complete.

    Args:
        objective: the loss that was trained.
        params: theta_hat, the adapter trained on the data as they stood.
        problem: the request.
        config: how to move.
        mesh: devices; None is one.
        heldout: examples of the same kind that were not trained on: they show where removed rows should end.
        modified: for each named example, whether its query is what changes; None is nowhere. Targets treat the
            two kinds of edits apart.
        retrain_cost: gradient equivalents of a retraining, which a budget is a share of. Where it is known and
            the configuration names no budget, an erasure stops before it costs more.
        checkpoint_directory: where `config.stream` saves its solves.
        factors_directory: where solver `ekfac` keeps its factors: read where they are there, else made and saved;
            None makes them anew.
        on_step: called after every accepted step.

    Returns:
        The new adapter with the record of every step.

    Raises:
        UnlearningError: nothing was done: a solve or its trust region failed at the first step, or the budget does
            not cover it. A later failure ends the move early, and `final_weight` and `stopped` tell how far it
            came and why.
        ValueError: the matched way was asked for and has no targets; a named, retained or held-out row whose loss
            is not finite.
    """
    request = _Request(
        objective,
        params,
        problem,
        np.zeros(len(problem.named), bool) if modified is None else np.asarray(modified, bool),
        mesh,
        heldout,
        CostMeter.of(config.budget, retrain_cost),
        checkpoint_directory,
        factors_directory,
        on_step,
    )
    if config.method != "auto":
        return request.move(config)
    # A loss that is no negative log-likelihood has no log-odds to match.
    matchable = objective.log_odds_fn is not None and objective.output_root_fn is not None
    knows_targets = heldout is not None or config.target_loss is not None or bool(np.all(problem.replacements >= 0))
    along_the_path = dataclasses.replace(config, method="path", sample_size=None, num_steps=None)
    if not (matchable and knows_targets):
        return request.move(dataclasses.replace(config, method="path"))
    try:
        moved = request.move(dataclasses.replace(config, method="matched"))
    except NoStepError as error:
        logger.warning("The matched way found no step (%s); going along the path instead.", error)
        return request.move(along_the_path, attempts=(f"matched: {error}",))
    if moved.validity is None or not moved.validity.failed:
        return moved
    logger.warning("Matched steps did not do what was asked (%s); trying the path.", moved.validity.words)
    try:
        again = request.move(along_the_path, attempts=(f"matched: {moved.validity.words}",), targets=moved.targets)
    except UnlearningError as error:
        return dataclasses.replace(moved, complete=False, attempts=(f"path: {error}",))
    if again.validity is not None and again.validity.passed:
        return again
    verdict = again.validity.words if again.validity is not None else again.stopped
    verdict += f"; {again.stopped}" if again.stopped else ""
    return dataclasses.replace(moved, complete=False, cost=again.cost, attempts=(f"path: {verdict}",))


@dataclasses.dataclass(frozen=True)
class _Request:
    """Everything about a move but its configuration."""

    objective: Objective
    params: LoraParams
    problem: EditProblem
    modified: np.ndarray
    mesh: Mesh | None
    heldout: ExampleSet | None
    cost: CostMeter
    checkpoint_directory: Path | None
    factors_directory: Path | None
    on_step: Callable[[StepRecord], None]

    def move(
        self, config: EraseConfig, *, attempts: tuple[str, ...] = (), targets: RowTargets | None = None
    ) -> Unlearned:
        """Moves, corrects, and checks what that did; `targets` are those that an earlier attempt found.

        Raises:
            UnlearningError: nothing was done.
        """
        evaluator = Evaluator(
            self.objective,
            self.problem,
            config,
            self.mesh,
            cost=self.cost,
            checkpoint_directory=self.checkpoint_directory,
            factors_directory=self.factors_directory,
        )
        is_matched = config.method == "matched"
        try:
            if targets is None:
                targets = find_targets(
                    evaluator,
                    self.params,
                    calibration=self.heldout,
                    modified=self.modified,
                    diagnostic=not is_matched,
                )
            if is_matched and not targets.known:
                raise ValueError(_no_targets(self.objective))
            validity = Validity(evaluator, self.params, targets, self.heldout)
            moved = self._move(evaluator, targets)
        except BudgetSpent as error:
            raise UnlearningError(str(error)) from error
        moved = dataclasses.replace(moved, targets=targets, attempts=attempts)
        if not moved.steps:
            return moved
        check = validity.check(moved.params)
        return dataclasses.replace(
            moved,
            complete=check.passed,
            validity=check,
            curvature_reason=evaluator.curvature_reason,
            asymmetry=evaluator.asymmetry,
        )

    def _move(self, evaluator: Evaluator, targets: RowTargets) -> Unlearned:
        config = evaluator.config
        check = None
        if config.correctors or (config.trust_region and config.method != "matched"):
            rng = np.random.default_rng([config.seed, 0])
            probe = self.problem.trained_mean(evaluator.curvature_sample, rng, without_named=True).indices
            check = Check(evaluator, probe)
        if config.method == "matched":
            moved = unlearn_matched(evaluator, self.params, targets, on_step=self.on_step)
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
        return moved


def _no_targets(objective: Objective) -> str:
    if objective.log_odds_fn is None:
        return (
            "method is 'matched', but the objective has no log_odds_fn: targets are log-odds of a negative "
            "log-likelihood. Use method 'path' or 'step'."
        )
    return (
        "method is 'matched', but there is nothing to tell where removed rows should end: give held-out "
        "examples or target_loss, or use method 'path'."
    )
