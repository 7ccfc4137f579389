"""A study as it is read: the rows of its tables, and its section of the page of `llmeraser report`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from llmeraser_jax.data import Action
from llmeraser_jax.evaluation.blocks import Block, Bullets, Heading, Page, Text, render_markdown
from llmeraser_jax.evaluation.closure import Closure, gap_closure, seed_mean, seed_standard_deviation
from llmeraser_jax.evaluation.example_blocks import NamedLosses, Quantity, example_blocks
from llmeraser_jax.evaluation.model_tables import Json, Kind, ModelRow, comparison_blocks, limits
from llmeraser_jax.evaluation.page import show_number
from llmeraser_jax.evaluation.plots import ACTION_NAMES
from llmeraser_jax.evaluation.study import (
    BEFORE,
    COSTS,
    PREPARATION,
    PROBES,
    RETRAINED,
    SCALARS,
    Study,
)
from llmeraser_jax.unlearning.receipt import RECEIPT_FORMAT

_QUANTITIES = {"forget_loss": "closure on S", "wanted_loss": "closure, wanted"}
_METHODS = {
    "llmeraser-auto": "this package, its default: matched steps, or the influence path where they do not reach",
    "llmeraser-matched": "this package: a few steps that take every named example to where it should end",
    "llmeraser-path": "this package: many small influence-function steps that take the weight out of S",
    "llmeraser-step": "this package: one influence-function step, kept short enough to be trusted",
    "llmeraser-newton": "this package: one Newton step on the edited data",
    "llmeraser-paper-step": "the paper's single step with the Hessian, not shortened, solved by damped conjugate "
    "gradients",
    "llmeraser-paper-descent": "the same step by the paper's own solver: mini-batch descent on the quadratic",
    "llmeraser-reference-compat": "the same step by the constants of the paper's public script",
    "finetune-edited": "a short fine-tuning on the edited data: what one does without a method",
    "gradient-ascent": "raises the loss on S, and nothing holds the rest",
    "gradient-difference": "raises the loss on S and lowers it on retained examples",
    "kl-anchored-ascent": "raises the loss on S and holds predictions on retained examples",
    "npo": "negative preference optimisation: S as answers that are not preferred, against the trained model",
    "simnpo": "negative preference optimisation without a reference model",
    "e2urec": "distillation from a teacher that forgets and one that remembers",
    "sisa": "training in shards; only those that hold S are trained anew, and all answer together",
    "receraser": "training in shards of similar examples that answer with learned weights; those that hold S are "
    "trained anew",
}


def study_rows(study: Study) -> list[ModelRow]:
    """Before, the methods with means over their seeds, and the mean of the retrained models at the end."""
    if study.before is None:
        return []
    retraining = [s["gradient_equivalents"] for s in study.retrained]
    kl = {} if study.kl is None else study.kl

    def row(
        label: str, kind: Kind, scores: Sequence[Json], kls: Sequence[float | None], name: str = ""
    ) -> ModelRow:
        return ModelRow(
            label=label,
            kind=kind,
            entry={**_entry(scores, kls, study.before or {}), "klom": _klom(study, name)},
            closure=_closures(study, scores) if kind == "unlearned" else None,
            cost=None if kind == "before" else _cost(scores),
            seed_floor=study.seed_floor,
            retraining=_mean(retraining)[0],
        )

    rows = [row("before", "before", [study.before], [kl["before"]] if "before" in kl else [], BEFORE)]
    for name, seeds in study.methods.items():
        moved, label = [s for s in seeds if "failed" not in s], name
        if len(moved) < len(seeds):
            label += f" ({len(seeds) - len(moved)} of {len(seeds)} seeds failed)" if moved else " (no step)"
        rows.append(row(label, "unlearned", moved, [s["heldout_kl"] for s in moved], name))
    if study.retrained:
        seeds = len(study.retrained)
        label = f"retrained, mean of {seeds}" if seeds > 1 else "retrained, one seed"
        rows.append(row(label, "retrained", study.retrained, kl.get("seed_floors", ()), RETRAINED))
    return rows


def _mean(values: Sequence[Any]) -> tuple[float | None, float | None]:
    """Mean and standard deviation over seeds; None where a value is not known."""
    if not values or any(value is None for value in values):
        return None, None
    return seed_mean(values), seed_standard_deviation(values)


def _entry(scores: Sequence[Json], kls: Sequence[float | None], before: Json) -> dict[str, Any]:
    """Means over seeds in the form of an evaluation's report."""
    deviations: dict[str, float | None] = {}
    entry: dict[str, Any] = {"num_seeds": len(scores), "not_finite": [], "seed_standard_deviation": deviations}
    columns = {key: [s[key] for s in scores if key in s] for key in (*SCALARS, *PROBES)}
    for key, values in (*columns.items(), ("heldout_kl_to_retrained", list(kls))):
        entry[key], deviations[key] = _mean(values)
        # What the model before has a number for and this one has none diverged.
        if None in values and (key not in columns or before.get(key) is not None):
            entry["not_finite"].append(key)
    attacks = dict.fromkeys(name for s in scores for name in s["membership"])
    entry["membership_auc"] = {}
    for name in attacks:
        value, deviation = _mean([s["membership"].get(name) for s in scores])
        entry["membership_auc"][name] = {"value": value, "seed_standard_deviation": deviation}
    measured = [s["task"]["metrics"] for s in scores if "task" in s]
    names = dict.fromkeys(name for metrics in measured for name in metrics)
    entry["task_metrics"] = {}
    for name in names:
        found = {
            key: _mean([metrics.get(name, {}).get(key) for metrics in measured])
            for key in ("value", "standard_error", "correct", "valid", "total")
        }
        entry["task_metrics"][name] = {key: mean for key, (mean, _) in found.items()} | {
            "deviation_over_seeds": found["value"][1]
        }
    return entry


def _klom(study: Study, name: str) -> dict[str, Any]:
    """By part the mean over examples, on S the 95th percentile, and how many models; of `retrained` the floor."""
    if name == RETRAINED:
        judged = study.klom.get(BEFORE, {})
        divergences = {part: found.floor for part, found in judged.items() if found.floor is not None}
        models = len(study.klom_models.get(RETRAINED, ())) or None
    else:
        judged = study.klom.get(name, {})
        divergences = {
            part: found.values if found.matched is None else found.matched for part, found in judged.items()
        }
        models = next((found.num_unlearned for found in judged.values()), None)
    told = {part: float(np.mean(values)) for part, values in divergences.items()}
    worst = {"named_95": float(np.percentile(divergences["named"], 95))} if "named" in divergences else {}
    return {**told, **worst, "models": models}


def _cost(scores: Sequence[Json]) -> dict[str, float | None]:
    cost = {key: _mean([s[key] for s in scores])[0] for key in COSTS}
    ahead = _mean([s.get(PREPARATION) for s in scores])[0]
    return {**cost, PREPARATION: ahead or None}


def _closure_of(study: Study, scores: Json, key: str) -> Closure:
    retrained = [s[key] for s in study.retrained]
    before = None if study.before is None else study.before[key]
    if before is None or scores[key] is None or any(value is None for value in retrained):
        return Closure(None, "undefined: a loss is not finite")
    return gap_closure(before, scores[key], retrained)


def _closures(study: Study, scores: Sequence[Json]) -> dict[str, Any]:
    found: dict[str, Any] = {"seed_standard_deviation": {}}
    for key in _QUANTITIES:
        values = [_closure_of(study, s, key).value for s in scores]
        found[key], found["seed_standard_deviation"][key] = _mean(values)
    return found


def _undefined(study: Study) -> dict[str, str]:
    """Closures that no method has, by title, each with the reason."""
    told = {}
    for key, title in _QUANTITIES.items():
        if study.before is None or study.before[key] is None:
            continue
        # The gap is the same for every method: what matters is before against retrained.
        closure = _closure_of(study, study.before, key)
        if closure.value is None:
            told[title] = closure.reason
    return told


def render_study(study: Study, picture: str) -> tuple[str, bytes | None]:
    """Its tables with their legends, in Markdown, and its picture of cost against fidelity, where there is one.

    Args:
        study: what was read.
        picture: name of the PNG file, beside the Markdown.
    """
    page = Page(study.manifest.name, tuple(_comparison(study, study_rows(study), picture)))
    return render_markdown(page), next((found.content for found in page.pictures), None)


def study_titles(studies: Sequence[Study]) -> list[str]:
    """Their names, with the directory above where two have the same."""
    names = [study.manifest.name for study in studies]
    return [
        name if names.count(name) == 1 else f"{study.path.resolve().parent.name}/{name}"
        for name, study in zip(names, studies, strict=True)
    ]


def study_blocks(study: Study, title: str, pictures: str, *, fold: bool = False) -> list[Block]:
    """Its section of a page.

    Args:
        study: what was read.
        title: of the section.
        pictures: what the names of its PNG files begin with.
        fold: the columns are explained elsewhere on the page.
    """
    blocks: list[Block] = [Heading(f"Study: {title}")]
    blocks += [Text(f"**What was asked.** {_question(study)}"), Bullets(_facts(study))]
    if study.missing:
        gaps = "; ".join(study.missing)
        blocks.append(
            Text(
                f"**Not finished**: {gaps}. The command that made the study goes on where it stopped; "
                "below is what there is."
            )
        )
    rows = study_rows(study)
    if not rows:
        return [*blocks, Text("Nothing was measured yet.")]
    return [*blocks, *_comparison(study, rows, f"{pictures}-cost.png", fold=fold), *_examples(study, pictures)]


def _examples(study: Study, pictures: str) -> list[Block]:
    """Every named example before and after, means over seeds; the first of the package's own ways is pictured."""
    if study.before is None:
        return []
    moved = {name: [s for s in seeds if "failed" not in s] for name, seeds in study.methods.items()}
    named = [(id_, ACTION_NAMES.get(action, action)) for id_, action in study.named]
    edited = [entry for entry, (_, action) in zip(named, study.named, strict=True) if action != Action.REMOVE.value]
    blocks: list[Block] = []
    quantities: tuple[tuple[Quantity, Callable[[Json], Any], list[tuple[str, str]]], ...] = (
        ("forget", lambda scores: scores["named"]["losses"], named),
        ("wanted", lambda scores: scores.get("wanted_losses"), edited),
    )
    for quantity, losses_of, asked in quantities:
        before = losses_of(study.before)
        if not before:
            continue
        models = {name: _mean_each([losses_of(s) for s in seeds]) for name, seeds in moved.items() if seeds}
        known = {name: losses for name, losses in models.items() if losses is not None}
        losses = NamedLosses(
            quantity=quantity,
            ids=[id_ for id_, _ in asked],
            requests=[words for _, words in asked],
            before=before,
            models=known,
            retrained=_mean_each([losses_of(s) for s in study.retrained]),
        )
        left = "the files of the study"
        blocks += example_blocks(losses, f"{pictures}-{quantity}.png", pictured=[*known][:1], left=left, fold=True)
    return [Heading("Each named example, before and after", 3), *blocks] if blocks else []


def _mean_each(seeds: Sequence[Sequence[float | None] | None]) -> list[float | None] | None:
    """Means over seeds of each example; None where a seed has none, or there is no seed."""
    lists = [losses for losses in seeds if losses is not None]
    if not lists or len(lists) < len(seeds):
        return None
    return [_mean(values)[0] for values in zip(*lists, strict=True)]


def _question(study: Study) -> str:
    return study.manifest.question or "The question was not recorded; the request below is what the data say."


def _facts(study: Study) -> tuple[str, ...]:
    plan = study.manifest
    named = ", ".join(f"{count} {ACTION_NAMES.get(action, action)}" for action, count in plan.named.items())
    facts = [
        f"**S**, the named examples: {named} of {plan.num_examples} trained on"
        + (f" ({plan.num_truncated} prompts were cut to fit)." if plan.num_truncated else "."),
        f"**Examples that no model was trained on**: {plan.num_unseen} to tell S from (membership inference), "
        f"{plan.num_heldout} behind the held-out KL"
        + (
            ". Methods were shown the former; taking them for a target flatters membership inference."
            if plan.num_shown is None
            else f", which no method saw; {plan.num_shown} others were shown to methods."
        ),
    ]
    trained = []
    lora, train = study.settings.get("lora"), study.settings.get("train")
    if isinstance(lora, Mapping):
        trained.append(f"LoRA of rank {lora.get('rank')}")
    if isinstance(train, Mapping):
        words = f"{train.get('epochs')} epochs of batches of {train.get('batch_size')}"
        trained.append(f"{words} at a learning rate of {train.get('learning_rate')}")
    if plan.base or trained:
        facts.append(f"**Model**: {', '.join([*([f'`{plan.base}`'] if plan.base else []), *trained])}.")
    seeds = [len(results) for results in study.methods.values()]
    if study.before is not None:
        several = f", with up to {max(seeds)} seeds each" if max(seeds, default=0) > 1 else ""
        facts.append(f"**Compared**: {len(study.retrained)} retrained models and {len(seeds)} methods{several}.")
    if study.seed_floor is not None:
        facts.append(f"**Seed floor** of the held-out KL: {show_number(study.seed_floor)} nats per response token.")
    if plan.devices:
        versions = ", ".join(f"{name} {plan.versions[name]}" for name in ("python", "jax") if name in plan.versions)
        facts.append(f"**Made on**: {plan.devices}" + (f"; {versions}." if versions else "."))
    return tuple(facts)


def _comparison(study: Study, rows: Sequence[ModelRow], picture: str, *, fold: bool = False) -> list[Block]:
    """The tables, how to read them, what is undefined in them, what their sizes allow, and the picture."""
    undefined = _undefined(study)
    told = [
        *(f"**{name}**: {_METHODS[name]}." for name in study.methods if name in _METHODS),
        "± is the standard deviation between seeds; after a task's metric, the standard error over examples, and "
        "(seeds) the standard deviation between seeds where several were measured. Methods that draw nothing, or "
        "cost much, have one seed and none.",
    ]
    tuned = {
        name: seeds[0]["chosen"]["learning_rate"]
        for name, seeds in study.methods.items()
        if isinstance(seeds[0].get("chosen"), Mapping) and "learning_rate" in seeds[0]["chosen"]
    }
    if tuned:
        rates = ", ".join(f"{name} {rate:g}" for name, rate in tuned.items())
        told.append(
            f"**Learning rates** ({rates}) are those of a small grid whose losses come nearest to the retrained "
            "models', which no user could know; the cost is without that search."
        )
    own = [
        f"**{name}** is not made from the model before, but from its own, which before the request had a loss of "
        f"{show_number(seeds[0]['own_before']['forget_loss'])} on S and "
        f"{show_number(seeds[0]['own_before']['retained_loss'])} on retained rows."
        for name, seeds in study.methods.items()
        if isinstance(seeds[0].get("own_before"), Mapping)
    ]
    failed = [
        f"**{name}** found no step with {sum('failed' in s for s in seeds)} of {len(seeds)} seeds: "
        f"{next(s['failed'] for s in seeds if 'failed' in s)}"
        for name, seeds in study.methods.items()
        if any("failed" in s for s in seeds)
    ]
    caveat = next((found.caveat for found in study.klom.get(BEFORE, {}).values()), "")
    sizes = limits(
        named=sum(study.manifest.named.values()),
        heldout=_num_asked(study),
        seeds=len(study.retrained),
    )
    reasons = [f"**{title}** has no column: {reason}." for title, reason in undefined.items()]
    reasons += [f"KLOM: {caveat}."] if caveat else []
    return comparison_blocks(
        rows,
        told=(*told, *own, *failed),
        sizes=(*reasons, *sizes),
        picture=picture,
        meanings=study.manifest.metrics,
        fold=fold,
    )


def _num_asked(study: Study) -> int | None:
    """The most examples that a share among the task's metrics is of; None where there is no share."""
    metrics = (study.before or {}).get("task", {}).get("metrics", {}).values()
    return int(max((m.get("total") or 0 for m in metrics), default=0)) or None


def study_receipts(study: Study, title: str) -> list[tuple[str, Json]]:
    """Receipts of the package's own ways, of the first seed each, by name."""
    found = []
    for name, seeds in study.methods.items():
        details = seeds[0].get("details")
        receipt = details.get("receipt") if isinstance(details, Mapping) else None
        if isinstance(receipt, Mapping) and receipt.get("format") in range(1, RECEIPT_FORMAT + 1):
            found.append((f"{title}: {name}", receipt))
    return found


def study_sources(studies: Sequence[Study]) -> tuple[tuple[str, str, str], ...]:
    """Rows of the table of what was read."""
    return tuple(
        (
            study.path.resolve().name,
            "study",
            f"{title}: {len(study.methods)} methods, {len(study.retrained)} retrained models"
            + (", not finished" if study.missing else ""),
        )
        for title, study in zip(study_titles(studies), studies, strict=True)
    )
