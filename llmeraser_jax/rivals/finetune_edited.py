"""Short fine-tuning on the edited data: what one does without a method."""

from __future__ import annotations

import dataclasses

from llmeraser_jax.training import finetune
from llmeraser_jax.unlearning import Cost, Result, UnlearningTask, Workspace


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneEdited:
    """Fine-tunes the trained adapter on the edited data: Adam from fresh moments, the training's schedule.

    Removed examples are merely no longer rehearsed; edited ones are learnt.

    Attributes:
        epochs: passes over the edited data.
    """

    epochs: int = 1

    def __post_init__(self) -> None:
        if not (isinstance(self.epochs, int) and self.epochs >= 1):
            msg = f"epochs is {self.epochs!r}; it must be a whole number of at least 1."
            raise ValueError(msg)

    def run(self, task: UnlearningTask, workspace: Workspace) -> Result:
        """Goes on training with the task's hyper-parameters but the epochs."""
        training = dataclasses.replace(task.require_training(), epochs=self.epochs)
        result = finetune(task.language_model, task.edited, training, lora=task.adapter)
        return Result(
            model=task.language_model,
            params=result.lora,
            before=task.adapter,
            cost=Cost(training=float(self.epochs * len(task.edited)), retraining=task.cost_of_retraining),
            seconds=result.seconds,
            details={"epochs": self.epochs},
        )
