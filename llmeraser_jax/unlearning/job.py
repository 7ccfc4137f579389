"""Erasing from run directory to run directory: what `llmeraser erase` does."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from jax.sharding import Mesh

from llmeraser_jax import checkpoint, data, files, trees
from llmeraser_jax.lora import Lora
from llmeraser_jax.models import Model
from llmeraser_jax.parallel import on_primary
from llmeraser_jax.runs import Run, RunError, load_run, write_run
from llmeraser_jax.unlearning.config import EraseConfig
from llmeraser_jax.unlearning.erase import EraseResult, erase
from llmeraser_jax.unlearning.receipt import Receipt
from llmeraser_jax.unlearning.steps import StepRecord, UnlearningError

_log = logging.getLogger(__name__)

RECEIPT_FILE = "receipt.json"
REQUESTS_FILE = "requests.jsonl"
DELTA_DIRECTORY = "delta"
# Of the receipt file: content hashes of the examples given as never trained on, here and to the erasures before.
SHOWN_KEY = "heldout_sha256"


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
    requests: Sequence[data.Request],
    workdir: Path,
    result: EraseResult,
    model: Model,
    lora: Lora,
    data_path: str | os.PathLike[str] | None,
) -> EraseResult:
    """The result of a retraining in the place of an erasure that is not complete."""
    from llmeraser_jax.baselines.retrain import retrain

    _log.warning("The erasure is not complete (%s); retraining on the edited data.", result.receipt.outcome)
    (retrained,) = retrain(run, requests, workdir, seeds=1, model=model, data_path=data_path)
    adapter = retrained.load_adapter(model)
    delta = trees.tree_sub(adapter, lora)
    receipt = result.receipt
    spent = receipt.gradient_equivalents
    total = spent.total + retrained.result["gradient_equivalents"]
    return EraseResult(
        delta=delta,
        lora=adapter,
        receipt=dataclasses.replace(
            receipt,
            method="retrained",
            complete=True,
            validity=None,
            outcome="complete: retrained on the edited data",
            attempts=(*receipt.attempts, f"{receipt.method}: {receipt.outcome}"),
            seconds=receipt.seconds + retrained.result["seconds"],
            gradient_equivalents=dataclasses.replace(
                spent,
                total=total,
                share_of_retraining=None if spent.retraining is None else total / spent.retraining,
            ),
            delta_norm=float(trees.tree_norm(delta)),
            adapter_norm_after=float(trees.tree_norm(adapter)),
        ),
    )


def erase_run(
    run: Run,
    requests_path: str | os.PathLike[str],
    workdir: str | os.PathLike[str],
    config: EraseConfig,
    *,
    model: Model | None = None,
    mesh: Mesh | None = None,
    data_path: str | os.PathLike[str] | None = None,
    heldout_path: str | os.PathLike[str] | None = None,
    factors_path: str | os.PathLike[str] | None = None,
    on_incomplete: OnIncomplete = "warn",
    on_step: Callable[[StepRecord], None] = lambda record: None,
) -> tuple[Run, EraseResult]:
    """Erases from a run and makes `workdir` a run directory of the result, whole or not at all.

    `workdir` gets `adapter/` (PEFT, float32), `delta/` (Orbax), `receipt.json`, the requests, and the edited
    training data, so that it can be erased from again. With `config.stream` the solves' states are kept in
    `<workdir>.solves` until it is done, and the same call after a kill goes on from them.

    Args:
        run: the run to erase from: trained, adopted, or itself the result of an erasure.
        requests_path: a request file.
        workdir: new or empty.
        config: how; its `l2` must be the run's.
        model: the run's base model where it is loaded already.
        mesh: where to load the model to otherwise.
        data_path: where the run's training data is now; None is where it was.
        heldout_path: examples of the same kind that were not trained on; see `erase`.
        factors_path: where solver `ekfac` keeps its factors; see `erase`.
        on_incomplete: what happens where the outcome is not called complete. `warn` writes the adapter, and the
            receipt says so; `refuse` writes nothing; `retrain` writes the adapter of a retraining on the edited
            data with the run's recipe, which goes on where it was if it is killed.
        on_step: called after every accepted step.

    Raises:
        RequestError: what is wrong with the request file, before anything is computed.
        RunError: the data or the model is not the run's, or `config.l2` is not its lambda.
        IncompleteError: the outcome is not complete and `on_incomplete` is `refuse`; nothing is written.
        UnlearningError: no usable step was found; nothing is written.
        FileExistsError: `workdir` holds something.
    """
    files.require_empty(workdir)
    if on_incomplete == "retrain":
        from llmeraser_jax.baselines.retrain import retraining_config  # baselines build on this package

        retraining_config(run)  # what it lacks is said now, and not after the erasure
    if config.l2 != run.train_config.l2:
        msg = f"l2 is {config.l2}, but {run.path} was trained with {run.train_config.l2}; use that."
        raise RunError(msg)
    examples = run.load_examples(data_path)
    requests = data.load_requests(requests_path, examples)
    edited = data.apply_requests(examples, requests)
    if model is None:
        model = run.load_model(mesh=mesh)
    else:
        run.verify_model(model)
    lora = run.load_adapter(model)
    dataset = run.encode(examples, model.tokenizer)
    heldout = None if heldout_path is None else run.encode(run.load_unseen(heldout_path), model.tokenizer)
    solves = Path(f"{os.fspath(workdir).rstrip('/')}.solves")
    result = erase(
        model,
        lora,
        dataset,
        requests,
        config,
        heldout=heldout,
        retrain_cost=float(run.train_config.epochs * len(edited)),
        checkpoint_directory=solves,
        factors_directory=None if factors_path is None else Path(factors_path),
        on_step=on_step,
    )
    retraining = Path(f"{os.fspath(workdir).rstrip('/')}.retraining")
    if not result.receipt.complete:
        if on_incomplete == "refuse":
            raise IncompleteError(result.receipt)
        if on_incomplete == "retrain":
            result = _retrained_instead(run, requests, retraining, result, model, lora, data_path)
    receipt = result.receipt.to_mapping()

    def write() -> None:
        with files.atomic_directory(workdir) as directory:
            earlier = files.read_json(run.path / RECEIPT_FILE).get(SHOWN_KEY, ()) if run.kind == "erase" else ()
            now = () if heldout is None else map(data.content_hash, heldout.examples)
            shown = list(dict.fromkeys((*earlier, *now)))
            written = {**receipt, SHOWN_KEY: shown, "parent": run.reference()}
            files.atomic_write_json(directory / RECEIPT_FILE, written)
            request_lines = "".join(data.request_to_json(request) + "\n" for request in requests)
            files.atomic_write_text(directory / REQUESTS_FILE, request_lines)
            checkpoint.save_pytree(directory / DELTA_DIRECTORY, result.delta)
            digest = hashlib.sha256((directory / RECEIPT_FILE).read_bytes()).hexdigest()
            write_run(
                directory,
                kind="erase",
                model=model,
                recipe=run.recipe,
                normalizer=run.normalizer,
                train_config=run.train_config,
                examples=edited,
                data_path=None,
                lora=result.lora,
                initial_lora=run.load_initial_adapter(model),
                result={
                    "seconds": receipt["seconds"],
                    "gradient_equivalents": receipt["gradient_equivalents"]["total"],
                    "gradient_norm": receipt["edited_gradient_norm_after"],
                },
                unstated=run.unstated,
                parent=run.reference(),
                receipts=[
                    *run.receipts,
                    {"sha256": digest, "counts": receipt["counts"], "outcome": receipt["outcome"]},
                ],
            )
        shutil.rmtree(solves, ignore_errors=True)
        shutil.rmtree(retraining, ignore_errors=True)

    on_primary(write)
    _log.info("%s: %s.", Path(workdir), result.receipt.outcome)
    return load_run(workdir), result
