"""How far a chain of erasures has gone from the last training, and whether to go on or to retrain.

Each erasure is judged against the adapter that it started from. What all of them together did is the drift: it
begins with the first erasure after a training, and a retraining ends it. The rule (`advise`) compares with two
thresholds each

    the rise of retained rows' mean loss, in harm bounds: what one erasure may take before it is called harmful
    the distance from the trained adapter in product space, in norms of the trained `scaling * B A`
    the sum of the erasures' costs, in retrainings

and says the worst: `keep on`, `retrain soon`, `retrain now`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from llmeraser_jax import trees
from llmeraser_jax.lora import Lora, product_norms
from llmeraser_jax.models import Model
from llmeraser_jax.runs import Run, RunError
from llmeraser_jax.unlearning.receipt import read_receipt

Advice = Literal["keep on", "retrain soon", "retrain now"]
ADVICE: tuple[Advice, ...] = get_args(Advice)

# From them on: retrain soon, retrain now.
RETAINED_RISE = (0.5, 1.0)  # harm bounds; one is what would be called harmful in one erasure
# Norms of the trained product. In experiments/deletion the held-out KL to retrained models is that between their
# seeds at 0.10, a quarter above it at 0.13, and more than four times it at 0.19.
DISTANCE = (0.12, 0.18)
COST = (1.0, float("inf"))  # retrainings; from one on, retraining once had cost less


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drift:
    """What all erasures since the last training did together.

    Attributes:
        erasures: how many.
        rows: how many rows they named.
        product_distance: Frobenius norm of the change of `scaling * B A` since the training; None where the trained
            adapter is not there any more.
        product_walk: root of the sum of squares of the erasures' own changes, which is the distance where their
            directions are unrelated; it stands in where the distance is not known.
        product_norm: Frobenius norm of the trained `scaling * B A`.
        retained_rise: nats per token that retained rows lost on average, summed over the erasures.
        calibration_rise: the same of calibration rows; None where some erasure was given none.
        harm_bound: nats per token that retained rows may lose in one erasure.
        cost: gradient equivalents of all erasures over those of one retraining; None where that is not known.
        advice: what the rule says.
        reasons: why it is no better.
    """

    erasures: int
    rows: int
    product_distance: float | None
    product_walk: float
    product_norm: float
    retained_rise: float
    calibration_rise: float | None
    harm_bound: float
    cost: float | None
    advice: Advice = "keep on"
    reasons: tuple[str, ...] = ()

    @property
    def distance(self) -> float:
        """From the trained adapter in norms of its product, or what stands in for it."""
        moved = self.product_walk if self.product_distance is None else self.product_distance
        return moved / self.product_norm if self.product_norm > 0 else 0.0

    @property
    def words(self) -> str:
        """One line."""
        parts = [
            f"{self.erasures} erasure{'s' * (self.erasures != 1)} of {self.rows} rows",
            f"distance {self.distance:.2g} of the trained adapter",
            f"retained rows {self.retained_rise:+.3f} nats",
            *([] if self.cost is None else [f"cost {self.cost:.2g} retrainings"]),
        ]
        return f"{self.advice}: {', '.join(parts)}"

    def to_mapping(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)


def advise(drift: Drift) -> Drift:
    """The drift with the rule's advice."""
    compared = (
        (drift.retained_rise / drift.harm_bound, RETAINED_RISE, "retained rows lost {:.2g} harm bounds"),
        (drift.distance, DISTANCE, "the adapter moved {:.2g} of its trained norm"),
        (0.0 if drift.cost is None else drift.cost, COST, "the erasures cost {:.2g} retrainings"),
    )
    levels = [sum(value >= threshold for threshold in thresholds) for value, thresholds, _ in compared]
    reasons = tuple(words.format(value) for level, (value, _, words) in zip(levels, compared, strict=True) if level)
    return dataclasses.replace(drift, advice=ADVICE[max(levels)], reasons=reasons)


def drift_after(run: Run, receipt: Mapping[str, Any], model: Model, adapter: Lora) -> Drift | None:
    """The drift after an erasure from `run`.

    Args:
        run: what was erased from.
        receipt: of this erasure, JSON-like.
        model: the base.
        adapter: the new one.

    Returns:
        None after a retraining, which ends the drift.
    """
    if receipt["method"] == "retrained":
        return None
    earlier = read_receipt(run)
    before = (earlier or {}).get("drift") or {}
    check, cost = receipt["validity"], receipt["gradient_equivalents"]
    retained, calibration = (_rise(check, group) for group in ("retained", "calibration"))
    # An unchanged adapter has no check and moved nothing.
    unseen = before.get("calibration_rise", 0.0)
    if check is not None:
        unseen = None if unseen is None or calibration is None else unseen + calibration
    spent = None
    if cost["retraining"] is not None and before.get("cost", 0.0) is not None:
        spent = before.get("cost", 0.0) + cost["total"] / cost["retraining"]
    trained = _trained_adapter(run, earlier, model)
    distance = None
    if trained is not None:
        distance = float(product_norms(trained, trees.tree_sub(adapter, trained))[0])
    drift = Drift(
        erasures=before.get("erasures", 0) + 1,
        rows=before.get("rows", 0) + sum(receipt["counts"].values()),
        product_distance=distance,
        product_walk=math.hypot(before.get("product_walk", 0.0), receipt["product_change_norm"]),
        product_norm=before.get("product_norm", receipt["product_norm_before"]),
        retained_rise=before.get("retained_rise", 0.0) + (retained or 0.0),
        calibration_rise=unseen,
        harm_bound=before.get("harm_bound", 0.05) if check is None else check["harm_bound"],
        cost=spent,
    )
    return advise(drift)


def words_of(receipt: Mapping[str, Any]) -> str:
    """One line of what a receipt says of the drift."""
    drift = receipt.get("drift")
    if drift is None:
        return "none: the adapter was retrained" if receipt["method"] == "retrained" else "not recorded"
    return Drift(**{**drift, "reasons": tuple(drift["reasons"])}).words


def _rise(check: Mapping[str, Any] | None, group: str) -> float | None:
    change = None if check is None else check[group]
    return None if change is None else change["rise"]["mean"]


def _trained_adapter(run: Run, receipt: Mapping[str, Any] | None, model: Model) -> Lora | None:
    """The adapter that the chain's erasures began with; None where one of its runs is gone or has changed."""
    while run.kind == "erase" and receipt is not None and receipt["method"] != "retrained":
        try:
            run = run.load_parent()
            receipt = read_receipt(run)
        except (RunError, FileNotFoundError):
            return None
    return run.load_adapter(model)
