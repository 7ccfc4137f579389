"""Reads the collectives of a compiled program out of its HLO text."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

_KINDS = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
_COLLECTIVE = re.compile(rf" = (.*?) ({_KINDS})(?:-start)?\(")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) .*\{$")
_CALLEE = re.compile(r"\b(?:calls|to_apply|body|condition)=%?([\w.-]+)")
_CONDITION = re.compile(r"\bcondition=%?([\w.-]+)")
_CONSTANT = re.compile(r" s32\[\]\S* constant\((\d+)\)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}")
_COMPACT_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _bytes(dtype: str, shape: list[int]) -> int:
    bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
    return int(np.prod(shape, dtype=np.int64)) * max(bits, 8) // 8


def _axes(line: str, mesh: Mapping[str, int]) -> str:
    """The axes of the mesh along which the devices of a group differ, such as "data" or "data,model"."""
    if compact := _COMPACT_GROUPS.search(line):
        shape, dims, order = (_numbers(part or "") for part in compact.groups())
        ids = np.arange(np.prod(dims)).reshape(dims)
        group = (ids.transpose(order) if order else ids).reshape(shape)[0]
    elif listed := _GROUPS.search(line):
        group = _numbers(listed[1])
    else:
        return ",".join(axis for axis, size in mesh.items() if size > 1)
    places = np.unravel_index(group, tuple(mesh.values()))
    return ",".join(axis for axis, place in zip(mesh, places, strict=True) if len(set(place.tolist())) > 1)


def collectives(text: str, mesh: Mapping[str, int]) -> list[dict[str, Any]]:
    """Each collective of a program: kind, axes, executions, shapes, and bytes of one execution's result.

    A collective that the compiler overlaps with other work stands in several fusions, under one channel.

    A loop whose condition names no bound itself, as a solver's, counts once.

    Args:
        text: of the scheduled module.
        mesh: axes and their sizes, in the order of the devices.
    """
    lines: dict[str, list[str]] = defaultdict(list)
    entry = name = ""
    for line in text.splitlines():
        if not line.startswith(" ") and (header := _COMPUTATION.match(line)):
            name = header[2]
            entry = name if header[1] else entry
        elif name:
            lines[name].append(line)
    found: dict[str, dict[str, Any]] = {}

    def trips(line: str) -> int:
        """Of a loop: the number that its condition compares with; 1 of anything else."""
        condition = _CONDITION.search(line)
        bounds = _CONSTANT.findall("\n".join(lines[condition[1]])) if condition else []
        return max(map(int, bounds), default=1)

    def visit(computation: str, executions: int) -> None:
        for line in lines[computation]:
            for callee in _CALLEE.findall(line):
                visit(callee, executions * trips(line))
            match = _COLLECTIVE.search(line)
            if match is None:
                continue
            arrays = [(dtype, _numbers(dims)) for dtype, dims in _ARRAY.findall(match[1])]
            if "-start(" in line and match[2] != "all-reduce":
                arrays = arrays[len(arrays) // 2 :]  # operands come first
            channel = _CHANNEL.search(line)
            # Equal channels of differing kinds do occur after collectives were combined. Layouts, in which the
            # fusions of one collective may differ, do not tell collectives apart.
            found[f"{match[2]} {channel[1]} {arrays}" if channel else line] = {
                "kind": match[2],
                "axes": _axes(line, mesh),
                "executions": executions,
                "bytes": sum(_bytes(*array) for array in arrays),
                "shapes": [[dtype, *shape] for dtype, shape in arrays],
            }

    visit(entry, 1)
    return list(found.values())
