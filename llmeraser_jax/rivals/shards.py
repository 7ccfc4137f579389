"""Owns training an adapter per shard, slice by slice, and training again only what a request touches.

Stage r of a shard goes on from the adapter after stage r - 1 (stage 0 from the initial adapter) and fine-tunes on
the shard's slices 0 to r. The adapter after every stage is kept: when rows of a shard change, its training is
repeated from the stage of the first one. A stage is `training.finetune` with fresh moments and its own schedule,
so that what it gives depends on the adapter before it, its rows and its seed alone, and a repeated stage equals
one from scratch.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from llmeraser_jax.data import TokenDataset
from llmeraser_jax.lora import Lora
from llmeraser_jax.models import Model
from llmeraser_jax.rivals.partition import Partition
from llmeraser_jax.training import TrainConfig, finetune
from llmeraser_jax.unlearning.budget import GRADIENT
from llmeraser_jax.unlearning.task import take


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ShardedTraining:
    """The adapters of all shards after all their stages.

    Attributes:
        partition: of the rows as trained.
        current: for each row where it is in the data now [n], or -1 where it was removed.
        stages: the adapter after each stage of each shard.
        repeated_from: for each shard the first stage that was trained now; the number of slices where none was.
        gradient_equivalents: of what was trained now.
    """

    partition: Partition
    current: np.ndarray
    stages: tuple[tuple[Lora, ...], ...]
    repeated_from: tuple[int, ...]
    gradient_equivalents: float

    @property
    def occupied(self) -> tuple[int, ...]:
        """Shards that have a row left; the others take no part in predictions."""
        return tuple(k for k in range(self.partition.num_shards) if np.any(self.current[self._rows(k)] >= 0))

    def _rows(self, shard: int) -> np.ndarray:
        return self.partition.rows(shard, self.partition.num_slices - 1)

    @property
    def members(self) -> tuple[Lora, ...]:
        """The last adapter of each occupied shard."""
        return tuple(self.stages[k][-1] for k in self.occupied)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ShardTrainer:
    """What all stages have in common.

    Attributes:
        model: the base.
        initial: the adapter that every shard starts from.
        train: hyper-parameters; shard k trains with `seed + k`.
        epochs: passes of each stage over its rows.
        workdir: where stages keep checkpoints; None keeps nothing.
    """

    model: Model
    initial: Lora
    train: TrainConfig
    epochs: int
    workdir: Path | None = None

    def fit(
        self,
        examples: TokenDataset,
        partition: Partition,
        current: np.ndarray,
        *,
        before: ShardedTraining | None = None,
        name: str = "shards",
    ) -> ShardedTraining:
        """Trains all stages, or only those that differ from `before`.

        Args:
            examples: what `current` indexes.
            partition: of the rows as trained.
            current: see `ShardedTraining`.
            before: a training of the same partition whose `current` indexes the same examples as far as they are
                in both.
            name: of the directory below `workdir`.
        """
        stages, repeated_from, cost = [], [], 0.0
        for shard in range(partition.num_shards):
            rows = partition.rows(shard, partition.num_slices - 1)
            first = 0
            if before is not None:
                changed = rows[before.current[rows] != current[rows]]
                first = int(partition.slice_of[changed].min()) if len(changed) else partition.num_slices
            done = [] if before is None else list(before.stages[shard][:first])
            for stage in range(first, partition.num_slices):
                there = current[partition.rows(shard, stage)]
                there = there[there >= 0]
                start = done[-1] if done else self.initial
                done.append(self._stage(take(examples, there), shard, stage, start, name) if len(there) else start)
                cost += GRADIENT * self.epochs * len(there)
            stages.append(tuple(done))
            repeated_from.append(first)
        return ShardedTraining(
            partition=partition,
            current=np.asarray(current),
            stages=tuple(stages),
            repeated_from=tuple(repeated_from),
            gradient_equivalents=cost,
        )

    def _stage(self, dataset: TokenDataset, shard: int, stage: int, start: Lora, name: str) -> Lora:
        config = dataclasses.replace(
            self.train,
            epochs=self.epochs,
            seed=(self.train.seed + shard) % 2**32,
        )
        workdir = None if self.workdir is None else self.workdir / name / f"shard_{shard}_stage_{stage}"
        return finetune(self.model, dataset, config, lora=start, workdir=workdir).lora
