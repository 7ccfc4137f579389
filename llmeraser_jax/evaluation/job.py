"""From directories to pages: what `llmeraser evaluate` and `llmeraser report` do.

`evaluate` measures the comparison of one method, summarises and renders it; `report` renders any number of
comparisons that are there: of `evaluate`, of experiments, finished or not. Those about the same request on the same
run, judged on the same held-out examples, stand side by side; nothing else is compared.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from llmeraser_jax import data, files, trees
from llmeraser_jax.data.pictures import thumbnail_text
from llmeraser_jax.environment import describe_devices
from llmeraser_jax.evaluation import measures
from llmeraser_jax.evaluation.page import ACTION_NAMES, comparison_blocks, receipt_blocks
from llmeraser_jax.evaluation.records import (
    BASE,
    BEFORE,
    COMPARISON_FILE,
    RETRAINED,
    Comparison,
    Record,
    is_comparison,
    read_comparison,
)
from llmeraser_jax.evaluation.render import (
    MISSING,
    Block,
    Heading,
    Page,
    Table,
    Text,
    show_number,
    write_page,
)
from llmeraser_jax.evaluation.scoring import make_task_metrics
from llmeraser_jax.evaluation.summary import FORMAT, REPORT_FILE, UNLEARNED, summarise
from llmeraser_jax.models import Model
from llmeraser_jax.parallel import from_primary, on_primary
from llmeraser_jax.rivals import EqualLengthAscent
from llmeraser_jax.runs import RUN_FILE, Run, RunError, load_run
from llmeraser_jax.types import LoraParams
from llmeraser_jax.unlearning import UnlearningTask, Workspace
from llmeraser_jax.unlearning.job import RECEIPT_FILE, REQUESTS_FILE, SHOWN_KEY
from llmeraser_jax.unlearning.receipt import RECEIPT_FORMAT

_CHUNK_SIZE = 16

_log = logging.getLogger(__name__)


def retrained_runs(directory: str | os.PathLike[str]) -> tuple[Run, ...]:
    """The finished runs below a directory of `llmeraser retrain`, or the one it is itself.

    Raises:
        RunError: there is none, or one of them is no retraining.
    """
    directory = Path(directory)

    def finished() -> list[str]:
        runs = (
            [directory] if (directory / RUN_FILE).exists() else [p.parent for p in directory.glob(f"*/{RUN_FILE}")]
        )
        return sorted(map(str, runs))

    found = from_primary(finished)
    if not found:
        msg = f"{directory} holds no finished retraining."
        raise RunError(msg)
    runs = tuple(load_run(path) for path in found)
    for run in runs:
        if run.kind != "retrain":
            msg = f"{run.path} is the result of {run.kind!r}, not of a retraining."
            raise RunError(msg)
    return tuple(sorted(runs, key=lambda run: run.train_config.seed))


def _check_lineage(before: Run, after: Run, retrained: Sequence[Run]) -> None:
    """Refuses runs that do not belong together: other parents or other edited data."""
    reference = before.reference()["sha256"]
    for run in (after, *retrained):
        if run.parent is None or run.parent["sha256"] != reference:
            msg = f"{run.path} was not derived from {before.path}; compare runs of one request on one run."
            raise RunError(msg)
    for run in retrained:
        try:
            after.verify_examples(run.load_examples(), source=str(run.data_path))
        except RunError as error:
            msg = f"{run.path} was trained on other edited data than {after.path} was made for: {error}"
            raise RunError(msg) from error


def held_out_task(base: Model, heldout: data.TokenDataset) -> measures.Task:
    """Accuracy and AUC of yes/no questions, else exact match, on held-out examples."""
    metrics = make_task_metrics(base, heldout)
    return lambda model, params: {
        "metrics": measures.metrics_as_json(dataclasses.replace(metrics, model=model)(params))
    }


def receipt_to_keep(receipt: Mapping[str, Any]) -> dict[str, Any]:
    """A receipt without what tells examples by id or hash."""
    return {
        name: value for name, value in receipt.items() if name not in ("named", "versions", SHOWN_KEY, "parent")
    }


def evaluate_runs(
    before: Run,
    after: Run,
    workdir: str | os.PathLike[str],
    *,
    retrained: Sequence[Run] = (),
    heldout_path: str | os.PathLike[str] | None = None,
    data_path: str | os.PathLike[str] | None = None,
    show_texts: bool = False,
    model: Model | None = None,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Compares an erasure with the run it started from, with retraining and with controls; writes the report.

    Args:
        before: the run that was erased from.
        after: the result of `erase_run`.
        workdir: new or empty; gets `report.json`, `report.html`, `report.md` and plots.
        retrained: of the same requests; without any, what needs no oracle is reported.
        heldout_path: examples that no model was trained on; None leaves out what needs them. Those that the erasure
            was shown are left out of membership inference.
        data_path: where the training data of `before` is now; None is where it was.
        show_texts: also generate answers to the forget set's questions, and keep them and its texts in the report.
        model: the base model where it is loaded already.
        mesh: where to load the model to otherwise.

    Returns:
        The report, see `summary.summarise`.

    Raises:
        RunError: the runs do not belong together, or `after` is no erasure.
    """
    on_primary(lambda: files.require_empty(workdir))
    if after.kind != "erase":
        msg = f"{after.path} is the result of {after.kind!r}, not of an erasure."
        raise RunError(msg)
    _check_lineage(before, after, retrained)
    examples = before.load_examples(data_path)
    requests = data.load_requests(after.path / REQUESTS_FILE, examples)
    receipt = files.read_json(after.path / RECEIPT_FILE)
    shown = frozenset(receipt.get(SHOWN_KEY, ()))
    model = before.load_or_verify_model(model, mesh=mesh)
    dataset = before.encode(examples, model.tokenizer)
    heldout = None if heldout_path is None else before.encode(before.load_unseen(heldout_path), model.tokenizer)
    old, new = before.load_adapter(model), after.load_adapter(model)
    unlearning = UnlearningTask(
        model=model, adapter=old, data=dataset, requests=tuple(requests), training=before.train_config
    )
    problem = unlearning.problem
    bench = measures.Bench(
        model=model,
        problem=problem,
        retrained=tuple(run.load_adapter(model) for run in retrained),
        heldout=heldout,
        task=None if heldout is None else held_out_task(model, heldout),
    )
    taken = (*measures.STANDARD, measures.answers) if show_texts else measures.STANDARD

    def record(
        name: str, kind: Any, lora: LoraParams | None, cost: Mapping[str, Any] | None, **other: Any
    ) -> Record:
        some = measures.LOSSES if kind == "base" else taken if kind != "control" else measures.STANDARD
        return Record(model=name, kind=kind, scores=measures.measure(bench, model, lora, some), cost=cost, **other)

    distance = float(trees.tree_norm(trees.tree_sub(new, old)))
    spent = {**after.result, "peak_memory_bytes": receipt["peak_memory_bytes"]}
    records = [
        record(BEFORE, "before", old, _cost(before.result) if before.kind == "finetune" else None),
        record(
            UNLEARNED,
            "unlearned",
            new,
            _cost(spent, receipt["gradient_equivalents"]["diagnostics"]),
            receipt=receipt_to_keep(receipt),
            details={"delta_norm": distance},
        ),
        *(record(name, "control", lora, cost) for name, lora, cost in _controls(unlearning, distance)),
        *(
            record(RETRAINED, "retrained", lora, _cost(run.result), seed=run.train_config.seed)
            for run, lora in zip(retrained, bench.retrained, strict=True)
        ),
        *([] if heldout is None else [record(BASE, "base", None, None)]),
    ]
    named = [dataset.examples[int(i)] for i in problem.named]
    wanted = [None if j < 0 else problem.examples.examples[int(j)] for j in problem.replacements]
    actions = {request.id: request.action.value for request in requests}
    between = bench.between_retrained
    comparison = Comparison(
        name=after.path.name,
        facts={
            **_context(before, receipt, len(examples)),
            "Held-out data": "none" if heldout is None else _heldout_words(heldout_path, heldout, after, shown),
        },
        ids=tuple(example.id for example in named),
        actions=tuple(actions[example.id] for example in named),
        num_examples=len(examples),
        nonmembers=None if heldout is None else tuple(after.shown_hash(e) not in shown for e in heldout.examples),
        num_positions=0 if between is None else between.num_positions,
        texts=tuple(
            {
                "query": example.query,
                "trained": example.response,
                "wanted_query": None if new is None else new.query,
                "wanted": None if new is None else new.response,
                **_thumbnails(example, new),
            }
            for example, new in zip(named, wanted, strict=True)
        )
        if show_texts
        else (),
        records=tuple(records),
    )
    report = summarise(comparison)
    report["method"] = receipt["method"]
    report["runs"] = {
        "before": before.reference(),
        "unlearned": after.reference(),
        "retrained": [run.reference() for run in retrained],
        "heldout_sha256": None if heldout is None else _digest(heldout),
        "requests_sha256": hashlib.sha256((after.path / REQUESTS_FILE).read_bytes()).hexdigest(),
    }
    on_primary(lambda: write_report(workdir, report))
    return report


def _thumbnails(example: data.Example, wanted: data.Example | None) -> dict[str, list[str]]:
    """An example's pictures, and those of what it should have been, for a report; nothing where it has none."""
    both = {"pictures": example, "wanted_pictures": wanted}
    return {
        name: [thumbnail_text(picture) for picture in of.images] for name, of in both.items() if of and of.images
    }


def _cost(result: Mapping[str, Any], diagnostics: float = 0.0) -> dict[str, Any]:
    keys = ("seconds", "gradient_equivalents", "peak_memory_bytes")
    return {**{key: result.get(key) for key in keys}, "diagnostic_gradient_equivalents": diagnostics}


def _controls(task: UnlearningTask, distance: float) -> Iterator[tuple[str, LoraParams, dict[str, float]]]:
    """The controls: `c*b`, as far away as the unlearned adapter is, and gradient ascent, as long a way."""
    length = distance / float(trees.tree_norm(task.adapter))
    for name, num_steps in (("c*b", 1), ("gradient ascent", 10)):
        moved = EqualLengthAscent(length=length, num_steps=num_steps).run(task, Workspace(mesh=task.mesh))
        cost = {"seconds": moved.seconds, "gradient_equivalents": moved.cost.total}
        yield name, moved.params, {**cost, "diagnostic_gradient_equivalents": 0.0}


def write_report(directory: str | os.PathLike[str], report: Mapping[str, Any]) -> Path:
    """Writes `report.json`, `report.html`, `report.md` and the plots into a new directory, whole or not at all.

    Args:
        directory: must not exist, or be empty.
        report: from `summary.summarise`.

    Returns:
        The path of `report.html`.

    Raises:
        FileExistsError: `directory` holds something.
        ValueError: the report holds a nan or an infinity, which JSON cannot.
    """
    with files.atomic_directory(directory) as temporary:
        files.atomic_write_json(temporary / REPORT_FILE, report)
        write_page(page_of(report), temporary)
    return Path(directory) / "report.html"


def page_of(report: Mapping[str, Any]) -> Page:
    """The page of one comparison."""
    title = "Unlearning compared with retraining" if UNLEARNED in report["models"] else report["name"]
    return Page(
        title, (*comparison_blocks([report], [UNLEARNED], "report"), *receipt_blocks(_receipts([report], [""])))
    )


def _receipts(reports: Sequence[Mapping[str, Any]], titles: Sequence[str]) -> list[tuple[str, Mapping[str, Any]]]:
    """The receipts that reports hold, each with a name."""
    return [
        (": ".join(part for part in (title, name if name != UNLEARNED or not title else "") if part), receipt)
        for report, title in zip(reports, titles, strict=True)
        for name, receipt in report.get("receipts", {}).items()
        if receipt.get("format") in range(1, RECEIPT_FORMAT + 1)
    ]


def _digest(dataset: data.TokenDataset) -> str:
    """SHA-256 (hex) of the examples' contents in order, the same wherever their file lies."""
    return hashlib.sha256("\n".join(map(data.content_hash, dataset.examples)).encode()).hexdigest()


def _heldout_words(
    path: str | os.PathLike[str] | None, heldout: data.TokenDataset, after: Run, shown: Collection[str]
) -> str:
    """The file's name, and how many of its examples are no non-members; says so aloud too."""
    name = Path(path or "").name
    count = sum(after.shown_hash(example) in shown for example in heldout.examples)
    if not count:
        return name
    left_out = f"{count} of its {len(heldout)} examples were shown to the erasing, which aims at their losses"
    rest = (
        "membership inference leaves them out" if count < len(heldout) else "membership inference is not measured"
    )
    _log.warning("%s: %s; %s. Name other examples here than to `erase`.", name, left_out, rest)
    return f"{name} ({left_out}; {rest})"


def _context(before: Run, receipt: Mapping[str, Any], num_examples: int) -> dict[str, str]:
    counts = ", ".join(f"{count} {action}" for action, count in receipt["counts"].items() if count)
    return {
        "Base model": Path(before.model_path).name,
        "Training data": f"{num_examples} examples, {before.train_config.epochs} epochs",
        "Request": counts,
        "Method": receipt["method"],
        "Curvature": receipt["curvature_reason"],
        "Outcome": receipt["outcome"],
        "Devices": describe_devices(),
    }


def write_overview(directories: Sequence[str | os.PathLike[str]], workdir: str | os.PathLike[str]) -> Path:
    """Gathers directories into `report.html`, which needs no other file, `report.md` and PNG files.

    Args:
        directories: see `gather`.
        workdir: new or empty; written whole or not at all.

    Returns:
        The path of `report.html`.

    Raises:
        RunError: a directory that is no result.
        FileExistsError: `workdir` holds something.
    """
    files.require_empty(workdir)
    found = gather(directories)
    try:
        page = build_overview(found)
    except Exception:
        for path, one in found.items():  # says whose contents they are
            with files.reading(path, RunError):
                build_overview({path: one})
        raise
    with files.atomic_directory(workdir) as temporary:
        write_page(page, temporary)
    return Path(workdir) / "report.html"


def gather(directories: Sequence[str | os.PathLike[str]]) -> dict[Path, Mapping[str, Any] | Run]:
    """What directories hold, by path: the report of a comparison, or a run.

    One named twice, or by itself and with its parent, counts once.

    Args:
        directories: each made by `evaluate`, `erase`, `retrain`, `finetune`, `adopt` or an experiment, or holding
            such directories.

    Raises:
        RunError: there is none, or some are nothing of the kind; all of them are named with what they hold.
    """
    found: dict[Path, Mapping[str, Any] | Run] = {}
    problems = [] if directories else ["No directory was named."]
    for name in directories:
        try:
            for part in _parts(Path(name)):
                with files.reading(part, RunError):
                    found.setdefault(part.resolve(), _read(part))
        except (RunError, FileNotFoundError) as error:
            problems.append(str(error))
    if problems:
        raise RunError("\n".join(problems))
    return found


def _parts(path: Path) -> list[Path]:
    """The directory itself, or the results right below it."""
    kinds = (COMPARISON_FILE, RUN_FILE, REPORT_FILE)
    if not path.is_dir():
        msg = f"{path} is {'a file' if path.exists() else 'not there'}; name a directory."
        raise FileNotFoundError(msg)
    below = sorted(entry for entry in path.iterdir() if entry.is_dir())
    parts = [part for part in (path, *below) if any((part / name).is_file() for name in kinds)]
    if not parts:
        held = sorted(entry.name for entry in path.iterdir())
        shown = ", ".join(held[:6]) + (" and more" if len(held) > 6 else "") if held else "nothing"
        msg = (
            f"{path} was not made by evaluate, erase, retrain, finetune, adopt or an experiment: neither it nor a "
            f"directory in it has {', '.join(kinds)} (it holds {shown})."
        )
        raise RunError(msg)
    return [path] if parts[0] == path else parts


def _read(path: Path) -> Mapping[str, Any] | Run:
    if is_comparison(path):
        return summarise(read_comparison(path))
    if (path / RUN_FILE).is_file():
        run = load_run(path)
        if run.kind == "erase":
            _receipt_of(run)
        return run
    report = files.read_json(path / REPORT_FILE)
    if not isinstance(report, dict) or report.get("format") != FORMAT or "models" not in report:
        msg = f"{path / REPORT_FILE} is no report of `llmeraser evaluate` in format {FORMAT}."
        raise RunError(msg)
    return report


def _receipt_of(run: Run) -> Mapping[str, Any]:
    receipt = files.read_json(run.path / RECEIPT_FILE)
    # Later formats add fields; what an earlier one lacks is shown as not recorded.
    if not isinstance(receipt, dict) or receipt.get("format") not in range(1, RECEIPT_FORMAT + 1):
        msg = f"{run.path / RECEIPT_FILE} is no receipt of a format up to {RECEIPT_FORMAT}."
        raise RunError(msg)
    return receipt


def build_overview(found: Mapping[Path, Mapping[str, Any] | Run]) -> Page:
    """The page of what was gathered."""
    reports = {path: report for path, report in found.items() if not isinstance(report, Run)}
    runs = [run for run in found.values() if isinstance(run, Run)]
    blocks: list[Block] = [
        Text(
            "A language model was fine-tuned on some examples; then it was asked to forget a few of them, or to "
            "learn them differently: the **forget set**. **Unlearning** edits the trained adapter for that. The "
            "model to match is one that was **retrained** from the start on the edited data, which is what "
            "unlearning saves."
        )
    ]
    groups = _groups(reports)
    labels = {path: _label(path, report) for path, report in reports.items()}
    names = list(labels.values())
    for group in groups:
        for path, label in {path: labels[path] for path in group}.items():
            if UNLEARNED not in reports[path]["models"] and names.count(label) > 1:
                labels[path] = f"{path.parent.name}/{label}"
            elif sum(_label(other, reports[other]) == label for other in group) > 1:
                labels[path] = f"{label}, {path.name}"
    singles = [group for group in groups if UNLEARNED in reports[group[0]]["models"]]
    for number, group in enumerate(groups, start=1):
        title = f"Comparison: {labels[group[0]]}"
        if group in singles:
            several = f"Comparison {singles.index(group) + 1} of {len(singles)}"
            title = "Comparison with retraining" if len(singles) == 1 else several
        inside = comparison_blocks(
            [reports[path] for path in group], [labels[path] for path in group], f"comparison{number}"
        )
        blocks += [Heading(title), *inside]
    if not groups:
        blocks.append(
            Text(
                "No evaluation was given, so that nothing says how close to retraining the results are; make one "
                "with `llmeraser evaluate` and name its directory too."
            )
        )
    erased = [run for run in runs if run.kind == "erase"]
    own = {run.reference()["sha256"] for run in erased}
    others = [p for p, r in reports.items() if r.get("runs", {}).get("unlearned", {}).get("sha256") not in own]
    receipts = [(run.path.name, _receipt_of(run)) for run in erased]
    receipts += _receipts([reports[path] for path in others], [labels[path] for path in others])
    return Page(
        "Unlearning report",
        (*blocks, *receipt_blocks(receipts), *_sources(reports, labels, runs)),
    )


def _label(path: Path, report: Mapping[str, Any]) -> str:
    """What a comparison is called: its name, or that of the unlearned model's directory with the method."""
    if UNLEARNED not in report["models"]:
        return report["name"]
    runs, method = report.get("runs"), report.get("method", "")
    origin = Path(runs["unlearned"]["path"]).name if runs else path.name
    return f"{origin} ({method})" if method and method not in origin else origin


def _groups(reports: Mapping[Path, Mapping[str, Any]]) -> list[list[Path]]:
    """Those that can be compared: of one run and request, on the same held-out examples and retrained models."""
    groups: dict[Any, list[Path]] = {}
    for path, report in reports.items():
        runs, key = report.get("runs"), path
        if runs is not None:
            retrained = tuple(sorted(run["sha256"] for run in runs["retrained"]))
            about = (runs["before"]["sha256"], runs["requests_sha256"], runs["heldout_sha256"], retrained)
            key = (*about, report["heldout"].get("nonmembers"))
        groups.setdefault(key, []).append(path)
    return list(groups.values())


def _sources(
    reports: Mapping[Path, Mapping[str, Any]], labels: Mapping[Path, str], runs: Sequence[Run]
) -> list[Block]:
    """Every directory that was read, and what each run took."""
    rows = []
    for path, report in reports.items():
        seeds, methods = report["models"][RETRAINED]["seeds"], report["models"].get("methods")
        compared = "" if methods is None else f"{len(methods)} methods, "
        unfinished = ", not finished" if report.get("missing") else ""
        told = f"{labels[path]}: {compared}{seeds} retrained models{unfinished}"
        rows.append((path.name, "comparison", told, MISSING, MISSING, MISSING))
    for run in runs:
        told = f"{len(run.data_ids)} examples, {run.train_config.epochs} epochs"
        memory = run.result.get("peak_memory_bytes")
        if run.kind == "erase":
            receipt = _receipt_of(run)
            counts = [f"{n} {ACTION_NAMES.get(action, action)}" for action, n in receipt["counts"].items() if n]
            told = f"{receipt['method']}: {', '.join(counts)} of {receipt['num_examples_before']} examples"
            memory = receipt.get("peak_memory_bytes")
        told = f"seed {run.train_config.seed}, {told}" if run.kind == "retrain" else told
        cost = [show_number(run.result.get(key)) for key in ("gradient_equivalents", "seconds")]
        rows.append(
            (run.path.name, run.kind, told, *cost, MISSING if memory is None else show_number(memory / 2**20))
        )
    header = ("directory", "made by", "what it is", "gradient equivalents", "seconds", "peak memory (MiB)")
    told = (
        "A gradient equivalent is a forward and backward pass of one example; diagnostics are not in it. Seconds "
        "are wall-clock time, compilation included. Memory is of the process, or of the first device where that "
        "keeps count; a process that had done other work before shows its peak too."
    )
    return [Heading("What was read, and what each run took"), Table(header, tuple(rows)), Text(told)]
