"""Processing a ledger: what is due becomes one request file, is erased, and gets its outcome.

A batch is a line `start`, an erasure whose directory appears whole or not at all, and a line `outcome` for each
entry. Killed anywhere, the next call goes on with the batch: an erasure that is there is not made again, and an
entry that has its outcome gets no second one.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from llmeraser_jax import data, files
from llmeraser_jax.deletion.certificate import receipt_sha256
from llmeraser_jax.deletion.ledger import Ledger
from llmeraser_jax.deletion.pending import (
    Batch,
    Entry,
    current_run,
    name_run,
    read_state,
    remove_orphans,
    request_lines,
)
from llmeraser_jax.runs import RUN_FILE, Run, load_run
from llmeraser_jax.runs.model_files import file_sha256
from llmeraser_jax.unlearning import Auto, Method, Receipt, UnlearningError, erase_run
from llmeraser_jax.unlearning.job import RECEIPT_FILE, REQUESTS_FILE
from llmeraser_jax.unlearning.receipt import method_to_mapping

_log = logging.getLogger(__name__)

PROCESSING_DIRECTORY = "processing"
RUNS_DIRECTORY = "runs"
_AUTO = Auto()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processed:
    """What a call did.

    Attributes:
        run: the run that was made.
        entries: those that got their outcome, as they are now.
        receipt: what is in the run's receipt file.
        fresh: the receipt of an erasure that was made by this call; None where it was there already.
    """

    run: Run
    entries: tuple[Entry, ...]
    receipt: Mapping[str, Any]
    fresh: Receipt | None


def process_queue(
    ledger: Ledger,
    run_path: str | os.PathLike[str] | None = None,
    *,
    by: datetime.date | None = None,
    everything: bool = False,
    workdir: str | os.PathLike[str] | None = None,
    method: Method = _AUTO,
    budget: float | None = None,
    erase: Callable[..., tuple[Run, Any]] = erase_run,
    compute: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Processed | None:
    """Erases what is due and writes the outcomes back.

    Args:
        ledger: whose entries.
        run_path: the run to erase from; None is the ledger's current one.
        by: entries due until this day; None is today.
        everything: also those that are due later.
        workdir: new or empty; None is `runs/batch-NUMBER` in the ledger.
        method: how, see `erase_run`; so is `budget`.
        budget: share of a retraining.
        erase: what erases, called as `erase_run` is.
        compute: arguments of `erase_run` that do not change the result: model, mesh, data_path, on_step.
        settings: other arguments of `erase_run`, JSON-like or paths. A batch that was begun with other settings and
            has not been erased is given up and begun again.

    Returns:
        What was done; None where nothing is due.

    Raises:
        LedgerError, RequestError: entries that cannot be carried out; they wait as before.
        UnlearningError, ValueError: from `erase_run`; the line `failed` has the reason, and the entries wait again.
        RuntimeError: another process is processing this ledger, or there are several JAX processes.
    """
    if jax.distributed.is_initialized():
        msg = "A ledger is processed by one process; on several hosts use `llmeraser erase` with a request file."
        raise RuntimeError(msg)
    by = ledger.now().date() if by is None else by
    flat = {name: os.fspath(value) if isinstance(value, Path) else value for name, value in settings.items()}
    share = "inf" if budget == float("inf") else budget
    recorded = json.loads(files.canonical_json({"method": method_to_mapping(method), "budget": share, **flat}))
    compute = {} if compute is None else compute
    with files.exclusive_use(ledger.path / PROCESSING_DIRECTORY):
        state = read_state(ledger.lines())
        batch = state.batch
        if batch is not None and not _is_erased(ledger, batch):
            places = ((workdir, batch.workdir), (run_path, batch.run["path"]))
            moved = any(given is not None and ledger.stored_path(Path(given)) != old for given, old in places)
            if moved or batch.settings != recorded:
                _fail(ledger, batch, "given up before it was erased: begun again with other settings")
                batch = None
        if batch is None:
            _remove_texts(ledger)
            batch = _begin(ledger, run_path, by, everything, workdir, recorded, compute.get("data_path"))
            if batch is None:
                return None
        out, fresh = ledger.located(batch.workdir), None
        requests = ledger.path / PROCESSING_DIRECTORY / REQUESTS_FILE
        if not _is_erased(ledger, batch):
            lines = _lines_of(ledger, batch)
            files.atomic_write_bytes(requests, "".join(line + "\n" for line in lines).encode("utf-8"), mode=0o600)
            run = load_run(ledger.located(batch.run["path"]))
            try:
                _, result = erase(run, requests, out, method, budget, **settings, **compute)
            except (ValueError, ArithmeticError, UnlearningError) as error:
                _fail(ledger, batch, f"{type(error).__name__}: {error}")
                raise
            fresh = result.receipt
        receipt = files.read_json(out / RECEIPT_FILE)
        entries = _write_outcomes(ledger, batch, receipt)
        _remove_texts(ledger)
    return Processed(run=load_run(out), entries=tuple(entries), receipt=receipt, fresh=fresh)


def _begin(
    ledger: Ledger,
    run_path: str | os.PathLike[str] | None,
    by: datetime.date,
    everything: bool,
    workdir: str | os.PathLike[str] | None,
    settings: Mapping[str, Any],
    data_path: str | os.PathLike[str] | None,
) -> Batch | None:
    """Checks all that can be checked before anything is computed, and writes the line `start`."""
    run = current_run(ledger, run_path)
    state = read_state(ledger.lines())
    entries = state.waiting(None if everything else by)
    if not entries:
        return None
    examples = run.load_examples(data_path)
    lines = [line for entry in entries for line in request_lines(ledger, entry)]
    sources = ", ".join(str(entry.number) for entry in entries)
    data.parse_requests(lines, examples, source=f"entries {sources} of {ledger.path} and the data of {run.path}")
    with ledger.writing() as writer:
        reference = name_run(ledger, writer, run)
        place = (
            ledger.path / RUNS_DIRECTORY / f"batch-{writer.next_number:04d}" if workdir is None else Path(workdir)
        )
        files.require_empty(place)
        content = {
            "entries": [entry.number for entry in entries],
            "run": dict(reference),
            "workdir": ledger.stored_path(place),
            "settings": dict(settings),
        }
        line = writer.append("start", content)
    return Batch(number=line.number, **{**content, "entries": tuple(content["entries"])})


def _lines_of(ledger: Ledger, batch: Batch) -> list[str]:
    entries = read_state(ledger.lines()).entries
    return [line for number in batch.entries for line in request_lines(ledger, entries[number])]


def _is_erased(ledger: Ledger, batch: Batch) -> bool:
    """Whether the batch's run is there, whole.

    Raises:
        FileExistsError: its directory is another run.
    """
    out = ledger.located(batch.workdir)
    if not (out / RUN_FILE).is_file():
        return False
    run = load_run(out)
    if run.parent is None or run.parent["sha256"] != batch.run["sha256"]:
        msg = f"{out} is a run that does not come from {ledger.located(batch.run['path'])}; name another --workdir."
        raise FileExistsError(msg)
    return True


def _fail(ledger: Ledger, batch: Batch, reason: str) -> None:
    with ledger.writing() as writer:
        writer.append("failed", {"batch": batch.number, "reason": reason})
    _remove_texts(ledger)


def _remove_texts(ledger: Ledger) -> None:
    """Deletes the request file, and the new texts that no open entry has; where no batch is in progress."""
    (ledger.path / PROCESSING_DIRECTORY / REQUESTS_FILE).unlink(missing_ok=True)
    with ledger.writing() as writer:
        remove_orphans(ledger, read_state(writer.lines))


def _write_outcomes(ledger: Ledger, batch: Batch, receipt: Mapping[str, Any]) -> list[Entry]:
    """A line for each entry that has none yet; all entries of the batch as they are then."""
    out = ledger.located(batch.workdir)
    check = receipt["validity"]
    hashes = {
        "run": {"path": batch.workdir, "sha256": file_sha256(out / RUN_FILE)},
        "adapter_sha256": load_run(out).adapter_sha256,
        "receipt_sha256": receipt_sha256(receipt),
    }
    verdict = "complete" if receipt["complete"] else check["verdict"] if check else "incomplete"
    rows: dict[str, list[bool | None]] = {}
    for row in check["rows"] if check else ():
        rows.setdefault(row["id"], []).append(row["arrived"])
    with ledger.writing() as writer:
        entries = read_state(writer.lines).entries
        for entry in (entries[number] for number in batch.entries):
            if entry.state == "done":
                continue
            # Without steps nothing was checked: every row was where it should be.
            arrived = {id_: _all_arrived(rows.get(id_, ())) if check else True for id_, _ in entry.rows}
            content = {"entry": entry.number, "batch": batch.number, **hashes, "verdict": verdict}
            writer.append("outcome", {**content, "arrived": arrived, "method": receipt["method"]})
        state = read_state(writer.lines)
    _log.info("%s: batch %d: %s.", ledger.path, batch.number, receipt["outcome"])
    return [state.entries[number] for number in batch.entries]


def _all_arrived(parts: Sequence[bool | None]) -> bool | None:
    """Whether every part of a row has arrived; None where that is not judged."""
    return False if False in parts else None if None in parts or not parts else True
