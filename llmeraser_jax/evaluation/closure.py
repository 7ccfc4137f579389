"""Gap closure: how much of the way from the model before to the retrained model unlearning went.

The formula, and when it means nothing: a gap no wider than the spread of retraining itself cannot be closed.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import TypeAlias

Number: TypeAlias = float | int

SEED_DEVIATIONS = 2.0  # a gap within this many standard deviations of the seeds is no gap


@dataclasses.dataclass(frozen=True)
class Closure:
    """`value` 1: at the retrained model's level; 0: as far from it as before; negative: further away.

    Attributes:
        value: the closure, or None where it is undefined.
        reason: why it is undefined, or what a defined value lacks; empty when nothing has to be said.
    """

    value: float | None
    reason: str = ""


def seed_mean(values: Sequence[Number]) -> float:
    """Mean over retraining seeds; nan where no seed is given."""
    return math.fsum(values) / len(values) if len(values) else math.nan


def seed_standard_deviation(values: Sequence[Number]) -> float | None:
    """Standard deviation over retraining seeds (ddof = 1); None for fewer than two or a value not finite."""
    finite = all(math.isfinite(value) for value in values)
    return statistics.stdev(map(float, values)) if len(values) > 1 and finite else None


def gap_closure(before: Number, unlearned: Number, retrained: Sequence[Number]) -> Closure:
    """`1 - |F_unlearned - F_retrained| / |F_before - F_retrained|`, F_retrained the mean over seeds.

    Overshooting counts as much as undershooting. Undefined where before and retrained are within two standard
    deviations of the seeds; with one seed no deviation is known and the value comes with that caveat.

    Args:
        before: F of the model that was edited.
        unlearned: F of the model after unlearning.
        retrained: F of each retrained model, one per seed.
    """
    if not len(retrained):
        return Closure(None, "no retrained model was given")
    target = seed_mean(retrained)
    named = {"before": before, "unlearned": unlearned, "retrained": target}
    for name, value in named.items():
        if not math.isfinite(value):
            return Closure(None, f"undefined: the value of {name} is {value}")
    gap = abs(before - target)
    deviation = seed_standard_deviation(retrained)
    if deviation is not None and gap <= SEED_DEVIATIONS * deviation:
        return Closure(
            None,
            f"undefined: before ({before:.4g}) and retrained ({target:.4g}) are within two seed standard "
            f"deviations (one is {deviation:.4g}, over {len(retrained)} seeds)",
        )
    if gap == 0:
        return Closure(None, f"undefined: before and retrained are equal ({before:.4g})")
    caveat = "" if deviation is not None else "one retraining seed: no deviation between seeds is known"
    return Closure(1 - abs(unlearned - target) / gap, caveat)


def kl_gap_closure(before: Number, unlearned: Number, retrained_left_out: Sequence[Number]) -> Closure:
    """Closure of the held-out KL. The target is the seed floor, the mean of `retrained_left_out`.

    Besides the condition of `gap_closure`, it is undefined unless `before` exceeds the floor: a model that is
    no further from the retrained ones than they are from each other has no gap to close.

    Args:
        before: held-out KL of the model that was edited.
        unlearned: held-out KL of the model after unlearning.
        retrained_left_out: KL of each retrained model to the mean of the others.
    """
    if len(retrained_left_out) < 2:
        return Closure(None, "the held-out KL needs at least two retrained models")
    floor = seed_mean(retrained_left_out)
    if math.isfinite(before) and math.isfinite(floor) and before <= floor:
        return Closure(None, f"undefined: before ({before:.4g}) does not exceed the seed floor ({floor:.4g})")
    return gap_closure(before, unlearned, retrained_left_out)
