"""Writing results: whole or not at all, and JSON that every reader accepts."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmeraser_jax.parallel import on_primary
from llmeraser_jax.text import bounded, one_line

LOCK_FILE = ".lock"
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def _temporary_sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")


def require_empty(path: str | os.PathLike[str], *, but: tuple[str, ...] = ()) -> None:
    """Refuses an output directory that already holds something.

    Args:
        path: the directory.
        but: names that it may hold.

    Raises:
        FileExistsError: `path` is a file, or a directory that is not empty.
    """
    path = Path(path)
    if path.is_dir():
        present = sorted(entry.name for entry in path.iterdir() if entry.name not in (LOCK_FILE, *but))
        if present:
            msg = (
                f"The output directory {path} already holds {', '.join(present[:5])}"
                f"{' and more' if len(present) > 5 else ''}. Name a new directory or empty this one."
            )
            raise FileExistsError(msg)
    elif path.exists() or path.is_symlink():
        msg = f"The output directory {path} is an existing file. Name a new directory."
        raise FileExistsError(msg)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary sibling of `path` that takes the name `path` when the block succeeds.

    When the block raises, the sibling is removed and `path` is as it was. A process killed outright leaves
    the hidden sibling behind and never a half-written `path`.

    Args:
        path: the directory to create; it may exist if it is empty. Missing parents are created.

    Raises:
        FileExistsError: `path` holds something, before the block or by the time it ends.
    """
    path = Path(path)
    require_empty(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_sibling(path)
    temporary.mkdir()
    try:
        yield temporary
        require_empty(path)
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def atomic_write_bytes(path: str | os.PathLike[str], content: bytes, *, mode: int = 0o666) -> None:
    """Writes a file that readers see either as it was or complete.

    Args:
        path: the file.
        content: of it.
        mode: its permissions, before the process's mask; 0o600 lets its owner alone read it.
    """
    path = Path(path)
    temporary = _temporary_sibling(path)
    try:
        with os.fdopen(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a UTF-8 file that readers see either as it was or complete."""
    atomic_write_bytes(path, text.encode("utf-8"))


def sync_directory(path: Path) -> None:
    """Makes names that were given and taken in a directory last through a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def non_finite_entries(value: Any, where: str = "") -> list[str]:
    """Where in a JSON-like value a nan or an infinity stands, e.g. `["losses.3 = nan"]`."""
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        prefix = f"{where}." if where else ""
        return [entry for k, v in value.items() for entry in non_finite_entries(v, f"{prefix}{k}")]
    if isinstance(value, float | np.floating) and not math.isfinite(value):
        return [f"{where or 'the value'} = {float(value)}"]
    return []


def finite_json(value: Any) -> Any:
    """A copy for JSON in which numbers that are not finite are null."""
    if isinstance(value, Mapping):
        return {k: finite_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(v) for v in value]
    if isinstance(value, float | np.floating) and not math.isfinite(value):
        return None
    return value


def _json_default(value: Any) -> Any:
    if isinstance(value, np.generic) or (hasattr(value, "item") and getattr(value, "ndim", None) == 0):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    msg = f"A value of type {type(value).__name__} cannot be written as JSON: {value!r}."
    raise TypeError(msg)


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Strict JSON text: numpy and JAX scalars become numbers, nan and infinity are refused.

    Raises:
        ValueError: a number is not finite; the message says where.
        TypeError: a value has no JSON form.
    """
    found = non_finite_entries(value)
    if found:
        msg = f"JSON has no nan or infinity; the value to write holds {len(found)}: {'; '.join(found[:10])}."
        raise ValueError(msg)
    return json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False, default=_json_default)


def canonical_json(value: Any) -> str:
    """JSON of one line in ASCII with sorted keys, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def atomic_write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented strict JSON, whole or not at all. Raises as `to_json` does."""
    atomic_write_text(path, to_json(value, indent=2) + "\n")


@contextlib.contextmanager
def reading(path: str | os.PathLike[str], error: type[ValueError] = ValueError) -> Iterator[None]:
    """Makes whatever a damaged file raises an exception with a short, printable message that names it.

    What names it already, in few words, passes as it is; so do files that are not there.

    Args:
        path: the file or directory that is read in the block.
        error: raised, where the exception was another one.
    """
    name = os.fspath(path)
    try:
        yield
    except (FileNotFoundError, PermissionError) as absent:
        if absent.filename is None and name not in str(absent):
            raise type(absent)(f"{name}: {bounded(str(absent))}") from absent
        raise
    except Exception as found:
        pointers = lfs_pointers(name)
        if pointers:
            listed = ", ".join(pointers[:3])
            msg = f"{listed} is a Git LFS pointer and not the file; fetch it with `git lfs pull`."
            raise error(msg) from found
        known = isinstance(found, ValueError | OSError | ImportError) and not isinstance(found, UnicodeError)
        if not known:
            reason = {RecursionError: "nested too deep", MemoryError: "it takes more memory than there is"}.get(
                type(found), f"{type(found).__name__}: {one_line(found, 400)}"
            )
            msg = f"{name} cannot be used ({reason}); it is damaged, or not what its name says."
            raise error(msg) from found
        message = bounded(str(found))
        if name in message and message == str(found):
            raise
        # A subclass of the package's own takes a message; those of others need not.
        own = isinstance(found, error) and type(found).__module__.startswith("llmeraser_jax")
        kind = type(found) if own else error
        raise kind(message if name in message else f"{name}: {message}") from found


def lfs_pointers(path: str | os.PathLike[str]) -> list[str]:
    """The files, `path` itself or those in the directory, that are Git LFS pointers to what is elsewhere."""
    path = Path(path)
    found = []
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb") as opened:
                if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
                    found.append(str(file))
    return found


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON; the message names it.
    """
    with reading(path):
        try:
            return json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            reason = "nested too deep" if isinstance(error, RecursionError) else one_line(error, 300)
            msg = f"{path} is not a JSON file: {reason}."
            raise ValueError(msg) from error


@contextlib.contextmanager
def exclusive_use(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Locks `directory`, so that two programs never write to it.

    The lock ends with the process, however that ends. Of several processes the primary one holds it for all.

    Raises:
        RuntimeError: another program holds the directory.
    """
    with contextlib.ExitStack() as held:
        on_primary(lambda: held.enter_context(_locked(Path(directory))))
        yield


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LOCK_FILE
    with open(path, "w") as file:
        msg = f"Another process is writing to {directory}. Wait for it, or name another directory."
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A process that finished in between has removed the file, and a third may hold its successor.
            current = path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino
        except BlockingIOError as error:
            raise RuntimeError(msg) from error
        if not current:
            raise RuntimeError(msg)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
