"""The files of a base model that a run records: their fingerprint, and a tokenizer that is not the model's own."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
from pathlib import Path

import jax

from llmeraser_jax.data.pictures import PROCESSOR_FILES
from llmeraser_jax.models import Model

_TOKENIZER_FILES = (
    "tokenizer*",
    "*.jinja",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "additional_chat_templates",
    *PROCESSOR_FILES,
)
_MODEL_FILES = ("config.json", "*.safetensors", "tokenizer*", "*.jinja", "vocab.*", "merges.txt", *PROCESSOR_FILES)


def model_directory(path: str | os.PathLike[str]) -> Path:
    """The local directory of a model: `path` itself, or the downloaded snapshot of a hub id.

    Raises:
        FileNotFoundError: neither is there.
    """
    directory = Path(path)
    if directory.is_dir():
        return directory
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(os.fspath(path), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        msg = f"There is no model directory {path}, and no downloaded model of that name."
        raise FileNotFoundError(msg) from error


def model_fingerprint(path: str | os.PathLike[str]) -> str:
    """SHA-256 (hex) over names and contents of all that determines a model's tokens and logits.

    These are `config.json`, the safetensors files and those of tokenizer and picture processor. Files are streamed,
    see `file_sha256`.

    Raises:
        FileNotFoundError: no such model, or a directory without these files.
    """
    directory = model_directory(path)
    parts = sorted({part for pattern in _MODEL_FILES for part in directory.glob(pattern)})
    if not (directory / "config.json").exists() or not any(part.suffix == ".safetensors" for part in parts):
        msg = f"{directory} is not a model: it needs config.json and at least one .safetensors file."
        raise FileNotFoundError(msg)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part.name}\0{file_sha256(part)}\n".encode())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file; one unchanged since the last call of this process is not read again."""
    status = path.stat()
    return _file_sha256_at(str(path.resolve()), status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=1024)
def _file_sha256_at(path: str, mtime_ns: int, size: int) -> str:
    """The arguments besides `path` make the cache notice that a file was written to."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenizer_source(model: Model) -> Path | None:
    """The directory that the model's tokenizer was read from, where that is not the base model's."""
    name = getattr(model.tokenizer, "name_or_path", "")
    if not name or not Path(name).is_dir() or Path(name).resolve() == model_directory(model.path).resolve():
        return None
    return Path(name)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the tokenizer files of the directory `source` to the directory `target`, made if it is not there."""
    target.mkdir(exist_ok=True)
    for part in sorted({part for pattern in _TOKENIZER_FILES for part in source.glob(pattern)}):
        (shutil.copytree if part.is_dir() else shutil.copy2)(part, target / part.name)


def base_dtype(model: Model) -> str:
    """The dtype that the base is stored in."""
    return str(jax.tree.leaves(model.base)[0].dtype)
