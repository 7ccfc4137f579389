"""Erasing from run directory to run directory: what `llmeraser erase` does."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh

from llmeraser_jax import data, files, trees
from llmeraser_jax.data import Example
from llmeraser_jax.lora import copy_adapter, product_norms
from llmeraser_jax.models import Model
from llmeraser_jax.parallel import mirrored, on_primary
from llmeraser_jax.runs import (
    ADAPTER_DIRECTORY,
    KEYED,
    PLAIN,
    Run,
    RunError,
    RunKeys,
    file_sha256,
    load_run,
    write_run,
)
from llmeraser_jax.training.replay import replay, run_with_checkpoints
from llmeraser_jax.training.retrain import retrain, retraining_config
from llmeraser_jax.unlearning.auto import Auto
from llmeraser_jax.unlearning.drift import drift_after
from llmeraser_jax.unlearning.erase import erase
from llmeraser_jax.unlearning.known_rows import KnownRows
from llmeraser_jax.unlearning.problem import EditProblem
from llmeraser_jax.unlearning.receipt import RECEIPT_FILE, Receipt, read_receipt
from llmeraser_jax.unlearning.records import StepRecord, UnlearningError
from llmeraser_jax.unlearning.result import Method, Result
from llmeraser_jax.unlearning.task import UnlearningTask, task_of_run

_log = logging.getLogger(__name__)

REQUESTS_FILE = "requests.jsonl"
PARENT_ADAPTER_DIRECTORY = "parent_adapter"
# Of the receipt file: hashes of the examples given as never trained on, here and to the erasures before.
SHOWN_KEY = "heldout_sha256"


_AUTO = Auto()
OnIncomplete = Literal["warn", "refuse", "retrain"]


class IncompleteError(UnlearningError):
    """The erasure is not complete, and an incomplete one was not wanted.

    Attributes:
        receipt: of what was not written.
    """

    def __init__(self, receipt: Receipt):
        super().__init__(f"No adapter is written, since the erasure is not complete. {receipt.outcome}.")
        self.receipt = receipt


def _retrained_instead(
    run: Run,
    task: UnlearningTask,
    workdir: Path,
    result: Result,
    receipt: Receipt,
    data_path: str | os.PathLike[str] | None,
    why: str,
) -> tuple[Result, Receipt]:
    """The result of a retraining in the place of an erasure, and why that is not kept."""
    _log.warning("Retraining on the edited data: %s.", why)
    model, requests = task.language_model, task.requests
    assert not isinstance(requests, EditProblem)  # of a run
    if run_with_checkpoints(run) is None:
        (retrained,) = retrain(run, requests, workdir, seeds=1, model=model, data_path=data_path)
    else:
        retrained = replay(run, requests, workdir / "replay", model=model, data_path=data_path)
    step = retrained.result.get("replayed_from_step")
    how = "retrained on the edited data" if step is None else f"replayed on the edited data after step {step}"
    adapter = retrained.load_adapter(model)
    delta = trees.tree_sub(adapter, task.adapter)
    cost = dataclasses.replace(result.cost, training=float(retrained.result["gradient_equivalents"]))
    products = product_norms(task.adapter, delta)
    seconds = receipt.seconds + retrained.result["seconds"]
    receipt = dataclasses.replace(
        receipt,
        method="retrained",
        complete=True,
        validity=None,
        outcome=f"complete: {how}",
        attempts=(*receipt.attempts, f"{receipt.method}: {why}"),
        seconds=seconds,
        gradient_equivalents=cost,
        delta_norm=float(trees.tree_norm(delta)),
        adapter_norm_after=float(trees.tree_norm(adapter)),
        product_change_norm=float(products[0]),
    )
    return dataclasses.replace(result, params=adapter, cost=cost, seconds=seconds, receipt=receipt), receipt


def _hashed(
    named: Sequence[Mapping[str, Any]], keys: RunKeys, examples: Sequence[Example], edited: Sequence[Example]
) -> list[dict[str, Any]]:
    """The named examples with hashes of what they were and what they are."""
    before, after = ({e.id: keys.example(data.content_hash(e)) for e in rows} for rows in (examples, edited))
    return [{**one, "hash_before": before[one["id"]], "hash_after": after.get(one["id"])} for one in named]


def _shown_before(run: Run) -> tuple[str, ...]:
    """Hashes of the examples that earlier erasures were shown; read before anything is computed.

    Raises:
        RunError: the receipt of the run is damaged.
    """
    if run.kind != "erase":
        return ()
    path = run.path / RECEIPT_FILE
    with files.reading(path, RunError):
        receipt = read_receipt(run)
        hashes = receipt.get(SHOWN_KEY, []) if isinstance(receipt, dict) else None
        if not isinstance(hashes, list) or not all(isinstance(one, str) for one in hashes):
            msg = f"{path} is damaged: expected a receipt with a list of hashes as {SHOWN_KEY!r}."
            raise RunError(msg)
    if hashes and run.hashes != PLAIN and run.keys is None:
        _log.warning(
            "The key of %s is not there: which held-out rows earlier erasures were shown is not known.", run.path
        )
        return ()
    return tuple(hashes)


def erase_run(
    run: Run,
    requests_path: str | os.PathLike[str],
    workdir: str | os.PathLike[str],
    method: Method = _AUTO,
    budget: float | None = None,
    *,
    seed: int = 0,
    chunk_size: int | Literal["auto"] = "auto",
    audit: bool = False,
    model: Model | None = None,
    mesh: Mesh | None = None,
    data_path: str | os.PathLike[str] | None = None,
    calibration_path: str | os.PathLike[str] | None = None,
    target_loss: float | None = None,
    on_incomplete: OnIncomplete = "warn",
    on_step: Callable[[StepRecord], None] = lambda record: None,
) -> tuple[Run, Result]:
    """Erases from a run and makes `workdir` a run directory of the result, whole or not at all.

    `workdir` gets `adapter/` (PEFT, float32), `parent_adapter/` (the files of the adapter before, for undoing),
    `receipt.json`, the requests, and the edited training data, so that it can be erased from again. Nothing in it
    holds what was erased or replaced: the receipt has hashes under a key of the directory's own. The states of
    streamed solves are kept in `<workdir>.solves` until it is done, and the same call after a kill goes on from
    them.

    Args:
        run: the run to erase from: trained, adopted, or itself the result of an erasure.
        requests_path: a request file.
        workdir: new or empty.
        method: how; one of the package's own, since rivals give no receipt.
        budget: see `erase`; so are `seed`, `chunk_size` and `audit`.
        seed: of every sample drawn.
        chunk_size: examples per micro-batch, or auto.
        audit: report gradient norms of all examples.
        model: the run's base model where it is loaded already.
        mesh: where to load the model to otherwise.
        data_path: where the run's training data is now; None is where it was.
        calibration_path: examples of the same kind that were not trained on.
        target_loss: where removed rows should end instead of the calibration rows' mean loss, nats per token.
        on_incomplete: what happens where the outcome is not called complete. `warn` writes the adapter, and the
            receipt says so; `refuse` writes nothing; `retrain` writes the adapter of a retraining on the edited
            data with the run's recipe, also where the drift of the chain says `retrain now`. It begins at the last
            checkpoint before the first forgotten row where the training kept any (see `training.replay`), and goes
            on where it was if it is killed.
        on_step: called after every accepted step.

    Raises:
        RequestError: what is wrong with the request file, before anything is computed.
        RunError: the data or the model is not the run's.
        IncompleteError: the outcome is not complete and `on_incomplete` is `refuse`; nothing is written.
        UnlearningError: no usable step was found; nothing is written.
        ValueError: the method gives no receipt.
        FileExistsError: `workdir` holds something.
    """
    on_primary(lambda: files.require_empty(workdir))
    if on_incomplete == "retrain":
        retraining_config(run)  # what it lacks is said now, and not after the erasure
    shown_before = _shown_before(run)
    examples = run.load_examples(data_path)
    requests = data.load_requests(mirrored(requests_path), examples)
    edited = data.apply_requests(examples, requests)
    calibration = None if calibration_path is None else run.load_unseen(calibration_path)
    task = task_of_run(
        run,
        requests,
        model=model,
        examples=examples,
        calibration=calibration,
        target_loss=target_loss,
        mesh=mesh,
    )
    solves = Path(f"{os.fspath(workdir).rstrip('/')}.solves")
    sets = {"trained": (task.problem.examples, task.problem.num_trained)}
    if task.calibration is not None:
        sets["calibration"] = (task.calibration, len(task.calibration))
    known = KnownRows(sets)
    known.load(run)
    result = erase(
        task,
        method,
        budget,
        seed=seed,
        chunk_size=chunk_size,
        directory=solves,
        audit=audit,
        known=known,
        on_step=on_step,
    )
    on_primary(lambda: known.save(run))  # also where nothing is written, so that the next attempt has it
    receipt = result.receipt
    if receipt is None:
        msg = f"{type(method).__name__} gives no receipt; erase a run with one of the package's own methods."
        raise ValueError(msg)
    retraining = Path(f"{os.fspath(workdir).rstrip('/')}.retraining")
    if not receipt.complete and on_incomplete == "refuse":
        raise IncompleteError(receipt)
    drift = drift_after(run, receipt.to_mapping(), task.language_model, result.params)
    if on_incomplete == "retrain":
        why = "" if receipt.complete else receipt.outcome
        if drift is not None and drift.advice == "retrain now":
            why = why or f"the chain has drifted too far ({'; '.join(drift.reasons)})"
        if why:
            result, receipt = _retrained_instead(run, task, retraining, result, receipt, data_path, why)
            drift = None
    written = receipt.to_mapping()
    previous = run.receipts[-1]["sha256"] if run.receipts else None
    written["reused_losses"] = known.found
    written["drift"] = None if drift is None else drift.to_mapping()

    def write() -> None:
        with files.atomic_directory(workdir) as directory:
            keys = RunKeys.new(heldout=None if run.keys is None else run.keys.heldout)
            earlier = map(keys.shown, shown_before) if run.hashes == PLAIN else shown_before
            now = () if calibration is None else map(data.content_hash, calibration)
            whole = {
                **written,
                "named": _hashed(written["named"], keys, examples, edited),
                SHOWN_KEY: list(dict.fromkeys((*earlier, *map(keys.shown, now)))),
                "hashes": KEYED,
                "parent": run.reference(),
                "previous": previous,
            }
            files.atomic_write_json(directory / RECEIPT_FILE, whole)
            data.save_requests(directory / REQUESTS_FILE, requests)
            copy_adapter(run.path / ADAPTER_DIRECTORY, directory / PARENT_ADAPTER_DIRECTORY)
            digest = file_sha256(directory / RECEIPT_FILE)
            write_run(
                directory,
                kind="erase",
                model=task.language_model,
                recipe=run.recipe,
                normalizer=run.normalizer,
                train_config=run.train_config,
                examples=edited,
                data_path=None,
                lora=result.params,
                initial_lora=task.initial,
                result={
                    "seconds": written["seconds"],
                    "gradient_equivalents": written["gradient_equivalents"]["total"],
                    "gradient_norm": written["edited_gradient_norm_after"],
                },
                unstated=run.unstated,
                parent=run.reference(),
                receipts=[
                    *run.receipts,
                    {
                        "sha256": digest,
                        "previous": previous,
                        "counts": written["counts"],
                        "outcome": written["outcome"],
                    },
                ],
                keys=keys,
                also=(REQUESTS_FILE, PARENT_ADAPTER_DIRECTORY),
            )
        shutil.rmtree(solves, ignore_errors=True)
        shutil.rmtree(retraining, ignore_errors=True)

    on_primary(write)
    _log.info("%s: %s.", Path(workdir), receipt.outcome)
    return load_run(workdir), result
