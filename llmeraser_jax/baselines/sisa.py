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

from llmeraser_jax.baselines.ensemble import AGGREGATIONS, ensemble_model, make_ensemble, place_ensemble
from llmeraser_jax.baselines.partition import random_partition
from llmeraser_jax.baselines.setting import Fitted, Setting
from llmeraser_jax.baselines.shards import ShardedTraining, ShardTrainer


@dataclasses.dataclass(frozen=True, kw_only=True)
class SISA:
    """Sharded training with the setting's hyper-parameters.

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
        if self.aggregation not in AGGREGATIONS:
            msg = f"aggregation is {self.aggregation!r}; it must be one of {', '.join(AGGREGATIONS)}."
            raise ValueError(msg)

    def trainer(self, setting: Setting) -> ShardTrainer:
        """What trains a stage."""
        train = setting.training
        return ShardTrainer(
            model=setting.model,
            initial=setting.initial_adapter(train.seed),
            train=train,
            epochs=max(1, round(2 * train.epochs / (self.num_slices + 1))),
            workdir=None if setting.workdir is None else setting.workdir / "sisa",
        )

    def prepare(self, setting: Setting) -> ShardedTraining:
        """Trains all shards on the data as they stood: what has to be there before a request comes.

        Raises:
            ValueError: fewer rows than slices.
        """
        n = len(setting.dataset)
        partition = random_partition(n, self.num_shards, self.num_slices, self.seed)
        return self.trainer(setting).fit(setting.problem.examples, partition, np.arange(n), name="before")

    def fit(self, setting: Setting, prepared: ShardedTraining | None = None) -> Fitted:
        """Repeats the training of the stages that the requests touch.

        Args:
            setting: the setting.
            prepared: of `prepare` with the same setting; None prepares.
        """
        started = time.perf_counter()
        if prepared is None:
            prepared = self.prepare(setting)
        prepared_at = time.perf_counter()
        after = self.trainer(setting).fit(
            setting.problem.examples, prepared.partition, setting.current, before=prepared, name="after"
        )
        model = ensemble_model(setting.model)

        def ensemble(training: ShardedTraining):
            return place_ensemble(make_ensemble(training.members, aggregation=self.aggregation), model)

        params = ensemble(after)
        return Fitted(
            model=model,
            params=params,
            before=ensemble(prepared),
            gradient_equivalents=after.gradient_equivalents,
            seconds=time.perf_counter() - prepared_at,
            preparation_gradient_equivalents=prepared.gradient_equivalents,
            preparation_seconds=prepared_at - started,
            details={
                "shard_sizes": np.bincount(prepared.partition.shard_of, minlength=self.num_shards).tolist(),
                "repeated_from_slice": list(after.repeated_from),
                "num_shards_repeated": sum(first < self.num_slices for first in after.repeated_from),
                "num_members": params.num_members,
            },
        )
