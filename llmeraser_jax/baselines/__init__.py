"""What unlearning is compared with: retraining, the oracle, and controls without curvature."""

from llmeraser_jax.baselines.controls import ControlResult, gradient_ascent, gradient_difference, scaled_rhs
from llmeraser_jax.baselines.finetune_edited import finetune_edited
from llmeraser_jax.baselines.retrain import retrain

__all__ = [
    "ControlResult",
    "finetune_edited",
    "gradient_ascent",
    "gradient_difference",
    "retrain",
    "scaled_rhs",
]
