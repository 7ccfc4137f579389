"""Several requests of a kind together: means with intervals, and differences from the default by request."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from llmeraser_jax.evaluation.closure import Number
from llmeraser_jax.evaluation.page import Row, rows_of
from llmeraser_jax.evaluation.plots import Point, plot_cost_against_fidelity
from llmeraser_jax.evaluation.render import MISSING, Block, Heading, Picture, Table, Text, show_number

CONFIDENCE = 0.95
RETAINED_ACCURACY = "retained: exact_match"


def _retained(row: Row) -> Number | None:
    """Accuracy on retained rows less that of the retrained models."""
    entries = (row.entry, row.report["models"]["retrained"])
    own, retrained = (entry.get("task_metrics", {}).get(RETAINED_ACCURACY, {}).get("value") for entry in entries)
    return None if own is None or retrained is None else own - retrained


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A number of one method on one request.

    Attributes:
        title: of its column.
        of: the number; None where it is undefined.
    """

    title: str
    of: Callable[[Row], Number | None]


COST = Quantity("cost / retraining", lambda row: row.share("gradient_equivalents"))
QUANTITIES = (
    Quantity("closure, forget set", lambda row: (row.closure or {}).get("forget_loss")),
    Quantity("closure, replacements", lambda row: (row.closure or {}).get("wanted_loss")),
    Quantity("held-out KL / floor", lambda row: row.over_floor(row.value("heldout_kl_to_retrained"))),
    Quantity("retained accuracy less retrained", _retained),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over requests.

    Attributes:
        mean: of them.
        half: half the width of its confidence interval by Student's t; None for a single request.
        count: requests where the number is defined.
    """

    mean: float
    half: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[Number | None]) -> Estimate | None:
        """Of the values that are defined; None where none is."""
        found = np.array([value for value in values if value is not None and math.isfinite(value)], np.float64)
        if not found.size:
            return None
        half = None
        if found.size > 1:
            quantile = stats.t.ppf((1 + CONFIDENCE) / 2, found.size - 1)
            half = float(quantile * found.std(ddof=1) / math.sqrt(found.size))
        return cls(mean=float(found.mean()), half=half, count=int(found.size))

    def show(self, sign: str = "") -> str:
        """Mean, half width and, of a difference whose interval leaves out 0, a star."""
        half = "" if self.half is None else f" ± {self.half:.2g}"
        clear = sign and self.half is not None and abs(self.mean) > self.half
        return f"{self.mean:{sign}.2f}{half}" + (" *" if clear else "")


# The row of each method in each request of a kind.
Requests = Sequence[Mapping[str, Row]]


def methods_of(report: Mapping[str, Any]) -> dict[str, Row]:
    """The rows of the model before and of the methods, by name."""
    rows = [row for row in rows_of(report) if row.kind in ("before", "unlearned") and row.entry]
    return {row.entry["name"]: row for row in rows}


def differences(requests: Requests, method: str, reference: str, quantity: Quantity) -> Estimate | None:
    """What a method has more than the reference, over the requests where both have a number."""
    both = [(quantity.of(rows[method]), quantity.of(rows[reference]))
            for rows in requests if method in rows and reference in rows]  # fmt: skip
    return Estimate.of([None if a is None or b is None else a - b for a, b in both])


def _cell(estimate: Estimate | None, sign: str = "") -> str:
    return MISSING if estimate is None else estimate.show(sign)


def tables(kind: str, requests: Requests, reference: str) -> list[Block]:
    """Means, and differences from the reference, of one kind of request."""
    names = list(dict.fromkeys(name for rows in requests for name in rows))
    means, beside = [], []
    for name in names:
        rows = [rows[name] for rows in requests if name in rows]
        cost = Estimate.of([COST.of(row) for row in rows])
        found = [Estimate.of([quantity.of(row) for row in rows]) for quantity in QUANTITIES]
        means.append((name, str(len(rows)), show_number(cost and cost.mean), *map(_cell, found)))
        if name not in (reference, "before"):
            compared = (differences(requests, name, reference, quantity) for quantity in (COST, *QUANTITIES))
            beside.append((name, *(_cell(estimate, "+") for estimate in compared)))
    titles = (COST.title, *(quantity.title for quantity in QUANTITIES))
    return [
        Heading(kind, 3),
        Table(("method", "requests", *titles), tuple(means)),
        Text(
            f"Differences from `{reference}`, request by request; a star marks those whose interval leaves out 0."
        ),
        Table(("method", *titles), tuple(beside)),
    ]


def picture(found: Mapping[str, Requests], name: str) -> list[Block]:
    """Closure and retained accuracy against cost: a mark for each method and kind, a mean over its requests."""
    points = []
    for requests in found.values():
        for method in dict.fromkeys(name for rows in requests for name in rows if name != "before"):
            rows = [rows[method] for rows in requests if method in rows]
            cost, closure, _, kl, retained = (
                Estimate.of([quantity.of(row) for row in rows]) for quantity in (COST, *QUANTITIES)
            )
            points.append(
                Point(
                    label=method,
                    kind="unlearned",
                    cost=cost and cost.mean,
                    closure=closure and closure.mean,
                    kl_over_floor=kl and kl.mean,
                    retained=retained and retained.mean,
                    closure_deviation=closure and closure.half,
                    kl_deviation=kl and kl.half,
                )
            )
    drawn = plot_cost_against_fidelity(points)
    if drawn is None:
        return []
    caption = (
        "Each mark is a method on one kind of request, the mean over several; bars are 95 % intervals. Dashed: "
        "where retraining is."
    )
    return [Picture(f"{name}-frontier.png", caption, drawn)]


def blocks(found: Mapping[str, Requests], reference: str, name: str) -> list[Block]:
    """Tables and picture of the kinds that have several requests; nothing where none has."""
    several = {kind: requests for kind, requests in found.items() if len(requests) > 1}
    if not several:
        return []
    told = (
        f"Means over requests that name other rows, with {100 * CONFIDENCE:.0f} % intervals by Student's t. Rivals "
        "have the learning rate or strength that ends nearest to what every method is given; `-oracle` is "
        "the one that ends nearest to the retrained models, `-as-costly` has as many epochs as cost what "
        f"`{reference}` costs, and `{reference}-as-cheap` has a budget of what K-FADE costs. The search is not in "
        "the cost."
    )
    listed = [block for kind, requests in several.items() for block in tables(kind, requests, reference)]
    return [Heading("Over several requests"), Text(told), *listed, *picture(several, name)]
