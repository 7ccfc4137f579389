"""Comparing run directories: what `llmeraser evaluate` does."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from llmeraser_jax import data, files
from llmeraser_jax.environment import describe_devices
from llmeraser_jax.evaluation.compare import Column, compare
from llmeraser_jax.evaluation.report import Cost, SolverTrace, build_report, write_report
from llmeraser_jax.models import Model
from llmeraser_jax.parallel import on_leader
from llmeraser_jax.runs import RUN_FILE, Run, RunError, load_run
from llmeraser_jax.unlearning.job import RECEIPT_FILE, REQUESTS_FILE, SHOWN_KEY

_log = logging.getLogger(__name__)


def retrained_runs(directory: str | os.PathLike[str]) -> tuple[Run, ...]:
    """The finished runs below a directory of `llmeraser retrain`, or the one it is itself.

    Raises:
        RunError: there is none, or one of them is no retraining.
    """
    directory = Path(directory)
    found = (
        [directory]
        if (directory / RUN_FILE).exists()
        else sorted(p.parent for p in directory.glob(f"*/{RUN_FILE}"))
    )
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
        if dict(zip(run.data_ids, run.data_sha256, strict=True)) != dict(
            zip(after.data_ids, after.data_sha256, strict=True)
        ):
            msg = f"{run.path} was trained on other edited data than {after.path} was made for."
            raise RunError(msg)


def _cost(result: Mapping[str, Any], diagnostics: float = 0.0) -> Cost:
    return Cost(
        seconds=result["seconds"],
        gradient_equivalents=result["gradient_equivalents"],
        peak_memory_bytes=result.get("peak_memory_bytes"),
        diagnostic_gradient_equivalents=diagnostics,
    )


def evaluate_runs(
    before: Run,
    after: Run,
    workdir: str | os.PathLike[str],
    *,
    retrained: Sequence[Run] = (),
    heldout_path: str | os.PathLike[str] | None = None,
    data_path: str | os.PathLike[str] | None = None,
    model: Model | None = None,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Compares an erasure with the run it started from, with retraining and with controls; writes the report.

    Args:
        before: the run that was erased from.
        after: the result of `erase_run`.
        workdir: new or empty; gets `report.json`, `report.md` and plots.
        retrained: of the same requests; without any, what needs no oracle is reported.
        heldout_path: examples that no model was trained on; None leaves out what needs them. Those that the erasure
            was shown are left out of membership inference.
        data_path: where the training data of `before` is now; None is where it was.
        model: the base model where it is loaded already.
        mesh: where to load the model to otherwise.

    Returns:
        The report.

    Raises:
        RunError: the runs do not belong together, or `after` is no erasure.
    """
    files.require_empty(workdir)
    if after.kind != "erase":
        msg = f"{after.path} is the result of {after.kind!r}, not of an erasure."
        raise RunError(msg)
    _check_lineage(before, after, retrained)
    examples = before.load_examples(data_path)
    requests = data.load_requests(after.path / REQUESTS_FILE, examples)
    receipt = files.read_json(after.path / RECEIPT_FILE)
    shown = frozenset(receipt.get(SHOWN_KEY, ()))
    if model is None:
        model = before.load_model(mesh=mesh)
    else:
        before.verify_model(model)
    dataset = before.encode(examples, model.tokenizer)
    heldout = None if heldout_path is None else before.encode(before.load_unseen(heldout_path), model.tokenizer)
    trained = before.result
    comparison = compare(
        model,
        dataset,
        requests,
        heldout,
        before=Column(
            name="before",
            lora=before.load_adapter(model),
            cost=_cost(trained) if before.kind == "finetune" else None,
        ),
        unlearned=Column(
            name="unlearned",
            lora=after.load_adapter(model),
            cost=_cost(
                {
                    **after.result,
                    "peak_memory_bytes": receipt["peak_memory_bytes"],
                },
                receipt["gradient_equivalents"]["diagnostics"],
            ),
        ),
        retrained=[
            Column(name=f"seed {run.train_config.seed}", lora=run.load_adapter(model), cost=_cost(run.result))
            for run in retrained
        ],
        l2=before.train_config.l2,
        shown=shown,
        solves=[
            SolverTrace(
                status=step["status"],
                iterations=step["iterations"],
                relative_residual=step["relative_residual"],
                negative_curvature=step["negative_curvature"],
                history=tuple(step["residual_history"]),
            )
            for step in receipt["steps"]
        ],
        context={
            **_context(before, receipt, len(examples)),
            "Held-out data": "none" if heldout is None else _heldout_words(heldout_path, heldout, shown),
        },
    )
    report = build_report(comparison)
    report["method"] = receipt["method"]
    report["runs"] = {
        "before": before.reference(),
        "unlearned": after.reference(),
        "retrained": [run.reference() for run in retrained],
        "heldout_sha256": None if heldout is None else _digest(heldout),
        "requests_sha256": hashlib.sha256((after.path / REQUESTS_FILE).read_bytes()).hexdigest(),
    }
    on_leader(lambda: write_report(workdir, report))
    return report


def _digest(dataset: data.TokenDataset) -> str:
    """SHA-256 (hex) of the examples' contents in order, the same wherever their file lies."""
    return hashlib.sha256("\n".join(map(data.content_hash, dataset.examples)).encode()).hexdigest()


def _heldout_words(path: str | os.PathLike[str] | None, heldout: data.TokenDataset, shown: Collection[str]) -> str:
    """The file's name, and how many of its examples are no non-members; says so aloud too."""
    name = Path(path or "").name
    count = sum(data.content_hash(example) in shown for example in heldout.examples)
    if not count:
        return name
    left_out = f"{count} of its {len(heldout)} examples were shown to the erasing, which aims at their losses"
    rest = (
        "membership inference leaves them out" if count < len(heldout) else "membership inference is not measured"
    )
    _log.warning("%s: %s; %s. Name other examples here than to `erase`.", name, left_out, rest)
    return f"{name} ({left_out}; {rest})"


def _context(before: Run, receipt: Mapping[str, Any], num_examples: int) -> dict[str, str]:
    config = receipt["config"]
    counts = ", ".join(f"{count} {action}" for action, count in receipt["counts"].items() if count)
    return {
        "Base model": Path(before.model_path).name,
        "Training data": f"{num_examples} examples, {before.train_config.epochs} epochs",
        "Request": counts,
        "Method": f"{receipt['method']} ({config['rhs']} right-hand side, {config['curvature']} curvature over "
        f"{config['curvature_data']}, damping {config['damping']:g})",
        "Outcome": receipt["outcome"],
        "Devices": describe_devices(),
    }
