"""E2URec: a teacher that has forgotten and one that remembers, distilled into the adapter.

Source: Wang et al. 2024 (arXiv 2403.03536). With z the logits of the trained adapter and z+ those of an
*augmented* one, which is trained further on S, the forgetting teacher has the logits `z - alpha relu(z+ - z)`:
what more training on S would raise is lowered. The remembering teacher is the trained adapter itself. Minimised is

    forget_share KL(forgetting teacher || theta) on S + (1 - forget_share) [KL(remembering teacher || theta) + l]
    on R

after some epochs of the first term alone, as the authors' public script has it; alpha and the share are that
script's defaults (its published call passes alpha 2 and gives the remembering side 0.6). What differs from the
source: the trained LoRA adapter is moved, where the source adds a new one to a wholly tuned T5; the augmented model
is a copy of the adapter, tuned with Adam, by default for 20 epochs at the same rate (the published calls: 1200
batches of 16 at a twentieth); KL is averaged over the response's tokens; and edits, whose wanted pair counts as
data to learn: its cross entropy has the coefficient of the retained rows (see `descent`).
"""

from __future__ import annotations

import dataclasses

from llmeraser_jax.rivals.descent import Descent, Phase, require_positive
from llmeraser_jax.rivals.terms import ForgettingTeacher, KLToReference
from llmeraser_jax.training import TrainConfig, finetune
from llmeraser_jax.types import LoraParams
from llmeraser_jax.unlearning import UnlearningTask
from llmeraser_jax.unlearning.budget import GRADIENT
from llmeraser_jax.unlearning.task import take


@dataclasses.dataclass(frozen=True, kw_only=True)
class E2URec(Descent):
    """Distillation from a forgetting and a remembering teacher.

    Attributes:
        alpha: how far the forgetting teacher goes.
        forget_share: weight of the forgetting teacher against the remembering one.
        forget_only_epochs: the first so many epochs look at S alone.
        augment_epochs: passes over S that the augmented adapter is trained for.
        augment_learning_rate: of that training; None is `learning_rate`.
    """

    alpha: float = 1.0
    forget_share: float = 0.5
    forget_only_epochs: int = 1
    augment_epochs: int = 20
    augment_learning_rate: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "alpha", "augment_epochs")
        if not 0 < self.forget_share < 1:
            msg = f"forget_share is {self.forget_share}; it must lie between 0 and 1."
            raise ValueError(msg)
        if not 0 <= self.forget_only_epochs < self.epochs:
            msg = (
                f"forget_only_epochs is {self.forget_only_epochs} of {self.epochs} epochs; it must be at least 0 "
                "and leave at least one for both teachers."
            )
            raise ValueError(msg)
        self._augmenting()

    def _augmenting(self) -> TrainConfig:
        rate = self.learning_rate if self.augment_learning_rate is None else self.augment_learning_rate
        return dataclasses.replace(self._optimiser(), epochs=self.augment_epochs, learning_rate=rate)

    def phases(self) -> tuple[Phase, ...]:
        """The forgetting teacher alone, then both."""
        forget, remember = ForgettingTeacher(alpha=self.alpha), KLToReference(cross_entropy=1.0)
        share = self.forget_share
        both = Phase(
            epochs=self.epochs - self.forget_only_epochs,
            forget=forget,
            forget_weight=share,
            wanted_weight=1 - share,
            retain=remember,
            retain_weight=1 - share,
        )
        if not self.forget_only_epochs:
            return (both,)
        return (Phase(epochs=self.forget_only_epochs, forget=forget), both)

    def teachers(self, task: UnlearningTask) -> tuple[tuple[LoraParams, ...], float]:
        """The trained adapter, and the one that is trained further on S as it was."""
        named = take(task.problem.examples, task.problem.named)
        config = self._augmenting()
        augmented = finetune(task.language_model, named, config, lora=task.adapter)
        return (task.adapter, augmented.lora), GRADIENT * config.epochs * len(named)
