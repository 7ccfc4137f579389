"""Methods that the package's own are compared with: retraining, the oracle, and rivals.

All are `unlearning.Method`s: `erase(task, RIVALS["npo"], budget=math.inf)` returns a `Result`, whose parameters
are an adapter or an ensemble. Rivals count what they cost, and keep to no budget.
"""

from llmeraser_jax.rivals.arithmetic import MSA, TaskVector
from llmeraser_jax.rivals.ascent import EqualLengthAscent, GradientAscent, GradientDifference, KLAnchoredAscent
from llmeraser_jax.rivals.e2urec import E2URec
from llmeraser_jax.rivals.ensemble import Ensemble, make_ensemble
from llmeraser_jax.rivals.ensemble_model import EnsembleModel, ensemble_model, generate_ensemble
from llmeraser_jax.rivals.finetune_edited import FinetuneEdited
from llmeraser_jax.rivals.gauss_newton import KFade, WinU
from llmeraser_jax.rivals.preference import NPO, SimNPO
from llmeraser_jax.rivals.receraser import RecEraser
from llmeraser_jax.rivals.registry import RIVALS, get_method
from llmeraser_jax.rivals.retrain import Retrain
from llmeraser_jax.rivals.rmu import RMU
from llmeraser_jax.rivals.sisa import SISA
from llmeraser_jax.rivals.token_losses import PDU, UNDIAL, WGA, SatImp

__all__ = [
    "MSA",
    "NPO",
    "PDU",
    "RIVALS",
    "RMU",
    "SISA",
    "UNDIAL",
    "WGA",
    "E2URec",
    "Ensemble",
    "EnsembleModel",
    "EqualLengthAscent",
    "FinetuneEdited",
    "GradientAscent",
    "GradientDifference",
    "KFade",
    "KLAnchoredAscent",
    "RecEraser",
    "Retrain",
    "SatImp",
    "SimNPO",
    "TaskVector",
    "WinU",
    "ensemble_model",
    "generate_ensemble",
    "get_method",
    "make_ensemble",
]
