"""Controls that a claim of unlearning must beat: ways to move that use no curvature.

They move along the right-hand side `b = (1/n) sum_S (g - g')`, gradient difference less what retained examples
object to, and are given the distance that the method under test moved. One step goes exactly as far; of several,
whose directions turn, the path is as long and its end no further away.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

from llmeraser_jax import trees
from llmeraser_jax.losses import Objective, gradient_sum
from llmeraser_jax.types import ExampleStack, LoraParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlResult:
    """A control's adapter and its cost.

    Attributes:
        params: the adapter.
        seconds: wall-clock time, compilation included.
        gradient_equivalents: gradients of one example that it took.
    """

    params: LoraParams
    seconds: float
    gradient_equivalents: float


def scaled_rhs(
    objective: Objective, params: LoraParams, direction: ExampleStack, *, distance: float, num_examples: int
) -> ControlResult:
    """`theta + c b` with c such that the step is `distance` long: influence without curvature.

    Args:
        objective: the loss.
        params: theta.
        direction: the named examples with the coefficients of `EditProblem.influence_rhs`.
        distance: Euclidean length of the step.
        num_examples: examples in `direction`.

    Raises:
        ValueError: the right-hand side is zero.
    """
    return gradient_ascent(objective, params, direction, distance=distance, num_examples=num_examples, num_steps=1)


def gradient_ascent(
    objective: Objective,
    params: LoraParams,
    direction: ExampleStack,
    *,
    distance: float,
    num_examples: int,
    num_steps: int = 10,
) -> ControlResult:
    """Normalised ascent on the loss of S (for edits: and descent on the wanted pairs), `distance` long in all.

    Args:
        objective: the loss.
        params: theta.
        direction: as for `scaled_rhs`; its gradient is taken anew at every step.
        distance: sum of the lengths of all steps.
        num_examples: examples in `direction`.
        num_steps: steps of equal length.

    Raises:
        ValueError: a gradient is zero.
    """
    return _climb(
        lambda params, step: gradient_sum(objective, params, direction),
        params,
        distance=distance,
        num_examples=num_examples,
        num_steps=num_steps,
    )


def gradient_difference(
    objective: Objective,
    params: LoraParams,
    direction: ExampleStack,
    retained: Sequence[ExampleStack],
    *,
    distance: float,
    num_examples: int,
) -> ControlResult:
    """Normalised ascent on the loss of S and descent on retained examples, `distance` long in all.

    Follows Liu, Liu and Stone 2022 (arXiv 2203.12817) as TOFU (arXiv 2401.06121) uses it; differs in steps of
    equal length instead of an optimiser's, and for edits also descends on the wanted pairs.

    Args:
        objective: the loss.
        params: theta.
        direction: as for `scaled_rhs`.
        retained: for each step the retained examples of that step, with the coefficients that their loss is
            subtracted with: positive, `1 / n` to count as much as an example of S.
        distance: sum of the lengths of all steps.
        num_examples: examples in `direction` and in one of `retained` together.

    Raises:
        ValueError: a gradient is zero, or there is no step.
    """
    if not retained:
        msg = "retained is empty; give one stack of retained examples for each step."
        raise ValueError(msg)

    def gradient(params: LoraParams, step: int) -> LoraParams:
        return trees.tree_sub(
            gradient_sum(objective, params, direction), gradient_sum(objective, params, retained[step])
        )

    return _climb(gradient, params, distance=distance, num_examples=num_examples, num_steps=len(retained))


def _climb(
    gradient_at: Callable[[LoraParams, int], LoraParams],
    params: LoraParams,
    *,
    distance: float,
    num_examples: int,
    num_steps: int,
) -> ControlResult:
    """`num_steps` steps of equal length along a gradient that is taken anew at each."""
    started = time.perf_counter()
    for step in range(num_steps):
        gradient = gradient_at(params, step)
        norm = float(trees.tree_norm(gradient))
        if not norm > 0:
            msg = f"The gradient along which the control moves has norm {norm}; it has no direction."
            raise ValueError(msg)
        params = trees.tree_axpy(distance / num_steps / norm, gradient, params)
    return ControlResult(
        params=params,
        seconds=time.perf_counter() - started,
        gradient_equivalents=float(num_steps * num_examples),
    )
