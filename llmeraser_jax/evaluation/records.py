"""The schema of a comparison: what was asked, and a record of every model that was measured. On disk:

    comparison.json              a `Comparison` without its records: what was asked, of which data, what is planned
    records/<model>-seed_<k>.json    one `Record`
    klom/<model>-seed_<k>.json   optional: records of models that each have a seed of training of their own:
                                 `before`, `retrained`, and ways to forget; only the losses of their scores are read

What needs several models (closure, membership by reference, forget quality, KLOM) is computed in `summary`, so that
each file stays true when more models come. A comparison that was interrupted is read as far as it went.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from llmeraser_jax import files
from llmeraser_jax.runs import RunError

COMPARISON_FILE, RECORDS, KLOM = "comparison.json", "records", "klom"
FORMAT = 1
BEFORE, RETRAINED, BASE = "before", "retrained", "base"
ACTIONS = ("remove", "modify_query", "correct_response")
PARTS = ("named", "wanted", "retained", "heldout")
PROBES = ("forget_loss_4_bit", "forget_loss_relearned")
COSTS = ("seconds", "gradient_equivalents", "peak_memory_bytes", "diagnostic_gradient_equivalents",
         "preparation_gradient_equivalents")  # fmt: skip

Json: TypeAlias = Mapping[str, Any]
Kind: TypeAlias = Literal["base", "before", "unlearned", "control", "retrained"]
Better: TypeAlias = Literal["higher", "lower", "retrained"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One model that was measured.

    Attributes:
        model: its name: `before`, `retrained`, `base` (without adapter), or a way to forget.
        kind: what it is.
        seed: of the retraining or the method.
        scores: see `measures`; a key that is missing was not measured, null is no finite number.
        cost: of making it, keys of `COSTS`; None where that is not known.
        receipt: of an erasure by this package, without ids and hashes of examples.
        failed: why there is no such model; empty where there is.
        details: JSON-like: `delta_norm`, `outcome`, `chosen`, `own_before`, and whatever else is worth keeping.
    """

    model: str
    kind: Kind
    seed: int | None = None
    scores: Json = dataclasses.field(default_factory=dict)
    cost: Json | None = None
    receipt: Json | None = None
    failed: str = ""
    details: Json = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = [] if self.cost is None else [self.cost.get(key) for key in COSTS]
        if any(number is not None and not (np.isfinite(number) and number >= 0) for number in numbers):
            msg = f"{self.model}: costs must be finite and not negative, got {dict(self.cost or {})}."
            raise ValueError(msg)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricMeaning:
    """What a task's metric says.

    Attributes:
        meaning: a sentence.
        better: which way is good (`retrained`: the retrained models' value); None where that is not known.
    """

    meaning: str
    better: Better | None

    def __post_init__(self) -> None:
        if not isinstance(self.meaning, str) or self.better not in (*get_args(Better), None):
            known = ", ".join(get_args(Better))
            msg = f"better is {self.better!r}; it must be one of {known}, and the meaning a text."
            raise ValueError(msg)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """Everything that a report is computed from.

    Attributes:
        name: of the comparison.
        question: what was asked, in a sentence or two.
        facts: what a reader has to know (model, data, devices), by title.
        ids, actions: of the examples in the forget set, in the order of their scores.
        num_examples: trained on.
        nonmembers: which held-out examples membership inference tells the forget set from; None is all.
        num_positions: response positions behind the held-out KL; 0 where it was not measured.
        metrics: what the task's metrics mean, where the library does not know them.
        retrain_seeds, methods, klom: models planned, by name.
        texts: for each example of the forget set `query`, `trained`, `wanted_query`, `wanted`, and of one with
            pictures `pictures` and `wanted_pictures`, small PNGs in base 64; empty keeps none.
        records: of the models measured.
        klom_records: see the module.
    """

    name: str
    question: str = ""
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ids: tuple[str, ...]
    actions: tuple[str, ...]
    num_examples: int = 0
    nonmembers: tuple[bool, ...] | None = None
    num_positions: int = 0
    metrics: Mapping[str, MetricMeaning] = dataclasses.field(default_factory=dict)
    retrain_seeds: int = 0
    methods: Mapping[str, int] = dataclasses.field(default_factory=dict)
    klom: Mapping[str, int] = dataclasses.field(default_factory=dict)
    texts: tuple[Json, ...] = ()
    records: tuple[Record, ...] = ()
    klom_records: tuple[Record, ...] = ()

    def __post_init__(self) -> None:
        unknown = sorted(set(self.actions) - set(ACTIONS))
        if unknown or not self.actions:
            msg = f"Every example of the forget set needs an action of {ACTIONS}, got {unknown or 'no example'}."
            raise ValueError(msg)
        if len(self.ids) != len(self.actions):
            msg = f"Got {len(self.ids)} ids for {len(self.actions)} actions; they must pair up."
            raise ValueError(msg)
        places = [(record.model, record.seed) for record in self.records]
        if len(set(places)) != len(places):
            msg = f"Each model and seed may have one record, got {places}."
            raise ValueError(msg)
        num_edited = sum(action != "remove" for action in self.actions)
        wanted = {"named": len(self.actions), "wanted": num_edited}
        lengths: dict[tuple[str, str], int] = {}
        for where, records in ((RECORDS, self.records), (KLOM, self.klom_records)):
            for record in records:
                if record.failed:
                    continue
                for part in PARTS:
                    count = len(record.scores[part]["losses"]) if part in record.scores else wanted.get(part, -1)
                    expected = wanted.get(part, lengths.setdefault((where, part), count) if count >= 0 else count)
                    if count != expected:
                        msg = (
                            f"{where}/{record.model}: {count} losses of `{part}` where {expected} are expected; "
                            "all "
                            "models must be measured on the same examples."
                        )
                        raise ValueError(msg)

    def of(self, kind: Kind) -> list[Record]:
        """The records of a kind, by name as they came, and by seed."""
        found = [record for record in self.records if record.kind == kind]
        order = {name: place for place, name in enumerate(dict.fromkeys(record.model for record in found))}
        return sorted(found, key=lambda record: (order[record.model], record.seed or 0))

    @property
    def missing(self) -> tuple[str, ...]:
        """What was planned and is not there, in words."""
        counts: dict[str, int] = {}
        for record in self.records:
            counts[record.model] = counts.get(record.model, 0) + 1
        gaps = [] if self.of(BEFORE) else ["the model before is not measured"]
        if counts.get(RETRAINED, 0) < self.retrain_seeds:
            gaps.append(f"{counts.get(RETRAINED, 0)} of {self.retrain_seeds} retrained models are measured")
        for name, planned in self.methods.items():
            if counts.get(name, 0) < planned:
                gaps.append(f"{name}: {counts.get(name, 0)} of {planned} seeds")
        for name, planned in self.klom.items():
            found = sum(record.model == name for record in self.klom_records)
            if found < planned:
                gaps.append(f"KLOM, {name}: {found} of {planned} models")
        return tuple(gaps)


_RECORD_FIELDS = tuple(field.name for field in dataclasses.fields(Record))
_PLAN_FIELDS = tuple(f.name for f in dataclasses.fields(Comparison) if f.name not in ("records", "klom_records"))


def is_comparison(directory: Path) -> bool:
    """Whether a directory holds a comparison, finished or not."""
    return (directory / COMPARISON_FILE).is_file()


def write_plan(directory: str | os.PathLike[str], comparison: Comparison) -> None:
    """Writes comparison.json. Methods and seeds that an earlier call had planned stay planned."""
    directory = Path(directory)
    plan = {name: getattr(comparison, name) for name in _PLAN_FIELDS}
    plan["metrics"] = {name: dataclasses.asdict(meaning) for name, meaning in comparison.metrics.items()}
    if is_comparison(directory):
        earlier = _read_plan(directory)
        plan["retrain_seeds"] = max(plan["retrain_seeds"], earlier.retrain_seeds)
        for key in ("methods", "klom"):
            first, now = getattr(earlier, key), plan[key]
            plan[key] = {name: max(first.get(name, 0), now.get(name, 0)) for name in (*first, *now)}
    directory.mkdir(parents=True, exist_ok=True)
    files.atomic_write_json(directory / COMPARISON_FILE, {"format": FORMAT, **plan})


def record_path(directory: Path, model: str, seed: int | None, where: str = RECORDS) -> Path:
    """Where a record is kept."""
    return directory / where / (f"{model}.json" if seed is None else f"{model}-seed_{seed}.json")


def write_record(directory: Path, record: Record, where: str = RECORDS) -> None:
    """Keeps a record; numbers that are not finite become null."""
    path = record_path(directory, record.model, record.seed, where)
    path.parent.mkdir(parents=True, exist_ok=True)
    value = {name: getattr(record, name) for name in _RECORD_FIELDS if getattr(record, name)
             or name in ("seed", "scores")}  # fmt: skip
    files.atomic_write_json(path, files.finite_json(value))


def read_record(path: Path) -> Record:
    """One record, checked.

    Raises:
        RunError: the file is none, named with what is wrong.
    """
    value = _read(path)
    wrong = [key for key in ("model", "kind") if not isinstance(value.get(key), str)]
    wrong += [] if value.get("kind") in get_args(Kind) else ["kind"]
    scores, failed = value.get("scores", {}), value.get("failed", "")
    if not isinstance(scores, dict) or not isinstance(failed, str):
        wrong.append("scores")
    elif not failed:
        wrong += _wrong_scores(scores)
    cost = value.get("cost")
    if cost is not None and not (isinstance(cost, dict) and all(_is_number(cost.get(key)) for key in COSTS)):
        wrong.append("cost")
    if not isinstance(value.get("details", {}), dict) or not isinstance(value.get("receipt") or {}, dict):
        wrong.append("details")
    if wrong:
        msg = f"{path} is no record of a model: {', '.join(dict.fromkeys(wrong))} missing or of another type."
        raise RunError(msg)
    return Record(**{name: value[name] for name in _RECORD_FIELDS if name in value})


def _wrong_scores(scores: dict[str, Any]) -> list[str]:
    wrong = [] if "named" in scores else ["scores.named"]
    for part in PARTS:
        lists = scores.get(part, {"losses": []})
        if not (isinstance(lists, dict) and "losses" in lists and all(map(_are_numbers, lists.values()))) or (
            len({len(entries) for name, entries in lists.items() if name in ("losses", "min_k", "min_k_plus_plus")})
            > 1
        ):
            wrong.append(f"scores.{part}")
    wrong += [f"scores.{key}" for key in (*PROBES, "heldout_kl") if not _is_number(scores.get(key))]
    if "task" in scores:
        task = scores["task"] if isinstance(scores["task"], dict) else {}
        metrics = task.get("metrics")
        keys = ("value", "standard_error", "correct", "valid", "total")
        if not isinstance(metrics, dict) or not all(
            isinstance(m, dict) and "value" in m and all(_is_number(m.get(key)) for key in keys)
            for m in metrics.values()
        ):
            wrong.append("scores.task.metrics")
        if not _are_numbers(task.get("truth_ratios", [])):
            wrong.append("scores.task.truth_ratios")
    return wrong


def read_comparison(directory: str | os.PathLike[str]) -> Comparison:
    """What a directory holds by now.

    Raises:
        RunError: a file is not what the module's text says, named with what is wrong.
    """
    directory = Path(directory)
    plan = _read_plan(directory)
    found = {where: [read_record(path) for path in _paths(directory / where)] for where in (RECORDS, KLOM)}
    planned = {name: place for place, name in enumerate(plan.methods)}
    found[RECORDS].sort(key=lambda record: planned.get(record.model, len(planned)))
    measured = [record for record in found[RECORDS] if not record.failed]
    if measured and not any(record.kind == BEFORE for record in measured):
        path = record_path(directory, BEFORE, None)
        msg = f"{path} is not there, and records of other models are. Measure it again."
        raise RunError(msg)
    try:
        return dataclasses.replace(plan, records=tuple(found[RECORDS]), klom_records=tuple(found[KLOM]))
    except ValueError as error:
        msg = f"{directory}: {error}"
        raise RunError(msg) from error


def _paths(directory: Path) -> list[Path]:
    """Records in a directory, by name and seed."""
    paths = directory.glob("*.json") if directory.is_dir() else ()
    return sorted(paths, key=lambda path: (re.sub(r"-seed_\d+$", "", path.stem), _seed(path)))


def _seed(path: Path) -> int:
    found = re.search(r"-seed_(\d+)$", path.stem)
    return int(found[1]) if found else -1


def _read_plan(directory: Path) -> Comparison:
    path = directory / COMPARISON_FILE
    value = _read(path)
    if value.get("format") != FORMAT:
        msg = f"{path} is of format {value.get('format')}; this version reads {FORMAT}."
        raise RunError(msg)
    fields = {name: value[name] for name in _PLAN_FIELDS if name in value}
    try:
        lists = ("ids", "actions", "nonmembers", "texts")
        fields |= {name: tuple(fields[name]) for name in lists if isinstance(fields.get(name), list)}
        fields["metrics"] = {name: MetricMeaning(**meaning) for name, meaning in fields.get("metrics", {}).items()}
        plan = Comparison(**fields)
        counts = (plan.num_examples, plan.retrain_seeds, *plan.methods.values(), *plan.klom.values())
        if not all(_is_number(count) and count is not None for count in counts):
            msg = "a count is no number"
            raise TypeError(msg)
    except (TypeError, ValueError, AttributeError) as error:
        msg = f"{path} is no description of a comparison: {error}."
        raise RunError(msg) from error
    return plan


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, with null for what is no finite number."""
    try:
        value = files.finite_json(files.read_json(path))
    except (ValueError, FileNotFoundError) as error:
        raise RunError(str(error)) from error
    if not isinstance(value, dict):
        msg = f"{path} holds no JSON object."
        raise RunError(msg)
    return value


def _is_number(value: Any) -> bool:
    """A number, or null."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _are_numbers(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(map(_is_number, value))
