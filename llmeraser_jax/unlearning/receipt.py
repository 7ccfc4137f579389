"""The receipt: what was asked, what was done, what it cost, and how far to trust it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from llmeraser_jax.solvers import Status, describe
from llmeraser_jax.unlearning.config import EraseConfig
from llmeraser_jax.unlearning.steps import CERTIFIED_BELOW, StepRecord
from llmeraser_jax.unlearning.targets import TargetLosses
from llmeraser_jax.unlearning.validity import ValidityCheck

RECEIPT_FORMAT = 3

# Worst first: the status that stands for a path is the worst of its steps'.
_SEVERITY = (
    Status.NEGATIVE_CURVATURE,
    Status.RESIDUAL_DRIFT,
    Status.MAX_STEPS,
    Status.LEAST_SQUARES,
    Status.CONVERGED,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedExample:
    """One request as it was carried out.

    Attributes:
        id: of the training example.
        action: `remove`, `modify_query` or `correct_response`.
        hash_before: content hash of the example as trained on.
        hash_after: of its replacement; None for a removal.
    """

    id: str
    action: str
    hash_before: str
    hash_after: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolverSummary:
    """All solves together.

    Attributes:
        status: in words, of the solve that ended worst.
        converged: whether every solve met its tolerance.
        iterations: over all solves.
        relative_residual: the largest true one.
        negative_curvature: whether any solve met it.
        error_bound: the largest of the solves' bounds on their relative error; None where some has none.
        certified: whether it is below `steps.CERTIFIED_BELOW`: every solve is within so much of the exact step of
            its own sampled operator. Says nothing about the sample or the linearisation.
    """

    status: str
    converged: bool
    iterations: int
    relative_residual: float
    negative_curvature: bool
    error_bound: float | None
    certified: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientEquivalents:
    """Cost; 1 is one forward and backward pass of one example.

    Attributes:
        rhs, curvature, trust_region: what was spent on gradients of the forget rows, on curvature, and on looking
            at steps.
        total: the three together.
        diagnostics: what only reports; not in `total`.
        retraining: what a retraining costs; None where that is not known.
        share_of_retraining: `total / retraining`.
    """

    rhs: float
    curvature: float
    trust_region: float
    total: float
    diagnostics: float
    retraining: float | None
    share_of_retraining: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Receipt:
    """What `erase` did.

    Attributes:
        config: every choice, resolved.
        counts: named examples per action.
        named: the requests with content hashes.
        num_examples_before, num_examples_after: n and n'.
        method: what was done: matched, path or step; `config` has what was asked for.
        validity: what the change did, row by row; None where the adapter is unchanged.
        targets: what the rows' targets come from.
        complete: whether the validity check says so, or nothing had to change.
        outcome: in words.
        final_weight: weight of the named examples at the end, 1 as trained, 0 gone; for the matched way the
            share of the named rows' way to their targets that is left.
        rhs_norm: Euclidean norm of the first step's right-hand side, scaled to the whole request; 0 without steps.
        solver: all solves together.
        steps: one record per solve; none where every named pair was at its target, and the adapter is unchanged.
        num_correctors: how many of `steps`, the last ones, are Newton steps on the edited objective.
        corrected: why they ended; empty where none were asked for.
        attempts: ways that were tried and given up, with the reason; their cost is counted.
        curvature_reason: which curvature was solved with, and why.
        step_standard_error: of the first step over its norm, from the curvature sample's two halves: how much
            another seed would change it; None where it was not measured.
        product_asymmetry: `|u'Av - v'Au| / (||u|| ||Av||)` of the first operator for random u and v; conjugate
            gradients need it well below their tolerance.
        delta_norm, adapter_norm_before, adapter_norm_after: Euclidean norms.
        product_change_norm, product_norm_before: Frobenius norms of the change of `scaling * B A` over all modules
            and of that product before: what the network sees, whatever basis the adapter is written in.
        bf16_survival: share of the delta that is left after rounding both adapters to bfloat16:
            `<round(new) - round(old), delta> / ||delta||^2`.
        edited_gradient_norm_before, edited_gradient_norm_after: `||grad L'||`, on `gradient_norm_examples`
            examples of the edited data (all of them in an audit).
        seconds: wall-clock time, compilation included.
        peak_memory_bytes: of the process (CPU) or of the first device.
        gradient_equivalents: cost.
        versions: of the interpreter and the libraries.
    """

    format: int = RECEIPT_FORMAT
    config: EraseConfig
    counts: Mapping[str, int]
    named: tuple[NamedExample, ...]
    num_examples_before: int
    num_examples_after: int
    method: str
    complete: bool
    validity: ValidityCheck | None
    targets: TargetLosses | None
    outcome: str
    final_weight: float
    rhs_norm: float
    solver: SolverSummary
    steps: tuple[StepRecord, ...]
    num_correctors: int
    corrected: str
    attempts: tuple[str, ...]
    curvature_reason: str
    step_standard_error: float | None
    product_asymmetry: float
    delta_norm: float
    adapter_norm_before: float
    adapter_norm_after: float
    product_change_norm: float
    product_norm_before: float
    bf16_survival: float
    edited_gradient_norm_before: float
    edited_gradient_norm_after: float
    gradient_norm_examples: int
    seconds: float
    peak_memory_bytes: int | None
    gradient_equivalents: GradientEquivalents
    versions: Mapping[str, str | None]

    def to_mapping(self) -> dict[str, Any]:
        """A JSON-ready dict. Numbers that do not exist (no probe, no trust region) are null."""
        mapping = dataclasses.asdict(self)
        if mapping["config"]["budget"] == math.inf:
            mapping["config"]["budget"] = "inf"  # JSON has no infinity
        if math.isnan(self.product_asymmetry):
            mapping["product_asymmetry"] = None
        for step in mapping["steps"]:
            step["status"] = describe(step["status"])
            for name, value in step.items():
                if isinstance(value, float) and math.isnan(value):
                    step[name] = None
            step["ritz_extremes"] = [None if math.isnan(value) else value for value in step["ritz_extremes"]]
        for group in ("retained", "calibration"):
            change = (mapping["validity"] or {}).get(group)
            if change and math.isnan(change["predicted"]):
                change["predicted"] = None
        return mapping


def summarise_solves(steps: tuple[StepRecord, ...]) -> SolverSummary:
    """One summary of several solves: worst status, largest residual, sum of iterations."""
    if not steps:
        return SolverSummary(
            status="nothing to solve",
            converged=True,
            iterations=0,
            relative_residual=0.0,
            negative_curvature=False,
            error_bound=0.0,
            certified=True,
        )
    bounds = [step.error_bound for step in steps]
    bound = math.nan if any(map(math.isnan, bounds)) else max(bounds)
    worst = min((step.status for step in steps), key=_SEVERITY.index)
    return SolverSummary(
        status=describe(worst),
        converged=worst is Status.CONVERGED,
        iterations=sum(step.iterations for step in steps),
        relative_residual=max(step.relative_residual for step in steps),
        negative_curvature=any(step.negative_curvature for step in steps),
        error_bound=None if math.isnan(bound) else bound,
        certified=bound < CERTIFIED_BELOW,
    )
