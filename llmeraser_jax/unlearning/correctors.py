"""Correctors: Newton steps on the edited objective after a move, each with a trust region.

`delta = -(C' + rho I)^-1 grad L'(theta)`, where `L'` is the edited objective with its retained part estimated from
one sample that stays the same, so that the steps descend on one function. They carry along whatever gradient
training itself left over. To end there and not train on by stealth, they stop where the norm of the edited
objective's gradient is back at that of the trained objective at the trained adapter, on the same sample: a
stopping rule that needs no retraining.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from llmeraser_jax import trees
from llmeraser_jax.types import LoraParams
from llmeraser_jax.unlearning.cost import GRADIENT, BudgetSpent
from llmeraser_jax.unlearning.evaluator import Evaluator
from llmeraser_jax.unlearning.problem import Weighted
from llmeraser_jax.unlearning.steps import StepRecord, UnlearningError
from llmeraser_jax.unlearning.trust_region import Check, Move, take

logger = logging.getLogger(__name__)


def _nonzero(weighted: Weighted, scale: float = 1.0) -> Weighted:
    keep = weighted.weights != 0
    return Weighted(weighted.indices[keep], scale * weighted.weights[keep])


def correct(
    evaluator: Evaluator,
    check: Check,
    trained: LoraParams,
    params: LoraParams,
    weight: float,
    on_step: Callable[[StepRecord], None],
) -> tuple[LoraParams, tuple[StepRecord, ...], str]:
    """At most `config.correctors` Newton steps.

    Args:
        evaluator: objective, request and configuration.
        check: the trust region's examples.
        trained: the adapter that was trained on the data as they stood.
        params: where to begin.
        weight: what is left of the named rows' weight or way; correctors do not change it.
        on_step: called after every accepted step.

    Returns:
        The adapter, one record per step, and why they ended.
    """
    problem, config = evaluator.problem, evaluator.config
    size = evaluator.curvature_sample
    after_total = problem.num_edited_total
    # The same retained rows in both objectives.
    before = _nonzero(problem.path_mean(1.0, size, np.random.default_rng([config.seed, 6])))
    after = _nonzero(
        problem.path_mean(0.0, size, np.random.default_rng([config.seed, 6])), problem.num_trained / after_total
    )
    records: list[StepRecord] = []
    try:
        evaluator.cost.spend("rhs", GRADIENT * len(before.indices))
        left_over = float(trees.tree_norm(evaluator.gradient(trained, before)))
        probe_scale = len(problem.retained) / max(int(check.is_probe.sum()), 1)
        for _ in range(config.correctors):
            step_cost = evaluator.largest_solve_cost(len(after.indices)) + check.least_cost
            evaluator.cost.reserve(GRADIENT * len(after.indices) + step_cost)
            evaluator.cost.spend("rhs", GRADIENT * len(after.indices))
            rhs = trees.tree_scale(-1.0, evaluator.gradient(params, after))
            norm = float(trees.tree_norm(rhs))
            if norm <= left_over:
                return params, tuple(records), f"the edited gradient norm is back at {norm:.3g} of {left_over:.3g}"
            move = Move(
                weight_before=weight,
                weight_target=weight,
                rhs=rhs,
                curvature=after,
                check_retained=probe_scale / after_total,
                check_named=0.0,
                check_wanted=1 / after_total,
            )
            params, record = take(evaluator, check, params, move)
            records.append(record)
            on_step(record)
    except BudgetSpent as spent:
        return params, tuple(records), str(spent)
    except UnlearningError as error:
        logger.warning("The correctors end: %s", error)
        return params, tuple(records), str(error)
    return params, tuple(records), f"all {config.correctors} correctors were taken"
