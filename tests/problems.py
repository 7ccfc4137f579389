"""Small problems with known answers, laid out as the package's own interfaces."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from llmeraser_jax.losses import Objective, half_squared_error
from llmeraser_jax.types import ExampleStack
from llmeraser_jax.unlearning import EditProblem, MatchingRecord, Receipt, Result, SolveRecord, UnlearningTask


class ArrayBatch(NamedTuple):
    """Rows of a design matrix with a target each."""

    inputs: Any
    targets: Any


class ArrayExamples:
    """Rows of arrays as an `ExampleSet`; `num_buckets` > 1 deals them out to buckets in turn."""

    def __init__(self, inputs, targets, num_buckets: int = 1):
        self.inputs, self.targets, self.num_buckets = np.asarray(inputs), np.asarray(targets), num_buckets

    def __len__(self) -> int:
        return len(self.inputs)

    def bucket_of(self, index: int) -> int:
        return index % self.num_buckets

    def stack(self, indices, weights, *, chunk_size: int) -> ExampleStack:
        parts = []
        for bucket in range(self.num_buckets):
            chosen = np.flatnonzero(np.asarray(indices) % self.num_buckets == bucket)
            if not len(chosen):
                continue
            padding = -len(chosen) % chunk_size
            padded = np.concatenate([chosen, np.full(padding, -1)]).reshape(-1, chunk_size)
            rows = np.asarray(indices)[np.where(padded < 0, chosen[0], padded)]
            w = np.where(padded < 0, 0.0, np.asarray(weights, np.float64)[padded])
            batch = ArrayBatch(jnp.asarray(self.inputs[rows]), jnp.asarray(self.targets[rows]))
            parts.append((batch, jnp.asarray(w), jnp.asarray(padded, jnp.int32)))
        batches, stacked_weights, places = zip(*parts, strict=True)
        return ExampleStack(batches, stacked_weights, places)


def linear_outputs(frozen, params, batch):
    """`x' theta`, with theta in two leaves so that pytrees are exercised."""
    theta = jnp.concatenate([params["head"], params["tail"]])
    return batch.inputs @ theta


def split_params(theta) -> dict:
    """A parameter vector [d] as the pytree of `linear_outputs`."""
    return {"head": jnp.asarray(theta[:1]), "tail": jnp.asarray(theta[1:])}


def join_params(params) -> np.ndarray:
    """Inverse of `split_params`."""
    return np.concatenate([np.asarray(params["head"]), np.asarray(params["tail"])])


def ridge_objective(l2: float) -> Objective:
    """`l(z) = (x'theta - y)^2 / 2 + l2/2 ||theta||^2`."""
    return Objective((), None, linear_outputs, half_squared_error, l2)


def ridge_task(problem: EditProblem, theta, l2: float, **fields) -> UnlearningTask:
    """A request about a ridge regression whose parameters are `theta` [d]."""
    return UnlearningTask(model=ridge_objective(l2), adapter=split_params(theta), requests=problem, **fields)


def receipt_of(result: Result) -> Receipt:
    """The receipt of a method that gives one."""
    assert result.receipt is not None
    return result.receipt


def solves_of(result: Result) -> list[SolveRecord]:
    """The steps of a method that solves by products."""
    steps = receipt_of(result).steps
    solves = [step for step in steps if isinstance(step, SolveRecord)]
    assert len(solves) == len(steps)
    return solves


def matching_steps_of(result: Result) -> list[MatchingRecord]:
    """The steps of target matching."""
    steps = receipt_of(result).steps
    matching = [step for step in steps if isinstance(step, MatchingRecord)]
    assert len(matching) == len(steps)
    return matching


def ridge_solution(inputs, targets, l2: float) -> np.ndarray:
    """Minimiser of the mean of `ridge_objective` over the rows, in closed form."""
    n, d = inputs.shape
    return np.linalg.solve(inputs.T @ inputs / n + l2 * np.eye(d), inputs.T @ targets / n)
