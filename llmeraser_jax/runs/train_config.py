"""Owns the hyper-parameters of fine-tuning."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How an adapter is trained: Adam on the batch mean of `l(z)`, warm-up, then a cosine to zero.

    `l2` puts a penalty into the loss of each example. `weight_decay` is AdamW's and no part of any loss: training
    comes to rest where it balances the data's gradient in Adam's metric, which is no minimum of the objective that
    erasing assumes. It is here so that a retraining repeats what others trained with; for your own choose `l2`.

    Attributes:
        epochs: passes over the data.
        batch_size: examples per step; the last, smaller batch of an epoch is kept and averaged over its own
            count.
        microbatch_size: examples per forward and backward pass. A smaller one bounds memory and leaves the gradient
            as it is. None is `batch_size` on a CPU, and on accelerators as many of them as fit, see plan.
        learning_rate: at the end of the warm-up.
        warmup_ratio: share of all steps that the learning rate rises over, linearly from zero.
        l2: lambda, in `l(z) = cross entropy + (l2 / 2) ||theta||^2`; 0 for an adapter with `modules_to_save`.
        seed: draws the order of the data in each epoch and, where none is given, the initial adapter.
        adam_b1: decay of Adam's mean of gradients.
        adam_b2: decay of Adam's mean of squared gradients.
        adam_eps: added to the root of the latter.
        weight_decay: of AdamW: each step subtracts this share of the adapter, times the learning rate; not of norms
            and biases among its `modules_to_save`, as in transformers' Trainer.
        max_grad_norm: longer gradients are scaled to this norm; None never does.
        checkpoint_every_steps: steps between two checkpoints.
    """

    epochs: int = 3
    batch_size: int = 32
    microbatch_size: int | None = None
    learning_rate: float = 1e-3
    warmup_ratio: float = 0.05
    l2: float = 1e-3
    seed: int = 0
    adam_b1: float = 0.9
    adam_b2: float = 0.999
    adam_eps: float = 1e-8
    max_grad_norm: float | None = None
    weight_decay: float = 0.0
    checkpoint_every_steps: int = 100

    def __post_init__(self):
        for name in ("epochs", "batch_size", "checkpoint_every_steps"):
            _require(self, name, lambda v: _is_int(v) and v >= 1, "a whole number of at least 1")
        _require(self, "microbatch_size", lambda v: v is None or (_is_int(v) and v >= 1), "at least 1, or None")
        # The order of the data is drawn by a generator whose seeds are 32-bit words.
        _require(self, "seed", lambda v: _is_int(v) and 0 <= v < 2**32, "a whole number from 0 to 2**32 - 1")
        _require(self, "learning_rate", lambda v: _is_number(v) and v > 0, "a number above 0")
        _require(self, "warmup_ratio", lambda v: _is_number(v) and 0 <= v < 1, "at least 0 and below 1")
        for name in ("l2", "weight_decay"):
            _require(self, name, lambda v: _is_number(v) and v >= 0, "at least 0")
        for name in ("adam_b1", "adam_b2"):
            _require(self, name, lambda v: _is_number(v) and 0 <= v < 1, "at least 0 and below 1")
        _require(self, "adam_eps", lambda v: _is_number(v) and v > 0, "above 0")
        _require(self, "max_grad_norm", lambda v: v is None or (_is_number(v) and v > 0), "above 0, or None")
        if self.microbatch_size is not None and self.microbatch_size > self.batch_size:
            msg = (
                f"microbatch_size is {self.microbatch_size} and batch_size {self.batch_size}: "
                "a micro-batch cannot be larger than the batch it is a part of."
            )
            raise ValueError(msg)

    @property
    def examples_per_pass(self) -> int:
        """Examples in one forward and backward pass."""
        return self.batch_size if self.microbatch_size is None else self.microbatch_size

    def num_steps(self, num_examples: int) -> int:
        """Optimiser steps on `num_examples` examples; what retraining on edited data recomputes."""
        return self.epochs * -(-num_examples // self.batch_size)

    def to_mapping(self) -> dict[str, Any]:
        """The fields as a JSON-like mapping; `from_mapping` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> TrainConfig:
        """Reads a mapping such as a parsed TOML table.

        Raises:
            ValueError: a key is unknown, or has an invalid value.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(mapping) - known)
        if unknown:
            msg = f"Unknown training options: {', '.join(unknown)}. Known are {', '.join(sorted(known))}."
            raise ValueError(msg)
        return cls(**mapping)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _require(config: TrainConfig, name: str, holds, expected: str) -> None:
    value = getattr(config, name)
    if not holds(value):
        msg = f"{name} is {value!r}; it must be {expected}."
        raise ValueError(msg)
