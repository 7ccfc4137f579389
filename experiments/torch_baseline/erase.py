"""Owns the method: requests to right-hand side and curvature, solved and added to the adapter.

    b = (1/n) sum_S (g_i - g'_i),   delta = (C + rho I)^-1 b        published, paper, cg: C over the data as trained

and for the path, from weight w to w' at each step, with the end-of-step weight in the curvature:

    b = (w - w') (1/n) sum_S (g_i - g'_i),   C = (1/n) [sum_R C(z) + w' sum_S C(z_i) + (1 - w') sum_edited C(z'_i)]
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.torch_baseline.batches import Batch, make_batches, num_examples
from experiments.torch_baseline.config import BaselineConfig
from experiments.torch_baseline.curvature import (
    GRADIENT_EQUIVALENTS,
    KEPT,
    KEPT_GRADIENT_EQUIVALENTS,
    PRODUCTS,
    gradient_sum,
)
from experiments.torch_baseline.model import AdaptedModel, Params, axpy, norm, scaled
from experiments.torch_baseline.solvers import Solution, adam_on_quadratic, conjugate_gradients
from llmeraser_jax.data import Request, TokenDataset, edited_example, encode_examples
from llmeraser_jax.solvers import Status, describe, is_failure
from llmeraser_jax.unlearning import CostMeter, StepRecord, UnlearningError


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

    @property
    def edited_examples(self) -> np.ndarray:
        """Indices of the data after the request."""
        return np.concatenate([self.retained, self.wanted])


def edit_data(dataset: TokenDataset, requests: Sequence[Request], tokenizer: Any) -> EditedData:
    """Encodes the replacements as the training set was.

    Raises:
        ValueError: no request, or a change that is cut off at the recipe's `max_length`.
    """
    if not requests:
        msg = "There are no requests; nothing to erase."
        raise ValueError(msg)
    by_id = {request.id: request for request in requests}
    named, replaced, replacements = [], [], []
    for index, example in enumerate(dataset.examples):
        if example.id in by_id:
            named.append(index)
            replacement = edited_example(example, by_id[example.id])
            if replacement is not None:
                replaced.append(index)
                replacements.append(replacement)
    together = encode_examples(
        (*dataset.examples, *replacements),
        dataset.recipe,
        tokenizer,
        buckets=dataset.buckets,
        normalizer=dataset.normalizer,
    )
    wanted = np.arange(len(dataset), len(dataset) + len(replacements))
    for i, j in zip(replaced, wanted, strict=True):
        if np.array_equal(together.encoded[i].tokens, together.encoded[j].tokens):
            msg = (
                f"The change to {dataset.examples[i].id!r} is cut off at max_length = {dataset.recipe.max_length}."
            )
            raise ValueError(msg)
    return EditedData(dataset=together, num_trained=len(dataset), named=np.array(named, np.int64), wanted=wanted)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Erased:
    """The adapter after an erasure, and how it got there."""

    params: Params
    steps: tuple[StepRecord, ...]
    cost: CostMeter


class Eraser:
    """A model, the data and a configuration; counts what it computes."""

    def __init__(self, model: AdaptedModel, data: EditedData, config: BaselineConfig):
        self.model = model
        self.data = data
        self.config = config
        self.cost = CostMeter()

    def batches(
        self, indices: np.ndarray, weights: np.ndarray | float, chunk_size: int | None = None
    ) -> list[Batch]:
        """Examples with coefficients, on the model's device."""
        return make_batches(
            self.data.dataset,
            indices,
            np.broadcast_to(np.asarray(weights, np.float64), (len(indices),)),
            chunk_size=chunk_size or self.config.chunk_size,
            dtype=self.model.dtype,
            device=self.model.device,
        )

    def gradient(self, params: Params, batches: Sequence[Batch]) -> Params:
        """`sum_i c_i grad l_i`."""
        return gradient_sum(
            self.model, params, batches, l2=self.config.l2, logits_at_response=self.config.logits_at_response
        )

    def rhs(self, params: Params) -> Params:
        """`(1/n) sum_S (g_i - g'_i)`."""
        data, n = self.data, self.data.num_trained
        indices = np.concatenate([data.named, data.wanted])
        weights = np.concatenate([np.full(len(data.named), 1 / n), np.full(len(data.wanted), -1 / n)])
        self.cost.rhs += len(indices)
        return self.gradient(params, self.batches(indices, weights))

    def product(self, params: Params, batches: Sequence[Batch], v: Params) -> Params:
        """`(sum_i c_i C(z_i) + rho I) v`; the caller counts it."""
        config = self.config
        options = self._curvature_options()
        if config.kind == "hessian":
            options["mode"] = config.hessian_mode
        return axpy(config.rho, v, PRODUCTS[config.kind](self.model, params, batches, v, **options))

    def operator(self, params: Params, batches: Sequence[Batch]) -> Callable[[Params], Params]:
        """`product` as a function of the vector, its graphs kept where the configuration says so."""
        config = self.config
        if not config.keep_graphs:
            return functools.partial(self.product, params, batches)
        kept = KEPT[config.kind](self.model, params, batches, **self._curvature_options())
        return lambda v: axpy(config.rho, v, kept(v))

    def _curvature_options(self) -> dict[str, Any]:
        return {"l2": self.config.l2, "logits_at_response": self.config.logits_at_response}

    def curvature_batches(self, weight: float) -> list[Batch]:
        """The examples of `C` with their coefficients; for the path, `weight` is that at the step's end."""
        data, n = self.data, self.data.num_trained
        if self.config.mode != "path":
            chosen = self._sample(np.arange(n))
            return self.batches(chosen, 1 / len(chosen))
        retained = self._sample(data.retained)
        share = len(data.retained) / max(len(retained), 1)
        indices = np.concatenate([retained, data.named, data.wanted])
        weights = np.concatenate(
            [
                np.full(len(retained), share / n),
                np.full(len(data.named), weight / n),
                np.full(len(data.wanted), (1 - weight) / n),
            ]
        )
        return self.batches(indices, weights)

    def _sample(self, which: np.ndarray) -> np.ndarray:
        """All, or the same seeded sample at every call."""
        size = self.config.sample_size
        if self.config.curvature_data == "all" or size >= len(which):
            return which
        return np.sort(np.random.default_rng([self.config.seed, 1]).choice(which, size=size, replace=False))

    def solve_cg(self, params: Params, batches: Sequence[Batch], rhs: Params) -> Solution:
        """Conjugate gradients on a fixed sum over examples."""
        solution = conjugate_gradients(
            self.operator(params, batches),
            rhs,
            rtol=self.config.cg_rtol,
            max_steps=self.config.cg_max_steps,
        )
        # One more product for the true residual, and the one that met negative curvature.
        products = solution.num_steps + 1 + int(solution.negative_curvature)
        if self.config.keep_graphs:
            each = (1 + products) * KEPT_GRADIENT_EQUIVALENTS
        else:
            each = products * GRADIENT_EQUIVALENTS[self.config.kind]
        self.cost.curvature += each * num_examples(batches)
        return solution

    def solve_adam(
        self, params: Params, rhs: Params, on_iterate: Callable[[int, Params], None] = lambda step, iterate: None
    ) -> Solution:
        """Adam on the quadratic, one training example per product."""
        config, n = self.config, self.data.num_trained
        order = np.arange(n)
        if config.order == "shuffled":
            order = np.random.default_rng([config.seed, 2]).permutation(n)

        def term_mv(step: int, v: Params) -> Params:
            return self.product(params, self.batches(order[step % n : step % n + 1], 1.0), v)

        solution = adam_on_quadratic(
            term_mv,
            rhs,
            product_is_constant=config.mode == "published",
            learning_rate=config.learning_rate,
            num_steps=config.descent_steps,
            start=config.start,
            weight_decay=config.weight_decay,
            on_step=on_iterate,
        )
        self.cost.curvature += solution.num_steps * GRADIENT_EQUIVALENTS["hessian"]
        if is_failure(solution.status):
            return solution
        # What the loop does not know: the residual of the system it stands for.
        chosen = np.arange(n)
        if n > config.diagnostic_sample:
            chosen = np.sort(
                np.random.default_rng([config.seed, 3]).choice(n, config.diagnostic_sample, replace=False)
            )
        with self.model.dropout_as(False):
            product = self.product(params, self.batches(chosen, 1 / len(chosen)), solution.value)
        self.cost.diagnostics += GRADIENT_EQUIVALENTS["hessian"] * len(chosen)
        residual = norm(axpy(-1.0, product, rhs)) / norm(rhs)
        return dataclasses.replace(solution, relative_residual=residual)


def erase(
    eraser: Eraser,
    params: Params,
    *,
    on_step: Callable[[StepRecord, Params], None] = lambda record, params: None,
) -> Erased:
    """Moves the adapter as the configuration's mode says.

    Args:
        eraser: model, data and configuration.
        params: theta_hat, the adapter as trained.
        on_step: called after every step with its record and the adapter it led to.

    Raises:
        UnlearningError: a solve failed; there is no result.
    """
    config, model = eraser.config, eraser.model
    weights = config.weights()
    records = []
    for weight, target in itertools.pairwise(weights):
        with model.dropout_as(config.uses_descent and config.dropout):
            rhs = scaled(weight - target, eraser.rhs(params))
            if config.uses_descent:
                solution = eraser.solve_adam(params, rhs)
                least = math.nan
            else:
                batches = eraser.curvature_batches(target)
                solution = eraser.solve_cg(params, batches, rhs)
                least = config.rho + config.l2 * float(sum(float(batch.weights.sum()) for batch in batches))
        record = _record(config, weight, target, rhs, solution, least)
        params = axpy(1.0, solution.value, params)
        records.append(record)
        on_step(record, params)
    return Erased(params=params, steps=tuple(records), cost=eraser.cost)


def _record(
    config: BaselineConfig, weight: float, target: float, rhs: Params, solution: Solution, least: float
) -> StepRecord:
    """The record of a step.

    Raises:
        UnlearningError: the solve failed or gave no step.
    """
    if is_failure(solution.status):
        msg = f"The solve at weight {weight:.4g} {describe(solution.status)}."
        raise UnlearningError(msg)
    rhs_norm, delta_norm = norm(rhs), norm(solution.value)
    if not (math.isfinite(delta_norm) and delta_norm > 0):
        msg = f"The step at weight {weight:.4g} has norm {delta_norm}; nothing would be forgotten."
        raise UnlearningError(msg)
    bounded = config.kind == "gauss-newton" and least > 0
    return StepRecord(
        weight_before=weight,
        weight_after=target,
        scale=1.0,
        rhs_norm=rhs_norm,
        delta_norm=delta_norm,
        status=Status(solution.status),
        iterations=solution.num_steps,
        relative_residual=solution.relative_residual,
        negative_curvature=solution.negative_curvature,
        residual_history=solution.history,
        predicted_reduction=math.nan,
        actual_reduction=math.nan,
        forget_loss=math.nan,
        wanted_loss=math.nan,
        curvature=config.kind,
        ritz_extremes=solution.ritz_extremes,
        error_bound=solution.relative_residual * rhs_norm / least / delta_norm if bounded else math.nan,
    )
