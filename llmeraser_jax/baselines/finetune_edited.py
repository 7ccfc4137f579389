"""The control that needs no method at all: go on fine-tuning, on the edited data."""

from __future__ import annotations

import dataclasses

from llmeraser_jax.baselines.controls import ControlResult
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
