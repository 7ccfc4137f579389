"""Reads a base's tensors from their files onto the devices; each process reads its own devices' parts.

A leaf stacks tensors of all layers, and a device holds a part of it. That part is allocated once, filled tensor by
tensor in pieces, and handed over; on a CPU the device takes the memory itself. Nothing else is kept on the host.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Sharding

from llmeraser_jax.convert import Index, Shape, Target, TensorSource

_PIECE_BYTES = 256 * 1024  # fits in a core's cache, where it is checked, converted and transposed
_ALIGNMENT = 64  # lets a CPU device take memory without a copy
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_EXPONENTS = {_BFLOAT16: 0x7F80, np.dtype(np.float16): 0x7C00}  # all set: not finite


def aligned_empty(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """An array of any content, whose memory a CPU device can take."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _own_parts(shape: Shape, sharding: Sharding | None) -> list[tuple[Index, list[Any]]]:
    """The parts of a leaf that devices of this process hold: where each is, and which devices hold it."""
    if sharding is None:
        return [(tuple(slice(0, size) for size in shape), [None])]
    sharers = defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        sharers[bounds].append(device)
    return [(tuple(slice(*pair) for pair in bounds), devices) for bounds, devices in sharers.items()]


def _empty_part(index: Index, dtype: np.dtype) -> np.ndarray:
    return aligned_empty(tuple(part.stop - part.start for part in index), dtype)


def _on_devices(part: np.ndarray, devices: Sequence[Any]) -> list[jax.Array]:
    # Waited for, so that the host keeps nothing that is on its way.
    return [jax.block_until_ready(jax.device_put(part, device)) for device in devices]


def _joined(shape: Shape, sharding: Sharding | None, parts: list[jax.Array]) -> jax.Array:
    return parts[0] if sharding is None else jax.make_array_from_single_device_arrays(shape, sharding, parts)


def make_leaf(
    fill: Callable[[Index, np.ndarray], None], shape: Shape, dtype: np.dtype, sharding: Sharding | None
) -> jax.Array:
    """A leaf, of which each process makes its devices' parts, one after the other.

    Args:
        fill: `(index, out)` writes the part of the leaf at `index` to `out`.
        shape: of the leaf.
        dtype: of the leaf.
        sharding: where it lives; None is the default device.
    """
    parts = []
    for index, devices in _own_parts(shape, sharding):
        part = _empty_part(index, dtype)
        fill(index, part)
        parts += _on_devices(part, devices)
    return _joined(shape, sharding, parts)


class LayerStack:
    """A leaf [layers, ...] that is given layer by layer; the host keeps this process's parts of it alone.

    Args:
        shape: of the leaf.
        dtype: of the leaf.
        sharding: see `make_leaf`; the first axis is on no axis of the mesh.
    """

    def __init__(self, shape: Shape, dtype: np.dtype, sharding: Sharding | None):
        self._shape, self._sharding = shape, sharding
        self._parts = [
            (_empty_part(index, dtype), index[1:], devices) for index, devices in _own_parts(shape, sharding)
        ]

    def fill(self, layer: int, value: np.ndarray) -> None:
        """Keeps this process's parts of a layer."""
        for part, index, _ in self._parts:
            part[layer] = value[index]

    def on_devices(self) -> jax.Array:
        """The leaf, once all layers are given."""
        parts = [array for part, _, devices in self._parts for array in _on_devices(part, devices)]
        return _joined(self._shape, self._sharding, parts)


def read_leaf(
    source: TensorSource,
    tensors: Sequence[tuple[str, Target]],
    shape: Shape,
    dtype: np.dtype,
    sharding: Sharding | None,
) -> jax.Array:
    """A leaf made of one tensor, of one tensor per layer, or of one per expert of each layer.

    Args:
        source: tensors on disk.
        tensors: name and place of each.
        shape: of the leaf.
        dtype: of the leaf.
        sharding: see `make_leaf`.

    Raises:
        ValueError: a number is not finite; the tensor is named.
    """

    def fill(index, out):
        for name, target in tensors:
            axes = len(target.place)
            stacked, part = index[:axes], index[axes:]
            if not all(of.start <= number < of.stop for of, number in zip(stacked, target.place, strict=True)):
                continue
            place = out[tuple(number - of.start for of, number in zip(stacked, target.place, strict=True))]
            transform, tensor = target.transform, source.read(name)
            if transform.disk_index is None:
                copy_finite(transform.to_leaf(np.asarray(tensor))[part], place, name)
            else:
                copy_finite(tensor[transform.disk_index(part)], transform.to_disk(place), name)

    return make_leaf(fill, shape, dtype, sharding)


def copy_finite(tensor: np.ndarray, out: np.ndarray, name: str) -> None:
    """Copies a tensor in pieces, into any dtype.

    Args:
        tensor: from a file, perhaps.
        out: of the same shape, in any layout.
        name: of the tensor, for the message.

    Raises:
        ValueError: a number is not finite, or is not in the new dtype.
    """
    row_bytes = max(tensor[:1].nbytes, 1)
    rows = max(_PIECE_BYTES // row_bytes, 1)
    raw = out.view(np.uint16) if out.dtype in _EXPONENTS else out
    for start in range(0, len(tensor), rows):
        with np.errstate(over="ignore"):  # found below
            piece = tensor[start : start + rows].astype(out.dtype, copy=False)
        if out.dtype in _EXPONENTS:
            piece, exponent = piece.view(np.uint16), _EXPONENTS[out.dtype]
            finite = ((piece & exponent) != exponent).all()
        else:
            finite = np.isfinite(piece).all()
        if not finite:
            msg = (
                f"{name} holds NaN, Inf or a number beyond {out.dtype.name} near row {start}; its file is damaged, "
                "or the dtype too narrow."
            )
            raise ValueError(msg)
        raw[start : start + rows] = piece  # as integers: NumPy copies those several times as fast
