"""Studies: several ways to forget measured on one request. Owns what their directory holds, and reads it.

    study.json                     `StudyManifest`: what was asked, of which data, what was planned
    settings.json                  what it was made with; `lora` and `train` are shown
    data/                          requests.jsonl, and train, shown, heldout.jsonl (examples one a line)
    scores/before.json             measures of the model as trained
    scores/seed_<k>.json           the same of a model retrained with seed k
    scores/heldout_kl.json         `before`, and `seed_floors`: each retrained model to the mean of the others
    methods/<name>-seed_<k>.json   a way to forget with one seed, or `failed`: why it found no step
    klom/<name>-seed_<k>.json      optional: `losses`, lists by `PARTS`, of models that each have a seed of training
                                   of their own: `before`, `retrained`, or a way to forget (or `failed`)

Measures are `SCALARS` (mean losses in nats per response token; null is not finite, or nothing to measure), `named`
and `unseen` with `PER_EXAMPLE` lists, `gradient_equivalents` and `seconds`. A method has `heldout_kl` too.
Optional are `PROBES`, `preparation_gradient_equivalents`, `chosen`, `details.receipt`, `wanted_losses` of each
edited example, `own_before` (mean losses of an ensemble before the request, which is not `before`), and `task`:
`metrics` by name (`value`, `standard_error`, `correct`, `valid`, `total`) and TOFU's `truth_ratios`.

What needs the retrained models (membership by reference, forget quality, closure, KLOM) is computed when read, so
that each file stays true when more models come. A directory without study.json, of an earlier version, is read by
its data. A study that was interrupted is read as far as it went, and `missing` says what is not there.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from llmeraser_jax import files
from llmeraser_jax.evaluation import tofu
from llmeraser_jax.evaluation.closure import seed_mean
from llmeraser_jax.evaluation.klom import Klom, klom, response_margins
from llmeraser_jax.evaluation.membership import (
    mean_of_others,
    membership_auc,
    membership_loss_auc,
    membership_min_k_auc,
    reference_scores,
)
from llmeraser_jax.evaluation.model_tables import MetricMeaning
from llmeraser_jax.runs import RunError

STUDY_FILE, SETTINGS_FILE = "study.json", "settings.json"
STUDY_FORMAT = 1
SCALARS = ("forget_loss", "wanted_loss", "retained_loss", "forget_probability", "extraction_strength")
PROBES = ("forget_loss_4_bit", "forget_loss_relearned")
COSTS = ("gradient_equivalents", "seconds")
PREPARATION = "preparation_gradient_equivalents"
PER_EXAMPLE = ("losses", "min_k", "min_k_plus_plus")
PARTS = ("named", "wanted", "retained", "unseen")  # examples that KLOM is of
BEFORE, RETRAINED = "before", "retrained"  # names in klom/ besides those of methods
QUALITY, STATISTIC = "forget quality, KS p", "KS statistic"
_QUALITY_MEANINGS = {
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
_REQUESTS_FILE = Path("data") / "requests.jsonl"

Json: TypeAlias = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyManifest:
    """What a reader has to be told besides the numbers.

    Attributes:
        name: of the study.
        question: what was asked, in a sentence or two; empty where it is not recorded.
        base: name of the base model.
        num_examples: trained on.
        named: how many are to go, by action.
        num_unseen: not trained on: non-members of membership inference.
        num_heldout: behind the held-out KL.
        num_shown: not trained on, and shown to methods; None in a study of an earlier version, whose methods were
            shown the non-members.
        num_truncated: prompts that did not fit; None where it is not known.
        retrain_seeds: retrained models planned.
        methods: seeds planned of each.
        klom: models planned for KLOM, by name in klom/.
        metrics: what the task's metrics mean.
        devices: in words.
        versions: of the libraries; None for one that is not there.
    """

    name: str
    question: str = ""
    base: str = ""
    num_examples: int
    named: Mapping[str, int]
    num_unseen: int
    num_heldout: int
    num_shown: int | None = None
    num_truncated: int | None = None
    retrain_seeds: int = 0
    methods: Mapping[str, int] = dataclasses.field(default_factory=dict)
    klom: Mapping[str, int] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, MetricMeaning] = dataclasses.field(default_factory=dict)
    devices: str = ""
    versions: Mapping[str, str | None] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Study:
    """A study as far as it went.

    Attributes:
        path: its directory.
        manifest: what it is.
        settings: its settings.json.
        before: measures of the model as trained; None where they are not there yet.
        retrained: of each retrained model.
        kl: scores/heldout_kl.json; None where it is not there yet.
        methods: of each seed of each method.
        named: id and action of each named example, in the order of its losses; its place where no id is kept.
        klom_models: losses of each model of klom/ by name, or why it found no step.
    """

    path: Path
    manifest: StudyManifest
    settings: Json
    before: Json | None
    retrained: tuple[Json, ...]
    kl: Json | None
    methods: Mapping[str, tuple[Json, ...]]
    named: tuple[tuple[str, str], ...] = ()
    klom_models: Mapping[str, tuple[Json, ...]] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def klom(self) -> Mapping[str, Mapping[str, Klom]]:
        """KLOM of each name in klom/ but the retrained models' own, by part; without what has no finite losses."""
        retrained = _losses_by_part(self.klom_models.get(RETRAINED, ()))
        floors: dict[str, np.ndarray | None] = {}  # the same for every name
        found: dict[str, dict[str, Klom]] = {}
        for name, models in self.klom_models.items():
            if name != RETRAINED:
                losses = _losses_by_part(models)
                found[name] = {
                    part: klom(
                        response_margins(losses[part]), response_margins(retrained[part]), floor=floors.get(part)
                    )
                    for part in PARTS
                    if part in losses and part in retrained
                }
                floors |= {part: result.floor for part, result in found[name].items()}
        return found

    @property
    def missing(self) -> tuple[str, ...]:
        """What was planned and is not there, in words."""
        plan = self.manifest
        gaps = [] if self.before is not None else ["the model as trained is not measured"]
        if len(self.retrained) < max(plan.retrain_seeds, 1):
            planned = f" of {plan.retrain_seeds}" if plan.retrain_seeds else ""
            gaps.append(f"{len(self.retrained)}{planned} retrained models are measured")
        if self.kl is None:
            gaps.append("the held-out KL between retrained models is not measured")
        for name, planned in plan.methods.items():
            found = len(self.methods.get(name, ()))
            if found < planned:
                gaps.append(f"{name}: {found} of {planned} seeds")
        for name, planned in plan.klom.items():
            found = len(self.klom_models.get(name, ()))
            if found < planned:
                gaps.append(f"KLOM, {name}: {found} of {planned} models")
        if not self.methods and not plan.methods:
            gaps.append("no method is measured")
        return tuple(gaps)

    @property
    def seed_floor(self) -> float | None:
        """Held-out KL between retrained models."""
        return None if self.kl is None else seed_mean(self.kl["seed_floors"])

    def to_mapping(self) -> dict[str, Any]:
        """All of it as one JSON value."""
        return {
            "scenario": dataclasses.asdict(self.manifest),
            **{name: getattr(self, name) for name in ("before", "retrained", "kl", "methods", "missing")},
            "klom": {
                name: {
                    part: {
                        key: getattr(found, key) for key in ("mean", "percentile_95", "mean_matched", "mean_floor")
                    }
                    for part, found in parts.items()
                }
                for name, parts in self.klom.items()
            },
        }


def is_study(directory: Path) -> bool:
    """Whether a directory was made by a study, finished or not."""
    return (directory / STUDY_FILE).is_file() or all(
        (directory / name).is_file() for name in (SETTINGS_FILE, _REQUESTS_FILE)
    )


def write_manifest(directory: Path, manifest: StudyManifest) -> None:
    """Writes study.json. Methods and seeds that an earlier call had planned stay planned."""
    if (directory / STUDY_FILE).exists():
        earlier = _read_manifest(directory)
        seeds = max(manifest.retrain_seeds, earlier.retrain_seeds)
        plans = {name: _most(getattr(earlier, name), getattr(manifest, name)) for name in ("methods", "klom")}
        manifest = dataclasses.replace(manifest, **plans, retrain_seeds=seeds)
    files.atomic_write_json(directory / STUDY_FILE, {"format": STUDY_FORMAT, **dataclasses.asdict(manifest)})


def _most(first: Mapping[str, int], second: Mapping[str, int]) -> dict[str, int]:
    return {name: max(first.get(name, 0), second.get(name, 0)) for name in (*first, *second)}


def read_study(directory: str | os.PathLike[str]) -> Study:
    """Reads what a directory holds by now, and computes what needs the retrained models.

    Raises:
        RunError: a file is not what the module's text says, named with what is wrong.
        FileNotFoundError: the directory is none of a study.
    """
    path = Path(directory)
    if not is_study(path):
        msg = f"{path} holds no study: neither {STUDY_FILE} nor {SETTINGS_FILE} with {_REQUESTS_FILE}."
        raise FileNotFoundError(msg)
    manifest = _read_manifest(path)
    settings = _read(path / SETTINGS_FILE) if (path / SETTINGS_FILE).exists() else {}
    scores = path / "scores"
    before = _read_scores(scores / "before.json") if (scores / "before.json").exists() else None
    retrained = [_read_scores(file) for _, _, file in _by_seed(scores, r"(seed)_(\d+)\.json")]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in manifest.methods}
    for name, _, file in _by_seed(path / "methods", r"(.+)-seed_(\d+)\.json"):
        found.setdefault(name, []).append(_read_scores(file, method=True))
    methods = {name: tuple(seeds) for name, seeds in found.items() if seeds}
    measured = [s for s in (before, *retrained, *(s for seeds in methods.values() for s in seeds)) if s is not None]
    moved = [s for s in measured if "failed" not in s]
    if before is None and moved:
        msg = f"{scores / 'before.json'} is not there, and measures of other models are. Run the study again."
        raise RunError(msg)
    sizes = {tuple(len(s[side]["losses"]) for side in ("named", "unseen")) for s in moved}
    if len(sizes) > 1:
        msg = f"The models of {path} are not measured on the same examples: {sorted(sizes)} named and unseen ones."
        raise RunError(msg)
    for scores_of in moved:
        left_out = next((k for k, other in enumerate(retrained) if other is scores_of), None)
        scores_of["membership"] = membership(scores_of, retrained, left_out)
        if "truth_ratios" in scores_of.get("task", {}):
            others = [other for k, other in enumerate(retrained) if k != left_out]
            scores_of["task"]["metrics"] |= forget_quality(scores_of, others)
    return Study(
        path=path,
        manifest=dataclasses.replace(manifest, metrics={**_QUALITY_MEANINGS, **manifest.metrics}),
        settings=settings,
        before=before,
        retrained=tuple(retrained),
        kl=_read_kl(scores / "heldout_kl.json"),
        methods=methods,
        named=_read_named(path, next((len(s["named"]["losses"]) for s in moved), 0)),
        klom_models=_read_klom(path / "klom"),
    )


def membership(scores: Json, retrained: Sequence[Json], left_out: int | None = None) -> dict[str, float | None]:
    """AUC of telling S from unseen examples, by attack.

    Args:
        scores: of the model attacked.
        retrained: of the retrained models, whose mean loss is the reference of the reference-model attack.
        left_out: which of them is the model attacked, where it is one.
    """
    named, unseen = ({key: _array(scores[side][key]) for key in PER_EXAMPLE} for side in ("named", "unseen"))
    found = [
        membership_loss_auc(named["losses"], unseen["losses"]),
        membership_min_k_auc(named["min_k"], unseen["min_k"]),
        membership_auc("min_k_plus_plus", named["min_k_plus_plus"], unseen["min_k_plus_plus"]),
    ]
    attacked = []
    for side, own in (("named", named), ("unseen", unseen)):
        others = mean_of_others([_array(r[side]["losses"]) for r in retrained], left_out)
        if others is not None:
            attacked.append(reference_scores(own["losses"], others))
    if attacked:
        found.append(membership_auc("reference_retrained", *attacked))
    return {metric.name: metric.value for metric in found}


def forget_quality(scores: Json, retrained: Sequence[Json]) -> dict[str, dict[str, float | None]]:
    """TOFU's, medians over the retrained models of the KS test's p-value and statistic.

    Args:
        scores: with `task.truth_ratios`.
        retrained: other models' with the same.
    """
    ours, *others = (_array(s.get("task", {}).get("truth_ratios") or []) for s in (scores, *retrained))
    values: dict[str, float | None] = {QUALITY: None, STATISTIC: None}
    if others and all(len(ratios) and np.isfinite(ratios).all() for ratios in (ours, *others)):
        tests = [tofu.forget_quality(ours, other) for other in others]
        values[QUALITY] = float(np.median([test.p_value for test in tests]))
        values[STATISTIC] = float(np.median([test.statistic for test in tests]))
    return {name: {"value": value, "standard_error": None} for name, value in values.items()}


def _array(values: Sequence[float | None]) -> np.ndarray:
    return np.asarray([np.nan if value is None else value for value in values], np.float64)


def _by_seed(directory: Path, pattern: str) -> list[tuple[str, int, Path]]:
    """Name, seed and path of files in a directory, this package's own ways first.

    Args:
        directory: need not exist.
        pattern: of a file's name, with a group for the name and one for the seed.
    """
    found = []
    for file in directory.iterdir() if directory.is_dir() else ():
        match = re.fullmatch(pattern, file.name)
        if match:
            found.append((match[1], int(match[2]), file))
    return sorted(found, key=lambda entry: (not entry[0].startswith("llmeraser"), *entry[:2]))


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, with null for what is no finite number.

    Raises:
        RunError: it is none.
    """
    try:
        value = files.finite_json(files.read_json(path))
    except ValueError as error:
        raise RunError(str(error)) from error
    if not isinstance(value, dict):
        msg = f"{path} holds no JSON object."
        raise RunError(msg)
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(entry is None or _is_number(entry) for entry in value)


def _read_scores(path: Path, *, method: bool = False) -> dict[str, Any]:
    """The measures of one model, checked."""
    value = _read(path)
    if method and isinstance(value.get("failed"), str):
        return value
    wrong = [key for key in (*SCALARS, *COSTS, *(("heldout_kl",) if method else ()))
             if key not in value or not (value[key] is None or _is_number(value[key]))]  # fmt: skip
    wrong += [key for key in (*PROBES, PREPARATION) if not (value.get(key) is None or _is_number(value[key]))]
    for side in ("named", "unseen"):
        lists = value.get(side)
        arrays = [lists.get(key) for key in PER_EXAMPLE] if isinstance(lists, dict) else [None]
        if not all(map(_are_numbers, arrays)) or len({len(array or ()) for array in arrays}) != 1:
            wrong.append(side)
    own = value.get("own_before")
    if own is not None and not (
        isinstance(own, dict)
        and all(
            key in own and (own[key] is None or _is_number(own[key])) for key in ("forget_loss", "retained_loss")
        )
    ):
        wrong.append("own_before")
    if "task" in value:
        metrics = value["task"].get("metrics") if isinstance(value["task"], dict) else None
        if not isinstance(metrics, dict) or not all(map(_is_metric, metrics.values())):
            wrong.append("task.metrics")
        elif not _are_numbers(value["task"].get("truth_ratios", [])):
            wrong.append("task.truth_ratios")
    if not _are_numbers(value.get("wanted_losses", [])):
        wrong.append("wanted_losses")
    if wrong:
        msg = f"{path} is no result of a study: {', '.join(wrong)} missing or no number."
        raise RunError(msg)
    return value


def _is_metric(value: Any) -> bool:
    keys = ("value", "standard_error", "correct", "valid", "total")
    return (
        isinstance(value, dict)
        and "value" in value
        and all(value.get(key) is None or _is_number(value[key]) for key in keys)
    )


def _read_kl(path: Path) -> Json | None:
    if not path.exists():
        return None
    value = _read(path)
    floors = value.get("seed_floors")
    known = isinstance(floors, list) and floors and all(map(_is_number, floors))
    if not known or not (value.get("before") is None or _is_number(value["before"])):
        msg = f"{path} has no numbers `before` and `seed_floors`."
        raise RunError(msg)
    return value


def _read_named(directory: Path, count: int) -> tuple[tuple[str, str], ...]:
    """Id and action of each named example in the order of the training data, which is that of the losses.

    Raises:
        RunError: the requests are not of so many examples of the training data.
    """
    train, requests = directory / "data" / "train.jsonl", directory / _REQUESTS_FILE
    if not train.exists() or not requests.exists():
        return tuple((f"{place + 1}", "") for place in range(count))
    try:
        actions = {entry["id"]: entry["action"] for entry in map(json.loads, _lines(requests))}
        ids = [json.loads(line)["id"] for line in _lines(train)]
    except (ValueError, KeyError, TypeError) as error:
        msg = f"{directory / 'data'} holds a line that is no example or no request: {error!r}."
        raise RunError(msg) from error
    named = tuple((id_, actions[id_]) for id_ in ids if id_ in actions)
    if count not in (0, len(named)):
        msg = f"{directory} has measures of {count} named examples, and its requests name {len(named)}."
        raise RunError(msg)
    return named


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line] if path.exists() else []


def _losses_by_part(models: Sequence[Json]) -> dict[str, np.ndarray]:
    """Losses [models, examples] of the parts that have examples, without models that found no step.

    Those of a part in which a loss is not finite are left out.
    """
    moved = [model["losses"] for model in models if "failed" not in model]
    stacked = {part: np.stack([_array(losses[part]) for losses in moved]) for part in PARTS if moved}
    return {part: losses for part, losses in stacked.items() if losses.size and np.isfinite(losses).all()}


def _read_klom(directory: Path) -> dict[str, tuple[Json, ...]]:
    """The models of klom/ by name, checked."""
    found: dict[str, list[dict[str, Any]]] = {}
    sizes: set[tuple[int, ...]] = set()
    for name, _, path in _by_seed(directory, r"(.+)-seed_(\d+)\.json"):
        value = _read(path)
        losses = value.get("losses")
        lists = [losses.get(part) for part in PARTS] if isinstance(losses, dict) else [None]
        if all(map(_are_numbers, lists)):
            sizes.add(tuple(len(entries or ()) for entries in lists))
        elif not isinstance(value.get("failed"), str):
            msg = f"{path} has no `losses` with lists of numbers for {', '.join(PARTS)}."
            raise RunError(msg)
        found.setdefault(name, []).append(value)
    if len(sizes) > 1:
        msg = f"The models of {directory} are not measured on the same examples: {sorted(sizes)} of {PARTS}."
        raise RunError(msg)
    return {name: tuple(models) for name, models in found.items()}


def _read_manifest(directory: Path) -> StudyManifest:
    path = directory / STUDY_FILE
    if not path.exists():
        return _manifest_of_data(directory)
    value = _read(path)
    if value.get("format") != STUDY_FORMAT:
        msg = f"{path} is of format {value.get('format')}; this version reads {STUDY_FORMAT}."
        raise RunError(msg)
    fields = {field.name: value[field.name] for field in dataclasses.fields(StudyManifest) if field.name in value}
    try:
        metrics = {name: MetricMeaning(**meaning) for name, meaning in fields.pop("metrics", {}).items()}
        manifest = StudyManifest(**fields, metrics=metrics)
        counts = (manifest.num_examples, manifest.num_unseen, manifest.num_heldout, manifest.retrain_seeds)
        planned = (*manifest.named.values(), *manifest.methods.values(), *manifest.klom.values())
        sound = all(map(_is_number, (*counts, *planned)))
    except (TypeError, ValueError, AttributeError) as error:
        msg = f"{path} is no description of a study: {error}."
        raise RunError(msg) from error
    if not sound:
        msg = f"{path} is no description of a study: a count is no number."
        raise RunError(msg)
    return manifest


def _manifest_of_data(directory: Path) -> StudyManifest:
    """What the data say where no study.json was written."""

    def lines(name: str) -> list[str]:
        return _lines(directory / "data" / f"{name}.jsonl")

    try:
        actions = Counter(json.loads(line)["action"] for line in lines("requests"))
    except (ValueError, KeyError, TypeError) as error:
        msg = f"{directory / _REQUESTS_FILE} holds a line that is no request: {error!r}."
        raise RunError(msg) from error
    return StudyManifest(
        name=directory.resolve().name,
        num_examples=len(lines("train")),
        named=dict(actions),
        num_unseen=len(lines("unseen")),  # of an earlier version: it had no other rows to show
        num_heldout=len(lines("heldout")),
    )
