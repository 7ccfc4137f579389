"""Forgetting by arithmetic on checkpoints: MSA and the negated task vector.

Both fine-tune an origin on S as it was and subtract what that changed, times a scale:

    theta = theta_trained - scale (tune(origin, S) - origin) + scale (tune(origin, S') - origin)

Sources: task vectors, Ilharco et al. 2022 (arXiv 2212.04089), whose origin is here the trained adapter, the model
that is edited; MSA, Rezaei et al. 2025 (arXiv 2506.20941), whose origin is a checkpoint from before S was seen,
here the adapter that training started from. What differs from both: the last term, for edits alone, whose
replacements S' they do not know; the tuning is the task's own training with other epochs; an adapter's two factors
are added and subtracted, and not the product that the network sees; MSA's vector of retained rows (its beta) is
left out, since tuning on those costs nearly a retraining.
"""

from __future__ import annotations

import dataclasses
import time

import numpy as np

from llmeraser_jax import trees
from llmeraser_jax.checks import check_at_least
from llmeraser_jax.rivals.descent import require_positive
from llmeraser_jax.training import finetune
from llmeraser_jax.types import LoraParams
from llmeraser_jax.unlearning import Cost, Result, UnlearningTask, Workspace
from llmeraser_jax.unlearning.budget import GRADIENT
from llmeraser_jax.unlearning.task import take


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskVector:
    """Subtracts what further training on S changes in the trained adapter.

    Attributes:
        scale: of the vectors.
        epochs: passes over S, and over its replacements.
    """

    scale: float = 1.0
    epochs: int = 5

    def __post_init__(self) -> None:
        require_positive(self, "scale")
        check_at_least(self, epochs=1)

    def _origin(self, task: UnlearningTask) -> LoraParams:
        return task.adapter

    def run(self, task: UnlearningTask, workspace: Workspace) -> Result:
        """Moves the task's adapter.

        Raises:
            ValueError: the origin is not known.
            RunError: the training's hyper-parameters are not wholly known.
        """
        started = time.perf_counter()
        problem, origin = task.problem, self._origin(task)
        training = dataclasses.replace(task.require_training(), epochs=self.epochs)
        params, norms = task.adapter, []
        parts: tuple[tuple[np.ndarray, float], ...] = ((problem.named, -self.scale), (problem.wanted, self.scale))
        for rows, scale in parts:
            if len(rows):
                tuned = finetune(task.language_model, take(problem.examples, rows), training, lora=origin).lora
                vector = trees.tree_sub(tuned, origin)
                norms.append(float(trees.tree_norm(vector)))
                params = trees.tree_axpy(scale, vector, params)
        count = len(problem.named) + len(problem.wanted)
        return Result(
            model=task.language_model,
            params=params,
            before=task.adapter,
            cost=Cost(training=GRADIENT * self.epochs * count, retraining=task.cost_of_retraining),
            seconds=time.perf_counter() - started,
            details={"vector_norms": norms},
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MSA(TaskVector):
    """Subtracts what training on S alone makes of the adapter that training started from."""

    def _origin(self, task: UnlearningTask) -> LoraParams:
        if task.initial is None:
            msg = "MSA's vector begins at the adapter that training started from, and the task has none (initial)."
            raise ValueError(msg)
        return task.initial
