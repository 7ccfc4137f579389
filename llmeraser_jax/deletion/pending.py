"""Deletion requests that wait: adding them to a ledger, and reading what has become of them.

A line `add` names rows by id. New texts of edits are not in it: they wait in `pending/<token>.json` (mode 0600),
and the line has their HMAC, whose key lies beside them. The file goes when the entry has its outcome.

Lines that this module and `process` write, and what they hold:

    run          path, sha256: the run that later entries are about
    add          subject, requester, reason, received, due, rows (id and action), rule, texts (token and HMAC)
    start        entries, run, workdir, settings: a batch that is being erased
    failed       batch, reason: its entries wait again
    outcome      entry, batch, run, adapter and receipt by hash, verdict, rows
    certificate  run, sha256 of `certificate.json`, the key's fingerprint
"""

from __future__ import annotations

import calendar
import dataclasses
import datetime
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from llmeraser_jax import data, files
from llmeraser_jax.data import Action, Example, Request
from llmeraser_jax.data.sources import read_rows
from llmeraser_jax.deletion.ledger import Ledger, LedgerError, Line, Writer
from llmeraser_jax.runs import Run, RunError, load_run

PENDING_DIRECTORY = "pending"
_MAX_LISTED = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One deletion request.

    Attributes:
        number: of its line.
        subject: pseudonym of whom the rows are about.
        requester: who asked: a role.
        reason: as given.
        received, due: dates.
        rows: (id, action) of each row.
        rule: column and pseudonym of the value that named the rows; None where they were named by id.
        texts: token of the file with new texts; None where every row is removed.
        texts_hmac: HMAC-SHA-256 of these texts under the key that lies in the file.
        state: what has become of it.
        batch: number of the batch that erases or has erased it; None where none has begun.
        outcome: content of its line `outcome`.
        failure: why its last batch failed; empty where none did.
    """

    number: int
    subject: str
    requester: str
    reason: str
    received: datetime.date
    due: datetime.date
    rows: tuple[tuple[str, str], ...]
    rule: Mapping[str, str] | None
    texts: str | None
    texts_hmac: str | None
    state: Literal["pending", "in progress", "done"] = "pending"
    batch: int | None = None
    outcome: Mapping[str, Any] | None = None
    failure: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Entries that are erased together.

    Attributes:
        number: of its line.
        entries: their numbers.
        run: path as stored, and hash, of the run that is erased from.
        workdir: as stored; the run that is made.
        settings: JSON-like; what determines the result besides.
    """

    number: int
    entries: tuple[int, ...]
    run: Mapping[str, str]
    workdir: str
    settings: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """What the lines of a ledger come to.

    Attributes:
        entries: by number, in order.
        run: path as stored, and hash, of the current run; None where no line names one.
        batch: the batch that was begun and not ended; None where there is none.
    """

    entries: Mapping[int, Entry]
    run: Mapping[str, str] | None
    batch: Batch | None

    def waiting(self, by: datetime.date | None = None) -> list[Entry]:
        """Entries that no batch has taken, those due until `by`; the earliest due first."""
        found = [e for e in self.entries.values() if e.state == "pending" and (by is None or e.due <= by)]
        return sorted(found, key=lambda entry: (entry.due, entry.number))


def read_state(lines: Sequence[Line]) -> State:
    """Folds lines into entries, the current run and the batch in progress.

    Raises:
        LedgerError: a line that does not fit those before it.
    """
    entries: dict[int, Entry] = {}
    run: Mapping[str, str] | None = None
    batch: Batch | None = None
    for line in lines:
        content = line.content
        try:
            if line.kind == "run":
                run = content
            elif line.kind == "add":
                entries[line.number] = _entry_of(line)
            elif line.kind == "start":
                batch = Batch(number=line.number, **{**content, "entries": tuple(content["entries"])})
                for number in batch.entries:
                    taken = dataclasses.replace(entries[number], state="in progress", batch=batch.number)
                    entries[number] = taken
            elif line.kind == "failed":
                for number, entry in entries.items():
                    if entry.batch == content["batch"] and entry.state == "in progress":
                        waits = {"state": "pending", "batch": None, "failure": content["reason"]}
                        entries[number] = dataclasses.replace(entry, **waits)
                batch = None
            elif line.kind == "outcome":
                number = content["entry"]
                if entries[number].state != "in progress":
                    msg = f"entry {number} has an outcome and was {entries[number].state}"
                    raise ValueError(msg)
                entries[number] = dataclasses.replace(entries[number], state="done", outcome=content)
                run = content["run"]
                if batch is not None and all(entries[n].state == "done" for n in batch.entries):
                    batch = None
        except (KeyError, TypeError, ValueError) as error:
            msg = f"Line {line.number} of the ledger ({line.kind}) does not fit: {type(error).__name__}: {error}."
            raise LedgerError(msg) from error
    return State(entries=entries, run=run, batch=batch)


def _entry_of(line: Line) -> Entry:
    content = dict(line.content)
    dates = {name: datetime.date.fromisoformat(content.pop(name)) for name in ("received", "due")}
    rows = tuple((row["id"], row["action"]) for row in content.pop("rows"))
    return Entry(number=line.number, rows=rows, **dates, **content)


def one_month_later(date: datetime.date) -> datetime.date:
    """The same day of the next month, or that month's last day where it is shorter."""
    year, month = (date.year, date.month + 1) if date.month < 12 else (date.year + 1, 1)
    return datetime.date(year, month, min(date.day, calendar.monthrange(year, month)[1]))


def current_run(ledger: Ledger, path: str | os.PathLike[str] | None = None) -> Run:
    """The run given, or the one that the ledger's lines end with.

    Raises:
        RunError: there is no such run.
        LedgerError: none is given, and the ledger names none.
    """
    if path is not None:
        return load_run(path)
    run = read_state(ledger.lines()).run
    if run is None:
        msg = f"{ledger.path} names no run yet; say with --run which one the request is about."
        raise LedgerError(msg)
    return load_run(ledger.located(run["path"]))


def name_run(ledger: Ledger, writer: Writer, run: Run) -> Mapping[str, str]:
    """Makes a run the ledger's current one, with a line where it is another than before.

    Returns:
        Its path as stored, and its hash.

    Raises:
        LedgerError: the ledger has gone on from this run; what was erased since would be back.
    """
    reference = {"path": ledger.stored_path(run.path), "sha256": run.reference()["sha256"]}
    state = read_state(writer.lines)
    if state.run == reference:
        return reference
    runs = [line.content if line.kind == "run" else line.content.get("run") for line in writer.lines]
    if state.run is not None and reference in runs:
        msg = (
            f"{ledger.path} has gone on from {run.path} to {ledger.located(state.run['path'])}: what was erased "
            "since would be back. Leave --run out, or name a run that is new to the ledger."
        )
        raise LedgerError(msg)
    writer.append("run", reference)
    return reference


def add_entry(
    ledger: Ledger,
    run_path: str | os.PathLike[str] | None = None,
    *,
    subject: str | None = None,
    pseudonym: str | None = None,
    ids: Sequence[str] = (),
    where: str | None = None,
    requests_path: str | os.PathLike[str] | None = None,
    requester: str = "",
    reason: str = "",
    received: datetime.date | None = None,
    due: datetime.date | None = None,
    data_path: str | os.PathLike[str] | None = None,
) -> Entry:
    """Checks a request against the run's data and adds it to the ledger.

    Args:
        ledger: where.
        run_path: the run whose rows are named; it becomes the ledger's current one. None is the current one.
        subject: whom the rows are about; the ledger keeps an HMAC of it.
        pseudonym: instead, an id of the user's own that is kept as it stands.
        ids: rows to remove.
        where: instead, `COLUMN=VALUE`: remove the rows that have this value in a column of the data.
        requests_path: instead, a request file as `erase` takes it.
        requester: who asked; a role, kept as it stands.
        reason: kept as it stands.
        received: None is today.
        due: None is a month after `received`.
        data_path: where the training data is now, and the column of `where`; None is where it was.

    Returns:
        The entry.

    Raises:
        LedgerError: contradictory arguments, a rule that matches no row or every row, a row that another entry
            names which has no outcome yet.
        RequestError: what is wrong with the rows.
        RunError: the data is not the run's.
    """
    if (subject is None) == (pseudonym is None) or not (subject or pseudonym):
        msg = "Say whom the request is about: either the subject, of which an HMAC is kept, or a pseudonym."
        raise LedgerError(msg)
    if sum([bool(ids), where is not None, requests_path is not None]) != 1:
        msg = "Name the rows in one way: by ids, by a rule COLUMN=VALUE, or by a request file."
        raise LedgerError(msg)
    received = ledger.now().date() if received is None else received
    due = one_month_later(received) if due is None else due
    if due < received:
        msg = f"The request is due on {due}, before it was received on {received}."
        raise LedgerError(msg)
    run = current_run(ledger, run_path)
    examples = run.load_examples(data_path if run.kind != "erase" else None)
    rule = None
    if where is not None:
        column, value, ids = _rows_where(run, examples, where, data_path)
        rule = {"column": column, "value": ledger.pseudonym(value)}
    if requests_path is not None:
        requests = data.load_requests(requests_path, examples)
    else:
        lines = [{"id": id_, "action": "remove"} for id_ in ids]
        requests = data.parse_requests(lines, examples, source="the rows named")
    with ledger.writing() as writer:
        state = read_state(writer.lines)
        _refuse_named_twice(state, requests)
        if run_path is not None:
            name_run(ledger, writer, run)
        elif state.run is None or ledger.located(state.run["path"]) != run.path:
            msg = f"{ledger.path} went on to another run while this entry was checked; add it again."
            raise LedgerError(msg)
        remove_orphans(ledger, state)
        texts = _keep_texts(ledger, [request for request in requests if request.changes])
        line = writer.append(
            "add",
            {
                "subject": ledger.pseudonym(subject) if subject is not None else pseudonym,
                "requester": requester,
                "reason": reason,
                "received": received.isoformat(),
                "due": due.isoformat(),
                "rows": [{"id": request.id, "action": str(request.action)} for request in requests],
                "rule": rule,
                **texts,
            },
        )
    return _entry_of(line)


def request_lines(ledger: Ledger, entry: Entry) -> list[str]:
    """The lines of a request file that an entry stands for.

    Raises:
        LedgerError: the new texts are not those that were added.
    """
    edits = read_texts(ledger, entry)
    return [
        edits[id_] if action != Action.REMOVE else json.dumps({"id": id_, "action": action})
        for id_, action in entry.rows
    ]


def read_texts(ledger: Ledger, entry: Entry) -> dict[str, str]:
    """Request lines of an entry's edits by id.

    Raises:
        LedgerError: the file is missing, or not what was added.
    """
    if entry.texts is None:
        return {}
    path = _texts_path(ledger, entry.texts)
    try:
        kept = files.read_json(path)
        lines, found = kept["lines"], _hmac_of(kept["key"], kept["lines"])
    except FileNotFoundError as error:
        msg = f"The new texts of entry {entry.number} are missing: {path}."
        raise LedgerError(msg) from error
    except (KeyError, TypeError, ValueError) as error:
        msg = f"{path}, the new texts of entry {entry.number}, is damaged."
        raise LedgerError(msg) from error
    if found != entry.texts_hmac:
        msg = f"{path} is not what was added as entry {entry.number}: its HMAC is another."
        raise LedgerError(msg)
    return {str(json.loads(line)["id"]): line for line in lines}


def remove_orphans(ledger: Ledger, state: State) -> None:
    """Deletes new texts that no open entry has; while the ledger is locked."""
    wanted = {f"{e.texts}.json" for e in state.entries.values() if e.texts is not None and e.state != "done"}
    directory = ledger.path / PENDING_DIRECTORY
    for path in directory.iterdir() if directory.is_dir() else ():
        if path.name not in wanted:
            path.unlink(missing_ok=True)


def _texts_path(ledger: Ledger, token: str) -> Path:
    return ledger.path / PENDING_DIRECTORY / f"{token}.json"


def _hmac_of(key: str, lines: Sequence[str]) -> str:
    content = files.canonical_json(list(lines)).encode("ascii")
    return hmac.new(bytes.fromhex(key), content, hashlib.sha256).hexdigest()


def _keep_texts(ledger: Ledger, edits: Sequence[Request]) -> dict[str, str | None]:
    if not edits:
        return {"texts": None, "texts_hmac": None}
    lines = [data.request_to_json(request) for request in edits]
    token, key = secrets.token_hex(8), secrets.token_hex(32)
    path = _texts_path(ledger, token)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    files.atomic_write_bytes(path, files.to_json({"key": key, "lines": lines}).encode("utf-8"), mode=0o600)
    return {"texts": token, "texts_hmac": _hmac_of(key, lines)}


def _refuse_named_twice(state: State, requests: Sequence[Request]) -> None:
    owners = {id_: e for e in state.entries.values() if e.state != "done" for id_, _ in e.rows}
    taken = [request.id for request in requests if request.id in owners]
    if taken:
        more = f" and {len(taken) - 1} more" if len(taken) > 1 else ""
        entry = owners[taken[0]]
        msg = (
            f"Row {taken[0]!r}{more} is named already by entry {entry.number}, which is {entry.state}; two entries "
            "cannot name one row. Process that one first."
        )
        raise LedgerError(msg)


def _rows_where(
    run: Run, examples: Sequence[Example], where: str, data_path: str | os.PathLike[str] | None
) -> tuple[str, str, list[str]]:
    """Column, value, and the ids of the run's rows that have the value in the column."""
    column, equals, value = where.partition("=")
    if not (column and equals):
        msg = f"The rule is {where!r}; write COLUMN=VALUE, for example user=U17."
        raise LedgerError(msg)
    source, rows = _rows_with_column(run, column, data_path)
    matching = [number for number, row in enumerate(rows) if str(row.get(column)) == value]
    # The value names a person, and messages are kept in logs.
    rule = f"The rule on the column {column!r}"
    if not matching:
        msg = f"{rule} matches none of the {len(rows)} rows of {source}; check the value."
        raise LedgerError(msg)
    if len(matching) == len(rows):
        msg = f"{rule} matches all {len(rows)} rows of {source}; an adapter trained on nothing is the initial one."
        raise LedgerError(msg)
    loaded = data.load_examples(source)
    current = {example.id: example for example in examples}
    chosen = [loaded[number] for number in matching]
    here = [example.id for example in chosen if example.id in current]
    if not here:
        msg = f"{rule} matches {len(chosen)} rows of {source}, and {run.path} has none of them any more."
        raise LedgerError(msg)
    if "id" not in rows[0]:
        # Row numbers are no ids where rows were taken out of the file since.
        moved = [example.id for example in chosen if example.id in current and current[example.id] != example]
        if moved:
            msg = f"The rows of {source} have no ids, and row {moved[0]} is not what {run.path} has there; use ids."
            raise LedgerError(msg)
    return column, value, here


def _rows_with_column(
    run: Run, column: str, data_path: str | os.PathLike[str] | None
) -> tuple[Path, list[Mapping[str, Any]]]:
    """The nearest data that has the column: given, the run's, or that of the runs it was made from."""
    looked: list[str] = []
    here: Run | None = run
    while here is not None:
        source = Path(data_path) if data_path is not None else here.data_path
        if source.exists():
            rows = [row for _, row in read_rows(source)]
            columns = list(dict.fromkeys(str(name) for row in rows for name in row))
            if column in columns:
                return source, rows
            looked.append(f"{source} has {', '.join(columns)}")
        else:
            looked.append(f"{source} is not there")
        if data_path is not None or here.parent is None:
            break
        try:
            here = load_run(here.parent["path"])
        except RunError as error:
            looked.append(str(error))
            break
    msg = f"No data of {run.path} has the column {column!r}: {'; '.join(looked[:_MAX_LISTED])}. Give --data."
    raise LedgerError(msg)
