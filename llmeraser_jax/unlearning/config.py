"""What a user chooses about an erasure; validated, hashable, written out with every result."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import tyro

from llmeraser_jax.curvature import CURVATURES


@dataclasses.dataclass(frozen=True, kw_only=True)
class EraseConfig:
    """Hyper-parameters of `erase`.

    Attributes:
        method: `path` re-linearises `num_steps` times on the way from the old to the new data; `step` is the
            paper's single step. A single step does not forget what was memorised: its gradient has vanished.
        rhs: `influence` is `(1/n) sum_S (g - g')`; `newton` is minus the gradient of the edited objective,
            which carries along whatever gradient training left over. `newton` goes with `step`.
        curvature: `gauss-newton` (positive semidefinite) or `hessian` (indefinite on a tuned network).
        curvature_data: the training examples behind the curvature besides the named ones: `all`, `retained`
            (the named ones left out), or `sample` (`sample_size` of them, redrawn at every step of the path).
        sample_size: examples in a sample, and in the retained probe that guards every step.
        damping: rho, added to the curvature besides the L2 term's lambda.
        num_steps: K, the steps of the path.
        log_odds_range: the path's weights are 1, then evenly spaced in log(w / (1 - w)) from this number down
            to its negative, then 0 (the range is widened to log(4 num_steps) where that is more).
        trust_region: compare each step's predicted with its actual change; shorten it where they disagree.
        min_ratio: a step is accepted when actual / predicted reduction is at least this.
        max_step_ratio: a step is at most this fraction of the adapter's norm; 0 sets no limit. Part of the
            trust region.
        cg_max_steps: conjugate-gradient steps per solve.
        cg_rtol: relative residual at which a solve stops.
        l2: lambda that the adapter was trained with; a run directory supplies its own.
        chunk_size: examples per micro-batch; memory grows with it, results do not change.
        seed: of every sample drawn.
        diagnostic_sample: examples behind the reported gradient norms.
        audit: compute the diagnostics on all examples instead of a sample.
    """

    method: Literal["path", "step"] = "path"
    rhs: Literal["influence", "newton"] = "influence"
    curvature: Literal["gauss-newton", "hessian"] = "gauss-newton"
    curvature_data: Literal["sample", "all", "retained"] = "sample"
    sample_size: int = 64
    damping: float = 7e-3
    num_steps: int = 8
    log_odds_range: float = 4.0
    trust_region: bool = True
    min_ratio: float = 0.25
    max_step_ratio: float = 0.05
    cg_max_steps: int = 15
    cg_rtol: float = 0.05
    l2: Annotated[float, tyro.conf.Suppress] = 0.0  # no flag: a run directory states it
    chunk_size: int = 16
    seed: int = 0
    diagnostic_sample: int = 64
    audit: bool = False

    def __post_init__(self) -> None:
        choices = {
            "method": ("path", "step"),
            "rhs": ("influence", "newton"),
            "curvature": tuple(CURVATURES),
            "curvature_data": ("sample", "all", "retained"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                msg = f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}."
                raise ValueError(msg)
        if self.method == "path" and self.rhs == "newton":
            msg = "rhs 'newton' corrects towards the edited data in one solve; use it with method 'step'."
            raise ValueError(msg)
        for name in ("sample_size", "num_steps", "cg_max_steps", "chunk_size", "diagnostic_sample"):
            if getattr(self, name) < 1:
                msg = f"{name} is {getattr(self, name)}; it must be at least 1."
                raise ValueError(msg)
        for name in ("damping", "l2", "max_step_ratio"):
            if not getattr(self, name) >= 0:
                msg = f"{name} is {getattr(self, name)}; it must be at least 0."
                raise ValueError(msg)
        if not self.log_odds_range > 0:
            msg = f"log_odds_range is {self.log_odds_range}; it must be above 0."
            raise ValueError(msg)
        if not 0 < self.min_ratio < 1:
            msg = f"min_ratio is {self.min_ratio}; it must lie between 0 and 1."
            raise ValueError(msg)
        if not 0 <= self.cg_rtol < 1:
            msg = f"cg_rtol is {self.cg_rtol}; it must be in [0, 1)."
            raise ValueError(msg)
