"""SISA: sharded, isolated, sliced and aggregated training, of which a request repeats a part.

Source: Bourtoule et al. 2021, *Machine Unlearning* (arXiv 1912.03817). The data are divided at random into shards,
each with an adapter of its own, trained slice by slice; a request repeats the training of the shards that it names
from the slice of the first named row on, and the forgetting is exact. Epochs per stage are the source's `2 e / (R
+ 1)` for R slices, so that a shard's training takes as many gradients as e epochs without slices. What differs
from the source: members are LoRA adapters on one frozen base; each stage begins with fresh moments of Adam and its
own schedule; predictions are averaged at every response position, as probabilities or as log-probabilities (the
source votes on labels, or averages prediction vectors); an edited row stays in its shard and slice, in its edited
form, and its shard is trained again as for a removal.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Literal

import numpy as np

from llmeraser_jax.checks import check_choice
from llmeraser_jax.rivals.ensemble import AGGREGATIONS, make_ensemble
from llmeraser_jax.rivals.ensemble_model import ensemble_model, place_ensemble
from llmeraser_jax.rivals.partition import random_partition
from llmeraser_jax.rivals.shards import ShardedTraining, ShardTrainer
from llmeraser_jax.unlearning import Cost, Result, UnlearningTask, Workspace


@dataclasses.dataclass(frozen=True, kw_only=True)
class SISA:
    """Sharded training with the task's hyper-parameters.

    Attributes:
        num_shards: adapters.
        num_slices: stages of each.
        aggregation: mean of members' `probabilities`, or of their `log-probabilities`, at each response position.
        seed: draws shards and slices.
    """

    num_shards: int = 4
    num_slices: int = 2
    aggregation: Literal["probabilities", "log-probabilities"] = "probabilities"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_shards", "num_slices"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                msg = f"{name} is {value!r}; it must be a whole number of at least 1."
                raise ValueError(msg)
        check_choice(self, "aggregation", AGGREGATIONS)

    def trainer(self, task: UnlearningTask) -> ShardTrainer:
        """What trains a stage."""
        train = task.require_training()
        return ShardTrainer(
            model=task.language_model,
            initial=task.initial_adapter(train.seed),
            train=train,
            epochs=max(1, round(2 * train.epochs / (self.num_slices + 1))),
            workdir=None if task.workdir is None else task.workdir / "sisa",
        )

    def prepare(self, task: UnlearningTask) -> ShardedTraining:
        """Trains all shards on the data as they stood: what has to be there before a request comes.

        Raises:
            ValueError: fewer rows than slices.
        """
        n = len(task.dataset)
        partition = random_partition(n, self.num_shards, self.num_slices, self.seed)
        return self.trainer(task).fit(task.problem.examples, partition, np.arange(n), name="before")

    def run(self, task: UnlearningTask, workspace: Workspace, prepared: ShardedTraining | None = None) -> Result:
        """Repeats the training of the stages that the requests touch.

        Args:
            task: the task.
            workspace: not used.
            prepared: of `prepare` with the same task; None prepares.
        """
        started = time.perf_counter()
        if prepared is None:
            prepared = self.prepare(task)
        prepared_at = time.perf_counter()
        after = self.trainer(task).fit(
            task.problem.examples, prepared.partition, task.current, before=prepared, name="after"
        )
        model = ensemble_model(task.language_model)

        def ensemble(training: ShardedTraining):
            return place_ensemble(make_ensemble(training.members, aggregation=self.aggregation), model)

        params = ensemble(after)
        return Result(
            model=model,
            params=params,
            before=ensemble(prepared),
            cost=Cost(
                training=after.gradient_equivalents,
                preparation=prepared.gradient_equivalents,
                retraining=task.cost_of_retraining,
            ),
            seconds=time.perf_counter() - prepared_at,
            details={
                "preparation_seconds": prepared_at - started,
                "shard_sizes": np.bincount(prepared.partition.shard_of, minlength=self.num_shards).tolist(),
                "repeated_from_slice": list(after.repeated_from),
                "num_shards_repeated": sum(first < self.num_slices for first in after.repeated_from),
                "num_members": params.num_members,
            },
        )
