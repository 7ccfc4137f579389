"""The ledger: an append-only file of lines, each chained to the one before it by its hash.

A ledger is a directory with

    ledger.jsonl    one line per event: number, time, kind, content, and the SHA-256 of the line before
    head.json       number and hash of the last line under the key: shows that lines at the end are missing
    ledger.key      32 random bytes (mode 0600): behind `head.json` and behind the pseudonyms of subjects

What a line means is said by `pending` and `process`. Lines are flushed to the disk one by one. A line without its
line end was being written when the process died; it is cut off by the next writer. Order is the order of numbers:
times are recorded as the clock gave them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import hmac
import itertools
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmeraser_jax import files
from llmeraser_jax.deletion.findings import Finding

_log = logging.getLogger(__name__)

LEDGER_FILE = "ledger.jsonl"
HEAD_FILE = "head.json"
KEY_FILE = "ledger.key"
NO_LINE = "0" * 64  # the hash before the first line
KINDS = ("open", "run", "add", "start", "failed", "outcome", "certificate")
_FIELDS = {"number", "time", "previous", "kind", "content"}
_WAIT_SECONDS = 10.0


class LedgerError(ValueError):
    """A ledger that is missing, damaged or changed, or what cannot be written to it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One event.

    Attributes:
        number: counted from 1 without gaps.
        time: ISO 8601 in UTC, as the clock gave it.
        previous: SHA-256 (hex) of the line before.
        kind: one of `KINDS`.
        content: JSON-like.
        sha256: of this line's bytes, without the line end.
    """

    number: int
    time: str
    previous: str
    kind: str
    content: Mapping[str, Any]
    sha256: str


def utc_now() -> datetime.datetime:
    """The clock."""
    return datetime.datetime.now(datetime.UTC)


class Ledger:
    """A directory of a ledger; see the module. Reading needs no lock.

    Attributes:
        path: the directory.
        now: the clock.
    """

    def __init__(self, path: str | os.PathLike[str], *, now: Callable[[], datetime.datetime] = utc_now):
        """An existing ledger.

        Raises:
            LedgerError: there is none.
        """
        self.path, self.now = Path(path), now
        if not _is_begun(self.path):
            msg = f"{self.path} is no ledger: there is no {LEDGER_FILE}. `llmeraser queue add` makes one."
            raise LedgerError(msg)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, now: Callable[[], datetime.datetime] = utc_now) -> Ledger:
        """The ledger at `path`, made where there is none.

        Raises:
            FileExistsError: the directory holds something else.
            RuntimeError: another process has held the directory for 10 seconds.
        """
        path = Path(path)
        if not _is_begun(path):
            with _locked(path):
                _create(path, now)
        return cls(path, now=now)

    def lines(self) -> tuple[Line, ...]:
        """All lines in order.

        Raises:
            LedgerError: a line is damaged, missing or in the wrong place.
        """
        complete, torn = _read(self.path)
        if torn:
            _log.warning("%s ends in an unfinished line, which is ignored.", self.path / LEDGER_FILE)
        return _checked(self.path, complete)

    @contextlib.contextmanager
    def writing(self) -> Iterator[Writer]:
        """Locks the ledger against other writers and yields what appends to it.

        Raises:
            RuntimeError: another process has held it for 10 seconds.
            LedgerError: it is damaged or changed.
        """
        with _locked(self.path):
            complete, torn = _read(self.path)
            if torn:
                _log.warning(
                    "%s: an unfinished line of %d bytes is cut off; it was being written when its process died.",
                    self.path / LEDGER_FILE,
                    len(torn),
                )
                _truncate(self.path / LEDGER_FILE, sum(len(line) + 1 for line in complete))
            yield Writer(self, _checked(self.path, complete))

    def pseudonym(self, text: str) -> str:
        """HMAC-SHA-256 of a text under the ledger's key, shortened to 32 hex digits."""
        return _mac(_key(self.path), f"pseudonym:{text}")[:32]

    def stored_path(self, path: Path) -> str:
        """A path as lines have it: relative to the ledger where it lies inside, so that both can be moved."""
        absolute, root = path.resolve(), self.path.resolve()
        return str(absolute.relative_to(root)) if absolute.is_relative_to(root) else str(absolute)

    def located(self, stored: str) -> Path:
        """Where a stored path is now."""
        return self.path / stored  # an absolute path stays as it is


class Writer:
    """Appends to a ledger; exists while the lock is held.

    Attributes:
        lines: all lines, those just appended included.
    """

    def __init__(self, ledger: Ledger, lines: Sequence[Line]):
        self._ledger = ledger
        self.lines = list(lines)
        self._confirmed = _head_number(ledger.path) == len(lines)

    @property
    def next_number(self) -> int:
        """Of the line that comes next."""
        return len(self.lines) + 1

    def append(self, kind: str, content: Mapping[str, Any]) -> Line:
        """Adds a line, on the disk when this returns.

        Raises:
            OSError: it cannot be written; the ledger is as it was.
        """
        previous = self.lines[-1].sha256 if self.lines else NO_LINE
        if not self._confirmed:
            _write_head(self._ledger.path, len(self.lines), previous)
        self._confirmed = False
        stamp = self._ledger.now().astimezone(datetime.UTC).isoformat(timespec="seconds")
        line = _append(self._ledger.path, len(self.lines) + 1, stamp, previous, kind, content)
        self.lines.append(line)
        try:
            _write_head(self._ledger.path, line.number, line.sha256)
            self._confirmed = True
        except OSError as error:  # the line is there; the next one waits until the head has come up to it
            _log.warning("%s: the line is written, %s is not: %s", self._ledger.path, HEAD_FILE, error)
        return line


def examine(path: str | os.PathLike[str]) -> tuple[tuple[Line, ...], list[Finding]]:
    """The lines that can be read, and a finding for each thing that a ledger promises of them.

    Args:
        path: the directory.

    Returns:
        Lines in the order of the file, and the findings `lines`, `numbers`, `chain`, `head`, `clock` and, where
        there is one, `unfinished line`.

    Raises:
        LedgerError: there is no ledger, or its key is missing.
    """
    path = Path(path)
    Ledger(path)
    complete, torn = _read(path)
    lines, damaged = _parse(complete)
    findings = [Finding("lines", not damaged, "; ".join(damaged) or f"{len(lines)} lines")]
    misplaced = [
        f"line {place} of the file has number {line.number}"
        for place, line in enumerate(lines, start=1)
        if line.number != place
    ]
    findings.append(
        Finding("numbers", not misplaced, _few(misplaced, "one was dropped, repeated or moved") or "without gaps")
    )
    before = (NO_LINE, *(line.sha256 for line in lines))
    broken = [
        f"line {line.number} does not follow the line before it"
        for line, hash_before in zip(lines, before, strict=False)
        if line.previous != hash_before
    ]
    findings.append(
        Finding("chain", not broken, _few(broken, "it or its neighbour was changed") or "every hash is right")
    )
    problem = _head_problem(path, lines)
    findings.append(Finding("head", not problem, problem or "the last line is the last that was written"))
    back = [
        f"line {b.number} ({b.time}) says an earlier time than line {a.number} ({a.time})"
        for a, b in itertools.pairwise(lines)
        if b.time < a.time
    ]
    findings.append(Finding("clock", True, _few(back, "the order is that of the numbers") or "never went back"))
    if torn:
        findings.append(
            Finding("unfinished line", True, f"{len(torn)} bytes at the end were being written when a process died")
        )
    return lines, findings


def _few(problems: Sequence[str], meaning: str) -> str:
    """The first problems and what they mean; empty where there are none."""
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return f"{'; '.join(problems[:3])}{more}: {meaning}" if problems else ""


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """`files.exclusive_use`, waiting for a short while: writers hold the ledger for milliseconds."""
    deadline = time.monotonic() + _WAIT_SECONDS
    with contextlib.ExitStack() as held:
        while True:
            try:
                held.enter_context(files.exclusive_use(path))
                break
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        yield


def _is_begun(path: Path) -> bool:
    """Whether there is a ledger with its first line."""
    if not (path / LEDGER_FILE).is_file():
        return False
    with open(path / LEDGER_FILE, "rb") as file:
        return file.readline().endswith(b"\n")


def _create(path: Path, now: Callable[[], datetime.datetime]) -> None:
    """Key, head, and the first line; a creation that was killed goes on here."""
    if _is_begun(path):
        return
    (path / LEDGER_FILE).unlink(missing_ok=True)  # a part of the first line
    ours = {KEY_FILE, HEAD_FILE, files.LOCK_FILE}
    others = sorted(p.name for p in path.iterdir() if p.name not in ours and not p.name.startswith("."))
    if others:
        msg = f"{path} is no ledger and already holds {', '.join(others[:5])}; name a new or an empty directory."
        raise FileExistsError(msg)
    if not (path / KEY_FILE).exists():
        files.atomic_write_bytes(path / KEY_FILE, secrets.token_bytes(32), mode=0o600)
    _write_head(path, 0, NO_LINE)
    stamp = now().astimezone(datetime.UTC).isoformat(timespec="seconds")
    # The first line sets this ledger apart from others that hold the same.
    line = _append(path, 1, stamp, NO_LINE, "open", {"ledger": secrets.token_hex(16)})
    _write_head(path, 1, line.sha256)


def _append(path: Path, number: int, stamp: str, previous: str, kind: str, content: Mapping[str, Any]) -> Line:
    if kind not in KINDS:
        msg = f"kind is {kind!r}; it must be one of {', '.join(KINDS)}."
        raise ValueError(msg)
    fields = {"number": number, "time": stamp, "previous": previous, "kind": kind, "content": dict(content)}
    text = files.canonical_json(fields).encode("ascii")
    file = path / LEDGER_FILE
    descriptor = os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        try:
            rest = text + b"\n"
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)
    if number == 1:
        files.sync_directory(path)
    return Line(**fields, sha256=hashlib.sha256(text).hexdigest())


def _truncate(file: Path, size: int) -> None:
    descriptor = os.open(file, os.O_WRONLY)
    try:
        os.ftruncate(descriptor, size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> tuple[list[bytes], bytes]:
    """Complete lines, and what stands after the last line end."""
    *complete, torn = (path / LEDGER_FILE).read_bytes().split(b"\n")
    return complete, torn


def _parse(raw: Sequence[bytes]) -> tuple[tuple[Line, ...], list[str]]:
    """Lines, and what is wrong with those that are none."""
    lines, damaged = [], []
    for place, text in enumerate(raw, start=1):
        try:
            fields = json.loads(text)
        except (json.JSONDecodeError, UnicodeDecodeError):
            damaged.append(f"line {place} of the file is not JSON")
            continue
        wrong = not isinstance(fields, dict) or fields.keys() != _FIELDS or fields["kind"] not in KINDS
        types = {"number": int, "time": str, "previous": str, "content": dict}
        if wrong or any(not isinstance(fields[name], of) for name, of in types.items()):
            damaged.append(f"line {place} of the file is no line of a ledger")
            continue
        lines.append(Line(**fields, sha256=hashlib.sha256(text).hexdigest()))
    return tuple(lines), damaged


def _checked(path: Path, raw: Sequence[bytes]) -> tuple[Line, ...]:
    """The lines, if all is right with them."""
    lines, problems = _parse(raw)
    previous = NO_LINE
    for place, line in enumerate(lines, start=1):
        if line.number != place or line.previous != previous:
            problems.append(f"line {place} of the file, with number {line.number}, does not follow the one before")
        previous = line.sha256
    problems += filter(None, [_head_problem(path, lines)])
    if problems:
        msg = f"{path / LEDGER_FILE} is damaged or was changed: {problems[0]}. `llmeraser verify {path}` says more."
        raise LedgerError(msg)
    return lines


def _key(path: Path) -> bytes:
    try:
        return (path / KEY_FILE).read_bytes()
    except FileNotFoundError as error:
        msg = f"{path / KEY_FILE} is missing; without it nothing shows that the ledger is whole."
        raise LedgerError(msg) from error


def _mac(key: bytes, text: str) -> str:
    return hmac.new(key, text.encode("utf-8"), hashlib.sha256).hexdigest()


def _write_head(path: Path, number: int, sha256: str) -> None:
    mac = _mac(_key(path), f"head:{number}:{sha256}")
    files.atomic_write_json(path / HEAD_FILE, {"number": number, "sha256": sha256, "hmac": mac})


def _head_number(path: Path) -> int:
    return int(files.read_json(path / HEAD_FILE)["number"])


def _head_problem(path: Path, lines: Sequence[Line]) -> str:
    """What is wrong with the head; it may be one line behind, whose writer died, and never ahead."""
    try:
        head = files.read_json(path / HEAD_FILE)
        number, sha256, mac = int(head["number"]), str(head["sha256"]), str(head["hmac"])
    except FileNotFoundError:
        return f"{HEAD_FILE} is missing"
    except (KeyError, TypeError, ValueError):
        return f"{HEAD_FILE} is damaged"
    if not hmac.compare_digest(mac, _mac(_key(path), f"head:{number}:{sha256}")):
        return f"{HEAD_FILE} was not written with this ledger's key"
    if number > len(lines):
        return f"lines are missing at the end: {number} were written, {len(lines)} are there"
    if number < len(lines) - 1:
        return f"the lines after {number} were not written by this program: {HEAD_FILE} does not know them"
    there = lines[number - 1].sha256 if number else NO_LINE
    return "" if there == sha256 else f"line {number} is not the one that was written"
