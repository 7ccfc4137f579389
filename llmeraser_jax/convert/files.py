"""Owns reading and writing safetensors: one file or several with an index, without PyTorch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llmeraser_jax import files
from llmeraser_jax.convert.table import Shape

_DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


class SafetensorsSource:
    """Tensors of one or several safetensors files; a file is opened once, a tensor read when asked for."""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        """Opens files.

        Args:
            paths: file of each tensor.
        """
        self._paths = dict(paths)
        self._open = {}
        for path in sorted(set(self._paths.values())):
            self._open[path] = _open(path)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> SafetensorsSource:
        """All tensors of one file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a safetensors file.
        """
        path = Path(path)
        return cls(dict.fromkeys(_open(path).keys(), path))

    @classmethod
    def from_checkpoint(cls, directory: str | os.PathLike[str]) -> SafetensorsSource:
        """The tensors of a Hugging Face checkpoint: `model.safetensors`, or its `.index.json` and shards.

        Raises:
            FileNotFoundError: neither is there, or a shard that the index names is not.
            ValueError: a file is not what its name says, or a shard lacks a tensor the index places there.
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
        paths = {str(name): directory / str(file) for name, file in content["weight_map"].items()}
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
        return frozenset(self._open[path].keys())

    def shapes(self) -> dict[str, tuple[Shape, str]]:
        """Shape and dtype name of every tensor; a dtype unknown here keeps the file's own name for it."""
        out = {}
        for name, path in self._paths.items():
            view = self._open[path].get_slice(name)
            stored = view.get_dtype()
            out[name] = (tuple(view.get_shape()), _DTYPE_NAMES.get(stored, stored))
        return out

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        return self._open[self._paths[name]].get_tensor(name)


def _open(path: Path):
    if not path.exists():
        msg = f"{path} does not exist."
        raise FileNotFoundError(msg)
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        msg = f"{path} is not a safetensors file: {error}."
        raise ValueError(msg) from error


def write_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors with the metadata that transformers and PEFT look for."""
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    Path(path).touch()
    mode = Path(path).stat().st_mode
    save_file(contiguous, os.fspath(path), metadata={"format": "pt"})
    # save_file renames a private temporary file into place; others may read this one as any other new file.
    Path(path).chmod(mode)
