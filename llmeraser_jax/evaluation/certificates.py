"""How far to trust an erasure's linear algebra: receipts side by side, each line with how to read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmeraser_jax.evaluation.blocks import Block, Details, Heading, Table, Text
from llmeraser_jax.evaluation.page import show_number
from llmeraser_jax.unlearning.steps import CERTIFIED_BELOW

Receipt = Mapping[str, Any]

_ABREAST = 4  # receipts in one table; more make another
_MISSING = "–"
_STEPS_SHOWN = 60


def certificate_blocks(receipts: Sequence[tuple[str, Receipt]]) -> list[Block]:
    """The section on what the receipts say.

    Args:
        receipts: name of the directory, and its `receipt.json`.
    """
    blocks: list[Block] = [
        Heading("Solver certificates"),
        Text(
            "Unlearning solves linear systems with a curvature matrix. Each erasure left a receipt that says how "
            "well they were solved, and whether the change stayed where a linear prediction holds. A certificate "
            "is about the algebra: being close to the exact step is not yet being close to retraining."
        ),
    ]
    for start in range(0, len(receipts), _ABREAST):
        chosen = receipts[start : start + _ABREAST]
        header = ("", *(name for name, _ in chosen), "how to read it")
        rows = []
        for title, cell, meaning in _LINES:
            cells = [cell(receipt) for _, receipt in chosen]
            if any(text != _MISSING for text in cells):
                rows.append((title, *cells, meaning))
        blocks.append(Table(header, tuple(rows)))
    for name, receipt in receipts:
        blocks.append(Details(f"Every step of {name}", (_steps(receipt),)))
    return blocks


def _range(receipt: Receipt, group: str) -> str:
    change = (receipt.get("range_check") or {}).get(group)
    if change is None:
        return _MISSING
    before, after, predicted = (show_number(change.get(key)) for key in ("before", "after", "predicted"))
    return f"{before} → {after} (predicted {predicted})"


def _ritz(receipt: Receipt) -> str:
    """Least and largest over all steps."""
    pairs = [step.get("ritz_extremes") or (None, None) for step in receipt["steps"]]
    low = [pair[0] for pair in pairs if pair[0] is not None]
    high = [pair[1] for pair in pairs if pair[1] is not None]
    return f"{show_number(min(low))} to {show_number(max(high))}" if low and high else _MISSING


def _bound(receipt: Receipt) -> str:
    """The largest of the steps' bounds; none where a step has none."""
    bounds = [step.get("error_bound") for step in receipt["steps"]]
    if not bounds or None in bounds:
        return _MISSING
    worst = max(bounds)
    return f"{show_number(worst)} ({'certified' if worst < CERTIFIED_BELOW else 'certifies nothing'})"


def _status(receipt: Receipt) -> str:
    solver = receipt["solver"]
    return f"{solver['status']} ({solver['iterations']} iterations in {len(receipt['steps'])} solves)"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _words(key: str) -> Callable[[Receipt], str]:
    return lambda receipt: str(receipt.get(key) or _MISSING)


def _config(receipt: Receipt) -> str:
    config = receipt["config"]
    return f"{config['curvature']} over {config['curvature_data']}, damping {show_number(config['damping'])}"


def _ratio(receipt: Receipt) -> str:
    change, size = receipt["delta_norm"], receipt["adapter_norm_before"]
    return f"{show_number(change)} of {show_number(size)}"


def _gradient(receipt: Receipt) -> str:
    before, after = (show_number(receipt[f"edited_gradient_norm_{when}"]) for when in ("before", "after"))
    return f"{before} → {after}"


def _survival(receipt: Receipt) -> str:
    survival = receipt["bf16_survival"]
    return _MISSING if survival is None else f"{100 * survival:.0f} %"


_LINES: tuple[tuple[str, Callable[[Receipt], str], str], ...] = (
    ("outcome", _words("outcome"), "what was reached, in words"),
    ("method", _words("method"), "matched, path or step; see the README"),
    ("curvature", _config, "the matrix, the examples behind it, and the number added to its diagonal"),
    ("solver status", _status, "the worst of all solves; reaching max_steps is not convergence"),
    (
        "true residual",
        lambda receipt: show_number(receipt["solver"]["relative_residual"]),
        "the largest ||b - A x|| / ||b||, recomputed after each solve: 0 is exact, 1 is nothing solved",
    ),
    (
        "Ritz extremes",
        _ritz,
        "least and largest eigenvalue that the solver met; their ratio says how hard the system is, a least one "
        "below 0 that the matrix is indefinite. Empty for methods that do not iterate",
    ),
    (
        "negative curvature",
        lambda receipt: _yes(receipt["solver"]["negative_curvature"]),
        "whether a direction was met along which the matrix is not positive; the solver then stops with what it "
        "has",
    ),
    (
        "error bound",
        _bound,
        f"bound on the relative error of the worst step, for its own sampled matrix; below {CERTIFIED_BELOW:g} it "
        "certifies the solve. Empty where a step has none",
    ),
    (
        "range check",
        lambda receipt: (receipt.get("range_check") or {}).get("verdict", _MISSING),
        "whether the named rows moved and retained rows stayed",
    ),
    (
        "loss on S",
        lambda receipt: _range(receipt, "forget"),
        "before and after, and as a quadratic predicted it",
    ),
    ("loss as wanted", lambda receipt: _range(receipt, "wanted"), "the same for the edited rows"),
    ("loss on retained rows", lambda receipt: _range(receipt, "probe"), "the same for a sample of rows not named"),
    ("size of the change", _ratio, "Euclidean norm of the change, of the adapter's"),
    (
        "gradient norm",
        _gradient,
        "of the edited objective, before and after, on a sample: smaller is nearer to a stationary point of it",
    ),
    (
        "bfloat16 survival",
        _survival,
        "share of the change that is left after rounding the adapter to bfloat16",
    ),
    (
        "cost",
        lambda receipt: (
            f"{show_number(receipt['gradient_equivalents']['total'])} gradient equivalents, "
            f"{show_number(receipt['seconds'])} s"
        ),
        "1 is a forward and backward pass of one example; diagnostics apart",
    ),
)


def _steps(receipt: Receipt) -> Table:
    """One row per solve."""
    header = (
        "step", "weight left", "length taken", "status", "iterations", "true residual", "least Ritz",
        "largest Ritz",         "negative curvature", "error bound", "loss on S", "as wanted", "retained",
    )  # fmt: skip
    rows = []
    for number, step in enumerate(receipt["steps"][:_STEPS_SHOWN], start=1):
        least, largest = step.get("ritz_extremes") or (None, None)
        rows.append(
            (
                str(number),
                f"{show_number(step['weight_before'])} → {show_number(step['weight_after'])}",
                show_number(step["scale"]),
                step["status"],
                str(step["iterations"]),
                show_number(step["relative_residual"]),
                show_number(least),
                show_number(largest),
                _yes(step["negative_curvature"]),
                show_number(step.get("error_bound")),
                *(show_number(step.get(key)) for key in ("forget_loss", "wanted_loss", "probe_loss")),
            )
        )
    left = len(receipt["steps"]) - len(rows)
    if left:
        rows.append((f"{left} more", *[_MISSING] * (len(header) - 1)))
    return Table(header, tuple(rows))
