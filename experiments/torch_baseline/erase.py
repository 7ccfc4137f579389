"""Owns the method: requests to right-hand side and curvature, solved and added to the adapter.

    b = (1/n) sum_S (g_i - g'_i),   delta = (C + rho I)^-1 b        C over the data as trained

and for a path, from weight w to w' at each step, with the end-of-step weight in the curvature:

    b = (w - w') (1/n) sum_S (g_i - g'_i),   C = (1/n) [sum_R C(z) + w' sum_S C(z_i) + (1 - w') sum_edited C(z'_i)]
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from experiments.torch_baseline import curvature, model, solvers
from experiments.torch_baseline.model import AdaptedModel, Batch, Params
from llmeraser_jax.checks import check_at_least
from llmeraser_jax.data import Request, TokenDataset, edited_example, encode_examples
from llmeraser_jax.solvers import Status, describe, is_failure

GRADIENT = 1.0  # cost of a gradient of one example, in gradient equivalents


class BaselineError(ValueError):
    """A solve gave no step; there is no result."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """How an erasure is computed.

    Attributes:
        mode: `published` is the released script (Adam on the quadratic, gradient `1/2 H d - b`); `paper` is the
            same loop with the gradient `H d + rho d - b`; `cg` solves by damped conjugate gradients.
        curvature: None is the Hessian for `published` and `paper` (which know no other), else `gauss-newton`.
        curvature_data: `cg`: the curvature over `all` examples, or over a seeded `sample`.
        sample_size: examples in the sample (of a path of the retained ones), and behind Adam's true residual.
        damping: rho; None is 0 for `published`, else 7e-3.
        path_weights: `cg`: weights of the named examples between steps, decreasing from 1 to 0; none is one step.
        cg_max_steps: conjugate-gradient steps per solve.
        cg_rtol: relative residual at which a solve stops.
        learning_rate: of Adam.
        descent_steps: of Adam, one product of one training example each, in order.
        start: every number of Adam's first iterate.
        weight_decay: of Adam.
        dropout: `published` and `paper`: leave the adapter's dropout on, as the released script does.
        keep_graphs: `cg`: make the graphs behind a solve's products once and hold them. Faster, for memory that
            grows with the examples of the curvature.
        chunk_size: examples per micro-batch.
        seed: of every sample drawn.
    """

    mode: Literal["cg", "paper", "published"] = "cg"
    curvature: Literal["gauss-newton", "hessian"] | None = None
    curvature_data: Literal["sample", "all"] = "sample"
    sample_size: int = 64
    damping: float | None = None
    path_weights: tuple[float, ...] = ()
    cg_max_steps: int = 15
    cg_rtol: float = 0.05
    learning_rate: float = 1e-5
    descent_steps: int = 20
    start: float = 1e-5
    weight_decay: float = 1e-5
    dropout: bool = True
    keep_graphs: bool = False
    chunk_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least(self, sample_size=1, cg_max_steps=1, descent_steps=1, chunk_size=1, rho=0, weight_decay=0)
        if self.descends and (self.curvature == "gauss-newton" or self.keep_graphs or self.path_weights):
            msg = f"mode {self.mode!r} descends with the Hessian; leave curvature, keep_graphs, path_weights out."
            raise ValueError(msg)
        if not 0 <= self.cg_rtol < 1:
            msg = f"cg_rtol is {self.cg_rtol}; it must be in [0, 1)."
            raise ValueError(msg)
        weights = self.weights
        if weights[0] != 1 or weights[-1] != 0 or np.any(np.diff(weights) >= 0):
            msg = f"path_weights is {weights}; it must decrease from 1 to 0."
            raise ValueError(msg)

    @property
    def descends(self) -> bool:
        """Whether the mode is Adam on the quadratic."""
        return self.mode in ("paper", "published")

    @property
    def kind(self) -> str:
        """The curvature that the mode uses."""
        return self.curvature or ("hessian" if self.descends else "gauss-newton")

    @property
    def rho(self) -> float:
        """The damping that the mode uses."""
        if self.damping is not None:
            return self.damping
        return 0.0 if self.mode == "published" else 7e-3

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights of the named examples before the first step, between steps and after the last."""
        return self.path_weights or (1.0, 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EditedData:
    """The data before and after a request.

    Attributes:
        dataset: the examples as trained on, then the replacements.
        num_trained: n.
        named: indices of S, increasing.
        wanted: indices of the replacements (edits only).
    """

    dataset: TokenDataset
    num_trained: int
    named: np.ndarray
    wanted: np.ndarray

    @property
    def retained(self) -> np.ndarray:
        """Indices of R."""
        return np.setdiff1d(np.arange(self.num_trained), self.named)


def edit_data(dataset: TokenDataset, requests: Sequence[Request], tokenizer: Any) -> EditedData:
    """Encodes the replacements as the training set was."""
    by_id = {request.id: request for request in requests}
    named = [k for k, example in enumerate(dataset.examples) if example.id in by_id]
    edited = [edited_example(dataset.examples[k], by_id[dataset.examples[k].id]) for k in named]
    replacements = [example for example in edited if example is not None]
    together = encode_examples((*dataset.examples, *replacements), dataset.recipe, tokenizer,
                               buckets=dataset.buckets, normalizer=dataset.normalizer)  # fmt: skip
    wanted = np.arange(len(dataset), len(together))
    return EditedData(dataset=together, num_trained=len(dataset), named=np.array(named, np.int64), wanted=wanted)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Erased:
    """The adapter after an erasure, and how it got there.

    Attributes:
        params: the adapter.
        steps: of each step what the package's receipts say under the same names, JSON-like.
        cost: gradient equivalents for right-hand sides, curvature and diagnostics.
    """

    params: Params
    steps: tuple[dict[str, Any], ...]
    cost: dict[str, float]


class Eraser:
    """A model, the data and a configuration; counts what it computes.

    Args:
        model: an `AdaptedModel`.
        data: before and after the request.
        config: how.
        l2: lambda that the adapter was trained with.
    """

    def __init__(self, model: AdaptedModel, data: EditedData, config: BaselineConfig, *, l2: float):
        self.model, self.data, self.config, self.l2 = model, data, config, l2
        self.cost = {"rhs": 0.0, "curvature": 0.0, "diagnostics": 0.0}

    def batches(self, indices: np.ndarray, weights: np.ndarray | float) -> list[Batch]:
        """Examples with coefficients, on the model's device."""
        weights = np.broadcast_to(np.asarray(weights, np.float64), (len(indices),))
        return model.make_batches(self.data.dataset, indices, weights, chunk_size=self.config.chunk_size,
                                  dtype=self.model.dtype, device=self.model.device)  # fmt: skip

    def rhs(self, params: Params) -> Params:
        """`(1/n) sum_S (g_i - g'_i)`."""
        data, n = self.data, self.data.num_trained
        indices = np.concatenate([data.named, data.wanted])
        weights = np.concatenate([np.full(len(data.named), 1 / n), np.full(len(data.wanted), -1 / n)])
        self.cost["rhs"] += GRADIENT * len(indices)
        return curvature.gradient_sum(self.model, params, self.batches(indices, weights), l2=self.l2)

    def product(self, params: Params, batches: Sequence[Batch], v: Params) -> Params:
        """`(sum_i c_i C(z_i) + rho I) v`; the caller counts it."""
        product = curvature.PRODUCTS[self.config.kind](self.model, params, batches, v, l2=self.l2)
        return model.axpy(self.config.rho, v, product)

    def curvature_batches(self, weight: float) -> list[Batch]:
        """The examples of `C` with their coefficients; for a path, `weight` is that at the step's end."""
        data, n = self.data, self.data.num_trained
        if not self.config.path_weights:
            chosen = self._sample(np.arange(n))
            return self.batches(chosen, 1 / len(chosen))
        retained = self._sample(data.retained)
        share = len(data.retained) / max(len(retained), 1)
        indices = np.concatenate([retained, data.named, data.wanted])
        counts = (len(retained), len(data.named), len(data.wanted))
        return self.batches(indices, np.repeat([share / n, weight / n, (1 - weight) / n], counts))

    def _sample(self, which: np.ndarray) -> np.ndarray:
        """All, or the same seeded sample at every call."""
        size = self.config.sample_size
        if self.config.curvature_data == "all" or size >= len(which):
            return which
        return np.sort(np.random.default_rng([self.config.seed, 1]).choice(which, size=size, replace=False))

    def solve_cg(self, params: Params, batches: Sequence[Batch], rhs: Params) -> solvers.Solution:
        """Conjugate gradients on a fixed sum over examples."""
        config, count = self.config, model.num_examples(batches)

        def mv(v: Params) -> Params:
            return self.product(params, batches, v)

        if config.keep_graphs:
            kept = curvature.KEPT[config.kind](self.model, params, batches, l2=self.l2)

            def mv(v: Params) -> Params:
                return model.axpy(config.rho, v, kept(v))

        solution = solvers.conjugate_gradients(mv, rhs, rtol=config.cg_rtol, max_steps=config.cg_max_steps)
        # One more product for the true residual, and the one that met negative curvature.
        products = solution.num_steps + 1 + int(solution.negative_curvature)
        if config.keep_graphs:
            self.cost["curvature"] += (1 + products) * curvature.KEPT_GRADIENT_EQUIVALENTS * count
        else:
            self.cost["curvature"] += products * curvature.GRADIENT_EQUIVALENTS[config.kind] * count
        return solution

    def solve_adam(
        self, params: Params, rhs: Params, on_iterate: Callable[[int, Params], None] = lambda step, iterate: None
    ) -> solvers.Solution:
        """Adam on the quadratic, one training example per product; its residual from the system it stands for."""
        config, n = self.config, self.data.num_trained
        solution = solvers.adam_on_quadratic(
            lambda step, v: self.product(params, self.batches(np.array([step % n]), 1.0), v),
            rhs,
            product_is_constant=config.mode == "published",
            learning_rate=config.learning_rate,
            num_steps=config.descent_steps,
            start=config.start,
            weight_decay=config.weight_decay,
            on_step=on_iterate,
        )
        price = curvature.GRADIENT_EQUIVALENTS["hessian"]
        self.cost["curvature"] += solution.num_steps * price
        if is_failure(solution.status):
            return solution
        batches = self.curvature_batches(0.0)
        with self.model.dropout_as(False):
            product = self.product(params, batches, solution.value)
        self.cost["diagnostics"] += price * model.num_examples(batches)
        residual = model.norm(model.axpy(-1.0, product, rhs)) / model.norm(rhs)
        return dataclasses.replace(solution, relative_residual=residual)


def erase(
    eraser: Eraser,
    params: Params,
    *,
    on_step: Callable[[dict[str, Any], Params], None] = lambda record, params: None,
) -> Erased:
    """Moves the adapter as the configuration says.

    Args:
        eraser: model, data and configuration.
        params: theta_hat, the adapter as trained.
        on_step: called after every step with its record and the adapter it led to.

    Raises:
        BaselineError: a solve failed.
    """
    config = eraser.config
    records = []
    for weight, target in itertools.pairwise(config.weights):
        with eraser.model.dropout_as(config.descends and config.dropout):
            rhs = model.scaled(weight - target, eraser.rhs(params))
            if config.descends:
                solution, least = eraser.solve_adam(params, rhs), math.nan
            else:
                batches = eraser.curvature_batches(target)
                solution, least = eraser.solve_cg(params, batches, rhs), eraser.l2 * model.weight_sum(batches)
        record = _record(config, weight, target, model.norm(rhs), solution, config.rho + least)
        params = model.axpy(1.0, solution.value, params)
        records.append(record)
        on_step(record, params)
    return Erased(params=params, steps=tuple(records), cost=eraser.cost)


def _record(
    config: BaselineConfig, weight: float, target: float, rhs_norm: float, solution: solvers.Solution, least: float
) -> dict[str, Any]:
    """The record of a step; `least` bounds a Gauss-Newton matrix's eigenvalues from below."""
    if is_failure(solution.status):
        msg = f"The solve at weight {weight:.4g} {describe(solution.status)}."
        raise BaselineError(msg)
    delta_norm = model.norm(solution.value)
    if not (math.isfinite(delta_norm) and delta_norm > 0):
        msg = f"The step at weight {weight:.4g} has norm {delta_norm}; nothing would be forgotten."
        raise BaselineError(msg)
    bounded = config.kind == "gauss-newton" and least > 0
    return {
        "weight_before": weight,
        "weight_after": target,
        "scale": 1.0,
        "rhs_norm": rhs_norm,
        "delta_norm": delta_norm,
        "status": describe(Status(solution.status)),
        "iterations": solution.num_steps,
        "relative_residual": solution.relative_residual,
        "negative_curvature": solution.negative_curvature,
        "residual_history": solution.history,
        "curvature": config.kind,
        "ritz_extremes": solution.ritz_extremes,
        "error_bound": solution.relative_residual * rhs_norm / least / delta_norm if bounded else None,
    }
