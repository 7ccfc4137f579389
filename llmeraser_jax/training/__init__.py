"""Training: LoRA fine-tuning that can be killed and restarted, and adoption of adapters trained elsewhere.

`training.job` (from files to a run directory) and `training.adopt` are imported by their own names.
"""

from llmeraser_jax.runs import TrainConfig
from llmeraser_jax.training.batches import epoch_order, step_indices
from llmeraser_jax.training.finetune import TrainResult, finetune
from llmeraser_jax.training.measure import Measurement, mean_loss, measure

__all__ = [
    "Measurement",
    "TrainConfig",
    "TrainResult",
    "epoch_order",
    "finetune",
    "mean_loss",
    "measure",
    "step_indices",
]
