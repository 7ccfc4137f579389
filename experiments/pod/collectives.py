"""Reads the collectives of a compiled program out of its HLO text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.pod.hlo import Program, numbers

_KINDS = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}")
_COMPACT_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


def _axes(line: str, mesh: Mapping[str, int]) -> str:
    """The axes of the mesh along which the devices of a group differ, such as "data" or "data,model"."""
    if compact := _COMPACT_GROUPS.search(line):
        shape, dims, order = (numbers(part or "") for part in compact.groups())
        ids = np.arange(np.prod(dims)).reshape(dims)
        group = (ids.transpose(order) if order else ids).reshape(shape)[0]
    elif listed := _GROUPS.search(line):
        group = numbers(listed[1])
    else:
        return ",".join(axis for axis, size in mesh.items() if size > 1)
    places = np.unravel_index(group, tuple(mesh.values()))
    return ",".join(axis for axis, place in zip(mesh, places, strict=True) if len(set(place.tolist())) > 1)


def collectives(program: Program, mesh: Mapping[str, int]) -> list[dict[str, Any]]:
    """Each collective of a program: kind, axes, executions, shapes, and bytes of one execution's result.

    A collective that the compiler overlaps with other work stands in several fusions, under one channel.

    Args:
        program: the scheduled module.
        mesh: axes and their sizes, in the order of the devices.
    """
    found: dict[str, dict[str, Any]] = {}
    for _, one, executions, _ in program.executed():
        kind = one.opcode.removesuffix("-start")
        if kind not in _KINDS:
            continue
        arrays = one.result
        if kind != one.opcode and kind != "all-reduce":
            arrays = arrays[len(arrays) // 2 :]  # operands come first
        channel, shapes = _CHANNEL.search(one.text), [[array.dtype, *array.shape] for array in arrays]
        # Equal channels of differing kinds do occur after collectives were combined. Layouts, in which the
        # fusions of one collective may differ, do not tell collectives apart.
        found[f"{kind} {channel[1]} {shapes}" if channel else one.text] = {
            "kind": kind,
            "axes": _axes(one.text, mesh),
            "executions": executions,
            "bytes": sum(array.bytes for array in arrays),
            "shapes": shapes,
        }
    return list(found.values())
