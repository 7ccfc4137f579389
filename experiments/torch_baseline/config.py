"""Owns what a user chooses about an erasure with the baseline."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, Literal

import numpy as np
import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """Hyper-parameters.

    Attributes:
        mode: `published` is the released script (Adam on the quadratic, gradient `1/2 H d - b`); `paper` is the
            same loop with the gradient `H d + rho d - b`; `cg` solves the single step by damped conjugate
            gradients; `path` takes the weight of the named examples from 1 to 0 in several such steps.
        curvature: None is the Hessian for `published` and `paper` (which know no other), else `gauss-newton`.
        curvature_data: `cg` and `path`: the curvature over `all` examples, or over a seeded `sample`.
        sample_size: examples in the sample: of all of them for `cg`; of the retained ones, drawn once, for `path`.
        damping: rho; None is 0 for `published`, else 7e-3.
        num_steps: of the path.
        log_odds_range: the path's weights between 1 and 0 are evenly spaced in log(w / (1 - w)) from this number to
            its negative (widened to log(4 num_steps) where that is more).
        path_weights: the path's weights instead, decreasing from 1 to 0.
        cg_max_steps: conjugate-gradient steps per solve.
        cg_rtol: relative residual at which a solve stops.
        learning_rate: of Adam.
        descent_steps: of Adam, one product of one training example each.
        start: every number of Adam's first iterate.
        weight_decay: of Adam.
        order: the training examples that Adam takes: `in-order` from the first, or `shuffled` by the seed.
        dropout: `published` and `paper`: leave the adapter's dropout on, as the released script does. Off in the
            other modes, and in every reported loss.
        keep_graphs: `cg` and `path`: make the graphs behind a solve's products once and hold them. Faster, for
            memory that grows with the examples of the curvature.
        hessian_mode: how Hessian products are computed where graphs are not kept.
        logits_at_response: apply the head at response positions only.
        l2: lambda that the adapter was trained with; a run directory supplies its own.
        chunk_size: examples per micro-batch.
        seed: of every sample drawn.
        diagnostic_sample: examples behind the reported gradient norms, and behind Adam's true residual.
    """

    mode: Literal["cg", "path", "paper", "published"] = "cg"
    curvature: Literal["gauss-newton", "hessian"] | None = None
    curvature_data: Literal["sample", "all"] = "sample"
    sample_size: int = 64
    damping: float | None = None
    num_steps: int = 8
    log_odds_range: float = 4.0
    path_weights: tuple[float, ...] = ()
    cg_max_steps: int = 15
    cg_rtol: float = 0.05
    learning_rate: float = 1e-5
    descent_steps: int = 20
    start: float = 1e-5
    weight_decay: float = 1e-5
    order: Literal["in-order", "shuffled"] = "in-order"
    dropout: bool = True
    keep_graphs: bool = False
    hessian_mode: Literal["reverse-over-reverse", "forward-over-reverse"] = "reverse-over-reverse"
    logits_at_response: bool = True
    l2: Annotated[float, tyro.conf.Suppress] = 0.0  # no flag: a run directory states it
    chunk_size: int = 16
    seed: int = 0
    diagnostic_sample: int = 64

    def __post_init__(self) -> None:
        if self.uses_descent and self.curvature == "gauss-newton":
            msg = f"curvature is 'gauss-newton', but mode {self.mode!r} descends with the Hessian; leave it out."
            raise ValueError(msg)
        if self.uses_descent and self.keep_graphs:
            msg = f"keep_graphs is set, but mode {self.mode!r} takes each product at another example; leave it out."
            raise ValueError(msg)
        for name in (
            "sample_size",
            "num_steps",
            "cg_max_steps",
            "descent_steps",
            "chunk_size",
            "diagnostic_sample",
        ):
            if getattr(self, name) < 1:
                msg = f"{name} is {getattr(self, name)}; it must be at least 1."
                raise ValueError(msg)
        for name in ("log_odds_range", "learning_rate"):
            if not getattr(self, name) > 0:
                msg = f"{name} is {getattr(self, name)}; it must be above 0."
                raise ValueError(msg)
        for name in ("l2", "weight_decay", "rho"):
            if not getattr(self, name) >= 0:
                msg = f"{name} is {getattr(self, name)}; it must be at least 0."
                raise ValueError(msg)
        if not 0 <= self.cg_rtol < 1:
            msg = f"cg_rtol is {self.cg_rtol}; it must be in [0, 1)."
            raise ValueError(msg)
        weights = self.path_weights
        if weights and (weights[0] != 1 or weights[-1] != 0 or np.any(np.diff(weights) >= 0)):
            msg = f"path_weights is {weights}; it must decrease from 1 to 0."
            raise ValueError(msg)

    @property
    def uses_descent(self) -> bool:
        """Whether the mode is Adam on the quadratic."""
        return self.mode in ("paper", "published")

    @property
    def kind(self) -> str:
        """The curvature that the mode uses."""
        return self.curvature or ("hessian" if self.uses_descent else "gauss-newton")

    @property
    def rho(self) -> float:
        """The damping that the mode uses."""
        if self.damping is not None:
            return self.damping
        return 0.0 if self.mode == "published" else 7e-3

    @property
    def method(self) -> str:
        """What a receipt calls it."""
        return "path" if self.mode == "path" else "step"

    def weights(self) -> tuple[float, ...]:
        """Weights of the named examples before the first step, between steps and after the last."""
        if self.mode != "path":
            return (1.0, 0.0)
        if self.path_weights:
            return self.path_weights
        bound = max(self.log_odds_range, math.log(4 * self.num_steps))
        between = np.linspace(bound, -bound, self.num_steps - 1) if self.num_steps > 2 else np.zeros(1)
        inner = 1 / (1 + np.exp(-between[: self.num_steps - 1]))
        return (1.0, *map(float, inner), 0.0)

    def to_mapping(self) -> dict[str, Any]:
        """What a receipt states, under the names that the package's own receipts use where there are such."""
        return {
            "implementation": "torch_baseline",
            "method": self.method,
            "rhs": "influence",
            **dataclasses.asdict(self),
            "curvature": self.kind,
            "curvature_data": "in turn" if self.uses_descent else self.curvature_data,
            "damping": self.rho,
            "path_weights": self.weights(),
            "dropout": self.dropout and self.uses_descent,
        }
