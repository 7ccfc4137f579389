"""What a user chooses about an erasure; validated, hashable, written out with every result."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Literal

import tyro

from llmeraser_jax.curvature import CURVATURES

_MAX_LOG_ODDS_RANGE = 16.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EraseConfig:
    """Hyper-parameters of `erase`.

    Attributes:
        method: `matched` takes a few influence steps whose coefficients are solved for, so that every named row
            ends where an unseen (or, for a replacement, a trained) row is; removals need held-out rows for it.
            `path` re-linearises on the way from the old to the new data and needs nothing besides. `step` is the
            paper's single step, which does not forget what was memorised. `auto` is `matched` where its
            targets are known and `path` where they are not.
        rhs: `influence` is `(1/n) sum_S (g - g')`; `newton` is minus the gradient of the edited objective,
            which carries along whatever gradient training left over. `newton` goes with `step`.
        curvature: `gauss-newton` (positive semidefinite), `hessian` (indefinite on a tuned network),
            `empirical-fisher`, or `auto`: the Hessian where the first solve meets no non-positive curvature, else
            Gauss-Newton. The matched way always factors Gauss-Newton.
        curvature_data: the training examples behind the curvature besides the named ones: `all`, `retained`
            (the named ones left out), or `sample` (`sample_size` of them, redrawn at every step of the path).
        sample_size: examples in a sample of the retained ones. Where not given: 64 for path and step; for
            matched as many as are named, but 96 at least and 256 at most.
        draws: random rows per sampled example, of the factored curvature (matched) and of Kronecker factors
            (ekfac).
        refresh_every: steps between fresh curvature samples (matched only).
        max_standard_error: the curvature sample grows until the first step's standard error, over its norm, is at
            most this (where `sample_size` is not given, for step and path).
        repairs: at most so many steps after the K, in which freshly drawn retained rows are brought back to the
            loss they had; they end early where a fresh sample has lost less than 0.02 nats per token and the named
            rows have arrived (matched only).
        repair_size: retained rows in each repair; where not given as many as are named, but 128 at least and 256
            at most (matched only).
        row_ridge: how far rows may miss their targets to spare the others: a ridge relative to their mean
            influence on themselves (matched only).
        target_loss: where removed rows should end, nats per token, instead of the held-out rows' mean loss.
        similar_share: share of the curvature's sample that is drawn in proportion to how much a retained row's
            text shares with the named rows; the coefficients undo the preference, so the estimate stays unbiased.
            0 draws uniformly. Not for `curvature_data="all"`.
        solver: of step and path: `cg`; `minres`, which negative eigenvalues do not stop; `descent`, the paper's
            mini-batch descent on the quadratic program; `lissa`; `ekfac`, one conjugate-gradient step
            preconditioned with Kronecker factors, for single steps: the factors belong to the adapter and serve
            every later request; or `reference-compat`, the public script's constants, to compare against and
            not to use.
        preconditioner: of `cg` with Gauss-Newton: `factored` inverts 8 random rows per example exactly, and takes a
            third to a half of the products (measured: `experiments/preconditioners`).
        solver_steps: mini-batch products of `descent` and `lissa` (`reference-compat` takes its own 20).
        solver_batch_size: examples in each of these mini-batches, taken in one pass, so that memory grows with it
            (`reference-compat` draws single ones).
        learning_rate: of `descent`, in units of 1 / (largest eigenvalue + rho), which a few products estimate;
            below 2. `lissa` scales by the same estimate.
        memory_budget_bytes: how much a solve may keep to save the primal pass of every product after the first;
            0 recomputes always. Results do not change.
        operands: of the matrix products in a solve. `bfloat16` rounds what is multiplied and sums in float32, all
            else staying float32: for the matrix units of a GPU or TPU. Residuals are computed in float32 and solved
            for again until they meet `cg_rtol`, and no solve goes below the rounded product's measured asymmetry.
            Step and path with `cg` or `minres`.
        stream: copy the curvature's examples to the device one micro-batch at a time, and save the state of every
            solve as it goes, so that an erasure that was killed goes on where it was (step and path with `cg`).
        damping: rho, added to the curvature besides the L2 term's lambda; with another `damping_kind` a factor.
            Solver `reference-compat` adds none, as the public script.
        damping_kind: `constant`; or `damping` times the curvature's mean eigenvalue (`mean-eigenvalue`), or
            times that of each LoRA matrix of each layer (`per-matrix`), both estimated with 4 products and never
            below 1e-5.
        correctors: at most so many Newton steps on the edited objective afterwards, each with a trust region, on
            one fixed sample. They end early where the gradient norm of the edited objective on that sample is back
            at what training itself had left of its own.
        num_steps: K. Where not given: 8 for path; 4 for matched, or 3 or 2 where a budget would leave no room for
            a repair.
        log_odds_range: the path's weights are 1, then evenly spaced in log(w / (1 - w)) from this number down
            to its negative, then 0 (the range is widened to log(4 num_steps) where that is more).
        trust_region: compare each step's predicted with its actual change; shorten it where they disagree.
        min_ratio: a step is accepted when actual / predicted reduction is at least this.
        max_step_ratio: a step is at most this fraction of the adapter's norm; 0 sets no limit. Part of the
            trust region.
        cg_max_steps: conjugate-gradient steps per solve.
        cg_rtol: relative residual at which a solve stops.
        budget: at most this share of a retraining's gradient equivalents (epochs times examples after the
            request); where not given 1, since whoever would pay more is better served by a retraining. Steps are
            planned to leave room for a repair and every cost is asked for before it is spent: what was reached by
            then is the result, and the receipt says that it is partial. `inf` lifts the limit.
        l2: lambda that the adapter was trained with; a run directory supplies its own.
        chunk_size: examples per micro-batch; memory grows with it, results do not change.
        seed: of every sample drawn.
        diagnostic_sample: examples behind the reported gradient norms.
        audit: compute the diagnostics on all examples instead of a sample.
    """

    method: Literal["auto", "matched", "path", "step"] = "auto"
    rhs: Literal["influence", "newton"] = "influence"
    curvature: Literal["gauss-newton", "hessian", "empirical-fisher", "auto"] = "gauss-newton"
    curvature_data: Literal["sample", "all", "retained"] = "sample"
    sample_size: int | None = None
    draws: int = 1
    refresh_every: int = 2
    max_standard_error: float = 0.2
    repairs: int = 5
    repair_size: int | None = None
    row_ridge: float = 0.01
    target_loss: float | None = None
    similar_share: float = 0.0
    solver: Literal["cg", "minres", "descent", "lissa", "ekfac", "reference-compat"] = "cg"
    preconditioner: Literal["none", "factored"] = "none"
    solver_steps: int = 100
    solver_batch_size: int = 16
    learning_rate: float = 0.5
    memory_budget_bytes: int = 2**30
    operands: Literal["float32", "bfloat16"] = "float32"
    stream: bool = False
    damping: float = 7e-3
    damping_kind: Literal["constant", "mean-eigenvalue", "per-matrix"] = "constant"
    correctors: int = 0
    num_steps: int | None = None
    log_odds_range: float = 4.0
    trust_region: bool = True
    min_ratio: float = 0.25
    max_step_ratio: float = 0.05
    cg_max_steps: int = 15
    cg_rtol: float = 0.05
    budget: float | None = None
    l2: Annotated[float, tyro.conf.Suppress] = 0.0  # no flag: a run directory states it
    chunk_size: int = 16
    seed: int = 0
    diagnostic_sample: int = 64
    audit: bool = False

    def __post_init__(self) -> None:
        choices = {
            "method": ("auto", "matched", "path", "step"),
            "rhs": ("influence", "newton"),
            "curvature": (*CURVATURES, "auto"),
            "curvature_data": ("sample", "all", "retained"),
            "solver": ("cg", "minres", "descent", "lissa", "ekfac", "reference-compat"),
            "preconditioner": ("none", "factored"),
            "damping_kind": ("constant", "mean-eigenvalue", "per-matrix"),
            "operands": ("float32", "bfloat16"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                msg = f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}."
                raise ValueError(msg)
        if self.method != "step" and self.rhs == "newton":
            msg = "rhs 'newton' corrects towards the edited data in one solve; use it with method 'step'."
            raise ValueError(msg)
        if self.method == "matched" and self.damping_kind != "constant":
            msg = f"damping_kind is {self.damping_kind!r}; the matched way takes 'constant' only."
            raise ValueError(msg)
        if self.operands == "bfloat16" and (
            self.method not in ("step", "path")
            or self.solver not in ("cg", "minres")
            or self.preconditioner != "none"
            or self.stream
        ):
            msg = (
                "operands 'bfloat16' go with method 'step' or 'path' and solver 'cg' or 'minres', without a "
                f"preconditioner or stream; got {self.method!r}, {self.solver!r}, {self.preconditioner!r}, stream "
                f"{self.stream}."
            )
            raise ValueError(msg)
        if self.preconditioner == "factored" and (
            self.solver != "cg"
            or self.curvature != "gauss-newton"
            or self.stream
            or self.damping_kind != "constant"
        ):
            msg = (
                "preconditioner 'factored' goes with solver 'cg', curvature 'gauss-newton' and constant damping, "
                f"not stream; got {self.solver!r}, {self.curvature!r}, {self.damping_kind!r}, stream {self.stream}."
            )
            raise ValueError(msg)
        if self.solver == "ekfac" and (
            self.method != "step" or self.curvature != "gauss-newton" or self.damping_kind != "constant"
        ):
            msg = (
                "solver 'ekfac' factors the Gauss-Newton matrix once, for method 'step' with a constant damping; "
                f"got method {self.method!r}, curvature {self.curvature!r}, damping_kind {self.damping_kind!r}."
            )
            raise ValueError(msg)
        if self.stream and (self.method not in ("step", "path") or self.solver != "cg"):
            msg = f"stream goes with method 'step' or 'path' and solver 'cg'; got {self.method!r}, {self.solver!r}."
            raise ValueError(msg)
        if self.stream and self.damping_kind != "constant":
            msg = f"stream goes with a constant damping; damping_kind is {self.damping_kind!r}."
            raise ValueError(msg)
        counts = (
            "sample_size",
            "num_steps",
            "draws",
            "refresh_every",
            "repair_size",
            "cg_max_steps",
            "solver_steps",
            "solver_batch_size",
            "chunk_size",
        )
        for name in (*counts, "diagnostic_sample"):
            value = getattr(self, name)
            if value is not None and value < 1:
                msg = f"{name} is {value}; it must be at least 1."
                raise ValueError(msg)
        for name in ("target_loss", "budget", "max_standard_error"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                msg = f"{name} is {value}; it must be above 0."
                raise ValueError(msg)
        for name in (
            "damping",
            "l2",
            "max_step_ratio",
            "row_ridge",
            "memory_budget_bytes",
            "correctors",
            "repairs",
        ):
            if not getattr(self, name) >= 0:
                msg = f"{name} is {getattr(self, name)}; it must be at least 0."
                raise ValueError(msg)
        if not 0 <= self.similar_share < 1:
            msg = f"similar_share is {self.similar_share}; it must be in [0, 1): some rows are drawn uniformly."
            raise ValueError(msg)
        if not 0 < self.learning_rate < 2:
            msg = (
                f"learning_rate is {self.learning_rate}; it must lie between 0 and 2 (in units of 1 / eigenvalue)."
            )
            raise ValueError(msg)
        if not 0 < self.log_odds_range <= _MAX_LOG_ODDS_RANGE:
            msg = (
                f"log_odds_range is {self.log_odds_range}; it must be above 0 and at most {_MAX_LOG_ODDS_RANGE:g}, "
                "beyond which weights next to 1 round to 1."
            )
            raise ValueError(msg)
        if not (isinstance(self.seed, int) and 0 <= self.seed < 2**32):
            msg = f"seed is {self.seed}; it must be a whole number from 0 to 2**32 - 1."
            raise ValueError(msg)
        if self.target_loss is not None and not math.isfinite(self.target_loss):
            msg = f"target_loss is {self.target_loss}; it must be finite."
            raise ValueError(msg)
        if not 0 < self.min_ratio < 1:
            msg = f"min_ratio is {self.min_ratio}; it must lie between 0 and 1."
            raise ValueError(msg)
        if not 0 <= self.cg_rtol < 1:
            msg = f"cg_rtol is {self.cg_rtol}; it must be in [0, 1)."
            raise ValueError(msg)
