"""Methods by metrics: one row per model, one column per measure, each with what it means and which way is good.

Evaluations and studies are shown by the same columns; one that no model has a value for is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from llmeraser_jax.evaluation.blocks import Block, Bullets, Details, Heading, Picture, Table, Text
from llmeraser_jax.evaluation.overview_plots import Point, plot_cost_against_fidelity
from llmeraser_jax.evaluation.page import metric_cell, show_number

MISSING = "–"
NOT_FINITE = "not finite"

Json: TypeAlias = Mapping[str, Any]
Kind: TypeAlias = Literal["before", "unlearned", "control", "retrained"]
Better: TypeAlias = Literal["higher", "lower", "retrained"]

_AIMS: Mapping[Better, str] = {
    "higher": "Higher is better.",
    "lower": "Lower is better.",
    "retrained": "Aim: the retrained row's value.",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelRow:
    """One row of the tables.

    Attributes:
        label: what it is called.
        kind: what it is.
        entry: its measures, as in `models` of an evaluation's `report.json`; None is what was not measured, and
            `not_finite` names what was and is no number.
        closure: of its losses, name -> value; None where it has none.
        cost: of making it; None for the model before.
        seed_floor: held-out KL of a retrained model left out.
        retraining: gradient equivalents of one retraining.
    """

    label: str
    kind: Kind
    entry: Json
    closure: Json | None
    cost: Json | None
    seed_floor: float | None
    retraining: float | None

    @property
    def kl_over_floor(self) -> float | None:
        """Held-out KL in multiples of the seed floor."""
        kl = self.entry.get("heldout_kl_to_retrained")
        return kl / self.seed_floor if kl is not None and self.seed_floor else None

    @property
    def kl_deviation(self) -> float | None:
        """Its standard deviation between seeds, in the same unit."""
        deviation = self.entry.get("seed_standard_deviation", {}).get("heldout_kl_to_retrained")
        return deviation / self.seed_floor if deviation is not None and self.seed_floor else None

    def share_of_retraining(self, key: str = "gradient_equivalents") -> float | None:
        """A cost over that of one retraining."""
        spent = None if self.cost is None else self.cost.get(key)
        return spent / self.retraining if spent is not None and self.retraining else None


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of the tables.

    Attributes:
        title: as its header says.
        meaning: a sentence.
        better: which way is good; None is neither.
        cell: its text for a model.
    """

    title: str
    meaning: str
    better: Better | None
    cell: Callable[[ModelRow], str]

    @property
    def explained(self) -> str:
        """Its line in the legend."""
        aim = "" if self.better is None else f" {_AIMS[self.better]}"
        return f"**{self.title}**: {self.meaning}{aim}"


def _with_deviation(value: float | None, deviation: float | None) -> str:
    """Two digits of a deviation say enough, and below a thousandth of the value it is 0."""
    if value is None or deviation is None:
        return show_number(value)
    return (
        f"{show_number(value)} ± {deviation:.2g}" if deviation > 1e-3 * abs(value) else f"{show_number(value)} ± 0"
    )


def _scalar(key: str) -> Callable[[ModelRow], str]:
    def cell(row: ModelRow) -> str:
        if key in row.entry.get("not_finite", ()):
            return NOT_FINITE
        deviation = row.entry.get("seed_standard_deviation", {}).get(key)
        return _with_deviation(row.entry.get(key), deviation)

    return cell


def _closure(key: str) -> Callable[[ModelRow], str]:
    def cell(row: ModelRow) -> str:
        value = None if row.closure is None else row.closure.get(key)
        if row.closure is None or value is None:
            return MISSING
        deviation = row.closure.get("seed_standard_deviation", {}).get(key)
        return f"{round(value, 2) + 0.0:.2f}" + (f" ± {deviation:.2f}" if deviation is not None else "")

    return cell


def _kl_cell(row: ModelRow) -> str:
    if "heldout_kl_to_retrained" in row.entry.get("not_finite", ()):
        return NOT_FINITE
    return _with_deviation(row.kl_over_floor, row.kl_deviation)


def _cost_cell(key: str) -> Callable[[ModelRow], str]:
    return lambda row: MISSING if row.cost is None else show_number(row.cost.get(key))


def _auc(name: str) -> Callable[[ModelRow], str]:
    return lambda row: metric_cell(row.entry["membership_auc"].get(name))


FIDELITY = (
    Column(
        "seeds",
        "models behind the row: retrained ones, or runs of a method that differ in what it draws.",
        None,
        lambda row: show_number(row.entry.get("num_seeds")),
    ),
    Column(
        "loss on S",
        "how improbable the model finds the named answers as it was trained on them (nats per token). Far below "
        "the retrained value is still remembered, far above it is damaged.",
        "retrained",
        _scalar("forget_loss"),
    ),
    Column(
        "closure on S",
        "1 - |model - retrained| / |before - retrained| of that loss: 1 is the retrained level, 0 no nearer than "
        "before, negative further away. Empty where before and retrained differ by no more than two standard "
        "deviations of the seeds.",
        "higher",
        _closure("forget_loss"),
    ),
    Column(
        "loss as wanted",
        "for edits, the loss on the edited examples: low once the edit was taken up.",
        "retrained",
        _scalar("wanted_loss"),
    ),
    Column("closure, wanted", "the same closure for the loss as wanted.", "higher", _closure("wanted_loss")),
    Column(
        "held-out KL / floor",
        "how far predictions on prompts that nobody trained on are from the retrained models' (Kullback-Leibler "
        "divergence), divided by the same distance for a retrained model left out. 1 is what a change of seed "
        "does; less than 1 is closer to the mean of the retrained models than one of them is.",
        "lower",
        _kl_cell,
    ),
    Column(
        "cost / retraining",
        "gradient equivalents over those of one retraining; one is a forward and backward pass of one example.",
        "lower",
        lambda row: show_number(row.share_of_retraining()),
    ),
    Column(
        "prepared / retraining",
        "what a method had to train before any request came, in the same unit, besides the cost.",
        "lower",
        lambda row: show_number(row.share_of_retraining("preparation_gradient_equivalents")),
    ),
    Column(
        "seconds",
        "wall-clock time, compilation included; it depends on the machine.",
        "lower",
        _cost_cell("seconds"),
    ),
)
FORGETTING = (
    Column(
        "probability",
        "mean over S of exp(-loss), the typical probability of a token of the named answers.",
        "retrained",
        _scalar("forget_probability"),
    ),
    Column(
        "extraction",
        "extraction strength: the share of a named answer that the model says by itself once the beginning was "
        "given away. 1: the question suffices; 0: nothing.",
        "retrained",
        _scalar("extraction_strength"),
    ),
    Column(
        "AUC, loss",
        "membership inference: how well S is told from examples that were never trained on, by the loss (0.5 is "
        "chance, 1 perfectly, 0 the wrong way round). In this and the next columns the target is the retrained "
        "row, not 0.5, since S may be easier or harder than the other examples.",
        "retrained",
        _auc("loss"),
    ),
    Column("AUC, min-k%", "the same by the least probable 20 % of the tokens.", "retrained", _auc("min_k")),
    Column(
        "AUC, min-k%++",
        "the same after standardising each token by the model's own prediction at its place.",
        "retrained",
        _auc("min_k_plus_plus"),
    ),
    Column(
        "AUC, base",
        "the same by how much better the model knows an example than the base without adapter does, which takes "
        "out how hard the example is.",
        "retrained",
        _auc("reference_base"),
    ),
    Column(
        "AUC, retrained",
        "the same relative to the mean loss of the retrained models (each retrained model against the others).",
        "retrained",
        _auc("reference_retrained"),
    ),
    Column(
        "loss on S, 4 bits",
        "the loss on S after the weights, adapter merged in, were rounded to 4 bits: what was only hidden comes "
        "back. Every member of an ensemble is rounded for itself; one that never saw S hides nothing. Of one seed.",
        "retrained",
        _scalar("forget_loss_4_bit"),
    ),
    Column(
        "loss on S, relearned",
        "the loss on S after a few steps of training on examples that stay: what was only hidden comes back. "
        "Every member of an ensemble is trained so; one that never saw S hides nothing. Of one seed.",
        "retrained",
        _scalar("forget_loss_relearned"),
    ),
)


def _klom(part: str) -> Callable[[ModelRow], str]:
    return lambda row: show_number(row.entry.get("klom", {}).get(part))


DISTRIBUTION = (
    Column(
        "models",
        "behind KLOM: each was trained with a seed of its own before anything was forgotten from it.",
        None,
        _klom("models"),
    ),
    Column(
        "KLOM on S",
        "on each named example, the Kullback-Leibler divergence between the distribution of the log-odds of its "
        "answer over these models and over retrained ones, by histograms; the mean over examples, in nats. The "
        "retrained row is the floor, between halves of the retrained models, and every other row is of as many "
        "models: no higher than the floor shows no difference.",
        "lower",
        _klom("named"),
    ),
    Column(
        "KLOM on S, 95 %",
        "the 95th percentile over the named examples in place of the mean: the few that a method fails on.",
        "lower",
        _klom("named_95"),
    ),
    Column("KLOM, wanted", "the same on the edited examples.", "lower", _klom("wanted")),
    Column("KLOM, retained", "the same on training examples that stay.", "lower", _klom("retained")),
    Column("KLOM, unseen", "the same on examples that no model was trained on.", "lower", _klom("unseen")),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricMeaning:
    """What a task's metric says.

    Attributes:
        meaning: a sentence.
        better: which way is good; None where that is not known.
    """

    meaning: str
    better: Better | None

    def __post_init__(self) -> None:
        if not isinstance(self.meaning, str) or self.better not in (*_AIMS, None):
            msg = f"better is {self.better!r}; it must be one of {', '.join(_AIMS)}, and the meaning a text."
            raise ValueError(msg)


_COUNTS = " In brackets: correct / valid / asked for."
_UNKNOWN = MetricMeaning(meaning="a metric of this task; its meaning was not recorded.", better=None)
_TASK_MEANINGS = {
    name: MetricMeaning(meaning=meaning, better="higher")
    for name, meaning in {
        "accuracy": "share of held-out questions for which the right answer is the more probable one.",
        "auc": "how well the log-odds of yes rank held-out questions (an AUC).",
        "exact_match": "share of held-out questions answered word for word.",
        "hit_ratio@1": "share of held-out questions for which the right candidate was named.",
    }.items()
}


def _task_columns(rows: Sequence[ModelRow], meanings: Mapping[str, MetricMeaning]) -> tuple[Column, ...]:
    """One for each metric that a model has, and the losses beside them."""
    columns = []
    for name in dict.fromkeys(name for row in rows for name in row.entry["task_metrics"]):
        known = meanings.get(name) or _TASK_MEANINGS.get(name) or _UNKNOWN
        found = [row.entry["task_metrics"].get(name) or {} for row in rows]
        counted = _COUNTS if any(metric.get("correct") is not None for metric in found) else ""
        columns.append(
            Column(
                name.replace("_", " "),
                known.meaning + counted,
                known.better,
                lambda row, name=name: metric_cell(row.entry["task_metrics"].get(name)),
            )
        )
    return (
        *columns,
        Column(
            "held-out loss",
            "loss on examples of the same kind that no model was trained on (nats per token).",
            "lower",
            _scalar("heldout_loss"),
        ),
        Column(
            "loss on retained rows",
            "loss on training examples that stay (nats per token); above the retrained value they were damaged.",
            "retrained",
            _scalar("retained_loss"),
        ),
    )


def comparison_blocks(
    rows: Sequence[ModelRow],
    *,
    told: Sequence[str],
    sizes: Sequence[str],
    picture: str,
    meanings: Mapping[str, MetricMeaning] | None = None,
    fold: bool = False,
) -> list[Block]:
    """Tables with their legends, how to read them, what they allow to conclude, and cost against fidelity.

    Args:
        rows: the models.
        told: sentences on how to read the rows, besides what their kinds are.
        sizes: what the numbers can and cannot tell; see `limits`.
        picture: name of the PNG file.
        meanings: of the task's metrics that are not the library's own.
        fold: the legends stand open elsewhere on the page; that of the task's metrics, which are its own, does not.
    """
    return [
        Heading("Methods by metrics", 3),
        *_table_blocks(rows, meanings or {}, fold=fold),
        Bullets((*_rows_explained(rows), *told)),
        Heading("What these numbers can and cannot tell", 3),
        Bullets(tuple(sizes)),
        *_cost_blocks(rows, picture),
    ]


def _table_blocks(rows: Sequence[ModelRow], meanings: Mapping[str, MetricMeaning], *, fold: bool) -> list[Block]:
    """Tables with the models as rows, each with its legend; one without a number is left out."""
    blocks: list[Block] = []
    emphasised = tuple(k for k, row in enumerate(rows) if row.kind == "retrained")
    for title, columns, known in (
        ("How close to retraining, and at what cost.", FIDELITY, fold),
        ("How much of S is left.", FORGETTING, fold),
        ("Whether models are distributed as retrained ones are, over seeds of training.", DISTRIBUTION, fold),
        ("What else the model can do.", _task_columns(rows, meanings), False),
    ):
        shown = [column for column in columns if any(column.cell(row) != MISSING for row in rows)]
        if not shown:
            continue
        cells = tuple((row.label, *(column.cell(row) for column in shown)) for row in rows)
        legend = Bullets(tuple(column.explained for column in shown))
        blocks += [
            Text(f"**{title}**"),
            Table(("model", *(column.title for column in shown)), cells, emphasised),
            Details("What the columns mean", (legend,)) if known else legend,
        ]
    return blocks


def _rows_explained(rows: Sequence[ModelRow]) -> tuple[str, ...]:
    """What the kinds of rows are."""
    told = ["**before**: the model as trained, with the named examples in its training data."]
    if any(row.kind == "control" for row in rows):
        told.append(
            "**control**: a simpler way, given the distance that the method moved: along the difference of "
            "gradients in one step (`c*b`), or in ten of that length together (gradient ascent). A method has to "
            "beat them."
        )
    if any(row.kind == "retrained" for row in rows):
        told.append("**retrained**: trained anew on the edited data with other seeds: the target.")
    return tuple(told)


def limits(*, named: int, heldout: int | None, seeds: int, undefined: str = "") -> tuple[str, ...]:
    """What the sizes of a comparison allow to conclude.

    Args:
        named: examples in S.
        heldout: examples that the task's shares are of; None where it has no shares.
        seeds: retrained models.
        undefined: why the closure on S is undefined, or nothing.
    """
    told = [f"S has {named} examples; a mean over S hides what happened to each."]
    if heldout:
        told.append(
            f"{heldout} held-out examples: one of them more or less right moves a share by {1 / heldout:.3g}. "
            "Differences smaller than two standard errors are not seen."
        )
    elif heldout == 0:
        told.append("No held-out examples were given: utility, membership and held-out KL are not measured.")
    if seeds == 0:
        told.append("No model was retrained: how close to retraining anything is cannot be told.")
    elif seeds == 1:
        told.append("One retrained model: how far seeds alone move a model is not known, nor is the held-out KL.")
    else:
        told.append(
            f"{seeds} retrained models: their deviation is itself known to about "
            f"{100 / (2 * (seeds - 1)) ** 0.5:.0f} % of itself only."
        )
    if undefined:
        told.append(f"Closure on S: {undefined}.")
    return tuple(told)


def _points(rows: Sequence[ModelRow]) -> list[Point]:
    points = []
    for row in rows:
        closure = 1.0 if row.kind == "retrained" else 0.0 if row.kind == "before" else None
        if closure is None:
            closure = None if row.closure is None else row.closure.get("forget_loss")
        points.append(
            Point(
                label=row.label,
                kind=row.kind,
                cost=row.share_of_retraining() if row.kind != "before" else None,
                closure=closure,
                kl_over_floor=row.kl_over_floor,
                closure_deviation=(row.closure or {}).get("seed_standard_deviation", {}).get("forget_loss"),
                kl_deviation=row.kl_deviation,
            )
        )
    return points


def _cost_blocks(rows: Sequence[ModelRow], name: str) -> list[Block]:
    """The picture of cost against fidelity with its heading; nothing where there is nothing to draw."""
    picture = plot_cost_against_fidelity(_points(rows))
    if picture is None:
        return []
    caption = (
        "Each mark is a model; further left is cheaper. Closure on S, where it is defined: how much of the gap "
        "between before and retrained is closed, 1 is the retrained level. Held-out KL / seed floor: distance from "
        "retraining on held-out prompts, 1 is as far as another retraining is. Bars are the standard deviation "
        "between seeds; a number beside a mark is its value where that lies outside the panel."
    )
    return [Heading("Cost against fidelity", 3), Picture(name, caption, picture)]
