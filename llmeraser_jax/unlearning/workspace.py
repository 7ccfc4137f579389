"""Where a method computes: devices, micro-batches, seed, budget; gradients and losses of rows."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from llmeraser_jax import trees
from llmeraser_jax.losses import Objective, forward_values, gradient_sum, per_example
from llmeraser_jax.parallel import place_stack
from llmeraser_jax.types import ExampleSet, ExampleStack, LoraParams
from llmeraser_jax.unlearning.budget import FORWARD, Budget
from llmeraser_jax.unlearning.known_rows import KnownRows
from llmeraser_jax.unlearning.problem import Weighted


class RowValues(NamedTuple):
    """Of some rows in the order asked for: data losses [rows], and their log-odds `log(exp(l) - 1)` [rows]."""

    losses: Float[np.ndarray, " rows"]
    log_odds: Float[np.ndarray, " rows"]


def _ignore(record: Any) -> None:
    pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workspace:
    """What a method computes with, besides the task. Callers book costs in `budget` themselves.

    Attributes:
        budget: what may be spent; counts what was.
        mesh: devices; None is one.
        chunk_size: examples in a micro-batch; memory grows with it, results do not change.
        seed: of every sample.
        directory: where long work keeps its state, so that it goes on after a kill; None keeps nothing.
        audit: whether gradient norms are reported of all examples instead of a sample.
        on_step: called with the record of every step taken.
        known: losses under the adapter as trained that an earlier request left; None computes all.
    """

    budget: Budget = dataclasses.field(default_factory=Budget)
    mesh: Mesh | None = None
    chunk_size: int = 16
    seed: int = 0
    directory: Path | None = None
    audit: bool = False
    on_step: Callable[[Any], None] = _ignore
    known: KnownRows | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.chunk_size, int) and self.chunk_size >= 1):
            msg = f"chunk_size is {self.chunk_size!r}; it must be a whole number of at least 1."
            raise ValueError(msg)
        if not (isinstance(self.seed, int) and 0 <= self.seed < 2**32):
            msg = f"seed is {self.seed!r}; it must be a whole number from 0 to 2**32 - 1."
            raise ValueError(msg)

    def rng(self, *stream: int) -> np.random.Generator:
        """Random numbers of a stream of their own."""
        return np.random.default_rng([self.seed, *stream])

    def stack(
        self, examples: ExampleSet, indices: np.ndarray | Weighted, *, chunk_size: int | None = None
    ) -> ExampleStack:
        """Rows on the device(s), in micro-batches, with the coefficients given or 1 each."""
        if not isinstance(indices, Weighted):
            indices = Weighted(indices, np.ones(len(indices)))
        stack = examples.stack(indices.indices, indices.weights, chunk_size=chunk_size or self.chunk_size)
        return place_stack(stack, self.mesh)

    def micro_batches(self, examples: ExampleSet, indices: np.ndarray | Weighted) -> ExampleStack:
        """Like `stack`, with an entry for every micro-batch: what is compiled for one serves any number of rows.

        For what is computed entry by entry: values and rows of single examples, gradients.

        Raises:
            ValueError: there are no rows.
        """
        if not isinstance(indices, Weighted):
            indices = Weighted(indices, np.ones(len(indices)))
        buckets = np.array([examples.bucket_of(int(index)) for index in indices.indices])
        if not len(buckets):
            msg = "There are no examples to lay out."
            raise ValueError(msg)
        parts = []
        for bucket in np.unique(buckets):
            of_bucket = np.flatnonzero(buckets == bucket)
            for chosen in np.split(of_bucket, np.arange(self.chunk_size, len(of_bucket), self.chunk_size)):
                part = examples.stack(indices.indices[chosen], indices.weights[chosen], chunk_size=self.chunk_size)
                assert part.places is not None  # of a set's stack
                inside = np.asarray(part.places[0])
                places = np.where(inside >= 0, chosen[inside], -1).astype(np.int32)
                parts.append((part.batches[0], part.weights[0], jax.device_put(places)))
        batches, weights, places = zip(*parts, strict=True)
        return place_stack(ExampleStack(batches, weights, places), self.mesh)

    def gradient(
        self, objective: Objective, params: LoraParams, examples: ExampleSet, weighted: Weighted
    ) -> LoraParams:
        """`sum_i c_i grad l_i`."""
        parts = [gradient_sum(objective, params, entry) for entry in self.micro_batches(examples, weighted).entries]
        return functools.reduce(trees.tree_add, parts)

    def row_values(
        self, objective: Objective, params: LoraParams, examples: ExampleSet, indices: np.ndarray
    ) -> RowValues:
        """Losses and log-odds of rows, in the order of `indices`."""
        if len(indices) == 0:
            return RowValues(np.zeros(0), np.zeros(0))
        values = per_example(forward_values, self.micro_batches(examples, indices), objective, params)
        return RowValues(values.losses, values.log_odds)

    def trained_values(
        self,
        objective: Objective,
        adapter: LoraParams,
        examples: ExampleSet,
        rows: np.ndarray,
        on: Literal["rhs", "diagnostics"],
    ) -> RowValues:
        """`row_values` under the adapter as trained: of known rows from `known`, and the others booked.

        Raises:
            BudgetSpent: they cannot be paid.
        """
        if self.known is None:
            self.budget.spend(on, FORWARD * len(rows))
            return self.row_values(objective, adapter, examples, rows)
        has = self.known.split(examples, rows)
        self.budget.spend(on, FORWARD * int((~has).sum()))
        fresh = self.row_values(objective, adapter, examples, rows[~has])
        self.known.keep(examples, rows[~has], *fresh)
        values = RowValues(np.zeros(len(rows)), np.zeros(len(rows)))
        for part, of_part, own in zip(values, fresh, self.known.take(examples, rows[has]), strict=True):
            part[~has], part[has] = of_part, own
        return values
