"""Owns the table of baselines: a name and a default configuration. Adding one is one line in `BASELINES`.

    fitted = fit(BASELINES["npo"], run, requests)
    fitted = fit(dataclasses.replace(BASELINES["npo"], beta=0.5, epochs=10), run, requests)

The descents' learning rate is that of TOFU's configuration for adapters; their 5 epochs are fewer than the 10 to 20
of their sources' configurations. Both want tuning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from llmeraser_jax.baselines.ascent import EqualLengthAscent, GradientAscent, GradientDifference, KLAnchoredAscent
from llmeraser_jax.baselines.e2urec import E2URec
from llmeraser_jax.baselines.erasing import NEWTON, PAPER_DESCENT, PAPER_STEP, REFERENCE_COMPAT, Erasing
from llmeraser_jax.baselines.finetune_edited import FinetuneEdited
from llmeraser_jax.baselines.preference import NPO, SimNPO
from llmeraser_jax.baselines.receraser import RecEraser
from llmeraser_jax.baselines.retrain import Retrain
from llmeraser_jax.baselines.setting import Baseline
from llmeraser_jax.baselines.sisa import SISA
from llmeraser_jax.unlearning import EraseConfig

BASELINES: Mapping[str, Baseline] = {
    "retrain": Retrain(seeds=3),
    "sisa": SISA(),
    "receraser": RecEraser(),
    "gradient-ascent": GradientAscent(),
    "gradient-ascent-equal-length": EqualLengthAscent(),
    "gradient-difference": GradientDifference(),
    "gradient-difference-equal-length": EqualLengthAscent(difference=True),
    "kl-anchored-ascent": KLAnchoredAscent(),
    "npo": NPO(),
    "simnpo": SimNPO(),
    "e2urec": E2URec(),
    "finetune-edited": FinetuneEdited(),
    "llmeraser-auto": Erasing(config=EraseConfig(method="auto")),
    "llmeraser-matched": Erasing(config=EraseConfig(method="matched")),
    "llmeraser-path": Erasing(config=EraseConfig(method="path", budget=math.inf)),
    "llmeraser-step": Erasing(config=EraseConfig(method="step", budget=math.inf)),
    "llmeraser-newton": Erasing(config=NEWTON),
    "llmeraser-paper-step": Erasing(config=PAPER_STEP),
    "llmeraser-paper-descent": Erasing(config=PAPER_DESCENT),
    "llmeraser-reference-compat": Erasing(config=REFERENCE_COMPAT),
}


def get_baseline(name: str) -> Baseline:
    """The default configuration of a baseline.

    Raises:
        ValueError: there is none of that name; the names are listed.
    """
    if name not in BASELINES:
        msg = f"There is no baseline {name!r}; there are {', '.join(BASELINES)}."
        raise ValueError(msg)
    return BASELINES[name]
