"""Erasing from run directory to run directory: what `llmeraser erase` does."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from jax.sharding import Mesh

from llmeraser_jax import checkpoint, data, files, trees
from llmeraser_jax.lora import product_norms
from llmeraser_jax.models import Model
from llmeraser_jax.parallel import on_primary
from llmeraser_jax.runs import Run, load_run, write_run
from llmeraser_jax.training.retrain import retrain, retraining_config
from llmeraser_jax.unlearning.auto import Auto
from llmeraser_jax.unlearning.erase import erase
from llmeraser_jax.unlearning.problem import EditProblem
from llmeraser_jax.unlearning.receipt import Receipt
from llmeraser_jax.unlearning.records import StepRecord, UnlearningError
from llmeraser_jax.unlearning.result import Method, Result
from llmeraser_jax.unlearning.task import UnlearningTask, task_of_run

_log = logging.getLogger(__name__)

RECEIPT_FILE = "receipt.json"
REQUESTS_FILE = "requests.jsonl"
DELTA_DIRECTORY = "delta"
# Of the receipt file: content hashes of the examples given as never trained on, here and to the erasures before.
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
) -> tuple[Result, Receipt]:
    """The result of a retraining in the place of an erasure that is not complete."""
    _log.warning("The erasure is not complete (%s); retraining on the edited data.", receipt.outcome)
    model, requests = task.language_model, task.requests
    assert not isinstance(requests, EditProblem)  # of a run
    (retrained,) = retrain(run, requests, workdir, seeds=1, model=model, data_path=data_path)
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
        outcome="complete: retrained on the edited data",
        attempts=(*receipt.attempts, f"{receipt.method}: {receipt.outcome}"),
        seconds=seconds,
        gradient_equivalents=cost,
        delta_norm=float(trees.tree_norm(delta)),
        adapter_norm_after=float(trees.tree_norm(adapter)),
        product_change_norm=float(products[0]),
    )
    return dataclasses.replace(result, params=adapter, cost=cost, seconds=seconds, receipt=receipt), receipt


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

    `workdir` gets `adapter/` (PEFT, float32), `delta/` (Orbax), `receipt.json`, the requests, and the edited
    training data, so that it can be erased from again. The states of streamed solves are kept in `<workdir>.solves`
    until it is done, and the same call after a kill goes on from them.

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
            data with the run's recipe, which goes on where it was if it is killed.
        on_step: called after every accepted step.

    Raises:
        RequestError: what is wrong with the request file, before anything is computed.
        RunError: the data or the model is not the run's.
        IncompleteError: the outcome is not complete and `on_incomplete` is `refuse`; nothing is written.
        UnlearningError: no usable step was found; nothing is written.
        ValueError: the method gives no receipt.
        FileExistsError: `workdir` holds something.
    """
    files.require_empty(workdir)
    if on_incomplete == "retrain":
        retraining_config(run)  # what it lacks is said now, and not after the erasure
    examples = run.load_examples(data_path)
    requests = data.load_requests(requests_path, examples)
    edited = data.apply_requests(examples, requests)
    calibration = None if calibration_path is None else run.load_unseen(calibration_path)
    task = task_of_run(
        run,
        requests,
        model=model,
        data_path=data_path,
        calibration=calibration,
        target_loss=target_loss,
        mesh=mesh,
    )
    solves = Path(f"{os.fspath(workdir).rstrip('/')}.solves")
    result = erase(
        task,
        method,
        budget,
        seed=seed,
        chunk_size=chunk_size,
        directory=solves,
        audit=audit,
        on_step=on_step,
    )
    receipt = result.receipt
    if receipt is None:
        msg = f"{type(method).__name__} gives no receipt; erase a run with one of the package's own methods."
        raise ValueError(msg)
    retraining = Path(f"{os.fspath(workdir).rstrip('/')}.retraining")
    if not receipt.complete:
        if on_incomplete == "refuse":
            raise IncompleteError(receipt)
        if on_incomplete == "retrain":
            result, receipt = _retrained_instead(run, task, retraining, result, receipt, data_path)
    written = receipt.to_mapping()

    def write() -> None:
        with files.atomic_directory(workdir) as directory:
            earlier = files.read_json(run.path / RECEIPT_FILE).get(SHOWN_KEY, ()) if run.kind == "erase" else ()
            now = () if calibration is None else map(data.content_hash, calibration)
            shown = list(dict.fromkeys((*earlier, *now)))
            whole = {**written, SHOWN_KEY: shown, "parent": run.reference()}
            files.atomic_write_json(directory / RECEIPT_FILE, whole)
            request_lines = "".join(data.request_to_json(request) + "\n" for request in requests)
            files.atomic_write_text(directory / REQUESTS_FILE, request_lines)
            checkpoint.save_pytree(directory / DELTA_DIRECTORY, result.delta)
            digest = hashlib.sha256((directory / RECEIPT_FILE).read_bytes()).hexdigest()
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
                    {"sha256": digest, "counts": written["counts"], "outcome": written["outcome"]},
                ],
            )
        shutil.rmtree(solves, ignore_errors=True)
        shutil.rmtree(retraining, ignore_errors=True)

    on_primary(write)
    _log.info("%s: %s.", Path(workdir), receipt.outcome)
    return load_run(workdir), result
