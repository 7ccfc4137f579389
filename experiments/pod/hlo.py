"""Reads the text of a compiled program: which instructions it executes, and how often."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r"  (ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_NAME = re.compile(r"%([\w.-]+)")
_CALLEE = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{(.*?)\}")
_CONDITION = re.compile(r"\bcondition=%?([\w.-]+)")
_CONSTANT = re.compile(r" s32\[\]\S* constant\((\d+)\)")
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+(?:e\dm\d\w*)?)\[([\d,]*)\](?:\{([^{}]*)\})?")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of a program.

    Attributes:
        dtype: as the text writes it, such as bf16.
        shape: its axes.
        in_hbm: whether it lies in the device's main memory and not in a memory on the chip.
    """

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool

    @property
    def size(self) -> int:
        """Numbers in it."""
        count = 1
        for axis in self.shape:
            count *= axis
        return count

    @property
    def bytes(self) -> int:
        """Of its numbers, without the padding of tiles; numbers of less than a byte take one."""
        found = re.search(r"\d+", self.dtype)
        return self.size * max(int(found[0]) if found else 8, 8) // 8


def arrays_of(text: str) -> list[Array]:
    """The arrays of a type."""
    return [
        Array(dtype, numbers(dims), re.search(r"S\([1-9]", layout) is None)
        for dtype, dims, layout in _ARRAY.findall(text)
    ]


def numbers(text: str) -> tuple[int, ...]:
    """Of `1,2,3`."""
    return tuple(int(part) for part in text.split(",") if part)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation.

    Attributes:
        name: unique in the program.
        opcode: such as fusion.
        result: the arrays that it makes.
        operands: names of instructions of the same computation.
        text: the line.
        is_root: its result is the computation's.
    """

    name: str
    opcode: str
    result: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str
    is_root: bool

    @property
    def callees(self) -> list[str]:
        """Computations that it executes."""
        branches = _BRANCHES.search(self.text)
        return _CALLEE.findall(self.text) + (_NAME.findall(branches[1]) if branches else [])


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, each a mapping of its instructions in order.

    Attributes:
        computations: all.
        entry: the name of the one that is executed.
    """

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str

    def executed(self) -> Iterator[tuple[str, Instruction, int, bool]]:
        """Computation, instruction, how often it is executed, and whether it is inside of a fusion.

        A loop whose condition names no bound itself, as a solver's, counts once. Of branches all are executed.
        """
        return self._executed(self.entry, 1, False)

    def _executed(self, name: str, times: int, fused: bool) -> Iterator[tuple[str, Instruction, int, bool]]:
        for one in self.computations.get(name, {}).values():
            yield name, one, times, fused
            within = fused or one.opcode == "fusion"
            for callee in one.callees:
                yield from self._executed(callee, times * self._trips(one), within)

    def _trips(self, one: Instruction) -> int:
        """Of a loop: the number that its condition compares with; 1 of anything else."""
        condition = _CONDITION.search(one.text)
        lines = self.computations.get(condition[1], {}).values() if condition else ()
        return max((int(bound) for line in lines for bound in _CONSTANT.findall(line.text)), default=1)


def read_program(text: str) -> Program:
    """Of a scheduled module's text."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry = name = ""
    for line in text.splitlines():
        if not line.startswith(" ") and (header := _COMPUTATION.match(line)):
            name = header[2]
            computations[name] = {}
            entry = name if header[1] else entry
        elif name and (found := _INSTRUCTION.match(line)):
            root, own, result, opcode, rest = found.groups()
            operands = tuple(_NAME.findall(rest.split(")")[0]))
            computations[name][own] = Instruction(own, opcode, tuple(arrays_of(result)), operands, line, bool(root))
    return Program(computations, entry)
