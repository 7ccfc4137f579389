"""Unlearning: a task and a method, to new parameters and a receipt."""

from llmeraser_jax.unlearning.attribution import attribute
from llmeraser_jax.unlearning.auto import Auto
from llmeraser_jax.unlearning.budget import Budget, Cost
from llmeraser_jax.unlearning.corrected import Corrected
from llmeraser_jax.unlearning.erase import erase
from llmeraser_jax.unlearning.inverse import CurvatureSpec, KroneckerPreconditioner, RowPreconditioner
from llmeraser_jax.unlearning.job import IncompleteError, erase_run
from llmeraser_jax.unlearning.matching import TargetMatching
from llmeraser_jax.unlearning.path import Path, log_odds_weights
from llmeraser_jax.unlearning.presets import METHODS, PAPER_DESCENT, PAPER_STEP, PUBLIC_SCRIPT
from llmeraser_jax.unlearning.problem import EditProblem, Weighted
from llmeraser_jax.unlearning.receipt import Receipt
from llmeraser_jax.unlearning.records import MatchingRecord, SolveRecord, UnlearningError
from llmeraser_jax.unlearning.result import Method, Result
from llmeraser_jax.unlearning.step import Step
from llmeraser_jax.unlearning.targets import TargetLosses
from llmeraser_jax.unlearning.task import UnlearningTask, make_problem, task_of_run
from llmeraser_jax.unlearning.trust_region import TrustRegion
from llmeraser_jax.unlearning.validity import RowOutcome, ValidityCheck, Verdict
from llmeraser_jax.unlearning.workspace import Workspace

__all__ = [
    "METHODS",
    "PAPER_DESCENT",
    "PAPER_STEP",
    "PUBLIC_SCRIPT",
    "Auto",
    "Budget",
    "Corrected",
    "Cost",
    "CurvatureSpec",
    "EditProblem",
    "IncompleteError",
    "KroneckerPreconditioner",
    "MatchingRecord",
    "Method",
    "Path",
    "Receipt",
    "Result",
    "RowOutcome",
    "RowPreconditioner",
    "SolveRecord",
    "Step",
    "TargetLosses",
    "TargetMatching",
    "TrustRegion",
    "UnlearningError",
    "UnlearningTask",
    "ValidityCheck",
    "Verdict",
    "Weighted",
    "Workspace",
    "attribute",
    "erase",
    "erase_run",
    "log_odds_weights",
    "make_problem",
    "task_of_run",
]
