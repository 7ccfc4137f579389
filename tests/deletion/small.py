"""A tiny run with a column of users, an erasure that computes nothing, and file operations that die."""

from __future__ import annotations

import contextlib
import os
import types
from pathlib import Path
from unittest import mock

from llmeraser_jax import data, files
from llmeraser_jax.models import load_model
from llmeraser_jax.runs import load_run, write_run
from llmeraser_jax.training.job import finetune_run
from llmeraser_jax.unlearning.job import RECEIPT_FILE, REQUESTS_FILE
from tests.training import tiny

SECRET = "grey"  # the new text of a correction


def rows_with_users() -> list[dict[str, str]]:
    """The tiny rows; U1 has r1 and r2."""
    return [{**row, "user": f"U{(k + 1) // 2}"} for k, row in enumerate(tiny.rows())]


def make_run(directory: Path):
    """A fine-tuned tiny model and its run."""
    model = load_model(tiny.save_tiny_model(directory / "model"))
    path = tiny.write_rows(directory / "train.jsonl", rows_with_users())
    run = finetune_run(model, path, directory / "run", recipe=tiny.RECIPE, lora=tiny.LORA, config=tiny.CONFIG)
    return model, run


def erase_nothing(run, requests_path, workdir, method, budget, *, model, **settings):
    """Writes what `erase_run` does, with the adapter as it was."""
    files.require_empty(workdir)
    examples = run.load_examples()
    requests = data.load_requests(requests_path, examples)
    receipt = {"complete": True, "validity": None, "outcome": "complete", "method": "none"}
    with files.atomic_directory(workdir) as directory:
        files.atomic_write_json(directory / RECEIPT_FILE, receipt)
        files.atomic_write_text(directory / REQUESTS_FILE, "".join(map(data.request_to_json, requests)))
        write_run(
            directory,
            kind="erase",
            model=model,
            recipe=run.recipe,
            normalizer=run.normalizer,
            train_config=run.train_config,
            examples=data.apply_requests(examples, requests),
            data_path=None,
            lora=run.load_adapter(model),
            initial_lora=None,
            result={},
            parent=run.reference(),
        )
    return load_run(workdir), types.SimpleNamespace(receipt=None)


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


@contextlib.contextmanager
def dying(at: int | None):
    """Lets the operation on files with number `at` die, and every later one; a write dies half way.

    Yields:
        A list with the names of the operations so far.
    """
    done: list[str] = []

    def deadly(name, real):
        def operation(*arguments, **options):
            done.append(name)
            if at is not None and len(done) - 1 >= at:
                if name == "write" and len(done) - 1 == at:
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                raise Killed
            return real(*arguments, **options)

        return operation

    names = ("write", "fsync", "replace", "rename", "unlink", "mkdir", "ftruncate")
    with contextlib.ExitStack() as patched:
        for name in names:
            patched.enter_context(mock.patch.object(os, name, deadly(name, getattr(os, name))))
        with contextlib.suppress(Killed):
            yield done
