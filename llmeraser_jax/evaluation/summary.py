"""Summarises a comparison: one JSON-ready dict with closures, seed floors, membership inference, KLOM and costs.

`summarise` is the only place where models are compared with each other. The page is drawn from its dict alone,
which is `report.json`, so that the file holds every number that the page shows. Every null in the dict has, in the
same object under `reason`, a sentence that says why.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from llmeraser_jax.evaluation import tofu
from llmeraser_jax.evaluation.closure import (
    Closure,
    Number,
    gap_closure,
    kl_gap_closure,
    seed_mean,
    seed_standard_deviation,
)
from llmeraser_jax.evaluation.klom import Klom, klom, response_margins
from llmeraser_jax.evaluation.membership import attacks
from llmeraser_jax.evaluation.records import (
    ACTIONS,
    BEFORE,
    COSTS,
    PARTS,
    PROBES,
    RETRAINED,
    Comparison,
    Json,
    MetricMeaning,
    Record,
)

FORMAT = 1
REPORT_FILE = "report.json"
UNLEARNED = "unlearned"  # the name of the one method of `llmeraser evaluate`, whose entry is at the top
QUANTITIES = {"forget_loss": "named", "wanted_loss": "wanted"}
QUALITY, STATISTIC = "forget quality, KS p", "KS statistic"
QUALITY_MEANINGS = {
    QUALITY: MetricMeaning(
        meaning="p of the Kolmogorov-Smirnov test between the truth ratios on the forgotten questions under the "
        "model and under a retrained one, the median over the retrained ones; small where they can be told apart.",
        better="higher",
    ),
    STATISTIC: MetricMeaning(
        meaning="the statistic of the same test: the largest difference of the two distribution functions.",
        better="lower",
    ),
}
_NOT_FINITE = "the value is"
_NO_RETRAINED = "no retrained model was given"
_ONE_SEED = "one retraining seed: no deviation between seeds is known"
_LEAST_ROWS = 3  # whose differences an R^2 can speak of


class _Node:
    """A JSON object under construction, in which every null gets a reason."""

    def __init__(self, **data: Any) -> None:
        self.data: dict[str, Any] = dict(data)
        self.reasons: dict[str, str] = {}

    def number(self, key: str, value: Number | None, reason: str = "") -> None:
        """Files `value`, or null with `reason`; a number that JSON cannot hold becomes null by itself."""
        if value is not None and not math.isfinite(value):
            value, reason = None, f"{_NOT_FINITE} {value}"
        self.data[key] = value
        if value is None or reason:
            self.reasons[key] = reason or "not measured"

    def build(self) -> dict[str, Any]:
        return {**self.data, "reason": self.reasons} if self.reasons else self.data


def _over_seeds(
    nodes: Sequence[Json], keys: Sequence[str], missing: str = "not known", *, ignore_unknown: bool = False
) -> tuple[_Node, _Node]:
    """Means of entries over seeds, and their standard deviations.

    Args:
        nodes: of each seed.
        keys: of numbers.
        missing: why there is no number, where no seed says so.
        ignore_unknown: average what is known; else a number that a seed lacks has no mean.
    """
    means, deviations = _Node(), _Node()
    for key in keys:
        known = [node[key] for node in nodes if node.get(key) is not None]
        reasons = [node["reason"][key] for node in nodes if key in node.get("reason", {})]
        diverged = any(reason.startswith(_NOT_FINITE) for reason in reasons)
        if not known or diverged or (len(known) < len(nodes) and not ignore_unknown):
            reason = next((r for r in reasons if r.startswith(_NOT_FINITE) or not diverged), missing)
            means.number(key, None, reason)
            deviations.number(key, None, "a seed has no value" if known else reason)
            continue
        means.number(key, seed_mean(known) if len(known) > 1 else known[0])
        deviation = seed_standard_deviation(known)
        unknown = _ONE_SEED if len(known) == 1 else "a seed's value is not finite"
        deviations.number(key, deviation, unknown if deviation is None else "")
    return means, deviations


def _array(values: Sequence[Number | None]) -> np.ndarray:
    return np.asarray([np.nan if value is None else value for value in values], np.float64)


def _list(scores: Json, part: str, name: str = "losses") -> np.ndarray:
    """Numbers of a part's examples; nan for what is no finite number, empty where it was not measured."""
    return _array(scores.get(part, {}).get(name, ()))


def _mean(values: np.ndarray) -> Number | None:
    return float(np.mean(values)) if values.size else None


class _Summary:
    """The comparison, with what several entries need computed once."""

    def __init__(self, comparison: Comparison) -> None:
        self.of = comparison
        self.before = next((record for record in comparison.of("before") if not record.failed), None)
        self.retrained = [record for record in comparison.of("retrained") if not record.failed]
        self.base = next(iter(comparison.of("base")), None)
        self.actions = {"named": np.asarray(comparison.actions),
                        "wanted": np.asarray([a for a in comparison.actions if a != "remove"])}  # fmt: skip
        self.klom = klom_of(comparison)
        measured = {key for record in comparison.records for key in record.scores}
        self.keys = ["forget_loss", "wanted_loss", "forget_r2", "forget_probability", "extraction_strength",
                     "heldout_loss",
                     "heldout_kl_to_retrained", *(["retained_loss"] if "retained" in measured else []),
                     *(key for key in PROBES if key in measured)]  # fmt: skip
        kls = [record.scores.get("heldout_kl") for record in self.retrained]
        self.floors = [] if None in kls or len(kls) < 2 else [float(kl) for kl in kls if kl is not None]

    def own_place(self, record: Record) -> int | None:
        """Its place among the retrained models, which it must not be held against."""
        return next((k for k, other in enumerate(self.retrained) if other is record), None)

    def forget_r2(self, record: Record) -> Number | None:
        """R^2 of a model's losses on single forget rows as a prediction of the (other) retrained models' means."""
        own = self.own_place(record)
        seeds = [_list(other.scores, "named") for k, other in enumerate(self.retrained) if k != own]
        losses = _list(record.scores, "named")
        if not seeds or len(losses) < _LEAST_ROWS:
            return None
        target = np.mean(seeds, axis=0)
        spread = float(np.sum((target - target.mean()) ** 2))
        return 1 - float(np.sum((losses - target) ** 2)) / spread if spread > 0 else None

    def why_no_kl(self) -> str:
        if len(self.retrained) < 2:
            return "the held-out KL needs at least two retrained models" if self.retrained else _NO_RETRAINED
        return "the held-out KL was not measured"

    def by_action(self, record: Record, quantity: str) -> dict[str, float]:
        """Mean loss per action that occurs, and over all of them under "all"; empty where no example has it."""
        part = QUANTITIES[quantity]
        losses, actions = _list(record.scores, part), self.actions[part]
        if not losses.size:
            return {}
        means = {a: float(losses[actions == a].mean()) for a in ACTIONS if a in actions}
        return {"all": float(losses.mean()), **means}

    def numbers(self, record: Record) -> dict[str, Number | None]:
        """The scalar entries of a model, None where there is nothing to average."""
        scores = record.scores
        found = {
            "forget_loss": _mean(_list(scores, "named")),
            "wanted_loss": _mean(_list(scores, "wanted")),
            "forget_r2": self.forget_r2(record),
            "forget_probability": _mean(np.exp(-_list(scores, "named"))),
            "extraction_strength": _mean(_list(scores, "named", "extraction")),
            "heldout_loss": _mean(_list(scores, "heldout")),
            "retained_loss": _mean(_list(scores, "retained")),
            **{key: math.nan if scores.get(key, 0) is None else scores.get(key) for key in PROBES},
        }
        kl = scores.get("heldout_kl", 0)
        found["heldout_kl_to_retrained"] = math.nan if kl is None else scores.get("heldout_kl")
        return {key: found[key] for key in self.keys}

    def reasons(self) -> dict[str, str]:
        return {
            "wanted_loss": "no edit was requested",
            "forget_r2": f"it takes another retrained model and {_LEAST_ROWS} forget rows that differ under it",
            "heldout_loss": "no held-out example was given",
            "heldout_kl_to_retrained": self.why_no_kl(),
        }

    def metrics(self, record: Record) -> dict[str, Json]:
        """Of the task, with TOFU's forget quality where truth ratios were kept."""
        task = record.scores.get("task", {})
        quality = {}
        if "truth_ratios" in task:
            own = self.own_place(record)
            quality = forget_quality(task, [other.scores.get("task", {}) for k, other in enumerate(self.retrained)
                                            if k != own])  # fmt: skip
        return {**task.get("metrics", {}), **quality}

    def aucs(self, record: Record) -> dict[str, Json]:
        found = attacks(
            record.scores,
            base=None if self.base is None else self.base.scores,
            retrained=[other.scores for other in self.retrained],
            left_out=self.own_place(record),
            nonmembers=self.of.nonmembers,
        )
        return {metric.name: vars(metric) for metric in found}

    def model(self, record: Record) -> dict[str, Any]:
        """The entry of one model."""
        name = f"seed {record.seed}" if record.kind == RETRAINED else record.model
        node, reasons = _Node(name=name), self.reasons()
        for key, value in self.numbers(record).items():
            node.number(key, value, "" if value is not None else reasons.get(key, "not measured"))
        for quantity in QUANTITIES:
            by_action = _Node()
            for action, value in self.by_action(record, quantity).items():
                if action != "all":
                    by_action.number(action, value)
            node.data[f"{quantity}_by_action"] = by_action.build()
        node.data["task_metrics"] = {name: _metric(metric) for name, metric in self.metrics(record).items()}
        node.data["membership_auc"] = {name: _metric(metric) for name, metric in self.aucs(record).items()}
        told = ("delta_norm", "outcome", "oracle")
        return node.build() | {key: record.details[key] for key in told if record.details.get(key)}

    def models(self, records: Sequence[Record], name: str) -> dict[str, Any]:
        """Means over seeds, their standard deviations, and each seed's own entry."""
        entries = [self.model(record) for record in records]
        missing = {key: self.reasons().get(key, "not measured") if records else _NO_RETRAINED for key in self.keys}
        found: dict[str, Any] = {"name": name, "seeds": len(records)}
        reasons, deviations, unknown = {}, {}, {}
        for key in self.keys:
            mean, deviation = _over_seeds(entries, [key], missing[key], ignore_unknown=True)
            found |= mean.data
            deviations |= deviation.data
            reasons |= mean.reasons
            unknown |= deviation.reasons
        for quantity in QUANTITIES:
            nodes = [entry[f"{quantity}_by_action"] for entry in entries]
            actions = [action for action in ACTIONS if nodes and action in nodes[0]]
            found[f"{quantity}_by_action"] = _over_seeds(nodes, actions)[0].build()
        found["seed_standard_deviation"] = deviations | ({"reason": unknown} if unknown else {})
        for group in ("task_metrics", "membership_auc"):
            found[group] = _mean_metrics([entry[group] for entry in entries])
        norms = [entry["delta_norm"] for entry in entries if "delta_norm" in entry]
        outcomes = dict.fromkeys(entry["outcome"] for entry in entries if "outcome" in entry)
        found |= {"delta_norm": seed_mean(norms)} if norms else {}
        found |= {"outcome": "; ".join(outcomes)} if outcomes else {}
        return {**found, "per_seed": entries, **({"reason": reasons} if reasons else {})}

    def entry(self, records: Sequence[Record], name: str) -> dict[str, Any]:
        """Of a method: its one model, or the means over its seeds."""
        found = self.model(records[0]) if len(records) == 1 else self.models(records, name)
        return found | ({"klom": self.klom_entry(name)} if self.klom else {})

    def klom_entry(self, name: str) -> dict[str, Any]:
        """By part the mean over examples, on the forget set the 95th percentile, and how many models."""
        if name == RETRAINED:
            judged = self.klom.get(BEFORE, {})
            values = {part: found.floor for part, found in judged.items() if found.floor is not None}
            models = sum(r.model == RETRAINED for r in self.of.klom_records)
        else:
            judged = self.klom.get(name, {})
            values = {part: f.values if f.matched is None else f.matched for part, f in judged.items()}
            models = next((found.num_unlearned for found in judged.values()), 0)
        entry: dict[str, Any] = {part: float(np.mean(each)) for part, each in values.items()}
        worst = {"named_95": float(np.percentile(values["named"], 95))} if "named" in values else {}
        return {**entry, **worst, **({"models": models} if models else {})}

    def closure(self, record: Record) -> dict[str, Any]:
        """Closure of each quantity for one model, over the whole forget set and per action."""
        node = _Node()
        by_action = {action: _Node() for action in ACTIONS if action in self.of.actions}
        for quantity in QUANTITIES:
            before = {} if self.before is None else self.by_action(self.before, quantity)
            after = self.by_action(record, quantity)
            seeds = [self.by_action(other, quantity) for other in self.retrained]
            if not before or not after:
                node.number(
                    quantity, None, "no edit was requested" if quantity == "wanted_loss" else "not measured"
                )
                continue
            for key in before:
                found = gap_closure(before[key], after[key], [losses[key] for losses in seeds])
                (node if key == "all" else by_action[key]).number(quantity, found.value, found.reason)
        kls = [None if of is None else of.scores.get("heldout_kl") for of in (self.before, record)]
        if not self.floors or kls[0] is None or kls[1] is None:
            found = Closure(None, self.why_no_kl())
        else:
            found = kl_gap_closure(kls[0], kls[1], self.floors)
        node.number("heldout_kl", found.value, found.reason)
        node.data["by_action"] = {action: child.build() for action, child in by_action.items()}
        return node.build()

    def closures(self, records: Sequence[Record]) -> dict[str, Any]:
        """Of a method: its one model's, or the means over its seeds with their standard deviations."""
        each = [self.closure(record) for record in records]
        if len(each) == 1:
            return each[0]
        return _mean_closures(each) | {
            "by_action": {
                action: _mean_closures([closure["by_action"][action] for closure in each])
                for action in each[0]["by_action"]
            }
        }

    def named_examples(self, methods: Mapping[str, Sequence[Record]]) -> list[dict[str, Any]]:
        """Losses of each example of the forget set, means over seeds, and its texts where they are kept."""
        models = {BEFORE: [] if self.before is None else [self.before], **methods, RETRAINED: self.retrained}
        edited = [k for k, action in enumerate(self.of.actions) if action != "remove"]
        rows = []
        for place, (id_, action) in enumerate(zip(self.of.ids, self.of.actions, strict=True)):
            row: dict[str, Any] = {"id": id_, "action": action}
            places = {"forget_loss": place} | ({} if action == "remove" else {"wanted_loss": edited.index(place)})
            for quantity, k in places.items():
                node = _Node()
                for name, records in models.items():
                    lists = [_list(record.scores, QUANTITIES[quantity]) for record in records]
                    if lists and all(losses.size for losses in lists):
                        node.number(name, seed_mean([float(losses[k]) for losses in lists]))
                row[quantity] = node.build()
            if self.of.texts:
                row["texts"] = dict(self.of.texts[place])
                for part, k in zip(("named", "wanted"), places.values(), strict=False):
                    said = {name: records[0].scores["answers"][part][k] for name, records in models.items()
                            if records and "answers" in records[0].scores}  # fmt: skip
                    if said:
                        row.setdefault("answers", {})[part] = said
            rows.append(row)
        return rows


def summarise(comparison: Comparison) -> dict[str, Any]:
    """One JSON-ready dict of everything compared.

    Args:
        comparison: what was measured.

    Returns:
        `models`, `gap_closure` and `cost`, each with `controls.<name>` and either `unlearned` (in cost: `unlearn`;
        in the closures at the top), where the one method is called so, or `methods.<name>`; `seed_floor`, `solver`,
        `named`, `named_examples`, `heldout`, `context`, `receipts`, `verdict`. Values of several seeds are means,
        each seed's own are under `per_seed`.
    """
    the = _Summary(comparison)
    groups: dict[str, dict[str, list[Record]]] = {}
    failed: dict[str, dict[str, Any]] = {}
    for kind in ("unlearned", "control"):
        by_name: dict[str, list[Record]] = {}
        for record in comparison.of(kind):
            by_name.setdefault(record.model, [])
            if not record.failed:
                by_name[record.model].append(record)
            else:
                told = failed.setdefault(record.model, {"seeds": 0, "reason": record.failed})
                told["seeds"] += 1
        groups[kind] = by_name
    methods, controls = groups["unlearned"], groups["control"]
    single = list(methods) == [UNLEARNED] and len(methods[UNLEARNED]) == 1
    named = {action: comparison.actions.count(action) for action in ACTIONS}
    heldout = 0 if the.before is None else _list(the.before.scores, "heldout").size

    def arrange(one: Callable[..., Any], top: str) -> dict[str, Any]:
        made = {name: one(records) for name, records in methods.items() if records}
        found = {top: made[UNLEARNED]} if single else {"methods": made}
        return found | {"controls": {name: one(records) for name, records in controls.items() if records}}

    def entry(records: Sequence[Record]) -> dict[str, Any]:
        return the.entry(records, records[0].model)

    closures = arrange(the.closures, "top")
    report = {
        "format": FORMAT,
        "name": comparison.name,
        "question": comparison.question,
        "context": dict(comparison.facts),
        "named": {**named, "total": len(comparison.actions)},
        "num_examples": comparison.num_examples,
        "heldout": {
            "examples": int(heldout),
            "nonmembers": int(heldout if comparison.nonmembers is None else sum(comparison.nonmembers)),
            "response_positions": comparison.num_positions,
        },
        "models": {
            **({} if the.before is None else {BEFORE: the.entry([the.before], BEFORE)}),
            **arrange(entry, UNLEARNED),
            RETRAINED: the.models(the.retrained, RETRAINED)
            | ({"klom": the.klom_entry(RETRAINED)} if the.klom else {}),
        },
        "seed_floor": _seed_floor(the),
        "gap_closure": {**closures.pop("top", {}), **closures},
        "cost": _costs(the, arrange(lambda records: _mean_cost([r.cost for r in records], ""), "unlearn")),
        "solver": _solver(methods[UNLEARNED][0].receipt if single else None),
        "named_examples": the.named_examples({k: v for k, v in methods.items() if v}),
        "receipts": {
            name: records[0].receipt for name, records in methods.items() if records and records[0].receipt
        },
        "failed": failed,
        "missing": list(comparison.missing),
        "metrics": {name: vars(meaning) for name, meaning in {**QUALITY_MEANINGS, **comparison.metrics}.items()},
        "choices": {
            name: {key: records[0].details[key] for key in ("chosen", "own_before") if records[0].details.get(key)}
            for name, records in methods.items()
            if records and any(records[0].details.get(key) for key in ("chosen", "own_before"))
        },
        "klom_caveat": next((found.caveat for found in the.klom.get(BEFORE, {}).values()), ""),
    }
    return {**report, "verdict": _verdict(report)}


def forget_quality(task: Json, retrained: Sequence[Json]) -> dict[str, dict[str, Number | None]]:
    """TOFU's, medians over the retrained models of the KS test's p-value and statistic.

    Args:
        task: `scores["task"]` with `truth_ratios`.
        retrained: other models' with the same.
    """
    ours, *others = (_array(of.get("truth_ratios") or []) for of in (task, *retrained))
    values: dict[str, Number | None] = {QUALITY: None, STATISTIC: None}
    if others and all(len(ratios) and np.isfinite(ratios).all() for ratios in (ours, *others)):
        tests = [tofu.forget_quality(ours, other) for other in others]
        values[QUALITY] = float(np.median([p for p, _ in tests]))
        values[STATISTIC] = float(np.median([statistic for _, statistic in tests]))
    return {name: {"value": value, "standard_error": None} for name, value in values.items()}


def klom_of(comparison: Comparison) -> dict[str, dict[str, Klom]]:
    """KLOM of each name in klom/ but the retrained models' own, by part with finite losses."""
    by_name: dict[str, list[Record]] = {}
    for record in comparison.klom_records:
        by_name.setdefault(record.model, []).extend([] if record.failed else [record])
    losses = {
        name: {
            part: stacked
            for part in PARTS
            if records
            and (stacked := np.stack([_list(r.scores, part) for r in records])).size
            and np.isfinite(stacked).all()
        }
        for name, records in by_name.items()
    }
    retrained = losses.pop(RETRAINED, {})
    floors: dict[str, np.ndarray | None] = {}  # the same for every name
    found: dict[str, dict[str, Klom]] = {}
    for name, parts in losses.items():
        found[name] = {
            part: klom(response_margins(own), response_margins(retrained[part]), floor=floors.get(part))
            for part, own in parts.items()
            if part in retrained
        }
        floors |= {part: result.floor for part, result in found[name].items()}
    return found


_METRIC_KEYS = ("value", "correct", "standard_error")


def _metric(metric: Json) -> dict[str, Any]:
    node = _Node(valid=metric.get("valid"), total=metric.get("total"))
    if node.data["valid"] is None:
        node.reasons |= {"valid": "not counted", "total": "not counted"}
    if metric.get("standard_error_method"):
        node.data["standard_error_method"] = metric["standard_error_method"]
    for key in _METRIC_KEYS:
        value = metric.get(key)
        node.number(key, value, (metric.get("reason") or "not known") if value is None else "")
    return node.build()


def _mean_metrics(per_seed: Sequence[Json]) -> dict[str, Any]:
    """Means of each metric over the seeds that have it; `standard_error` is the mean of their sampling errors."""
    result = {}
    for name in dict.fromkeys(name for metrics in per_seed for name in metrics):
        found = [metrics[name] for metrics in per_seed if name in metrics]
        node, deviations = _over_seeds(found, ("value", "correct", "valid", "total", "standard_error"))
        node.number("seed_standard_deviation", deviations.data["value"], deviations.reasons.get("value", ""))
        if method := found[0].get("standard_error_method"):
            node.data["standard_error_method"] = f"mean over seeds of: {method}"
        result[name] = node.build()
    return result


def _mean_closures(each: Sequence[Json]) -> dict[str, Any]:
    keys = [key for key in (*QUANTITIES, "heldout_kl") if key in each[0]]
    node, deviations = _over_seeds(each, keys)
    for key in keys:  # a defined closure may come with a caveat
        reason = next((c["reason"][key] for c in each if key in c.get("reason", {})), "")
        node.number(key, node.data[key], reason or node.reasons.get(key, ""))
    return {**node.build(), "seed_standard_deviation": deviations.build()}


def _seed_floor(the: _Summary) -> dict[str, Any]:
    node, per_seed = _Node(), _Node()
    node.number("heldout_kl", seed_mean(the.floors) if the.floors else None, "" if the.floors else the.why_no_kl())
    for record, value in zip(the.retrained, the.floors, strict=False):
        per_seed.number(f"seed {record.seed}", value)
    node.data["per_seed"] = per_seed.build()
    return node.build()


def _mean_cost(costs: Sequence[Json | None], unknown: str) -> dict[str, Any]:
    """Mean over seeds of each part of the cost; null where a seed's is not known."""
    known = [cost for cost in costs if cost is not None]
    prepared = "preparation_gradient_equivalents"
    keys = [key for key in COSTS if key != prepared or any(cost.get(prepared) for cost in known)]
    complete = bool(costs) and len(known) == len(costs)
    missing = "not measured" if complete else unknown or "the cost is not known"
    return _over_seeds(known if complete else [{}], keys, missing)[0].build()


def _costs(the: _Summary, found: dict[str, Any]) -> dict[str, Any]:
    """Costs of unlearning, of retraining (mean over seeds and each) and of the controls."""
    seeds = [record.cost for record in the.retrained]
    unknown = "the cost of a retrained model is not known" if seeds else _NO_RETRAINED
    retrain = _mean_cost(seeds, unknown)
    retrain["per_seed"] = [_mean_cost([cost], unknown) for cost in seeds]
    if "unlearn" in found:
        ratio = _Node()
        for key in ("seconds", "gradient_equivalents"):
            spent, reference = found["unlearn"][key], retrain[key]
            defined = spent is not None and bool(reference)
            ratio.number(key, spent / reference if defined else None, "" if defined else unknown)
        found["unlearn_over_retrain"] = ratio.build()
    return {**found, "retrain": retrain}


def _solver(receipt: Json | None) -> dict[str, Any]:
    """All solves as one: iterations add up, the residual is the largest, the flag is any.

    Steps of target matching are solved for directly, without iterations and without a status of their own.
    """
    direct = {"status": "solved directly", "iterations": 0, "negative_curvature": False}
    solves = [] if receipt is None else [{**direct, **step} for step in receipt["steps"]]
    node = _Node(iterations=sum(solve["iterations"] for solve in solves))
    if not solves:
        missing = "no solve was recorded"
        for key in ("status", "negative_curvature", "relative_residual"):
            node.number(key, None, missing)
        return node.build()
    counts = collections.Counter(solve["status"] for solve in solves)
    several = "; ".join(f"{status} ({count} of {len(solves)} steps)" for status, count in counts.items())
    node.data["status"] = next(iter(counts)) if len(counts) == 1 else several
    node.data["negative_curvature"] = any(solve["negative_curvature"] for solve in solves)
    residuals = _array([solve["relative_residual"] for solve in solves])
    node.number("relative_residual", float(residuals.max()))  # nan where one is: a step must not be hidden
    return node.build()


def _verdict(report: Json) -> list[str]:
    """What the numbers say, in sentences for a reader who looks at nothing else."""
    models, closure, cost = report["models"], report["gap_closure"], report["cost"]
    if BEFORE not in models:
        return ["Nothing was measured yet."]
    if UNLEARNED in models:
        return _verdict_of_one(report)
    told = []
    names = [name for name in models["methods"] if closure["methods"][name]["forget_loss"] is not None]
    if names:
        ranked = sorted(names, key=lambda name: -closure["methods"][name]["forget_loss"])[:3]
        shown = ", ".join(f"{name} ({closure['methods'][name]['forget_loss']:.2f})" for name in ranked)
        told.append(
            f"**Nearest to retraining** in the mean loss on the forget set: {shown}. The number is the share of "
            "the gap "
            "between the model before and the retrained models that is closed (closure)."
        )
    floor, kls = report["seed_floor"]["heldout_kl"], {}
    for name, entry in models["methods"].items():
        if floor and entry["heldout_kl_to_retrained"] is not None:
            kls[name] = entry["heldout_kl_to_retrained"] / floor
    if kls:
        shown = ", ".join(f"{name} ({kls[name]:.2g})" for name in sorted(kls, key=kls.__getitem__)[:3])
        told.append(
            f"**Least other change**: on held-out prompts, predictions are nearest to the retrained models' for "
            f"{shown}; "
            "1 is as far as another retraining is."
        )
    reached = [name for name in names if closure["methods"][name]["forget_loss"] >= 0.5]
    shares = {
        name: share for name in reached if (share := _share(cost["methods"][name], cost["retrain"])) is not None
    }
    if shares:
        least = min(shares, key=shares.__getitem__)
        told.append(f"**Cheapest that closes half of the gap**: {least}, at {shares[least]:.2g} of one retraining.")
    told += [line for name, entry in models["methods"].items() for line in _fallen(report, name, entry)]
    return told or ["No method can be compared with retraining yet."]


def _fallen(report: Json, name: str, entry: Json) -> list[str]:
    """Task metrics of a model that are worse than retraining's (else than before) beyond sampling error."""
    models = report["models"]
    reference, against = (RETRAINED, "retrained") if models[RETRAINED]["seeds"] else (BEFORE, "before")
    told = []
    for metric, node in entry.get("task_metrics", {}).items():
        counted = "higher" if node.get("correct") is not None else None  # a share of right answers
        better = report["metrics"].get(metric, {}).get("better", counted)
        other = models[reference].get("task_metrics", {}).get(metric)
        if other is None or better not in ("higher", "lower") or None in (node["value"], other["value"]):
            continue
        errors = [x["standard_error"] for x in (node, other) if x.get("standard_error") is not None]
        fall = (other["value"] - node["value"]) * (1 if better == "higher" else -1)
        allowed = 2 * math.hypot(*errors)
        if errors and fall > allowed:
            told.append(
                f"**{metric} got worse** with {name}: {node['value']:.3g}, {against} {other['value']:.3g}; "
                f"sampling explains {allowed:.2g}."
            )
    return told


def _share(cost: Json, retrain: Json) -> Number | None:
    spent, whole = cost["gradient_equivalents"], retrain["gradient_equivalents"]
    return spent / whole if spent is not None and whole else None


def _verdict_of_one(report: Json) -> list[str]:
    before, after, retrained = (report["models"][name] for name in (BEFORE, UNLEARNED, RETRAINED))
    closure = report["gap_closure"]
    # By kind of request: over several kinds, too much and too little would cancel in a mean.
    words = {"remove": "removed", "modify_query": "modified", "correct_response": "corrected"}
    titles = {"forget_loss": "examples", "wanted_loss": "examples' replacements"}
    known = {f"{words[action]} {titles[key]}": value for action, node in closure["by_action"].items()
             for key in titles if (value := node.get(key)) is not None}  # fmt: skip
    told = []
    if not retrained["seeds"]:
        told.append("**No retrained model was given**, so nothing says how close to retraining the result is.")
    elif not known:
        told.append(f"**Closeness to retraining cannot be told**: {closure['reason']['forget_loss']}.")
    else:
        least = min(known.values())
        grades = ((0.9, "is close to retraining"), (0.5, "comes most of the way to retraining"),
                  (1e-9, "comes part of the way to retraining"))  # fmt: skip
        grade = next((name for bound, name in grades if least >= bound), "is no nearer to retraining than before")
        parts = ", ".join(f"{100 * value:.0f} % on {name}" for name, value in known.items())
        told.append(f"**The unlearned model {grade}**. Of the gap in mean loss it closes {parts}.")
    for key, title in (("forget_loss", "Loss on the forget set"), ("wanted_loss", "Loss on the replacements"),
                       ("retained_loss", "Loss on training examples that stay")):  # fmt: skip
        if before.get(key) is not None and after.get(key) is not None:
            target = f"; retrained {retrained[key]:.3g}" if retrained.get(key) is not None else ""
            told.append(f"**{title}**: {before[key]:.3g} before, {after[key]:.3g} after{target}.")
    floor, kls = report["seed_floor"]["heldout_kl"], [m["heldout_kl_to_retrained"] for m in (before, after)]
    if floor and None not in kls:
        told.append(
            f"**Predictions on held-out prompts** are {kls[1] / floor:.3g} times as far from the retrained "
            f"models' as another retraining's are ({kls[0] / floor:.3g} times before)."
        )
    share = report["cost"]["unlearn_over_retrain"]["gradient_equivalents"]
    if share is not None:
        told.append(f"**Cost**: {share:.3g} of one retraining, in gradient computations.")
    return told[:1] + _fallen(report, "the unlearned model", after) + told[1:]
