"""`unlearn`: chooses the way to move and runs it, and checks afterwards what the move did."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh

from llmeraser_jax.losses import Objective
from llmeraser_jax.types import ExampleSet, LoraParams
from llmeraser_jax.unlearning.config import EraseConfig
from llmeraser_jax.unlearning.evaluator import Evaluator
from llmeraser_jax.unlearning.matched import unlearn_matched
from llmeraser_jax.unlearning.path import influence_path, single_step
from llmeraser_jax.unlearning.problem import EditProblem, Weighted
from llmeraser_jax.unlearning.range_check import check_range
from llmeraser_jax.unlearning.steps import StepRecord, TargetLosses, Unlearned
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
    on_step: Callable[[StepRecord], None] = lambda record: None,
) -> Unlearned:
    """Moves the adapter as `config.method` says.

    Args:
        objective: the loss that was trained.
        params: theta_hat, the adapter trained on the data as they stood.
        problem: the request.
        config: how to move.
        mesh: devices; None is one.
        heldout: examples of the same kind that were not trained on: the matched way takes from them where
            removed rows should end.
        modified: for each named example, whether its query is what changes; None is nowhere. Removed and modified
            rows need held-out rows for the matched way, corrected ones can do without.
        retrain_cost: gradient equivalents of a retraining, which a budget is a share of.
        on_step: called after every accepted step.

    Returns:
        The new adapter with the record of every step.

    Raises:
        UnlearningError: nothing was done: a solve or its trust region failed at the first step. A later failure
            ends the path early, and `final_weight` and `stopped` tell how far it came and why.
        ValueError: the matched way was asked for and has no targets.
    """
    modified = np.zeros(len(problem.named), bool) if modified is None else np.asarray(modified, bool)
    goes = modified | (problem.replacements < 0)
    knows_unknown = heldout is not None or config.target_loss is not None
    knows_targets = knows_unknown or not goes.any()
    if config.method == "auto":
        config = dataclasses.replace(config, method="matched" if knows_targets else "path")
    elif config.method == "matched" and not knows_targets:
        msg = (
            "method is 'matched', but there is nothing to tell where removed or modified rows should end: give "
            "held-out examples or target_loss, or use method 'path'."
        )
        raise ValueError(msg)
    evaluator = Evaluator(objective, problem, config, mesh, retrain_cost=retrain_cost)
    if config.method == "matched":
        targets = _target_losses(evaluator, params, heldout)
        moved = unlearn_matched(evaluator, params, targets, on_step=on_step)
    else:
        moved = _unlearn_by_weight(evaluator, params, on_step)
    return dataclasses.replace(moved, range_check=check_range(evaluator, params, moved.params))


def _unlearn_by_weight(
    evaluator: Evaluator, params: LoraParams, on_step: Callable[[StepRecord], None]
) -> Unlearned:
    problem, config = evaluator.problem, evaluator.config
    rng = np.random.default_rng([config.seed, 0])
    probe = problem.trained_mean(evaluator.curvature_sample, rng, without_named=True).indices
    check = Check(evaluator, probe) if config.trust_region else None
    probe_scale = len(problem.retained) / max(len(probe), 1)
    run = influence_path if config.method == "path" else single_step
    return run(evaluator, check, params, probe_scale, on_step)


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
    known_loss = _mean_loss(evaluator, params, problem.examples, known) if len(problem.wanted) else math.nan
    return TargetLosses(unknown=unknown, known=known_loss)


def _mean_loss(evaluator: Evaluator, params: LoraParams, examples: ExampleSet, indices: np.ndarray) -> float:
    stack = evaluator.place(examples, Weighted(indices, np.ones(len(indices))))
    losses = evaluator.example_losses(params, stack)
    weights = np.concatenate([np.asarray(w).reshape(-1) for w in stack.weights])
    return float(losses[weights != 0].mean())
