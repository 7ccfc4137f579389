"""Unlearning: requests to right-hand sides, moves of the adapter, receipts."""

from llmeraser_jax.unlearning.config import EraseConfig
from llmeraser_jax.unlearning.cost import CostMeter
from llmeraser_jax.unlearning.dispatch import unlearn
from llmeraser_jax.unlearning.erase import EraseResult, erase, make_problem
from llmeraser_jax.unlearning.job import IncompleteError, erase_run
from llmeraser_jax.unlearning.path import log_odds_weights
from llmeraser_jax.unlearning.problem import EditProblem, Weighted
from llmeraser_jax.unlearning.receipt import Receipt
from llmeraser_jax.unlearning.steps import StepRecord, Unlearned, UnlearningError
from llmeraser_jax.unlearning.targets import TargetLosses
from llmeraser_jax.unlearning.validity import RowOutcome, ValidityCheck, Verdict

__all__ = [
    "CostMeter",
    "EditProblem",
    "EraseConfig",
    "EraseResult",
    "IncompleteError",
    "Receipt",
    "RowOutcome",
    "StepRecord",
    "TargetLosses",
    "Unlearned",
    "UnlearningError",
    "ValidityCheck",
    "Verdict",
    "Weighted",
    "erase",
    "erase_run",
    "log_odds_weights",
    "make_problem",
    "unlearn",
]
