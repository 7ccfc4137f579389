"""What a method is and what it returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from llmeraser_jax import trees
from llmeraser_jax.models import Model
from llmeraser_jax.text import short_repr
from llmeraser_jax.types import LoraParams
from llmeraser_jax.unlearning.budget import Cost
from llmeraser_jax.unlearning.receipt import Receipt
from llmeraser_jax.unlearning.task import UnlearningTask
from llmeraser_jax.unlearning.workspace import Workspace


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """What a method returns.

    Attributes:
        params: the new adapter; of rivals with several, an `Ensemble`.
        before: what would have been used had no request come: the task's adapter, or the ensemble as trained.
        cost: in gradient equivalents.
        seconds: wall-clock time, compilation included.
        receipt: what was done and how far to trust it; None of a rival.
        model: what reads `params`: the task's, or one that reads ensembles; None where the task has an objective.
        details: JSON-like, for the record.
    """

    params: LoraParams
    before: LoraParams
    cost: Cost
    seconds: float
    receipt: Receipt | None = None
    model: Model | None = None
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        receipt = self.receipt
        outcome = None if receipt is None else receipt.outcome
        return short_repr(self, outcome=outcome, cost=round(self.cost.total, 1), seconds=round(self.seconds, 1))

    @property
    def delta(self) -> LoraParams:
        """The change of the parameters."""
        return trees.tree_sub(self.params, self.before)


@runtime_checkable
class Method(Protocol):
    """A way to forget: a frozen, hashable configuration."""

    def run(self, task: UnlearningTask, workspace: Workspace) -> Result:
        """The parameters after the task's requests.

        Raises:
            UnlearningError: there is no usable result.
        """
        ...
