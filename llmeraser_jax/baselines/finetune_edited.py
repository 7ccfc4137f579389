"""The control that needs no method at all: go on fine-tuning, on the edited data."""

from __future__ import annotations

import dataclasses

from llmeraser_jax.baselines.controls import ControlResult
from llmeraser_jax.baselines.setting import Fitted, Setting
from llmeraser_jax.data import TokenDataset
from llmeraser_jax.lora import Lora
from llmeraser_jax.models import Model
from llmeraser_jax.training import TrainConfig, finetune


def finetune_edited(
    model: Model, lora: Lora, edited: TokenDataset, config: TrainConfig, *, epochs: int = 1
) -> ControlResult:
    """Ordinary fine-tuning of the trained adapter on the edited data: Adam from fresh moments, same schedule.

    Costs `epochs * n'` gradients. Removed examples are merely no longer rehearsed; edited ones are learnt.

    Args:
        model: the base.
        lora: the adapter trained on the data as they stood.
        edited: the n' examples after the request, encoded as for training.
        config: of the training; all but its epochs is kept.
        epochs: passes over the edited data.

    Raises:
        ValueError: as `training.finetune`.
    """
    result = finetune(model, edited, dataclasses.replace(config, epochs=epochs), lora=lora)
    return ControlResult(
        params=result.lora, seconds=result.seconds, gradient_equivalents=float(epochs * len(edited))
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneEdited:
    """Short fine-tuning on the edited data; its source is habit: it is what one does without a method.

    Attributes:
        epochs: passes over the edited data.
    """

    epochs: int = 1

    def __post_init__(self) -> None:
        if not (isinstance(self.epochs, int) and self.epochs >= 1):
            msg = f"epochs is {self.epochs!r}; it must be a whole number of at least 1."
            raise ValueError(msg)

    def fit(self, setting: Setting) -> Fitted:
        """Goes on training with the setting's hyper-parameters but the epochs."""
        result = finetune_edited(setting.model, setting.lora, setting.edited, setting.training, epochs=self.epochs)
        return Fitted(
            model=setting.model,
            params=result.params,
            before=setting.lora,
            gradient_equivalents=result.gradient_equivalents,
            seconds=result.seconds,
            details={"epochs": self.epochs},
        )
