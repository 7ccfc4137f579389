"""Features of pictures from a model's vision tower: computed once, kept in files beside a run.

A store is a directory:

    tower.json             SHA-256 of the tower: its configuration and its parameters
    {number}.safetensors   features [features, size] of some pictures by their keys, written whole or not at all

A key names a picture as the tower sees it: the SHA-256 of its file, and of the settings of its preparation where
they can differ. A store is read through memory maps, so that features of more pictures than fit in memory can be
laid out batch by batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Float

from llmeraser_jax import convert, files
from llmeraser_jax.models.vision import VisionConfig, vision_features
from llmeraser_jax.parallel import mirrored, on_primary, to_host
from llmeraser_jax.types import BaseParams

_log = logging.getLogger(__name__)

TOWER_FILE = "tower.json"
_SUFFIX = ".safetensors"
_BATCH_SIZE = 16
_BATCHES_PER_FILE = 16


@runtime_checkable
class SeesPictures(Protocol):
    """A model with a vision tower (`models.Model`)."""

    @property
    def config(self) -> Any:
        """With the field `vision`."""
        ...

    @property
    def vision(self) -> BaseParams | None: ...


def image_features(
    model: SeesPictures, pixels: Float[np.ndarray, "n channels height columns"], *, batch_size: int = _BATCH_SIZE
) -> Float[np.ndarray, "n features size"]:
    """The features of pictures, in the tower's storage dtype.

    Args:
        model: with its vision tower.
        pixels: as the checkpoint's image processor makes them.
        batch_size: pictures computed together; results do not depend on it beyond rounding.

    Raises:
        ValueError: a model without a tower, pictures of another size, or numbers that are not finite.
    """
    return _features(*_tower(model), np.asarray(pixels), batch_size)


def _features(config: VisionConfig, vision: BaseParams, pixels: np.ndarray, batch_size: int) -> np.ndarray:
    expected = (config.num_channels, config.image_size, config.image_size)
    if pixels.shape[1:] != expected:
        msg = f"Pictures have shape {list(pixels.shape[1:])}; this model's vision tower reads {list(expected)}."
        raise ValueError(msg)
    if not np.all(np.isfinite(pixels)):
        broken = int(np.flatnonzero(~np.isfinite(pixels.reshape(len(pixels), -1)).all(1))[0])
        msg = f"Picture {broken} of {len(pixels)} holds numbers that are not finite."
        raise ValueError(msg)
    parts = [np.zeros((0, config.num_features, config.feature_width), vision["class_embedding"].dtype)]
    for start in range(0, len(pixels), batch_size):
        part = pixels[start : start + batch_size]
        filled = np.concatenate([part, np.repeat(part[:1], batch_size - len(part), axis=0)])  # one shape
        parts.append(to_host(vision_features(config, vision, jnp.asarray(filled)))[: len(part)])
    return np.concatenate(parts)


def _features_of(
    config: VisionConfig,
    vision: BaseParams,
    keys: Sequence[str],
    load_pixels: Callable[[str], np.ndarray],
    batch_size: int,
) -> dict[str, np.ndarray]:
    """Features by key; the pixels of one batch at a time are in memory."""
    found = {}
    for start in range(0, len(keys), batch_size):
        part = keys[start : start + batch_size]
        pixels = np.stack([load_pixels(key) for key in part])
        found |= dict(zip(part, _features(config, vision, pixels, batch_size), strict=True))
    return found


def load_or_compute_features(
    model: SeesPictures,
    keys: Iterable[str],
    load_pixels: Callable[[str], Float[np.ndarray, "channels height columns"]],
    path: str | os.PathLike[str],
    *,
    batch_size: int = _BATCH_SIZE,
) -> dict[str, np.ndarray]:
    """The features of pictures by their keys; those that the store at `path` lacks are computed and added to it.

    What was computed before the program was killed is not computed again. Of several processes the first one
    writes.

    Args:
        model: with its vision tower.
        keys: of the pictures; repeats count once.
        load_pixels: the pixels of a picture; called for those that are missing, one after the other.
        path: the store; made where there is none.
        batch_size: pictures computed together.

    Returns:
        Features [features, size] of each key, mapped from their files.

    Raises:
        ValueError: the store is another tower's, or its files do not fit this one; see `image_features` too.
    """
    return _load_or_compute(*_tower(model), keys, load_pixels, path, batch_size)


def _load_or_compute(
    config: VisionConfig,
    vision: BaseParams,
    keys: Iterable[str],
    load_pixels: Callable[[str], np.ndarray],
    path: str | os.PathLike[str],
    batch_size: int,
) -> dict[str, np.ndarray]:
    path, keys = Path(path), list(dict.fromkeys(keys))
    tower = {"tower_sha256": tower_sha256(config, vision)}
    on_primary(lambda: _claim(path, tower))
    stored = _stored(mirrored(path))
    missing = [key for key in keys if key not in stored]
    on_primary(lambda: None)  # adds nothing before the others have looked
    per_file = batch_size * _BATCHES_PER_FILE
    for start in range(0, len(missing), per_file):
        part = missing[start : start + per_file]
        tensors = _features_of(config, vision, part, load_pixels, batch_size)
        on_primary(lambda tensors=tensors: _add(path, tensors))
        _log.info("Features of %d of %d pictures computed.", start + len(part), len(missing))
    sources = _stored(mirrored(path))
    shape = (config.num_features, config.feature_width)
    found = {key: sources[key].read(key) for key in keys}
    wrong = [key for key, value in found.items() if value.shape != shape]
    if wrong:
        msg = f"{path} holds features of shape {found[wrong[0]].shape} for {wrong[0]}; expected {shape}."
        raise ValueError(msg)
    return found


class FeaturesOfTower:
    """`data.pictures.ComputeFeatures` of a tower: what was computed or read once is not computed again.

    Args:
        config: the tower.
        vision: its parameters.
    """

    def __init__(self, config: VisionConfig, vision: BaseParams):
        self._tower = config, vision
        self._known: dict[str, np.ndarray] = {}

    def __call__(
        self, keys: Sequence[str], load_pixels: Callable[[str], np.ndarray], directory: Path | None
    ) -> dict[str, np.ndarray]:
        missing = [key for key in dict.fromkeys(keys) if key not in self._known]
        if missing and directory is not None:
            self._known |= _load_or_compute(*self._tower, missing, load_pixels, directory, _BATCH_SIZE)
        elif missing:
            self._known |= _features_of(*self._tower, missing, load_pixels, _BATCH_SIZE)
        return {key: self._known[key] for key in keys}


def tower_sha256(config: VisionConfig, vision: BaseParams) -> str:
    """SHA-256 (hex) of what features depend on besides the picture: the tower and which of its states they are."""
    digest = hashlib.sha256()
    inert = {"image_token": 0, "projector_activation": "gelu", "projector_bias": True}
    digest.update(repr(dataclasses.replace(config, **inert)).encode())
    for name, leaf in sorted(flatten_dict(vision, sep="/").items()):
        value = np.ascontiguousarray(to_host(leaf))
        digest.update(f"{name} {value.dtype} {value.shape}\n".encode())
        digest.update(value.view(np.uint8).data)
    return digest.hexdigest()


def _tower(model: SeesPictures) -> tuple[VisionConfig, BaseParams]:
    config = model.config.vision
    if config is None or model.vision is None:
        msg = f"This {model.config.model_type} model has no vision tower; load a LLaVA checkpoint to read pictures."
        raise ValueError(msg)
    return config, model.vision


def _claim(path: Path, tower: dict[str, str]) -> None:
    """Makes a store, or checks whose it is; removes what a killed process left."""
    path.mkdir(parents=True, exist_ok=True)
    for left in path.glob(f".*{_SUFFIX}.*"):
        left.unlink()
    if not (path / TOWER_FILE).exists():
        files.atomic_write_json(path / TOWER_FILE, tower)
    elif files.read_json(path / TOWER_FILE) != tower:
        msg = f"{path} holds features of another vision tower; name another directory, or remove it."
        raise ValueError(msg)


def _stored(path: Path) -> dict[str, convert.SafetensorsSource]:
    """The file of every picture in a store, opened."""
    sources = [convert.SafetensorsSource.from_file(file) for file in sorted(path.glob(f"*{_SUFFIX}"))]
    return {key: source for source in sources for key in source.shapes()}


def _add(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Adds a file to a store, under the first free number."""
    taken = {int(file.stem) for file in path.glob(f"*{_SUFFIX}") if file.stem.isdigit()}
    target = path / f"{max(taken, default=-1) + 1:06d}{_SUFFIX}"
    temporary = path / f".{target.name}.{os.getpid()}"
    convert.write_safetensors(temporary, tensors)
    os.replace(temporary, target)
