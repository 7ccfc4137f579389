"""What unlearning is compared with: retraining, the oracle, and controls without curvature."""

from llmeraser_jax.baselines.controls import ControlResult, gradient_ascent, scaled_rhs
from llmeraser_jax.baselines.retrain import retrain

__all__ = ["ControlResult", "gradient_ascent", "retrain", "scaled_rhs"]
