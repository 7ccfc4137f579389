"""Files of the primary process, for processes on hosts that do not share its file system.

The primary process alone writes. `mirrored` says where another one reads what is at a path of the primary process:
at the path itself if the same is there, else in a private copy, which lasts as long as the process. Decisions that
depend on files are the primary's, by `from_primary`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.experimental import multihost_utils

from llmeraser_jax.parallel.processes import is_primary, on_primary, works_alone

_PIECE_BYTES = 2**24
_Stamps = Mapping[str, list[Any]]


def from_primary(fn: Callable[[], Any]) -> Any:
    """What `fn` returns in the primary process, as JSON carries it; every process has to call this.

    Raises:
        Exception: see `on_primary`.
    """
    if works_alone():
        return fn()
    return json.loads(bytes_from_primary(lambda: json.dumps(fn()).encode()))


def bytes_from_primary(read: Callable[[], bytes]) -> bytes:
    """The bytes that `read` returns in the primary process; every process has to call this.

    Raises:
        Exception: see `on_primary`.
    """
    if works_alone():
        return read()
    found: list[bytes] = []
    on_primary(lambda: found.append(read()))
    content = found[0] if found else b""
    size = int.from_bytes(_sent(len(content).to_bytes(8, "little"), 8), "little")
    return b"".join(
        _sent(content[start : start + _PIECE_BYTES], min(_PIECE_BYTES, size - start))
        for start in range(0, size, _PIECE_BYTES)
    )


def _sent(piece: bytes, size: int) -> bytes:
    """A piece of `size` bytes, which the primary process has, in every process."""
    padded = np.zeros(1 << max(8, (size - 1).bit_length()), np.uint8)  # few sizes: each is a program
    padded[: len(piece)] = np.frombuffer(piece, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8)[:size].tobytes()


def mirrored(path: str | os.PathLike[str], *, but: Sequence[str] = ()) -> Path:
    """Where this process reads the file or directory that is at `path` in the primary process.

    Every process has to call this, but for the primary one inside of `on_primary`. Hidden files are passed over.

    Args:
        path: of the primary process; nothing may be there.
        but: names in the directory that nobody reads.
    """
    path = Path(path)
    if works_alone():
        return path
    where, theirs = from_primary(lambda: [os.fspath(path.absolute()), _stamps(path, but)])
    here = is_primary() or _stamps(path, but) == theirs
    target = path if here else Path(_copies().name) / where.lstrip("/")
    names = list(theirs or {})
    held = theirs if here else _stamps(target, but) or {}
    lacking = [not here, *(held.get(name) != theirs[name] for name in names)]
    asked = multihost_utils.process_allgather(np.array(lacking)).reshape(-1, len(lacking)).any(axis=0)
    if not here:
        _remove(target, [name for name in held if name not in names] if theirs else None)
    for name, needed, ask in zip(names, lacking[1:], asked[1:], strict=True):
        if ask:
            content = bytes_from_primary((path / name).read_bytes)
            if needed:
                _write(target / name, content, theirs[name])
    return target


def _stamps(path: Path, but: Sequence[str]) -> _Stamps | None:
    """Size and content of a file, or sizes and times of a directory's files, by name; None of nothing."""
    if path.is_file():
        with open(path, "rb") as file:
            return {"": [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]}
    if not path.is_dir():
        return None
    found = {}
    for file in sorted(path.rglob("*")):
        parts = file.relative_to(path).parts
        if file.is_file() and parts[0] not in but and not any(part.startswith(".") for part in parts):
            status = file.stat()
            found["/".join(parts)] = [status.st_size, status.st_mtime_ns]
    return found


@functools.cache
def _copies() -> tempfile.TemporaryDirectory[str]:
    """Its owner's alone, and removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="llmeraser-")


def _remove(target: Path, names: Sequence[str] | None) -> None:
    """Removes files of a copy; None removes all of it."""
    if names is None:
        shutil.rmtree(target, ignore_errors=True)
        target.unlink(missing_ok=True)
    for name in names or ():
        (target / name).unlink()


def _write(file: Path, content: bytes, stamp: Sequence[Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    if not isinstance(stamp[1], str):
        os.utime(file, ns=(stamp[1], stamp[1]))
