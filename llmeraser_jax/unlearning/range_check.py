"""The range check: what a finished change did to the named rows and to retained ones, against what it predicted.

Influence functions promise a change in a neighbourhood. This module looks, before anything is written, whether
the change stayed where the promise holds: whether the named rows moved at all, and what it cost the others.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from llmeraser_jax import trees
from llmeraser_jax.losses import Objective, real_rows
from llmeraser_jax.parallel import to_host
from llmeraser_jax.types import ExampleStack, LoraParams
from llmeraser_jax.unlearning.cost import FORWARD, FORWARD_WITH_TANGENT
from llmeraser_jax.unlearning.evaluator import Evaluator, losses_by_bucket
from llmeraser_jax.unlearning.problem import Weighted

# A change of the named rows' mean loss below this many nats per token is no forgetting.
LEAST_CHANGE = 0.05
# Retained rows may lose this share of what the named rows moved, and `LEAST_CHANGE` on top, before the check fails.
HARM_SHARE = 0.25
_PROBE_SIZE = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossChange:
    """Mean data loss of a group of rows, nats per token.

    Attributes:
        before, after: the change.
        predicted: `after` by the quadratic model at `before` (slope and Gauss-Newton curvature along the change).
    """

    before: float
    after: float
    predicted: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class RangeCheck:
    """What the whole change did.

    Attributes:
        passed: whether the named rows moved and the retained ones stayed.
        verdict: in words.
        forget: the named rows as trained.
        wanted: their replacements; None where there are none.
        probe: a seeded sample of retained rows.
        num_probed: how many.
    """

    passed: bool
    verdict: str
    forget: LossChange
    wanted: LossChange | None
    probe: LossChange | None
    num_probed: int


@jax.jit
def _quadratic(objective: Objective, params: LoraParams, stack: ExampleStack, delta: LoraParams):
    """Per bucket: losses, and their second-order prediction at `params + delta`; [chunks, batch] each."""

    def predict(batch):
        outputs, tangent = jax.jvp(lambda p: objective.outputs(p, batch), (params,), (delta,))

        def along(t):
            return objective.output_loss_fn(jax.tree.map(lambda o, d: o + t * d, outputs, tangent), batch)

        zero, one = jnp.zeros(()), jnp.ones(())
        slope_at = lambda t: jax.jvp(along, (t,), (one,))[1]  # noqa: E731
        slope, curvature = jax.jvp(slope_at, (zero,), (one,))
        start = along(zero)
        return start, start + slope + 0.5 * curvature

    return tuple(jax.lax.map(predict, batches) for batches in stack.batches)


def check_range(
    evaluator: Evaluator, params: LoraParams, moved: LoraParams, *, asked: float = math.inf
) -> RangeCheck:
    """Compares an adapter with what it was; counted as diagnostics.

    Args:
        evaluator: objective, request and configuration.
        params: before.
        moved: after.
        asked: how far the mean loss of the named rows or of their replacements was to move, in nats per token:
            where that is little, half of it is no failure. Infinite where nobody knows.
    """
    problem = evaluator.problem
    # Apart from the streams of the path's samples, 1 plus the attempt: what a step protects cannot show its harm.
    rng = np.random.default_rng([evaluator.config.seed, 2**31 + 1])
    probe = problem.retained
    if len(probe) > _PROBE_SIZE:
        probe = np.sort(rng.choice(probe, size=_PROBE_SIZE, replace=False))
    indices = np.concatenate([problem.named, problem.wanted, probe]).astype(np.int64)
    stack = evaluator.stack(Weighted(indices, np.ones(len(indices))))
    buckets = np.array([problem.examples.bucket_of(int(i)) for i in indices])
    order = indices[np.argsort(buckets, kind="stable")]
    keep = real_rows(stack)

    def flat(parts) -> np.ndarray:
        return np.concatenate([part.astype(np.float64).reshape(-1) for part in to_host(parts)])[keep]

    modelled = _quadratic(evaluator.objective, params, stack, trees.tree_sub(moved, params))
    before, predicted = flat([m[0] for m in modelled]), flat([m[1] for m in modelled])
    after = flat(losses_by_bucket(evaluator.objective, moved, stack))
    evaluator.cost.diagnostics += (FORWARD_WITH_TANGENT + FORWARD) * len(indices)

    def change(group: np.ndarray) -> LossChange | None:
        which = np.isin(order, group)
        if not which.any():
            return None
        return LossChange(
            before=float(before[which].mean()),
            after=float(after[which].mean()),
            predicted=float(predicted[which].mean()),
        )

    forget = change(problem.named)
    assert forget is not None  # a request names at least one row
    wanted, probed = change(problem.wanted), change(probe)
    passed, verdict = _judge(forget, wanted, probed, asked)
    return RangeCheck(
        passed=passed, verdict=verdict, forget=forget, wanted=wanted, probe=probed, num_probed=len(probe)
    )


def _judge(
    forget: LossChange, wanted: LossChange | None, probe: LossChange | None, asked: float
) -> tuple[bool, str]:
    numbers = [forget.after, wanted.after if wanted else 0.0, probe.after if probe else 0.0]
    if not all(math.isfinite(number) for number in numbers):
        return False, "failed: a loss is not finite after the change"
    # Forgetting raises the loss of the named rows; where nothing was asked for, a little either way is no failure.
    moved = max(forget.after - forget.before, wanted.before - wanted.after if wanted else -math.inf)
    if moved < (min(LEAST_CHANGE, 0.5 * asked) if asked > 0 else -LEAST_CHANGE):
        return False, (
            f"failed: nothing was forgotten; the mean loss of the named rows moved by {moved:.2g} nats "
            f"({forget.before:.3g} -> {forget.after:.3g})"
        )
    if probe is None:
        return True, "passed: the named rows moved; there are no retained rows to look at"
    harm = probe.after - probe.before
    told = f"{probe.before:.3g} -> {probe.after:.3g} nats (predicted {probe.predicted:.3g})"
    if harm > HARM_SHARE * moved + LEAST_CHANGE:
        return False, f"failed: the retained rows were harmed; their mean loss went {told}"
    return True, f"passed: retained rows {told}"
