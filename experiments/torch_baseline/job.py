"""Owns the way from run directory to run directory."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from experiments.torch_baseline.config import BaselineConfig
from experiments.torch_baseline.erase import Eraser, edit_data, erase
from experiments.torch_baseline.model import Params, load_adapted_model
from experiments.torch_baseline.receipt import make_receipt
from llmeraser_jax import data, files
from llmeraser_jax.environment import library_versions
from llmeraser_jax.models import load_tokenizer
from llmeraser_jax.runs import (
    ADAPTER_DIRECTORY,
    EXAMPLES_FILE,
    INITIAL_ADAPTER_DIRECTORY,
    RUN_FILE,
    Run,
    RunError,
    load_run,
    model_directory,
    model_fingerprint,
)
from llmeraser_jax.unlearning import StepRecord
from llmeraser_jax.unlearning.job import RECEIPT_FILE, REQUESTS_FILE, SHOWN_KEY

logger = logging.getLogger(__name__)


def erase_run(
    run: Run,
    requests_path: str | os.PathLike[str],
    workdir: str | os.PathLike[str],
    config: BaselineConfig,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    data_path: str | os.PathLike[str] | None = None,
    on_step: Callable[[StepRecord, Params], None] = lambda record, params: None,
) -> tuple[Run, dict[str, Any]]:
    """Erases from a run and makes `workdir` a run directory of the result, whole or not at all.

    What `llmeraser erase` reads is read here, and what it writes is written (but for its Orbax copy of the change),
    so that `llmeraser evaluate --after` takes either.

    Args:
        run: the run to erase from.
        requests_path: a request file.
        workdir: new or empty.
        config: how; its `l2` must be the run's.
        device: where to compute.
        dtype: of the base; None is the run's.
        data_path: where the run's training data is now; None is where it was.
        on_step: called after every step.

    Returns:
        The new run, and the receipt.

    Raises:
        RequestError: what is wrong with the request file.
        RunError: the data or the model is not the run's, or `config.l2` is not its lambda.
        UnlearningError: a solve failed; nothing is written.
        FileExistsError: `workdir` holds something.
    """
    files.require_empty(workdir)
    torch.manual_seed(config.seed)  # dropout's, where the released script has it on
    if config.l2 != run.train_config.l2:
        msg = f"l2 is {config.l2}, but {run.path} was trained with {run.train_config.l2}; use that."
        raise RunError(msg)
    examples = run.load_examples(data_path)
    requests = data.load_requests(requests_path, examples)
    edited = data.apply_requests(examples, requests)
    if model_fingerprint(run.model_path) != run.model_sha256:
        msg = f"The base model at {run.model_path} is not the one that {run.path} was trained on."
        raise RunError(msg)
    base = model_directory(run.model_path)
    tokenizer = load_tokenizer(base)
    base_dtype: torch.dtype = getattr(torch, run.model_dtype) if dtype is None else dtype
    model = load_adapted_model(base, run.path / ADAPTER_DIRECTORY, dtype=base_dtype, device=device)
    dataset = run.encode(examples, tokenizer)

    started = time.perf_counter()
    eraser = Eraser(model, edit_data(dataset, requests, tokenizer), config)
    before = model.loaded_params()
    erased = erase(eraser, before, on_step=on_step)
    seconds = time.perf_counter() - started
    receipt = make_receipt(eraser, examples, requests, before, erased, seconds)

    with files.atomic_directory(workdir) as directory:
        # No row is shown to these methods but those trained on.
        files.atomic_write_json(directory / RECEIPT_FILE, {**receipt, SHOWN_KEY: [], "parent": run.reference()})
        request_lines = "".join(data.request_to_json(request) + "\n" for request in requests)
        files.atomic_write_text(directory / REQUESTS_FILE, request_lines)
        data.save_examples(directory / EXAMPLES_FILE, edited)
        save_adapter(directory / ADAPTER_DIRECTORY, erased.params, like=run.path / ADAPTER_DIRECTORY)
        if run.knows_initial_adapter:
            shutil.copytree(run.path / INITIAL_ADAPTER_DIRECTORY, directory / INITIAL_ADAPTER_DIRECTORY)
        digest = hashlib.sha256((directory / RECEIPT_FILE).read_bytes()).hexdigest()
        files.atomic_write_json(directory / RUN_FILE, _run_record(run, edited, receipt, digest))
    logger.info("%s: %s.", Path(workdir), receipt["outcome"])
    return load_run(workdir), receipt


def _run_record(run: Run, edited: tuple[data.Example, ...], receipt: dict[str, Any], digest: str) -> dict[str, Any]:
    """The parent's `run.json` with what an erasure changes."""
    return {
        **files.read_json(run.path / RUN_FILE),
        "kind": "erase",
        "result": {
            "seconds": receipt["seconds"],
            "gradient_equivalents": receipt["gradient_equivalents"]["total"],
            "gradient_norm": receipt["edited_gradient_norm_after"],
        },
        "parent": run.reference(),
        "receipts": [
            *run.receipts,
            {"sha256": digest, "counts": receipt["counts"], "outcome": receipt["outcome"]},
        ],
        "versions": library_versions(),
        "data": {
            "path": EXAMPLES_FILE,
            "ids": [example.id for example in edited],
            "sha256": [data.content_hash(example) for example in edited],
        },
    }


def save_adapter(directory: Path, params: Params, *, like: Path) -> None:
    """Writes an adapter in PEFT's format, in float32.

    Args:
        directory: to be made.
        params: by PEFT's tensor names.
        like: an adapter directory whose configuration it shares.

    Raises:
        ValueError: a number is not finite.
    """
    broken = [name for name, tensor in params.items() if not torch.isfinite(tensor).all()]
    if broken:
        msg = f"The adapter holds nan or infinity in {', '.join(broken)}; it is not saved."
        raise ValueError(msg)
    directory.mkdir()
    shutil.copyfile(like / "adapter_config.json", directory / "adapter_config.json")
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in params.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
