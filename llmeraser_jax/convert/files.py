"""Owns reading and writing safetensors: one file or several with an index, without PyTorch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llmeraser_jax import files
from llmeraser_jax.convert.table import Shape

_DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
_NUMPY_NAMES = {**_DTYPE_NAMES, "U8": "uint8", "I8": "int8"}


class SafetensorsSource:
    """Tensors of one or several safetensors files; a file is opened once, a tensor's numbers are read when used."""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        """Opens files.

        Args:
            paths: file of each tensor.
        """
        self._paths = dict(paths)
        self._headers = {path: _read_header(path) for path in sorted(set(self._paths.values()))}

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> SafetensorsSource:
        """All tensors of one file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a safetensors file.
        """
        path = Path(path)
        return cls(dict.fromkeys(_read_header(path), path))

    @classmethod
    def from_checkpoint(cls, directory: str | os.PathLike[str]) -> SafetensorsSource:
        """The tensors of a Hugging Face checkpoint: `model.safetensors`, or its `.index.json` and shards.

        Raises:
            FileNotFoundError: neither is there, or a shard that the index names is not.
            ValueError: a file is not what its name says, the index names one outside of the directory, or a shard
                lacks a tensor the index places there.
        """
        directory = Path(directory)
        single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
        if single.exists():
            return cls.from_file(single)
        if not index.exists():
            found = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
            hint = f" It holds {', '.join(found)}; convert that to safetensors first." if found else ""
            msg = f"{directory} has neither {single.name} nor {index.name}.{hint}"
            raise FileNotFoundError(msg)
        content = files.read_json(index)
        if not isinstance(content, dict) or not isinstance(content.get("weight_map"), dict):
            msg = f"{index} has no weight_map from tensor names to files."
            raise ValueError(msg)
        named = {str(name): Path(str(file)) for name, file in content["weight_map"].items()}
        outside = sorted({str(file) for file in named.values() if file.is_absolute() or ".." in file.parts})
        if outside:
            msg = f"{index} names {', '.join(outside[:3])}, outside of its directory; weights must lie inside it."
            raise ValueError(msg)
        paths = {name: directory / file for name, file in named.items()}
        source = cls(paths)
        absent = [f"{name} in {path.name}" for name, path in paths.items() if name not in source._names_in(path)]
        unlisted = [
            f"{name} in {path.name}"
            for path in sorted(set(paths.values()))
            for name in source._names_in(path)
            if paths.get(name) != path
        ]
        if absent or unlisted:
            msg = f"{index} and its files disagree: absent {absent}; not listed {unlisted}."
            raise ValueError(msg)
        return source

    def _names_in(self, path: Path) -> frozenset[str]:
        return frozenset(self._headers[path])

    def shapes(self) -> dict[str, tuple[Shape, str]]:
        """Shape and dtype name of every tensor; a dtype unknown here keeps the file's own name for it."""
        out = {}
        for name, path in self._paths.items():
            entry = self._headers[path][name]
            out[name] = (tuple(entry["shape"]), _DTYPE_NAMES.get(entry["dtype"], entry["dtype"]))
        return out

    def read(self, name: str) -> np.ndarray:
        """One tensor, memory-mapped: only the parts used are read, and freed with the array.

        Raises:
            ValueError: its dtype has no counterpart in NumPy.
        """
        path = self._paths[name]
        entry = self._headers[path][name]
        if entry["dtype"] not in _NUMPY_NAMES:
            msg = f"{name} in {path} is stored as {entry['dtype']}; readable are {', '.join(_NUMPY_NAMES)}."
            raise ValueError(msg)
        stored, shape = _NUMPY_NAMES[entry["dtype"]], tuple(entry["shape"])
        dtype = np.dtype(ml_dtypes.bfloat16 if stored == "bfloat16" else stored)
        if 0 in shape:
            return np.empty(shape, dtype)
        return np.memmap(path, dtype, mode="r", offset=entry["offset"], shape=shape)


def _read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Dtype, shape and place in the file of every tensor of a safetensors file."""
    if not path.exists():
        msg = f"{path} does not exist."
        raise FileNotFoundError(msg)
    if path.is_dir():
        msg = f"{path} is a directory; expected a safetensors file."
        raise ValueError(msg)
    with files.reading(path), open(path, "rb") as file:
        start = file.read(8)
        try:
            safe_open(path, framework="numpy")  # checks that the header fits the file
        except SafetensorError as error:
            msg = f"{path} is not a safetensors file: {error}."
            raise ValueError(msg) from error
        size = int.from_bytes(start[:8], "little")
        file.seek(8)
        entries = json.loads(file.read(size))
    entries.pop("__metadata__", None)
    return {name: {**entry, "offset": 8 + size + entry["data_offsets"][0]} for name, entry in entries.items()}


def write_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors with the metadata that transformers and PEFT look for."""
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    Path(path).touch()
    mode = Path(path).stat().st_mode
    save_file(contiguous, os.fspath(path), metadata={"format": "pt"})
    # save_file renames a private temporary file into place; others may read this one as any other new file.
    Path(path).chmod(mode)
