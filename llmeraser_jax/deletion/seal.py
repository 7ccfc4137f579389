"""Sealing: an end to undoing an erasure. Until then `undo` gives back the adapter as it was before, bit for bit.

What restores the erased state is in `parent_adapter/` of an erasure's directory (`delta/` in older ones), and in
what killed work left in it or beside it. Sealing first writes down what it will remove, with sizes and keyed
hashes, in `sealing.json`; then overwrites every file with random bytes, and removes it; and at last, when all are
gone, gives the list the name `seal.json`. Killed at any moment in between, the directory says that its sealing is
not finished, and the same call goes on.

Overwriting reaches the blocks that the file had, and no others: file systems that write elsewhere (copy on write,
snapshots, log-structured ones), flash storage that levels wear, and backups keep what they have.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from llmeraser_jax import files
from llmeraser_jax.data.pictures import PICTURES_DIRECTORY
from llmeraser_jax.environment import library_versions
from llmeraser_jax.lora import copy_adapter
from llmeraser_jax.runs import (
    ADAPTER_DIRECTORY,
    EXAMPLES_FILE,
    FEATURES_DIRECTORY,
    INITIAL_ADAPTER_DIRECTORY,
    KEY_FILE,
    PLAIN,
    RUN_FILE,
    TOKENIZER_DIRECTORY,
    Run,
    RunError,
    RunKeys,
    file_sha256,
    load_run,
)
from llmeraser_jax.training.finetune import CHECKPOINT_DIRECTORY
from llmeraser_jax.unlearning.job import PARENT_ADAPTER_DIRECTORY, RECEIPT_FILE, REQUESTS_FILE
from llmeraser_jax.unlearning.known_rows import KNOWN_ROWS_FILE

SEAL_FILE = "seal.json"
MARKER_FILE = "sealing.json"
SEAL_FORMAT = 1
ADAPTERS_BEFORE = ("delta", PARENT_ADAPTER_DIRECTORY)  # what gives the adapter before; the first in older ones
# What restores the erased state, by its name in the directory. No program writes the last three there unasked.
RESTORING = (
    *ADAPTERS_BEFORE,
    CHECKPOINT_DIRECTORY,
    KNOWN_ROWS_FILE,
    FEATURES_DIRECTORY,
    "solves",
    "factors",
    "cache",
)
# What may stay: it tells nothing of the erased rows. The initial adapter is the one that training began with.
KEPT = (
    RUN_FILE,
    RECEIPT_FILE,
    REQUESTS_FILE,
    EXAMPLES_FILE,
    PICTURES_DIRECTORY,
    KEY_FILE,
    SEAL_FILE,
    MARKER_FILE,
    files.LOCK_FILE,
    ADAPTER_DIRECTORY,
    INITIAL_ADAPTER_DIRECTORY,
    TOKENIZER_DIRECTORY,
)
_KEPT_PREFIXES = ("certificate",)
_BLOCK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seal:
    """What a sealing did.

    Attributes:
        path: the sealed directory.
        sealed_at: when it began, UTC, ISO 8601.
        num_files: how many files it removed.
        num_bytes: their sizes together.
        outside: what else restores the erased state and is not in the directory, in words.
    """

    path: Path
    sealed_at: str
    num_files: int
    num_bytes: int
    outside: tuple[str, ...]


def sealed_state(path: str | os.PathLike[str]) -> Literal["open", "sealing", "sealed"]:
    """Whether an erasure's directory is sealed, or its sealing was begun and not finished."""
    path = Path(path)
    if (path / SEAL_FILE).exists():
        return "sealed"
    return "sealing" if (path / MARKER_FILE).exists() else "open"


def seal(path: str | os.PathLike[str]) -> Seal:
    """Removes all that restores the erased state from an erasure's directory, and records what that was.

    Killed at any moment and called again it goes on; called on a sealed directory it changes nothing.

    Args:
        path: made by `erase_run`.

    Raises:
        RunError: it is no erasure, or it holds something that no erasure writes: that could restore the state too.
        ValueError: its key file, or the record of a sealing that was begun, is damaged.
        OSError: a file could not be overwritten or removed; the sealing is not finished.
    """
    path = Path(path).resolve()
    run = load_run(path)
    if run.kind != "erase":
        msg = f"{path} is the result of {run.kind!r}, not of an erasure: nothing in it is there to undo one."
        raise RunError(msg)
    with files.exclusive_use(path):
        if sealed_state(path) == "sealed":
            return _seal_of(run, files.read_json(path / SEAL_FILE))
        targets = list(_restoring_files(path))
        strangers = unknown_entries(path)
        if strangers:
            msg = (
                f"{path} holds {', '.join(strangers[:5])}{' and more' if len(strangers) > 5 else ''}, which no "
                "erasure writes and which could restore what was erased. Move it elsewhere or remove it."
            )
            raise RunError(msg)
        record = _begin(run, targets)
        for target in targets:
            _overwrite(target)
            target.unlink()
        for directory in restoring_roots(path):
            _remove_directories(directory)
        files.sync_directory(path)
        os.replace(path / MARKER_FILE, path / SEAL_FILE)
        files.sync_directory(path)
    return _seal_of(run, record)


def undo(path: str | os.PathLike[str], workdir: str | os.PathLike[str]) -> None:
    """Writes the adapter as it was before an erasure, bit for bit, to a new directory, in PEFT's format.

    Directories that hold a `delta/` instead of the adapter before need the run that was erased from.

    Args:
        path: made by `erase_run`.
        workdir: new or empty.

    Raises:
        RunError: it is no erasure, it is sealed or half sealed, or what it needs is missing or changed.
        FileExistsError: `workdir` holds something.
    """
    path = Path(path)
    run = load_run(path)
    if run.kind != "erase" or run.parent is None:
        msg = f"{path} is the result of {run.kind!r}, not of an erasure; there is nothing to undo."
        raise RunError(msg)
    state = sealed_state(path)
    if state != "open":
        record = files.read_json(path / (SEAL_FILE if state == "sealed" else MARKER_FILE))
        was = "was sealed" if state == "sealed" else "is being sealed, since"
        msg = (
            f"{path} {was} {record['sealed_at']}: what restores the adapter before the erasure is removed, which "
            "is what sealing is for. It cannot be undone."
        )
        raise RunError(msg)
    source = path / PARENT_ADAPTER_DIRECTORY
    recorded = files.read_json(path / RUN_FILE).get("files", {}).get(PLAIN, {})
    if not source.is_dir():
        if any(name.startswith(f"{PARENT_ADAPTER_DIRECTORY}/") for name in recorded):
            msg = f"{path} is damaged: {PARENT_ADAPTER_DIRECTORY} is missing, and it is not sealed."
            raise RunError(msg)
        source = _parent_of(run).path / ADAPTER_DIRECTORY
    with files.atomic_directory(workdir) as temporary:
        copy_adapter(source, temporary / ADAPTER_DIRECTORY)
        for part in sorted((temporary / ADAPTER_DIRECTORY).iterdir()):
            name = f"{PARENT_ADAPTER_DIRECTORY}/{part.name}"
            if recorded and file_sha256(part) != recorded.get(name):
                msg = f"{path / name} is not the file that the erasure wrote; the adapter before it is not there."
                raise RunError(msg)
            os.replace(part, temporary / part.name)
        (temporary / ADAPTER_DIRECTORY).rmdir()


def _parent_of(run: Run) -> Run:
    """The run that was erased from, as it was then."""
    try:
        return run.load_parent()
    except (RunError, FileNotFoundError) as error:
        msg = f"{run.path} does not hold the adapter before the erasure, and the run that had it is gone: {error}"
        raise RunError(msg) from error


def restoring_roots(path: Path) -> list[Path]:
    """What restores the erased state in an erasure's directory, and what killed work left in it and beside it."""
    inside = [path / name for name in RESTORING]
    beside = [path.with_name(f"{path.name}{suffix}") for suffix in (".solves", ".retraining")]
    leftovers = (*path.parent.glob(f".{path.name}.tmp-*"), *path.glob(".*.tmp-*"))
    return [p for p in (*inside, *beside, *sorted(leftovers)) if os.path.lexists(p)]


def _restoring_files(path: Path) -> Iterator[Path]:
    """Every file that restores the erased state, in the directory and beside it.

    Raises:
        RunError: something that overwriting would harm elsewhere (a link), or that is no file.
    """
    for root in restoring_roots(path):
        for part in [root] if not root.is_dir() or root.is_symlink() else sorted(root.rglob("*")):
            status = part.lstat()
            if stat.S_ISDIR(status.st_mode):
                continue
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                msg = f"{part} is a link, has other names, or is no plain file: remove it, and what it stands for."
                raise RunError(msg)
            yield part


def unknown_entries(path: Path) -> list[str]:
    """Names in a directory of what no erasure writes, and of adapter files that its record does not have."""
    known = {*KEPT, *(root.name for root in restoring_roots(path))}
    found = [
        entry.name
        for entry in sorted(path.iterdir())
        if entry.name not in known and not entry.name.startswith(_KEPT_PREFIXES)
    ]
    recorded = files.read_json(path / RUN_FILE).get("files", {}).get(PLAIN)
    if recorded is None:
        return found
    for name in (ADAPTER_DIRECTORY, INITIAL_ADAPTER_DIRECTORY, TOKENIZER_DIRECTORY):
        parts = (p.relative_to(path).as_posix() for p in sorted((path / name).rglob("*")) if not p.is_dir())
        found += [part for part in parts if part not in recorded]
    return found


def _begin(run: Run, targets: list[Path]) -> dict[str, Any]:
    """Writes the marker: what is to be removed, with that of a sealing that was killed before."""
    path, keys = run.path, run.keys
    if keys is None and run.hashes == PLAIN:
        keys = RunKeys.load(path)
        if keys is None:
            keys = RunKeys.new()
            keys.save(path)
    earlier = files.read_json(path / MARKER_FILE) if (path / MARKER_FILE).exists() else None
    listed = [] if earlier is None else earlier["removed"]
    known = {entry["name"] for entry in listed}
    found = [
        {
            "name": name,
            "bytes": target.stat().st_size,
            "hmac_sha256": None if keys is None else keys.file(target),
        }
        for target in targets
        if (name := os.path.relpath(target, path)) not in known
    ]
    if earlier is not None and not found:
        return earlier
    record = {
        "format": SEAL_FORMAT,
        "sealed_at": earlier["sealed_at"] if earlier else _now(),
        "run_sha256": file_sha256(path / RUN_FILE),
        "removed": [*listed, *found],
        "versions": library_versions(),
    }
    record = {**record, "mac": None if keys is None else keys.mac(record)}
    files.atomic_write_json(path / MARKER_FILE, record)
    files.sync_directory(path)
    return record


def _overwrite(path: Path) -> None:
    """Random bytes in the place of a file's own, down to the device."""
    with open(path, "r+b") as file:
        left = os.fstat(file.fileno()).st_size
        while left:
            left -= file.write(secrets.token_bytes(min(left, _BLOCK_BYTES)))
        file.flush()
        os.fsync(file.fileno())


def _remove_directories(root: Path) -> None:
    """Removes a tree of empty directories."""
    if root.is_dir():
        for directory, _, _ in os.walk(root, topdown=False):
            os.rmdir(directory)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat("T", "seconds")


def _seal_of(run: Run, record: dict[str, Any]) -> Seal:
    return Seal(
        path=run.path,
        sealed_at=record["sealed_at"],
        num_files=len(record["removed"]),
        num_bytes=sum(entry["bytes"] for entry in record["removed"]),
        outside=tuple(outside_of(run)),
    )


def outside_of(run: Run) -> list[str]:
    """What restores the erased state from outside of an erasure's directory, as far as its record tells."""
    found = []
    if run.parent is not None and Path(run.parent["path"]).exists():
        found.append(f"the run that was erased from, with its adapter, checkpoints and data: {run.parent['path']}")
    receipt = files.read_json(run.path / RECEIPT_FILE)
    found += [f"curvature factors of the adapter before: {p}" for p in sorted(_factors(receipt["config"]))]
    return found


def _factors(config: Any) -> set[str]:
    """Directories of factors that a method's configuration names and that are there."""
    if not isinstance(config, dict):
        return set()
    named = config.get("directory")
    own = {named} if isinstance(named, str) and Path(named).exists() else set()
    return own.union(*map(_factors, config.values()))
