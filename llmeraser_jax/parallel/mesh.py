"""Device meshes with the two axes that the package knows: `data` and `model`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh


def make_mesh(*, data: int = 1, model: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A `data` x `model` mesh whose axes the compiler may reshard freely.

    The axis type is Auto: under JAX's default (Explicit), products of Jacobians with vectors and reductions
    over the adapter would need a sharding annotation at every operation.

    Args:
        data: devices that share out the examples of a micro-batch.
        model: devices that share out each matrix of the base.
        devices: which devices; default all that JAX sees.

    Raises:
        ValueError: fewer devices than `data * model`, or a size below 1.
    """
    if data < 1 or model < 1:
        msg = f"A mesh of data={data}, model={model} is empty; both must be at least 1."
        raise ValueError(msg)
    devices = list(jax.devices() if devices is None else devices)
    if data * model > len(devices):
        msg = f"A mesh of data={data} x model={model} needs {data * model} devices; there are {len(devices)}."
        raise ValueError(msg)
    return jax.make_mesh(
        (data, model),
        ("data", "model"),
        axis_types=(AxisType.Auto,) * 2,
        devices=devices[: data * model],
    )


def parse_mesh(text: str) -> Mesh | None:
    """Reads the `data=4,model=2` of a command; the empty string means no mesh (one device).

    Raises:
        ValueError: unknown axis, a size that is no whole number, too few devices, or a process without any.
    """
    if not text:
        if jax.process_count() > 1:
            msg = f"There are {jax.process_count()} processes; name a mesh over their {jax.device_count()} devices."
            raise ValueError(msg)
        return None
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in ("data", "model") or not size.isdigit() or axis in sizes:
            msg = f"Mesh {text!r} is not understood at {part!r}; write for example data=4,model=2."
            raise ValueError(msg)
        sizes[axis] = int(size)
    mesh = make_mesh(data=sizes.get("data", 1), model=sizes.get("model", 1))
    idle = set(range(jax.process_count())) - {device.process_index for device in mesh.devices.flat}
    if idle:
        msg = (
            f"Mesh {text!r} leaves processes {', '.join(map(str, sorted(idle)))} without a device; "
            f"there are {jax.device_count()} devices in {jax.process_count()} processes."
        )
        raise ValueError(msg)
    return mesh
