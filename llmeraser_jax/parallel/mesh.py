"""Device meshes with the axes that the package knows: `data`, `fsdp` and `model`; several TPU slices included."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "model")
_EXAMPLE_AXES = ("data", "fsdp")
_EXAMPLE = "data=4,fsdp=2,model=2"


def make_mesh(*, data: int = 1, fsdp: int = 1, model: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A `data` x `fsdp` x `model` mesh whose axes the compiler may reshard freely.

    The axis type is Auto: under JAX's default (Explicit), products of Jacobians with vectors and reductions
    over the adapter would need a sharding annotation at every operation.

    Of several TPU slices, whose network is slow, each has its own part of the examples ("data") and all of the
    base: "fsdp" and "model" stay inside a slice.

    Args:
        data: groups of devices that share out the examples of a micro-batch.
        fsdp: devices of a group that do so too and hold a share of each frozen matrix, which they gather when they
            multiply with it.
        model: devices that share out each frozen matrix and multiply with their share.
        devices: which devices; default all that JAX sees.

    Raises:
        ValueError: fewer devices than the product of the sizes, a size below 1, or slices that do not share `data`
            out evenly.
    """
    sizes = (data, fsdp, model)
    words = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if min(sizes) < 1:
        msg = f"A mesh of {words} is empty; all must be at least 1."
        raise ValueError(msg)
    devices = list(jax.devices() if devices is None else devices)
    count = data * fsdp * model
    if count > len(devices):
        msg = f"A mesh of {words} needs {count} devices; there are {len(devices)}."
        raise ValueError(msg)
    slices: dict[int, list[Any]] = defaultdict(list)
    for device in devices[:count]:
        slices[slice_of(device)].append(device)
    per_slice, rest = divmod(data, len(slices))
    if rest or len({len(members) for members in slices.values()}) > 1:
        msg = (
            f"A mesh of {words} reaches over {len(slices)} slices, which share out data alone; "
            f"make it a multiple of {len(slices)}, and use all devices."
        )
        raise ValueError(msg)
    kinds = (AxisType.Auto,) * len(AXES)
    parts = [
        jax.make_mesh((per_slice, fsdp, model), AXES, axis_types=kinds, devices=members)
        for members in slices.values()
    ]
    if len(parts) == 1:
        return parts[0]
    return Mesh(np.concatenate([part.devices for part in parts]), AXES, axis_types=kinds)


def slice_of(device: Any) -> int:
    """The TPU slice that a device belongs to; 0 of other devices."""
    return getattr(device, "slice_index", None) or 0


def example_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes that several devices share the examples out over."""
    return tuple(axis for axis in _EXAMPLE_AXES if mesh.shape[axis] > 1)


def example_shares(mesh: Mesh | None) -> int:
    """How many parts the examples of a micro-batch are shared out in."""
    return 1 if mesh is None else int(np.prod([mesh.shape[axis] for axis in _EXAMPLE_AXES]))


def whole_shares(size: int, mesh: Mesh | None) -> int:
    """The next size of a micro-batch that the devices of the mesh share out evenly."""
    shares = example_shares(mesh)
    return -(-size // shares) * shares


def mesh_sizes(text: str) -> dict[str, int]:
    """Reads the `data=4,fsdp=2,model=2` of a command: each axis and its size, 1 where it is left out.

    Raises:
        ValueError: unknown axis, or a size that is no whole number.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES or not size.isdigit() or axis in sizes:
            msg = f"Mesh {text!r} is not understood at {part!r}; write for example {_EXAMPLE}."
            raise ValueError(msg)
        sizes[axis] = int(size)
    return {axis: sizes.get(axis, 1) for axis in AXES}


def parse_mesh(text: str) -> Mesh | None:
    """The mesh of a command's `data=4,fsdp=2,model=2`; the empty string means no mesh (one device).

    Raises:
        ValueError: see `mesh_sizes`; too few devices, or a process without any.
    """
    if not text:
        if jax.process_count() > 1:
            msg = f"There are {jax.process_count()} processes; name a mesh over their {jax.device_count()} devices."
            raise ValueError(msg)
        return None
    sizes = mesh_sizes(text)
    mesh = make_mesh(data=sizes["data"], fsdp=sizes["fsdp"], model=sizes["model"])
    idle = set(range(jax.process_count())) - {device.process_index for device in mesh.devices.flat}
    if idle:
        msg = (
            f"Mesh {text!r} leaves processes {', '.join(map(str, sorted(idle)))} without a device; "
            f"there are {jax.device_count()} devices in {jax.process_count()} processes."
        )
        raise ValueError(msg)
    return mesh
