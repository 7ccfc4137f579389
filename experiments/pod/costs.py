"""Counts what a compiled program computes and moves, and what that takes at least at a chip's rates.

Operations are those of matrix products. A matrix unit takes bfloat16 numbers: a product of float32 numbers at
precision HIGHEST is six passes, and counts six times; with one side in bfloat16 it is three. Memory traffic is what
instructions read from and write to HBM; what stays in a memory on the chip is free. A fusion that takes a slice of
an array reads the slice. Loops count as often as they run.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from experiments.pod.hlo import Array, Instruction, Program


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published rates of a chip.

    Attributes:
        flops: of bfloat16 matrix products, per second.
        hbm_bytes: per second.
        link_bytes: into the chip from others, per second: half of the bidirectional rate.
    """

    flops: float
    hbm_bytes: float
    link_bytes: float


# docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e}; NVIDIA's data sheet of the H100 SXM, without sparsity, and NVLink 4.
CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        "v5e": Chip(197e12, 819e9, 200e9),
        "v5p": Chip(459e12, 2765e9, 600e9),
        "v6e": Chip(918e12, 1638e9, 400e9),
        "h100": Chip(989e12, 3350e9, 450e9),
    }
)


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of one execution, on each device.

    Attributes:
        flops: of matrix products, each as often as a matrix unit passes over it.
        hbm_bytes: read and written.
        link_bytes: received from other devices.
        cycles: the compiler's own estimate, summed over instructions; None where it states none.
    """

    flops: float
    hbm_bytes: float
    link_bytes: float
    cycles: float | None

    def seconds(self, chip: Chip) -> dict[str, float]:
        """What each of the three would take by itself at the chip's rates."""
        return {
            "products": self.flops / chip.flops,
            "memory": self.hbm_bytes / chip.hbm_bytes,
            "links": self.link_bytes / chip.link_bytes,
        }

    def bound(self, chip: Chip) -> tuple[str, float]:
        """What takes longest, and its seconds: no execution is faster."""
        seconds = self.seconds(chip)
        longest = max(seconds, key=seconds.__getitem__)
        return longest, seconds[longest]


_CHANNEL = re.compile(r"channel_id=(\d+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
# Nothing is moved, or their parts are counted themselves.
_FREE = frozenset(
    {
        "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
        "after-all", "partition-id", "replica-id", "iota", "opt-barrier",
    }
)  # fmt: skip
# By the number of operands in float32.
_PASSES: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {"default": (1, 1, 1), "high": (1, 2, 3), "highest": (1, 3, 6)}
)
_SHORT: Mapping[str, str] = MappingProxyType({"bfloat16": "bf16", "float32": "f32"})
_SLICES = ("dynamic-slice", "slice", "gather")
_VIEWS = ("bitcast", "reshape", "get-tuple-element", "copy", "convert", "transpose")


def costs(program: Program, link_bytes: float) -> Costs:
    """Of a compiled program.

    Args:
        program: the scheduled module.
        link_bytes: see `received_bytes`.
    """
    flops = moved = cycles = 0.0
    overlapped: dict[str, float] = {}  # by channel: such a collective stands in several fusions
    for name, one, times, fused in program.executed():
        computation = program.computations[name]
        if one.opcode in ("convolution", "dot"):
            flops += times * _flops(computation, one)
        if fused:
            if (channel := _CHANNEL.search(one.text)) and one.result[-1].in_hbm:
                overlapped[channel[1]] = times * one.result[-1].bytes
            continue
        moved += times * _hbm_bytes(program, computation, one)
        if stated := _CYCLES.search(one.text):
            cycles += times * int(stated[1])
    return Costs(flops, moved + sum(overlapped.values()), link_bytes, cycles or None)


def traced_flops(jaxpr: Any) -> float:
    """Operations of a traced program's matrix products, counted as `costs` counts those of a compiled one.

    Of branches the longest counts, and a loop without a fixed number of rounds once. Code that devices share out
    counts as one device executes it.

    Args:
        jaxpr: of the program; a `jax.extend.core.Jaxpr`.
    """
    total = 0.0
    for one in jaxpr.eqns:
        name = one.primitive.name
        if name in ("dot_general", "bfloat16_matmul"):
            left, right = (Array(_SHORT.get(x.aval.dtype.name, "f32"), x.aval.shape, True) for x in one.invars)
            axes, passes = (-1,), 1
            if name == "dot_general":
                axes = one.params["dimension_numbers"][0][0]
                passes = _PASSES[_precision(one.params["precision"])][_wide(left, right)]
            total += 2 * passes * one.outvars[0].aval.size * float(np.prod([left.shape[axis] for axis in axes]))
            continue
        inside = [traced_flops(part) for value in one.params.values() for part in _jaxprs_of(value)]
        total += max(inside, default=0.0) if name == "cond" else sum(inside) * one.params.get("length", 1)
    return total


def _jaxprs_of(value: Any) -> list[Any]:
    parts = value if isinstance(value, tuple | list) else (value,)
    inner = [getattr(part, "jaxpr", part) for part in parts]
    return [part for part in inner if hasattr(part, "eqns")]


def _precision(setting: Any) -> str:
    setting = setting[0] if isinstance(setting, tuple) else setting
    return "default" if setting is None else setting.name.lower()


def received_bytes(collectives: list[dict], mesh: Mapping[str, int]) -> float:
    """What a device receives at least: all-reduces reduce and spread, of other results it has its own part."""
    total = 0.0
    for one in collectives:
        ways = int(np.prod([mesh[axis] for axis in one["axes"].split(",") if axis]))
        share = (ways - 1) / ways * (2 if one["kind"] == "all-reduce" else 1)
        share = ways - 1 if one["kind"] == "reduce-scatter" else share
        total += one["executions"] * one["bytes"] * share
    return total


def _flops(computation: Mapping[str, Instruction], one: Instruction) -> float:
    left, right = (computation[name].result[0] for name in one.operands[:2])
    products = _dot(one, left) if one.opcode == "dot" else _convolution(one, left, right)
    return 2 * products * _passes(one, left, right)


def _passes(one: Instruction, left: Array, right: Array) -> int:
    """Of a matrix unit that multiplies bfloat16 numbers."""
    precision = re.search(r"operand_precision=\{(\w+)", one.text)
    return _PASSES["default" if precision is None else precision[1]][_wide(left, right)]


def _wide(left: Array, right: Array) -> int:
    return sum(array.dtype == "f32" for array in (left, right))


def _dot(one: Instruction, left: Array) -> float:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.text)
    inner = [left.shape[int(axis)] for axis in contracted[1].split(",") if axis] if contracted else []
    return one.result[0].size * float(np.prod(inner))


def _convolution(one: Instruction, left: Array, right: Array) -> float:
    """Multiplications: a TPU's program writes batched products as convolutions over padded axes."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.text)
    assert labels is not None
    inputs, kernel, outputs = labels.groups()
    out = one.result[0]
    total = float(out.shape[outputs.index("b")] * out.shape[outputs.index("f")] * right.shape[kernel.index("i")])
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", (re.search(r"window=\{(.*?)\}", one.text) or [""])[0]))

    def setting(name: str, place: int, default: int) -> int:
        return int(window[name].split("x")[place]) if name in window else default

    for place in range(len(kernel) - 2):
        digit = str(place)
        size, length = right.shape[kernel.index(digit)], left.shape[inputs.index(digit)]
        steps = np.arange(out.shape[outputs.index(digit)]) * setting("stride", place, 1)
        low = int(window["pad"].split("x")[place].split("_")[0]) if "pad" in window else 0
        dilation = setting("lhs_dilate", place, 1)
        taps = np.arange(size) * setting("rhs_dilate", place, 1)
        at = steps[:, None] - low + taps[None, :]
        total *= np.count_nonzero((at >= 0) & (at % dilation == 0) & (at // dilation < length))
    return total


def _hbm_bytes(program: Program, computation: Mapping[str, Instruction], one: Instruction) -> float:
    if one.opcode in _FREE or one.opcode.endswith(("-done", "-update")):
        return 0
    written = sum(array.bytes for array in one.result if array.in_hbm)
    if one.opcode == "slice-start":
        source, target = one.result[:2]
        return target.bytes * (source.in_hbm + target.in_hbm)
    if one.opcode.endswith("-start"):
        return written  # which lists the operands too
    if one.opcode == "dynamic-update-slice":
        update = computation[one.operands[1]].result[0].bytes
        return 2 * update if one.result[0].in_hbm else 0
    read = 0
    for place, name in enumerate(one.operands):
        source = computation[name].result
        if len(source) != 1 or not source[0].in_hbm:
            continue
        if one.opcode == "fusion":
            read += min(_read_bytes(program, one.callees[0], place, source[0]), source[0].bytes)
        elif one.opcode in _SLICES and place == 0:
            read += one.result[0].bytes
        else:
            read += source[0].bytes
    if one.opcode == "fusion":
        written = _written_bytes(program, one)
    return read + written


def _read_bytes(program: Program, name: str, place: int, source: Array) -> int:
    """Of a fusion's parameter: all of it, or the slices that are taken."""
    inside = program.computations[name]
    parameter = next(
        (one for one in inside.values() if one.opcode == "parameter" and f"parameter({place})" in one.text), None
    )
    if parameter is None:
        return source.bytes
    return _read_of(program, inside, parameter.name, source)


def _read_of(program: Program, inside: Mapping[str, Instruction], name: str, source: Array) -> int:
    total = 0
    for user in inside.values():
        for place, operand in enumerate(user.operands):
            if operand != name:
                continue
            if user.opcode in _SLICES and place == 0:
                total += user.result[0].bytes
            elif _passes_on(user, place):
                continue
            elif user.opcode == "bitcast":
                total += _read_of(program, inside, user.name, source)
            elif user.opcode == "fusion":
                total += _read_bytes(program, user.callees[0], place, source)
            else:
                return source.bytes
    return total


def _passes_on(user: Instruction, place: int) -> bool:
    """Whether an operand is neither read nor copied, but written in place or handed on."""
    handed_on = user.opcode == "tuple" or (user.opcode == "custom-call" and "AsyncCollective" in user.text)
    return handed_on or (user.opcode == "dynamic-update-slice" and place == 0)


def _written_bytes(program: Program, fusion: Instruction) -> int:
    inside = program.computations[fusion.callees[0]]
    root = next(one for one in inside.values() if one.is_root)
    if "AsyncCollective" in root.text:
        return 0  # the collective is counted itself
    parts = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(parts) != len(fusion.result):
        return sum(array.bytes for array in fusion.result if array.in_hbm)
    return sum(
        _update_bytes(program, inside, part, array)
        for part, array in zip(parts, fusion.result, strict=True)
        if array.in_hbm
    )


def _update_bytes(program: Program, inside: Mapping[str, Instruction], part: Instruction, array: Array) -> int:
    """Of a result: all of it, or the slice that is written in place."""
    while part.opcode in _VIEWS and part.operands:
        part = inside[part.operands[0]]
    if part.opcode == "dynamic-update-slice":
        return inside[part.operands[1]].result[0].bytes
    if part.opcode == "parameter" or "AsyncCollective" in part.text:
        return 0
    if part.opcode == "fusion" and len(part.result) == 1:
        deeper = program.computations[part.callees[0]]
        return _update_bytes(program, deeper, next(one for one in deeper.values() if one.is_root), array)
    return array.bytes
