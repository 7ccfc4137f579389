"""What unlearning is compared with: retraining, the oracle, rival methods, and controls without curvature.

All have one interface: `BASELINES[name].fit(setting)`, or `fit(BASELINES[name], run, requests)` from a run
directory, returns a `Fitted`: an adapter or an ensemble, and its cost in gradient equivalents.
"""

from llmeraser_jax.baselines.ascent import EqualLengthAscent, GradientAscent, GradientDifference, KLAnchoredAscent
from llmeraser_jax.baselines.controls import ControlResult, gradient_ascent, gradient_difference, scaled_rhs
from llmeraser_jax.baselines.e2urec import E2URec
from llmeraser_jax.baselines.ensemble import Ensemble, EnsembleModel, ensemble_model, make_ensemble
from llmeraser_jax.baselines.ensemble_generation import generate_ensemble
from llmeraser_jax.baselines.erasing import Erasing
from llmeraser_jax.baselines.finetune_edited import FinetuneEdited, finetune_edited
from llmeraser_jax.baselines.preference import NPO, SimNPO
from llmeraser_jax.baselines.receraser import RecEraser
from llmeraser_jax.baselines.registry import BASELINES, get_baseline
from llmeraser_jax.baselines.retrain import Retrain, retrain
from llmeraser_jax.baselines.setting import Baseline, Fitted, Setting, fit, response_losses, setting_of_run
from llmeraser_jax.baselines.sisa import SISA

__all__ = [
    "BASELINES",
    "NPO",
    "SISA",
    "Baseline",
    "ControlResult",
    "E2URec",
    "Ensemble",
    "EnsembleModel",
    "EqualLengthAscent",
    "Erasing",
    "FinetuneEdited",
    "Fitted",
    "GradientAscent",
    "GradientDifference",
    "KLAnchoredAscent",
    "RecEraser",
    "Retrain",
    "Setting",
    "SimNPO",
    "ensemble_model",
    "finetune_edited",
    "fit",
    "generate_ensemble",
    "get_baseline",
    "gradient_ascent",
    "gradient_difference",
    "make_ensemble",
    "response_losses",
    "retrain",
    "scaled_rhs",
    "setting_of_run",
]
