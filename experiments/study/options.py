"""Owns what every study's command lets a user choose: which ways to forget, and how often."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable

from llmeraser_jax.baselines import BASELINES
from llmeraser_jax.baselines.descent import Descent

from llmeraser_jax.evaluation.records import BEFORE, RETRAINED

DESCENTS = tuple(name for name, baseline in BASELINES.items() if isinstance(baseline, Descent))
SHARDED = ("sisa", "receraser")
# The paper's step draws no sample, a path costs several retrainings, and fine-tuning takes its order from the
# training's own seed.
ONE_SEED = ("llmeraser-paper-step", "llmeraser-path", "finetune-edited")
# `retrain` is the reference of every study, and the equal-length controls belong to one other method each.
METHODS = (
    "llmeraser-auto",
    "llmeraser-path",
    "llmeraser-step",
    "llmeraser-paper-step",
    "llmeraser-paper-descent",
    "llmeraser-reference-compat",
    "finetune-edited",
    *DESCENTS,
    *SHARDED,
)
# KLOM asks for every method with each of many trained models: not what costs as much as training them.
WITHOUT_KLOM = (*SHARDED, "llmeraser-paper-step", "llmeraser-paper-descent", "llmeraser-path")


def check_methods(names: Iterable[str], known: Collection[str] = BASELINES.keys()) -> None:
    """Refuses names that are no methods: a command does so before it trains anything.

    Raises:
        ValueError: which, and what there is.
    """
    unknown = sorted(set(names) - set(known))
    if unknown:
        msg = f"Unknown methods {', '.join(unknown)}; there are {', '.join(known)}."
        raise ValueError(msg)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """Which ways to forget are compared, and how often.

    Attributes:
        methods: ways to forget, names in `llmeraser_jax.baselines.BASELINES`.
        retrain_seeds: retrained models, at least 2.
        method_seeds: seeds of each method that draws anything.
        sharded_seeds: seeds of sisa and receraser, which train all their shards for each.
        klom_seeds: models trained with other seeds and forgotten from for KLOM, which takes as many retrained ones
            and wants at least 10; 0 leaves it out.
    """

    methods: tuple[str, ...] = METHODS
    retrain_seeds: int = 3
    method_seeds: int = 3
    sharded_seeds: int = 1
    klom_seeds: int = 0

    def __post_init__(self):
        check_methods(self.methods)
        for name, least in (("retrain_seeds", 2), ("method_seeds", 1), ("sharded_seeds", 1), ("klom_seeds", 0)):
            if getattr(self, name) < least:
                msg = f"{name} is {getattr(self, name)}; it must be at least {least}."
                raise ValueError(msg)

    @property
    def seeds(self) -> dict[str, int]:
        """Name of each method -> how many seeds it has."""

        def count(name: str) -> int:
            if name in ONE_SEED:
                return 1
            return self.sharded_seeds if name in SHARDED else self.method_seeds

        return {name: count(name) for name in self.methods}

    @property
    def klom(self) -> dict[str, int]:
        """Models behind KLOM: of each method that takes part, before and retrained; empty where it is left out."""
        if not self.klom_seeds:
            return {}
        references = {BEFORE: self.klom_seeds, RETRAINED: max(self.klom_seeds, self.retrain_seeds)}
        return references | {name: self.klom_seeds for name in self.methods if name not in WITHOUT_KLOM}
