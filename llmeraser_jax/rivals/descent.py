"""Owns the loop of rivals that move the trained adapter by an optimiser on a loss of named and retained rows.

Every step takes a batch of S (in an order drawn anew each epoch), the replacements of its edited rows, and, where
the rival looks at retained rows, a batch of those from a permutation of R of its own. It minimises

    (1/B) sum_{S batch} forget(z) + (w/B) sum_{its replacements} l(z') + (v/B_R) sum_{R batch} retain(z)

so that a removal moves along `-g` and an edit along `-(g - g')`, as the right-hand side of the influence method
does. What `forget` and `retain` are, and w and v, is the rival's. The sources minimise the same without the
middle term: they know removals only. Optimiser: Adam with a linear warm-up and a cosine to zero, no decay of the
weights and no L2 term (some sources use AdamW with decay 0.01, which no objective here has), dropout off. The
sources' epochs are counted in passes over S, and so are these.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from llmeraser_jax import parallel, trees
from llmeraser_jax.lora import Lora
from llmeraser_jax.rivals.terms import CrossEntropy, ExampleLoss, terms_gradient
from llmeraser_jax.training import TrainConfig
from llmeraser_jax.training.batches import lay_out_mean, step_indices
from llmeraser_jax.training.finetune import adam_of, adam_step, learning_rates
from llmeraser_jax.types import LoraParams
from llmeraser_jax.unlearning import Result, UnlearningTask, Workspace
from llmeraser_jax.unlearning.budget import FORWARD, GRADIENT, Cost

_RETAINED_STREAM = 2**31  # apart from the order of S where both are drawn from one seed
_LEAST_MULTIPLIER = 1e-6  # instead of 0, at which the retained loss could not be read off the weighted sum


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """Some epochs with one loss.

    Attributes:
        epochs: passes over S.
        forget: loss of the named rows as they were trained on.
        forget_weight: its coefficient.
        wanted_weight: coefficient of the replacements' cross entropy.
        retain: loss of retained rows; None looks at none.
        retain_weight: its coefficient v.
        dual_rate: above 0, v is a multiplier of the constraint that the retained loss stay below what it was at the
            first step plus `retain_slack`: after each step it rises by `dual_rate` times the excess, or falls. Then
            w is v too.
        retain_slack: nats.
    """

    epochs: int
    forget: ExampleLoss
    forget_weight: float = 1.0
    wanted_weight: float = 1.0
    retain: ExampleLoss | None = None
    retain_weight: float = 1.0
    dual_rate: float = 0.0
    retain_slack: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Descent:
    """What all rivals of this kind let a user choose.

    Attributes:
        epochs: passes over the named rows.
        batch_size: named rows per step.
        retain_batch_size: retained rows per step; None is `batch_size`.
        microbatch_size: rows per forward and backward pass; None is the batch's.
        learning_rate: of Adam, at the end of the warm-up.
        warmup_ratio: share of all steps that it rises over.
        max_grad_norm: longer gradients are scaled to this norm; None never does.
        seed: of the order of named and of retained rows.
    """

    epochs: int = 5
    batch_size: int = 16
    retain_batch_size: int | None = None
    microbatch_size: int | None = None
    learning_rate: float = 1e-4
    warmup_ratio: float = 0.2
    max_grad_norm: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self._optimiser()  # the fields that it shares with training are checked there
        size = self.retain_batch_size
        if size is not None and not (isinstance(size, int) and size >= 1):
            msg = f"retain_batch_size is {size!r}; it must be a whole number of at least 1, or None."
            raise ValueError(msg)

    def _optimiser(self) -> TrainConfig:
        return TrainConfig(
            epochs=self.epochs,
            batch_size=self.batch_size,
            microbatch_size=self.microbatch_size,
            learning_rate=self.learning_rate,
            warmup_ratio=self.warmup_ratio,
            max_grad_norm=self.max_grad_norm,
            seed=self.seed,
            l2=0.0,
        )

    def phases(self) -> tuple[Phase, ...]:
        """What is minimised, epoch by epoch; their epochs add up to `epochs`."""
        raise NotImplementedError

    def teachers(self, task: UnlearningTask) -> tuple[tuple[LoraParams, ...], float]:
        """Frozen adapters that the losses look at, and what making them cost."""
        return (task.adapter,), 0.0

    def run(self, task: UnlearningTask, workspace: Workspace) -> Result:
        """Moves the task's adapter.

        Raises:
            ValueError: retained rows are needed, and every row is named.
            FloatingPointError: a loss or the adapter is no longer finite.
        """
        started = time.perf_counter()
        teachers, teacher_cost = self.teachers(task)
        descended = descend(task, self.phases(), self._optimiser(), teachers, self.retain_batch_size)
        return Result(
            model=task.language_model,
            params=descended.params,
            before=task.adapter,
            cost=Cost(training=teacher_cost + descended.gradient_equivalents, retraining=task.cost_of_retraining),
            seconds=time.perf_counter() - started,
            details={"num_steps": len(descended.history), "loss_terms": descended.history},
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForgetAndRetain(Descent):
    """A loss on S and, with `retain_weight` above 0, cross entropy on retained rows.

    Edits, which the sources do not know: the wanted pair counts as data to learn, with the coefficient of the
    retained rows (1 where they have none).

    Attributes:
        retain_weight: coefficient of the retained rows, S having 1; 0 leaves them out.
    """

    retain_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_non_negative(self, "retain_weight")

    def _forget(self) -> ExampleLoss:
        raise NotImplementedError

    def phases(self) -> tuple[Phase, ...]:
        """One, on S and, with a weight, on R."""
        weight = self.retain_weight
        return (
            Phase(
                epochs=self.epochs,
                forget=self._forget(),
                wanted_weight=weight if weight > 0 else 1.0,
                retain=CrossEntropy() if weight > 0 else None,
                retain_weight=weight,
            ),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Descended:
    """Where the loop ended, what it cost, and for each step the sum of each term, and the multiplier it used."""

    params: Lora
    gradient_equivalents: float
    history: list[dict[str, float]]


def require_positive(config: Any, *names: str) -> None:
    """Refuses fields that are not numbers above 0."""
    _require_number(config, names, lambda value: value > 0, "above 0")


def require_non_negative(config: Any, *names: str) -> None:
    """Refuses fields that are not numbers of at least 0."""
    _require_number(config, names, lambda value: value >= 0, "at least 0")


def _require_number(config: Any, names: Sequence[str], holds, expected: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not (isinstance(value, int | float) and math.isfinite(value) and holds(value)):
            msg = f"{name} is {value!r}; it must be a number {expected}."
            raise ValueError(msg)


def descend(
    task: UnlearningTask,
    phases: Sequence[Phase],
    optimiser: TrainConfig,
    teachers: tuple[LoraParams, ...],
    retain_batch_size: int | None,
) -> Descended:
    """Minimises the phases' losses one after the other, under one schedule of learning rates.

    Args:
        task: where the rows are, and the adapter to start from.
        phases: their epochs add up to the optimiser's.
        optimiser: Adam's settings, batch size and seed.
        teachers: frozen adapters.
        retain_batch_size: retained rows per step; None is the batch size.
    """
    problem, model = task.problem, task.language_model
    named, retained = problem.named, problem.retained

    def room(wanted: int, there: int) -> int:
        # Devices share out whole batches; without a mesh there is no need for more places than rows.
        return wanted if model.mesh is not None else min(wanted, there)

    size = room(optimiser.batch_size, len(named))
    retain_size = room(retain_batch_size or optimiser.batch_size, len(retained))
    if any(phase.retain for phase in phases) and not len(retained):
        msg = "Every training row is named; there is no retained row for this rival to look at."
        raise ValueError(msg)
    steps_per_epoch = -(-len(named) // size)
    plan = [phase for phase in phases for _ in range(phase.epochs * steps_per_epoch)]
    rates = learning_rates(optimiser, len(plan))
    adam = adam_of(optimiser)
    params = parallel.replicate(task.adapter, model.mesh)
    teachers = parallel.replicate(teachers, model.mesh)
    opt_state = parallel.replicate(adam.transformation().init(params), model.mesh)
    no_decay = trees.tree_zeros_like(params)

    def lay_out(rows: np.ndarray, weight: float, batch_size: int):
        stack = lay_out_mean(
            problem.examples,
            rows,
            weight,
            batch_size=batch_size,
            microbatch_size=min(optimiser.microbatch_size or batch_size, batch_size),
        )
        return parallel.place_stack(stack, model.mesh)

    cost, multiplier, bound = 0.0, None, None
    summed = []
    for step, phase in enumerate(plan):
        places = step_indices(step, seed=optimiser.seed, num_examples=len(named), batch_size=size)
        replacements = problem.replacements[places]
        wanted = replacements[replacements >= 0]
        weight = phase.retain_weight if multiplier is None else multiplier
        parts = [("forget", phase.forget, named[places], phase.forget_weight / len(places), size)]
        if len(problem.wanted):
            wanted_weight = weight if phase.dual_rate else phase.wanted_weight
            parts.append(("wanted", CrossEntropy(), wanted, wanted_weight / len(places), size))
        if phase.retain is not None:
            chosen = retained[
                step_indices(
                    step,
                    seed=(optimiser.seed + _RETAINED_STREAM) % 2**32,
                    num_examples=len(retained),
                    batch_size=retain_size,
                )
            ]
            parts.append(("retain", phase.retain, chosen, weight / len(chosen), retain_size))
        values, gradient = terms_gradient(
            model.apply,
            model.base,
            params,
            teachers,
            tuple(lay_out(rows, weight, batch_size) for _, _, rows, weight, batch_size in parts),
            terms=tuple(term for _, term, _, _, _ in parts),
        )
        params, opt_state, _ = adam_step(
            params, opt_state, gradient, no_decay, jnp.asarray(rates[step]), adam=adam, l2=0.0
        )
        cost += sum(
            len(rows) * term.network_share(model.apply) * (GRADIENT + FORWARD * term.num_teachers)
            for _, term, rows, _, _ in parts
        )
        told = {}
        if phase.dual_rate:
            told = {"multiplier": weight}
            retained_loss = float(values[-1]) / weight
            bound = retained_loss + phase.retain_slack if bound is None else bound
            multiplier = max(weight + phase.dual_rate * (retained_loss - bound), _LEAST_MULTIPLIER)
        summed.append(([name for name, *_ in parts], values, told))
    # Read at the end, so that no step waits for the host.
    history = [dict(zip(names, map(float, values), strict=True)) | told for names, values, told in summed]
    bad = [step for step, sums in enumerate(history) if not all(map(math.isfinite, sums.values()))]
    if bad or not bool(trees.tree_all_finite(params)):
        where = f"at step {bad[0] + 1} of {len(plan)} a loss" if bad else "after the last step the adapter"
        msg = f"The descent left the finite numbers: {where} is nan or infinite. Lower the learning rate."
        raise FloatingPointError(msg)
    return Descended(params=params, gradient_equivalents=cost, history=history)
