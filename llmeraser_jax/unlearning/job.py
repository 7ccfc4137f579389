"""Erasing from run directory to run directory: what `llmeraser erase` does."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from jax.sharding import Mesh

from llmeraser_jax import checkpoint, data, files
from llmeraser_jax.models import Model
from llmeraser_jax.parallel import on_leader
from llmeraser_jax.runs import Run, RunError, load_run, write_run
from llmeraser_jax.unlearning.config import EraseConfig
from llmeraser_jax.unlearning.erase import EraseResult, erase
from llmeraser_jax.unlearning.steps import StepRecord

_log = logging.getLogger(__name__)

RECEIPT_FILE = "receipt.json"
REQUESTS_FILE = "requests.jsonl"
DELTA_DIRECTORY = "delta"
# Of the receipt file: content hashes of the examples given as never trained on, here and to the erasures before.
SHOWN_KEY = "heldout_sha256"


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
        on_step: called after every accepted step.

    Raises:
        RequestError: what is wrong with the request file, before anything is computed.
        RunError: the data or the model is not the run's, or `config.l2` is not its lambda.
        UnlearningError: no usable step was found; nothing is written.
        FileExistsError: `workdir` holds something.
    """
    files.require_empty(workdir)
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

    on_leader(write)
    _log.info("%s: %s.", Path(workdir), result.receipt.outcome)
    return load_run(workdir), result
