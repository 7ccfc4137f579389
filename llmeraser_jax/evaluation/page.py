"""What a page says: tables with their legends, each example, receipts, costs; from the dicts of `summary` alone.

One comparison, several side by side, and a grid of them are shown by the same columns, on the terminal, in Markdown
and in HTML. A column is a title, which way is good, how to read its cell off a row, and a sentence; a new measure
needs one more.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmeraser_jax.evaluation.closure import Number
from llmeraser_jax.evaluation.plots import Point, plot_cost_against_fidelity, plot_examples, plot_residuals
from llmeraser_jax.evaluation.records import BEFORE, RETRAINED, Better, Json, Kind, MetricMeaning
from llmeraser_jax.evaluation.render import (
    MISSING,
    Block,
    Bullets,
    Details,
    Heading,
    Picture,
    Table,
    Text,
    show_number,
)
from llmeraser_jax.evaluation.summary import UNLEARNED
from llmeraser_jax.unlearning.records import CERTIFIED_BELOW

NOT_FINITE = "not finite"
ACTION_NAMES = {"remove": "removed", "modify_query": "query modified", "correct_response": "response corrected"}
_AIMS: Mapping[Better, str] = {
    "higher": "Higher is better.",
    "lower": "Lower is better.",
    "retrained": "Aim: the retrained row's value.",
}
METHOD_MEANINGS = {
    "auto": "this package, its default: target matching, or the influence path where that does not reach",
    "target-matching": "this package: a few steps whose coefficients are solved for, so that every example of "
    "the forget set ends at its target",
    "path": "this package: many small influence-function steps that take the weight out of the forget set",
    "step": "this package: one influence-function step, kept short enough to be trusted",
    "newton": "this package: one Newton step on the edited data",
    "paper-step": "the paper's single step with the Hessian, not shortened, solved by damped conjugate gradients",
    "paper-descent": "the same step by the paper's own solver: mini-batch descent on the quadratic",
    "public-script": "the same step by the constants of the paper's public script",
    "finetune-edited": "a short fine-tuning on the edited data: what one does without a method",
    "gradient-ascent": "raises the loss on the forget set, and nothing holds the rest",
    "gradient-difference": "raises the loss on the forget set and lowers it on retained examples",
    "kl-anchored-ascent": "raises the loss on the forget set and holds predictions on retained examples",
    "gradient-ascent-equal-length": "normalised ascent on the forget set, as far as a given method moved",
    "gradient-difference-equal-length": "the same, with descent on retained examples",
    "retrain": "training anew on the edited data: the target itself",
    "npo": "negative preference optimisation: the forget set as answers that are not preferred to the trained "
    "model's",
    "simnpo": "negative preference optimisation without a reference model",
    "wga": "gradient ascent that leaves alone the tokens that are improbable already",
    "satimp": "gradient ascent on the tokens that are known, but not by heart",
    "undial": "distillation of the trained model with the tokens of the forget set lowered",
    "pdu": "flattens predictions on the forget set as far as a bound on the loss of retained examples allows",
    "rmu": "drives activations on the forget set to a random direction and holds those on retained examples",
    "k-fade": "a few uphill Newton steps on the forget set, held by the Kronecker-factored curvature of retained "
    "examples",
    "win-u": "one Newton step from curvature stored at the end of training, without retained examples",
    "msa": "subtracts what training on the forget set alone makes of the initial adapter",
    "task-vector": "subtracts what further training on the forget set changes",
    "e2urec": "distillation from a teacher that forgets and one that remembers",
    "sisa": "training in shards; only those that hold the forget set are trained anew, and all answer together",
    "receraser": "training in shards of similar examples that answer with learned weights; those that hold the "
    "forget set are trained anew",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the tables.

    Attributes:
        label: what it is called.
        kind: what it is.
        entry: of `models` in a report.
        closure: of `gap_closure`; None where it has none.
        cost: of `cost`; None for the model before.
        report: that it is from.
    """

    label: str
    kind: Kind
    entry: Json
    closure: Json | None
    cost: Json | None
    report: Json

    def value(self, key: str) -> Number | None:
        """A scalar of the entry."""
        return self.entry.get(key)

    def deviation(self, key: str) -> Number | None:
        """Its standard deviation between seeds."""
        return self.entry.get("seed_standard_deviation", {}).get(key)

    def over_floor(self, number: Number | None) -> Number | None:
        """A held-out KL in multiples of the seed floor."""
        floor = self.report["seed_floor"].get("heldout_kl")
        return number / floor if number is not None and floor else None

    def share(self, key: str, of: str = "gradient_equivalents") -> Number | None:
        """A cost over that of one retraining."""
        spent, whole = (self.cost or {}).get(key), self.report["cost"]["retrain"].get(of)
        return spent / whole if spent is not None and whole else None


def rows_of(report: Json, label: str = UNLEARNED, suffix: str = "") -> list[Row]:
    """Before, the methods, the controls, and the mean of the retrained models at the end.

    Args:
        report: from `summary.summarise`.
        label: of its one method, where it has one.
        suffix: of its controls' labels.
    """
    models, closure, cost = report["models"], report["gap_closure"], report["cost"]

    def row(label: str, kind: Kind, entry: Json, closure: Json | None = None, cost: Json | None = None) -> Row:
        return Row(label=label, kind=kind, entry=entry, closure=closure, cost=cost, report=report)

    rows = [row(BEFORE, "before", models[BEFORE])] if BEFORE in models else []
    if UNLEARNED in models:
        rows.append(row(label, "unlearned", models[UNLEARNED], closure, cost["unlearn"]))
    methods, failed = models.get("methods", {}), report.get("failed", {})
    for name in dict.fromkeys([*methods, *failed]):
        told, entry = failed.get(name), methods.get(name)
        if entry is None:
            rows.append(row(f"{name} (no step)", "unlearned", {}))
            continue
        seeds = entry.get("seeds", 1) + (told["seeds"] if told else 0)
        label = name + (f" ({told['seeds']} of {seeds} seeds failed)" if told else "")
        label += " (chosen with the oracle)" if entry.get("oracle") else ""
        rows.append(row(label, "unlearned", entry, closure["methods"][name], cost["methods"][name]))
    for name, entry in models["controls"].items():
        parts = closure["controls"][name], cost["controls"][name]
        rows.append(row(f"control: {name}{suffix}", "control", entry, *parts))
    if seeds := models[RETRAINED]["seeds"]:
        title = f"retrained, mean of {seeds}" if seeds > 1 else "retrained, one seed"
        rows.append(row(title, "retrained", models[RETRAINED], None, cost["retrain"]))
    return rows


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of the tables.

    Attributes:
        title: as its header says, its unit where it has one.
        better: which way is good; None is neither.
        cell: its text for a model.
        meaning: a sentence.
    """

    title: str
    better: Better | None
    cell: Callable[[Row], str]
    meaning: str

    @property
    def explained(self) -> str:
        """Its line in the legend."""
        aim = "" if self.better is None else f" {_AIMS[self.better]}"
        return f"**{self.title}**: {self.meaning}{aim}"


def _with_deviation(value: Number | None, deviation: Number | None) -> str:
    """Two digits of a deviation say enough, and below a thousandth of the value it is 0."""
    if value is None or deviation is None:
        return show_number(value)
    return f"{show_number(value)} ± " + (f"{deviation:.2g}" if deviation > 1e-3 * abs(value) else "0")


def _scalar(
    key: str, scale: Callable[[Row, Number | None], Number | None] = lambda row, x: x
) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        reasons = [entry.get("reason", {}).get(key, "") for entry in (row.entry, *row.entry.get("per_seed", ()))]
        if row.value(key) is None and any(reason.startswith("the value is") for reason in reasons):
            return NOT_FINITE
        return _with_deviation(scale(row, row.value(key)), scale(row, row.deviation(key)))

    return cell


def _closure_cell(node: Json | None, key: str) -> str:
    value = (node or {}).get(key)
    if node is None or value is None:
        return MISSING
    deviation = node.get("seed_standard_deviation", {}).get(key)
    return f"{round(value, 2) + 0.0:.2f}" + (f" ± {deviation:.2f}" if deviation is not None else "")


def _closure(key: str) -> Callable[[Row], str]:
    return lambda row: _closure_cell(row.closure, key)


def _spent(key: str, scale: Number = 1) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        value = (row.cost or {}).get(key)
        return show_number(None if value is None else value / scale)

    return cell


def _auc(name: str) -> Callable[[Row], str]:
    return lambda row: _metric_cell(row.entry.get("membership_auc", {}).get(name), both=False)


def _klom(part: str) -> Callable[[Row], str]:
    return lambda row: show_number(row.entry.get("klom", {}).get(part))


def _metric_cell(metric: Json | None, *, both: bool = True) -> str:
    """A metric with its error over examples, its deviation over seeds, and `(correct / valid / N)`.

    Args:
        metric: of a report.
        both: else the deviation, where there is one, stands in the place of the error.
    """
    if metric is None:
        return MISSING
    text, deviation = show_number(metric["value"]), metric.get("seed_standard_deviation")
    if metric["standard_error"] is not None and (both or deviation is None):
        text += f" ± {metric['standard_error']:.2g}"
    if deviation is not None:
        text += f" ± {deviation:.2g}" + (" (seeds)" if both else "")
    numbers = (metric.get(key) for key in ("correct", "valid", "total"))
    counts = [MISSING if n is None else f"{n:.0f}" if n == int(n) else f"{n:.1f}" for n in numbers]
    if metric.get("correct") is not None:
        return f"{text} ({' / '.join(counts)})"
    return text if metric.get("valid") == metric.get("total") else f"{text} (valid {counts[1]} of {counts[2]})"


# fmt: off
FIDELITY = (
    Column("seeds", None, lambda row: show_number(row.entry.get("seeds", 1 if row.entry else None)),
           "models behind the row: retrained ones, or runs of a method that differ in what it draws."),
    Column("loss on the forget set", "retrained", _scalar("forget_loss"),
           "how improbable the model finds the responses that it was trained on and is to forget (nats per token). "
           "Far below the retrained value they are still remembered, far above it the model is damaged."),
    Column("closure, forget set", "higher", _closure("forget_loss"),
           "1 - |model - retrained| / |before - retrained| of that loss: 1 is the retrained level, 0 no nearer "
           "than before, negative further away; overshooting counts as much as undershooting. Empty where before "
           "and retrained differ by no more than two standard deviations of the seeds."),
    Column("loss on replacements", "retrained", _scalar("wanted_loss"),
           "of edits, the loss on the edited examples: low once the edit was learned."),
    Column("closure, replacements", "higher", _closure("wanted_loss"), "the same closure for that loss."),
    Column("loss on retained examples", "retrained", _scalar("retained_loss"),
           "loss on training examples that stay (nats per token); above the retrained value they were damaged."),
    Column("held-out KL / floor", "lower", _scalar("heldout_kl_to_retrained", Row.over_floor),
           "how far predictions on prompts that nobody trained on are from the mean of the retrained models' "
           "(Kullback-Leibler divergence, one retrained model left out in turn), divided by the same distance "
           "for the one left out (the seed floor). 1 is what a change of seed does."),
    Column("closure, held-out KL", "higher", _closure("heldout_kl"),
           "the same closure for the held-out KL. Empty where the model before is no further from the retrained "
           "models than they are from each other."),
    Column("cost / retraining", "lower", lambda row: show_number(row.share("gradient_equivalents")),
           "gradient equivalents over those of one retraining; one is a forward and backward pass of one example."),
)
FORGETTING = (
    Column("probability", "retrained", _scalar("forget_probability"),
           "mean over the forget set of exp(-loss), the typical probability of a token of its responses."),
    Column("extraction", "retrained", _scalar("extraction_strength"),
           "extraction strength: the share of a response that the model says by itself once the beginning was "
           "given away. 1: the question suffices; 0: nothing."),
    Column("R^2, forget rows", "retrained", _scalar("forget_r2"),
           "how well the losses on single rows of the forget set predict those of the (other) retrained models: "
           "1 is exactly, 0 as well as their mean does, below 0 worse than that."),
    Column("AUC, loss", "retrained", _auc("loss"),
           "membership inference: how well the forget set is told from examples that were never trained on, by "
           "the loss (0.5 is chance, 1 perfectly, 0 the wrong way round). The target is the retrained row, not "
           "0.5, since the forget set may be easier or harder than the other examples."),
    Column("AUC, min-k%", "retrained", _auc("min_k"), "the same by the least probable 20 % of the tokens."),
    Column("AUC, min-k%++", "retrained", _auc("min_k_plus_plus"),
           "the same after standardising each token by the model's own prediction at its place."),
    Column("AUC, base", "retrained", _auc("reference_base"),
           "the same by how much better the model knows an example than the base without adapter does."),
    Column("AUC, retrained", "retrained", _auc("reference_retrained"),
           "the same relative to the mean loss of the retrained models (each of them against the others)."),
    Column("loss on the forget set, 4 bits", "retrained", _scalar("forget_loss_4_bit"),
           "that loss after the weights, adapter merged in, were rounded to 4 bits: what was only hidden comes "
           "back. Every member of an ensemble is rounded for itself. Of one seed."),
    Column("loss on the forget set, relearned", "retrained", _scalar("forget_loss_relearned"),
           "that loss after a few steps of training on retained examples: what was only hidden comes back. Every "
           "member of an ensemble is trained so. Of one seed."),
)
DISTRIBUTION = (
    Column("models", None, _klom("models"),
           "behind KLOM: each was trained with a seed of its own before anything was forgotten from it."),
    Column("KLOM, forget set", "lower", _klom("named"),
           "on each of its examples, the Kullback-Leibler divergence between the distribution of the log-odds of "
           "the response over these models and over retrained ones, by histograms; the mean over examples, in "
           "nats. The retrained row is the floor, between halves of the retrained models, and every other row is "
           "of as many models: no higher than the floor shows no difference."),
    Column("KLOM, forget set, 95 %", "lower", _klom("named_95"),
           "the 95th percentile in place of the mean: the few examples that a method fails on."),
    Column("KLOM, replacements", "lower", _klom("wanted"), "the same on the edited examples."),
    Column("KLOM, retained", "lower", _klom("retained"), "the same on training examples that stay."),
    Column("KLOM, held-out", "lower", _klom("heldout"), "the same on examples that no model was trained on."),
)
COST = (
    Column("gradient equivalents", "lower", _spent("gradient_equivalents"),
           "1 is a forward and backward pass of one example; training costs epochs times examples."),
    Column("for diagnostics", "lower", _spent("diagnostic_gradient_equivalents"),
           "gradient equivalents spent on checks, besides."),
    Column("prepared / retraining", "lower", lambda row: show_number(row.share("preparation_gradient_equivalents")),
           "what a method had to train before any request came, in retrainings, besides the cost."),
    Column("seconds", "lower", _spent("seconds"),
           "wall-clock time, compilation included; it depends on the machine."),
    Column("seconds / retraining", "lower", lambda row: show_number(row.share("seconds", "seconds")),
           "over those of one retraining."),
    Column("peak memory (MiB)", "lower", _spent("peak_memory_bytes", 2**20),
           "of the process, or of the first device where that keeps count; a process that had done other work "
           "before shows its peak too."),
    Column("distance moved", None, _scalar("delta_norm"), "Euclidean norm of the adapter's change."),
)
_TASK_MEANINGS = {
    "accuracy": "share of held-out questions for which the right answer is the more probable one.",
    "auc": "how well the log-odds of yes rank held-out questions (an AUC).",
    "exact_match": "share of held-out questions answered word for word.",
}
# fmt: on
_UNKNOWN = {"meaning": "a metric of this task; its meaning was not recorded.", "better": None}


def _task_columns(rows: Sequence[Row]) -> tuple[Column, ...]:
    """One for each metric that a model has, and the loss on held-out examples beside them."""
    columns = []
    told = {name: {"meaning": meaning, "better": "higher"} for name, meaning in _TASK_MEANINGS.items()}
    for row in rows:
        told |= row.report.get("metrics", {})
    for name in dict.fromkeys(name for row in rows for name in row.entry.get("task_metrics", {})):
        known = MetricMeaning(**told.get(name, _UNKNOWN))
        found = [row.entry.get("task_metrics", {}).get(name) or {} for row in rows]
        counted = any(metric.get("correct") is not None for metric in found)
        meaning = known.meaning + (" In brackets: correct / valid / asked for." if counted else "")
        cell = lambda row, name=name: _metric_cell(row.entry.get("task_metrics", {}).get(name))  # noqa: E731
        columns.append(Column(name.replace("_", " "), known.better, cell, meaning))
    held = "loss on examples of the same kind that no model was trained on (nats per token)."
    return (*columns, Column("held-out loss", "lower", _scalar("heldout_loss"), held))


def _action_columns(rows: Sequence[Row]) -> tuple[Column, ...]:
    """Losses with their closures by kind of request, where there are several kinds."""
    actions = [action for action in ACTION_NAMES if any(row.report["named"].get(action) for row in rows)]
    columns = []
    for action in actions if len(actions) > 1 else ():
        for quantity, title in (("forget_loss", "loss"), ("wanted_loss", "replacement's loss")):

            def cell(row: Row, quantity: str = quantity, action: str = action) -> str:
                loss = show_number(row.entry.get(f"{quantity}_by_action", {}).get(action))
                closed = _closure_cell((row.closure or {}).get("by_action", {}).get(action), quantity)
                return loss if closed == MISSING else f"{loss} ({closed})"

            meaning = "mean over these examples (nats per token); in brackets the closure of that mean."
            columns.append(Column(f"{ACTION_NAMES[action]}: {title}", "retrained", cell, meaning))
    return tuple(columns)


def _table(title: str, rows: Sequence[Row], columns: Sequence[Column]) -> list[Block]:
    """A table with its legend, folded; columns without a number are left out, and a table without columns is."""
    shown = [column for column in columns if any(column.cell(row) != MISSING for row in rows)]
    if not shown:
        return []
    emphasised = tuple(k for k, row in enumerate(rows) if row.kind == "retrained")
    cells = tuple((row.label, *(column.cell(row) for column in shown)) for row in rows)
    legend = Bullets(tuple(column.explained for column in shown))
    table = Table(("model", *(column.title for column in shown)), cells, emphasised)
    return [Text(f"**{title}**"), table, Details("What the columns mean", (legend,))]


def terminal_blocks(report: Json) -> list[Block]:
    """What a command prints of a comparison: the verdict and the first table."""
    rows = rows_of(report)
    table = [block for block in _table("", rows, FIDELITY) if isinstance(block, Table)] if rows else []
    return [Bullets(tuple(report["verdict"])), *table]


def comparison_blocks(reports: Sequence[Json], labels: Sequence[str], name: str) -> list[Block]:
    """The section of one comparison, or of several about the same request side by side.

    Args:
        reports: from `summary.summarise`.
        labels: of their methods, where a report has one.
        name: what the names of its PNG files begin with.
    """
    first = max(reports, key=lambda report: report["models"][RETRAINED]["seeds"])
    rows = _rows(reports, labels, first)
    blocks: list[Block] = []
    for label, report in zip(labels, reports, strict=True):
        prefix = f"{label}: " if len(reports) > 1 else ""
        blocks.append(Bullets(tuple(prefix + line for line in report.get("verdict", ()))))
    if first.get("question"):
        blocks.append(Text(f"**What was asked.** {first['question']}"))
    blocks += [Heading("What was compared", 3), Bullets(tuple(_facts(reports, labels, first)))]
    if first.get("missing"):
        gaps = "; ".join(first["missing"])
        told = "The command that made the comparison goes on where it stopped; below is what there is."
        blocks.append(Text(f"**Not finished**: {gaps}. {told}"))
    if not rows:
        return [*blocks, Text("Nothing was measured yet.")]
    blocks += [
        Heading("Models and measures", 3),
        *_table("How close to retraining, and at what cost.", rows, FIDELITY),
        *_table("By kind of request.", rows, _action_columns(rows)),
        *_table("How much of the forget set is left.", rows, FORGETTING),
        *_table("Whether models are distributed as retrained ones are, over seeds.", rows, DISTRIBUTION),
        *_table("What else the model can do.", rows, _task_columns(rows)),
        *_table("What it took.", rows, COST),
        *_each_retrained(first),
        Bullets(tuple(_rows_explained(rows, first))),
        Heading("What these numbers can and cannot tell", 3),
        Bullets(tuple(_limits(first))),
        *_cost_picture(rows, f"{name}-cost.png"),
        *_examples(reports, labels, first, name),
    ]
    return blocks


def _rows(reports: Sequence[Json], labels: Sequence[str], first: Json) -> list[Row]:
    """The rows of all, with before and retrained of the first alone."""
    found = []
    for label, report in zip(labels, reports, strict=True):
        found += rows_of(report, label, "" if len(reports) == 1 else f", as far as {label}")
    of_first = [row for row in rows_of(first) if row.kind in ("before", "retrained")]
    middle = [row for row in found if row.kind not in ("before", "retrained")]
    return [*(r for r in of_first if r.kind == "before"), *middle, *(r for r in of_first if r.kind == "retrained")]


def _facts(reports: Sequence[Json], labels: Sequence[str], first: Json) -> list[str]:
    hidden = ("Request", *(("Method", "Outcome") if len(reports) > 1 else ()))
    asked = ", ".join(f"{first['named'][a]} {words}" for a, words in ACTION_NAMES.items() if first["named"].get(a))
    of = f" of {first['num_examples']} training examples" if first.get("num_examples") else ""
    facts = [f"**Forget set**: {asked}{of}."]
    facts += [f"**{key}**: {value}" for key, value in first["context"].items() if key not in hidden]
    if len(reports) > 1:
        facts += [f"**{label}**: {report['context'].get('Outcome', 'outcome not recorded')}"
                  for label, report in zip(labels, reports, strict=True)]  # fmt: skip
    floor = first["seed_floor"].get("heldout_kl")
    if floor is not None:
        facts.append(f"**Seed floor** of the held-out KL: {show_number(floor)} nats per response token.")
    return facts


def _each_retrained(report: Json) -> list[Block]:
    """Each retrained model by itself, folded."""
    entries, costs = report["models"][RETRAINED].get("per_seed", []), report["cost"]["retrain"].get("per_seed", [])
    if len(entries) < 2:
        return []
    rows = [Row(label=f"retrained, {entry['name']}", kind="control", entry=entry, closure=None, cost=cost,
            report=report) for entry, cost in zip(entries, costs, strict=True)]  # fmt: skip
    columns = (*FIDELITY[1:], *_action_columns(rows), *FORGETTING, *_task_columns(rows), *COST)
    return [Details("Each retrained model by itself", tuple(_table("Each seed.", rows, columns)[1:2]))]


def _rows_explained(rows: Sequence[Row], report: Json) -> list[str]:
    """What the rows are, and what has to be known about some of them."""
    told = ["**before**: the model as trained, with the forget set in its training data."]
    methods = report["models"].get("methods", {})
    told += [f"**{name}**: {METHOD_MEANINGS[name]}." for name in methods if name in METHOD_MEANINGS]
    if any(row.kind == "control" for row in rows):
        told.append(
            "**control**: a simpler way, given the distance that the method moved: along the difference of "
            "gradients in one step (`c*b`), or in ten of that length together (gradient ascent). A method has to "
            "beat them."
        )
    if any(row.kind == "retrained" for row in rows):
        told.append("**retrained**: trained anew on the edited data with other seeds: the target.")
    told.append(
        "± after a loss, a closure or the held-out KL is the standard deviation between seeds. After a metric of "
        "the task, and after an AUC of one model, it is the standard error over examples; (seeds) is the "
        "deviation between seeds. A row of one model has no deviation."
    )
    choices = report.get("choices", {})
    rates = {n: c["chosen"]["learning_rate"] for n, c in choices.items() if "learning_rate" in c.get("chosen", {})}
    if rates:
        shown = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
        told.append(
            f"**Learning rates** ({shown}) are those of a small grid whose losses come nearest to the retrained "
            "models', which no user could know; the cost is without that search."
        )
    for name, choice in choices.items():
        if own := choice.get("own_before"):
            told.append(
                f"**{name}** is not made from the model before, but from its own, which before the request had a "
                f"loss of {show_number(own.get('forget_loss'))} on the forget set and "
                f"{show_number(own.get('retained_loss'))} on retained examples."
            )
    for name, failure in report.get("failed", {}).items():
        seeds = failure["seeds"] + report["models"].get("methods", {}).get(name, {"seeds": 0}).get("seeds", 1)
        told.append(f"**{name}** found no step with {failure['seeds']} of {seeds} seeds: {failure['reason']}")
    return told


def _limits(report: Json) -> list[str]:
    """What the sizes of a comparison allow to conclude."""
    told, closure, seeds = [], report["gap_closure"], report["models"][RETRAINED]["seeds"]
    # The gap is the same for every method: what matters is before against retrained.
    any_closure = closure if "forget_loss" in closure else next(iter(closure.get("methods", {}).values()), {})
    for key, title in (("forget_loss", "the forget set"), ("wanted_loss", "replacements")):
        reason = any_closure.get("reason", {}).get(key, "")
        if any_closure.get(key) is None and reason.startswith("undefined: before"):
            told.append(f"**Closure on {title}** has no value: {reason}.")
        elif any_closure.get(key) is not None and reason:
            told.append(f"Closure on {title}: {reason}.")
    if report.get("klom_caveat"):
        told.append(f"KLOM: {report['klom_caveat']}.")
    named = report["named"]["total"]
    told.append(f"The forget set has {named} examples; a mean over them hides what happened to each.")
    metrics = report["models"].get(BEFORE, {}).get("task_metrics", {}).values()
    shares = [metric.get("total") or 0 for metric in metrics if metric.get("correct") is not None]
    if any(shares):
        told.append(
            f"The task is measured on {max(shares):.0f} examples: one of them more or less right moves a share by "
            f"{1 / max(shares):.3g}. Differences smaller than two standard errors are not seen."
        )
    if not report["heldout"]["examples"]:
        told.append("No held-out examples were given: membership inference and held-out KL are not measured.")
    if seeds == 0:
        told.append("No model was retrained: how close to retraining anything is cannot be told.")
    elif seeds == 1:
        told.append("One retrained model: how far seeds alone move a model is not known, nor is the held-out KL.")
    else:
        known = 100 / (2 * (seeds - 1)) ** 0.5
        told.append(
            f"{seeds} retrained models: their deviation is itself known to about {known:.0f} % of itself only."
        )
    return told


def _points(rows: Sequence[Row], *, labels: Sequence[str] | None = None) -> list[Point]:
    points = []
    for place, row in enumerate(rows):
        closure = {"retrained": 1.0, "before": 0.0}.get(row.kind, (row.closure or {}).get("forget_loss"))
        key = "heldout_kl_to_retrained"
        points.append(
            Point(
                label=row.label if labels is None else labels[place],
                kind=row.kind,
                cost=row.share("gradient_equivalents") if row.kind != "before" else None,
                closure=closure,
                kl_over_floor=row.over_floor(row.value(key)),
                closure_deviation=(row.closure or {}).get("seed_standard_deviation", {}).get("forget_loss"),
                kl_deviation=row.over_floor(row.deviation(key)),
            )
        )
    return points


def _cost_picture(rows: Sequence[Row], name: str, *, labels: Sequence[str] | None = None) -> list[Block]:
    """The picture of cost against fidelity with its heading; nothing where there is nothing to draw."""
    picture = plot_cost_against_fidelity(_points(rows, labels=labels))
    if picture is None:
        return []
    caption = (
        "Each mark is a model; further left is cheaper. Closure: the share of the gap between before and "
        "retrained that is closed in the loss on the forget set. Held-out KL / seed floor: distance from "
        "retraining on held-out prompts. Bars are the standard deviation between seeds; a number beside a mark is "
        "its value where that lies outside the panel."
    )
    return [Heading("Cost against fidelity", 3), Picture(name, caption, picture)]


_SHOWN_EXAMPLES, _OPEN_EXAMPLES = 200, 30
_QUANTITIES = {
    "forget_loss": ("named", "as it was trained on", "it should rise to the retrained value, not beyond"),
    "wanted_loss": ("wanted", "as its replacement", "it should fall to the retrained value"),
}


def _examples(reports: Sequence[Json], labels: Sequence[str], first: Json, name: str) -> list[Block]:
    """Every example of the forget set: a picture, tables of losses, and texts where they are kept."""
    by_id = [{row["id"]: row for row in report["named_examples"]} for report in reports]
    own = {BEFORE, RETRAINED}
    models: dict[str, tuple[int, str]] = {}  # label -> which report, and its name there
    for place, (label, rows) in enumerate(zip(labels, by_id, strict=True)):
        for key in next(iter(rows.values()))["forget_loss"] if rows else ():
            if key not in own | {"reason"}:
                models[label if key == UNLEARNED else key] = (place, key)
    columns = {BEFORE: (reports.index(first), BEFORE), **models}
    if first["models"][RETRAINED]["seeds"]:
        columns["retrained (mean)"] = (reports.index(first), RETRAINED)
    kinds = {
        label: {BEFORE: "before", RETRAINED: "retrained"}.get(key, "unlearned")
        for label, (_, key) in columns.items()
    }
    panels: dict[str, dict[str, dict[str, list[Number | None]]]] = {}
    blocks: list[Block] = []
    for quantity, (_, title, meaning) in _QUANTITIES.items():
        chosen = [row for row in first["named_examples"] if quantity in row]
        if not chosen:
            continue
        losses = {
            label: [by_id[k].get(row["id"], {}).get(quantity, {}).get(key) for row in chosen]
            for label, (k, key) in columns.items()
        }
        losses = {label: values for label, values in losses.items() if any(v is not None for v in values)}
        actions = dict.fromkeys(row["action"] for row in chosen)
        panels[f"each example {title}"] = {
            ACTION_NAMES[action]: {
                label: [value for row, value in zip(chosen, values, strict=True) if row["action"] == action]
                for label, values in losses.items()
            }
            for action in actions
        }
        cells = tuple((row["id"], ACTION_NAMES[row["action"]], *(show_number(values[k]) for values in
                      losses.values())) for k, row in enumerate(chosen))  # fmt: skip
        shown = Table(("id", "request", *losses), cells[:_SHOWN_EXAMPLES])
        left = len(cells) - len(shown.rows)
        note = f" The other {left} are in `report.json`." if left else ""
        text = Text(f"Loss (nats per token) of each example of the forget set **{title}**: {meaning}.{note}")
        fold = len(shown.rows) > _OPEN_EXAMPLES or len(models) > 3
        table: Block = Details(f"{len(shown.rows)} examples, {title}", (shown,)) if fold else shown
        blocks += [text, table]
    picture = plot_examples(panels, kinds)
    if picture is not None:
        caption = "Loss of each example of the forget set under each model; the bars are means."
        blocks.insert(0, Picture(f"{name}-examples.png", caption, picture))
    heading = [Heading("Each example of the forget set, before and after", 3)] if blocks else []
    return [*heading, *blocks, *_texts(first, name)]


def _texts(report: Json, name: str) -> list[Block]:
    """What was asked, with its pictures, and answered, where the evaluation was told to keep texts."""
    rows = []
    pictures: dict[tuple[int, int], tuple[Picture, ...]] = {}
    models: list[str] = []
    for row in report["named_examples"][:_SHOWN_EXAMPLES]:
        for part, said in row.get("answers", {}).items():
            texts = row["texts"]
            models = models or list(said)
            query, right = ("query", "trained") if part == "named" else ("wanted_query", "wanted")
            action = ACTION_NAMES[row["action"]] if part == "named" else "  its replacement"
            if shown := texts.get("pictures" if part == "named" else "wanted_pictures"):
                pictures[len(rows), 1] = tuple(
                    Picture(
                        f"{name}-question-{len(rows)}-{k}.png", f"picture of {row['id']}", base64.b64decode(png)
                    )
                    for k, png in enumerate(shown)
                )
            rows.append((action, texts[query], texts[right], *(said.get(model, MISSING) for model in models)))
    if not rows:
        return []
    header = ("request", "question", "trained on, or wanted", *models)
    meaning = "What the models answer by greedy decoding; of the retrained models, the first."
    return [Heading("Questions and answers", 3), Text(meaning), Table(header, tuple(rows), pictures=pictures)]


def grid_blocks(reports: Sequence[tuple[str, Json]], name: str, extra: Sequence[Column] = ()) -> list[Block]:
    """Many comparisons in tables: a row for each method of each, and one picture of all.

    Args:
        reports: each with the name of its cell. Those of one name differ in what was drawn, and stand one below the
            other.
        name: what the name of the PNG file begins with.
        extra: columns besides those of every comparison.
    """
    rows, labels = [], []
    for cell, report in reports:
        for row in rows_of(report):
            rows.append(dataclasses.replace(row, label=f"{cell}: {row.label}"))
            labels.append(row.label)
    tables = (("How close to retraining, and at what cost.", (*FIDELITY, *extra)), ("What is left.", FORGETTING),
              ("What else the model can do.", _task_columns(rows)), ("What it took.", COST))  # fmt: skip
    blocks = [block for title, columns in tables for block in _table(title, rows, columns)]
    methods = [(row, label) for row, label in zip(rows, labels, strict=True) if row.kind == "unlearned"]
    return [
        *blocks,
        *_cost_picture([row for row, _ in methods], f"{name}-cost.png", labels=[l for _, l in methods]),
    ]


_ABREAST = 4  # receipts in one table; more make another
_STEPS_SHOWN = 60


def receipt_blocks(receipts: Sequence[tuple[str, Json]]) -> list[Block]:
    """How far to trust each erasure's linear algebra: receipts side by side, each line with how to read it.

    Args:
        receipts: name, and `receipt.json`.
    """
    if not receipts:
        return []
    blocks: list[Block] = [
        Heading("Receipts"),
        Text(
            "Each erasure solves linear systems with a curvature matrix. Its receipt says how well they were "
            "solved and what the rows did. Being close to the exact step is not yet being close to retraining."
        ),
    ]
    for start in range(0, len(receipts), _ABREAST):
        chosen = receipts[start : start + _ABREAST]
        lines = [(title, *(_line(cell, receipt) for _, receipt in chosen), help) for title, cell, help in _LINES]
        rows = tuple(line for line in lines if set(line[1:-1]) != {MISSING})
        blocks.append(Table(("", *(name for name, _ in chosen), "how to read it"), rows))
    for place, (name, receipt) in enumerate(receipts, start=1):
        inside: list[Block] = [*_forget_rows(receipt), _steps(receipt)]
        drawn = plot_residuals([s for s in receipt["steps"] if "residual_history" in s])
        if drawn is not None:
            caption = (
                "Relative residual after each iteration, a line per solve, the last the lightest; marks are "
                "recomputed at the end, crosses where negative curvature stopped the solver."
            )
            inside.append(Picture(f"receipt{place}-residual.png", caption, drawn))
        blocks.append(Details(f"Every forget row and every step of {name}", tuple(inside)))
    return blocks


def _line(cell: Callable[[Json], str], receipt: Json) -> str:
    """A receipt's cell; a dash for what a receipt of another format or program does not say."""
    try:
        return cell(receipt)
    except (KeyError, TypeError):
        return MISSING


def _shown(*keys: str) -> Callable[[Json], str]:
    """The number, yes or no, or text that lies there."""

    def cell(receipt: Json) -> str:
        value: Any = receipt
        for key in keys:
            value = value[key]
        if isinstance(value, bool):
            return _yes(value)
        return str(value or MISSING) if isinstance(value, str) else show_number(value)

    return cell


def _stayed(group: str) -> Callable[[Json], str]:
    """Losses of rows that should have stayed."""
    words = {"mean": "mean", "percentile_95": "95 %", "worst": "worst"}

    def cell(receipt: Json) -> str:
        change = receipt["validity"][group]
        pairs = ((word, change["before"][name], change["after"][name]) for name, word in words.items())
        return ", ".join(f"{word} {show_number(old)} → {show_number(new)}" for word, old, new in pairs)

    return cell


def _ritz(receipt: Json) -> str:
    """Least and largest over all steps."""
    pairs = [step.get("ritz_extremes") or () for step in receipt["steps"]]
    low, high = ([pair[k] for pair in pairs if pair and pair[k] is not None] for k in (0, 1))
    return f"{show_number(min(low))} to {show_number(max(high))}" if low and high else MISSING


def _bound(receipt: Json) -> str:
    """The largest of the steps' bounds; none where a step has none."""
    bounds = [step.get("error_bound") for step in receipt["steps"]]
    if not bounds or None in bounds:
        return MISSING
    worst = max(bounds)
    return f"{show_number(worst)} ({'certified' if worst < CERTIFIED_BELOW else 'certifies nothing'})"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


# fmt: off
_LINES: tuple[tuple[str, Callable[[Json], str], str], ...] = (
    ("outcome", _shown("outcome"), "what was reached, in words"),
    ("method", _shown("method"), "what was done; METHOD.md in the package explains it"),
    ("curvature", _shown("curvature_reason"), "the matrix that was solved with, and why that one"),
    ("solver status", lambda r: f"{r['solver']['status']} ({r['solver']['iterations']} iterations in "
     f"{len(r['steps'])} solves)", "the worst of all solves; reaching max_steps is not convergence"),
    ("true residual", _shown("solver", "relative_residual"),
     "the largest ||b - A x|| / ||b||, recomputed after each solve: 0 is exact, 1 is nothing solved"),
    ("Ritz extremes", _ritz, "least and largest eigenvalue that the solver met; their ratio says how hard the "
     "system is, a least one below 0 that the matrix is indefinite"),
    ("negative curvature", _shown("solver", "negative_curvature"), "whether a direction was met along which the "
     "matrix is not positive; the solver then stops with what it has"),
    ("error bound", _bound, f"bound on the relative error of the worst step, for its own sampled matrix; below "
     f"{CERTIFIED_BELOW:g} it certifies the solve"),
    ("validity check", lambda r: "; ".join([str(r["validity"]["verdict"]), *r["validity"]["reasons"]]),
     "whether every forget row arrived and the others stayed; not judged where nothing shows where removed rows "
     "should end"),
    ("loss on retained examples", _stayed("retained"),
     "before and after, on rows drawn apart from those that any step protected"),
    ("loss on calibration rows", _stayed("calibration"), "the same for rows that were not trained on"),
    ("standard error", _shown("step_standard_error"),
     "of the first step over its norm: how much another sample would change it"),
    ("size of the change", lambda r: f"{show_number(r['delta_norm'])} of {show_number(r['adapter_norm_before'])}",
     "Euclidean norm of the change, of the adapter's"),
    ("gradient norm", lambda r: " → ".join(show_number(r[f"edited_gradient_norm_{when}"]) for when in
     ("before", "after")), "of the edited objective on a sample: smaller is nearer to a stationary point of it"),
    ("bfloat16 survival", lambda r: f"{100 * r['bf16_survival']:.0f} %",
     "share of the change that is left after rounding the adapter to bfloat16"),
    ("cost", lambda r: f"{show_number(r['gradient_equivalents']['total'])} gradient equivalents, "
     f"{show_number(r['seconds'])} s", "1 is a forward and backward pass of one example; diagnostics apart"),
)
# fmt: on


def _forget_rows(receipt: Json) -> list[Block]:
    """Every forget row: where it was, should be and is."""
    rows = (receipt.get("validity") or {}).get("rows") or ()
    words = {True: "arrived", False: "not arrived", None: "not judged"}
    header = ("row", "part", "before", "target", "after", "outcome", "whole response", "retain set says the same")
    cells = tuple(
        (
            row["id"],
            row["part"],
            *(show_number(row[when]) for when in ("before", "target", "after")),
            words[row["arrived"]],
            f"{show_number(row['whole_before'])} → {show_number(row['whole_after'])}",
            ", ".join(row["copies"]) or MISSING,
        )
        for row in rows
    )
    return [Table(header, cells)] if rows else []


def _steps(receipt: Json) -> Table:
    """One row per step: of target matching how far the rows came, of the others how the solve ended."""
    if receipt["steps"] and "status" not in receipt["steps"][0]:
        return _matching_steps(receipt)
    header = (
        "step", "weight left", "length taken", "status", "iterations", "true residual", "least Ritz",
        "largest Ritz", "negative curvature", "error bound", "loss on the forget set", "replacements", "retained",
    )  # fmt: skip
    rows = []
    solves = [step for step in receipt["steps"] if "status" in step]
    for number, step in enumerate(solves[:_STEPS_SHOWN], start=1):
        weights = " → ".join(show_number(step[f"weight_{when}"]) for when in ("before", "after"))
        solve = (show_number(step["scale"]), step["status"], str(step["iterations"]))
        ritz = step.get("ritz_extremes") or (None, None)
        first = [show_number(x) for x in (step["relative_residual"], *ritz)]
        last = [show_number(step.get(key)) for key in ("error_bound", "forget_loss", "wanted_loss", "probe_loss")]
        rows.append((str(number), weights, *solve, *first, _yes(step["negative_curvature"]), *last))
    return _shortened(header, rows, len(solves))


def _matching_steps(receipt: Json) -> Table:
    """Steps of target matching; Newton steps that follow them are left to the receipt."""
    header = (
        "step", "way left", "length taken", "predicted move", "actual move", "residual", "restoration",
        "loss on the forget set", "replacements", "constrained retained rows",
    )  # fmt: skip
    rows = []
    matching = [step for step in receipt["steps"] if "way_left_after" in step]
    for number, step in enumerate(matching[:_STEPS_SHOWN], start=1):
        way = " → ".join(show_number(step[f"way_left_{when}"]) for when in ("before", "after"))
        keys = ("scale", "predicted_move", "actual_move", "relative_residual")
        losses = ("forget_loss", "wanted_loss", "retained_loss")
        rows.append(
            (
                str(number),
                way,
                *(show_number(step[key]) for key in keys),
                _yes(step["restoration"]),
                *(show_number(step[key]) for key in losses),
            )
        )
    return _shortened(header, rows, len(matching))


def _shortened(header: tuple[str, ...], rows: list[tuple[str, ...]], count: int) -> Table:
    """The rows, and how many of `count` are left out."""
    left = count - len(rows)
    if left:
        rows.append((f"{left} more", *[MISSING] * (len(header) - 1)))
    return Table(header, tuple(rows))
