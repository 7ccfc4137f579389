"""Checks a ledger against itself and against the runs, texts and certificates that its lines name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from llmeraser_jax.data import Action
from llmeraser_jax.deletion.certificate import (
    CERTIFICATE_DIRECTORY,
    JSON_FILE,
    receipt_sha256,
    verify_certificate,
)
from llmeraser_jax.deletion.findings import Finding
from llmeraser_jax.deletion.ledger import LEDGER_FILE, Ledger, LedgerError, Line, examine
from llmeraser_jax.deletion.pending import State, read_state, read_texts
from llmeraser_jax.deletion.verify import verify_directory
from llmeraser_jax.runs import RunError, load_run
from llmeraser_jax.runs.model_files import file_sha256
from llmeraser_jax.unlearning.receipt import read_receipt


def verify(
    path: str | os.PathLike[str],
    *,
    data_path: str | os.PathLike[str] | None = None,
    public_key: str | os.PathLike[str] | None = None,
) -> list[Finding]:
    """Every check of a ledger, or of a run directory with its certificate.

    Args:
        path: either.
        data_path: see `verify_directory`.
        public_key: the key that must have signed, a PEM file; None takes the ones that are named.

    Raises:
        ValueError: neither a ledger nor a run; or `data_path` is given for a ledger.
        ImportError: a certificate is signed and `cryptography` is missing.
    """
    path = Path(path)
    if (path / LEDGER_FILE).is_file():
        if data_path is not None:
            msg = f"{path} is a ledger, whose runs know their data; give data for one of its runs."
            raise ValueError(msg)
        return verify_ledger(path, public_key=public_key)
    findings = verify_directory(path, data_path)
    if public_key is not None or (path / CERTIFICATE_DIRECTORY).is_dir():
        findings += verify_certificate(path, public_key=public_key)
    return findings


def verify_ledger(
    path: str | os.PathLike[str], *, public_key: str | os.PathLike[str] | None = None
) -> list[Finding]:
    """Every check of a ledger.

    Args:
        path: its directory.
        public_key: the key that must have signed its certificates, a PEM file; None takes the ones that they name.

    Raises:
        LedgerError: there is no ledger, or its key is missing.
        ImportError: a certificate is signed and `cryptography` is missing.
    """
    ledger = Ledger(path)
    lines, findings = examine(path)
    if not all(finding.ok for finding in findings):
        return findings  # what damaged lines say is not worth checking
    try:
        state = read_state(lines)
    except LedgerError as error:
        return [*findings, Finding("entries", False, str(error))]
    counts = {
        name: sum(e.state == name for e in state.entries.values()) for name in ("pending", "in progress", "done")
    }
    findings.append(Finding("entries", True, ", ".join(f"{count} {name}" for name, count in counts.items())))
    findings += _texts(ledger, state)
    findings += _runs(ledger, lines, state)
    findings += _certificates(ledger, lines, public_key)
    return findings


def _texts(ledger: Ledger, state: State) -> list[Finding]:
    """New texts of open entries are there and are those that were added."""
    findings = []
    for entry in state.entries.values():
        if entry.state == "done" or entry.texts is None:
            continue
        try:
            read_texts(ledger, entry)
        except LedgerError as error:
            findings.append(Finding(f"texts of entry {entry.number}", False, str(error)))
        else:
            findings.append(Finding(f"texts of entry {entry.number}", True, "as added"))
    return findings


def _runs(ledger: Ledger, lines: Sequence[Line], state: State) -> list[Finding]:
    """Runs that batches made are those that outcomes describe, and the last one trains on no removed row."""
    findings = []
    starts = {line.number: line.content for line in lines if line.kind == "start"}
    seen: set[str] = set()
    for line in lines:
        if line.kind != "outcome" or line.content["run"]["path"] in seen:
            continue
        content, stored = line.content, line.content["run"]["path"]
        seen.add(stored)
        path, name = ledger.located(stored), f"run {Path(stored).name}"
        is_current = state.run is not None and state.run["path"] == stored
        if not path.exists() and not is_current:
            findings.append(Finding(name, True, "it is not there any more, and is not checked"))
            continue
        try:
            run = load_run(path)
            receipt = read_receipt(run) or {}
            parent = None if run.parent is None else run.parent["sha256"]
            problems = [
                what
                for what, wrong in (
                    ("its adapter is another", run.adapter_sha256 != content["adapter_sha256"]),
                    ("its receipt was changed", receipt_sha256(receipt) != content["receipt_sha256"]),
                    ("it comes from another run", parent != starts[content["batch"]]["run"]["sha256"]),
                )
                if wrong
            ]
        except (RunError, OSError, ValueError, KeyError) as error:
            problems = [str(error)]
        told = "; ".join(problems) or "adapter, receipt and the run before are those of its outcome"
        findings.append(Finding(name, not problems, told))
    if state.run is not None and seen:
        findings.append(_erased_rows(ledger, state))
    return findings


def _erased_rows(ledger: Ledger, state: State) -> Finding:
    name, path = "erased rows", ledger.located((state.run or {})["path"])
    removed = {
        id_: entry.number
        for entry in state.entries.values()
        if entry.state == "done"
        for id_, action in entry.rows
        if action == Action.REMOVE
    }
    try:
        present = set(load_run(path).data_ids)
    except RunError as error:
        return Finding(name, False, str(error))
    back = [f"{id_!r} of entry {number}" for id_, number in removed.items() if id_ in present]
    told = f"the current run, {path.name}, is trained on {', '.join(back[:5])}"
    return Finding(name, not back, told if back else f"none of {len(removed)} is in the data of the current run")


def _certificates(
    ledger: Ledger, lines: Sequence[Line], public_key: str | os.PathLike[str] | None
) -> list[Finding]:
    """Certificates that have a line are what was recorded."""
    findings = []
    for line in lines:
        if line.kind != "certificate":
            continue
        out = ledger.located(line.content["run"]["path"])
        path, name = out / CERTIFICATE_DIRECTORY / JSON_FILE, f"certificate of {out.name}"
        if not out.exists():
            findings.append(Finding(name, True, "its run is not there any more, and is not checked"))
        elif not path.is_file() or file_sha256(path) != line.content["sha256"]:
            findings.append(Finding(name, False, f"it is missing or not the one recorded in line {line.number}"))
        else:
            findings.append(Finding(name, True, f"the one recorded in line {line.number}"))
            findings += [
                Finding(f"{out.name}: {finding.name}", finding.ok, finding.detail)
                for finding in verify_certificate(out, ledger=ledger, public_key=public_key)
            ]
    return findings
