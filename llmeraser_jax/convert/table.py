"""Owns conversion tables: one list of rules that reads in one direction and writes in the other.

A rule pairs a tensor name on disk, with `{layer}` where the layer's number stands, and `{expert}` where each expert
of a layer has a tensor, with the path of a leaf and a transform. The regular expression that recognises the name,
and the inverse that produces it, both come from that one line.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, runtime_checkable

import ml_dtypes
import numpy as np

Shape = tuple[int, ...]
Index = tuple[slice, ...]
_INDICES = ("layer", "expert")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transform:
    """An invertible change of layout between a tensor on disk and one layer, or one layer's expert, of a leaf.

    Attributes:
        name: for messages.
        to_leaf: from disk.
        to_disk: its inverse.
        disk_shape: shape on disk of a leaf's layer of the given shape.
        disk_index: index on disk of a part of a leaf's layer; then `to_leaf` and `to_disk` are views, so that a
            part can be read alone. None: a tensor is read whole.
    """

    name: str
    to_leaf: Callable[[np.ndarray], np.ndarray]
    to_disk: Callable[[np.ndarray], np.ndarray]
    disk_shape: Callable[[Shape], Shape]
    disk_index: Callable[[Index], Index] | None = None


KEEP = Transform(
    name="keep",
    to_leaf=lambda x: x,
    to_disk=lambda x: x,
    disk_shape=lambda shape: shape,
    disk_index=lambda index: index,
)
TRANSPOSE = Transform(
    name="transpose",
    to_leaf=lambda x: x.T,
    to_disk=lambda x: x.T,
    disk_shape=lambda shape: shape[::-1],
    disk_index=lambda index: index[::-1],
)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a table.

    Attributes:
        name: tensor name on disk; `{layer}` stands for the layer's number, `{expert}` for that of an expert in it.
        path: leaf; with `{layer}` in `name`, the leaf stacks all layers on its first axis, with `{expert}` all
            experts on the second.
        transform: layout change.
    """

    name: str
    path: str
    transform: Transform = KEEP

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches exactly the names of this rule."""
        pattern = re.escape(self.name)
        for index in _INDICES:
            pattern = pattern.replace(re.escape(f"{{{index}}}"), rf"(?P<{index}>0|[1-9]\d*)")
        return re.compile(pattern)

    @functools.cached_property
    def indices(self) -> tuple[str, ...]:
        """The names of the leaf's first axes, which count tensors."""
        return tuple(index for index in _INDICES if f"{{{index}}}" in self.name)


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a tensor on disk belongs: a leaf, the layer (and expert) in it, and the layout change."""

    path: str
    place: tuple[int, ...]
    transform: Transform


@dataclasses.dataclass(frozen=True)
class Table:
    """An ordered list of rules.

    Attributes:
        rules: each path appears once.
        ignored: regular expressions of names on disk that hold nothing to load, e.g. constants that other
            versions of a library stored.
    """

    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what in ("name", "path"):
            values = [getattr(rule, what) for rule in self.rules]
            doubled = sorted({value for value in values if values.count(value) > 1})
            if doubled:
                msg = f"The table has more than one rule with {what} {', '.join(doubled)}; it has no inverse."
                raise ValueError(msg)

    def match(self, name: str) -> Target | None:
        """Where the tensor called `name` belongs; None if no rule knows it."""
        for rule in self.rules:
            found = rule.pattern.fullmatch(name)
            if found:
                place = tuple(int(found[index]) for index in rule.indices)
                return Target(path=rule.path, place=place, transform=rule.transform)
        return None

    def is_ignored(self, name: str) -> bool:
        """Whether `name` on disk may be passed over."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)

    def rule_of(self, path: str) -> Rule:
        """The rule that writes the leaf at `path`.

        Raises:
            ValueError: no rule does.
        """
        for rule in self.rules:
            if rule.path == path:
                return rule
        msg = f"No conversion rule writes the parameter {path!r}."
        raise ValueError(msg)

    def renamed(self, path: str, name: str) -> Table:
        """The table with the leaf at `path` called `name` on disk, and without the rule that has that name."""
        rule = dataclasses.replace(self.rule_of(path), name=name)
        kept = (rule if old.path == path else old for old in self.rules if old.path == path or old.name != name)
        return dataclasses.replace(self, rules=tuple(kept))

    def entries(self, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Target, Shape]]:
        """Every tensor on disk that the given leaves need: its name, its place, its shape on disk.

        Args:
            shapes: leaf shapes by path, the axes of layers and experts included.
        """
        for path, shape in shapes.items():
            rule = self.rule_of(path)
            axes = len(rule.indices)
            disk_shape = rule.transform.disk_shape(shape[axes:])
            for place in np.ndindex(shape[:axes]):
                name = rule.name
                for index, number in zip(rule.indices, place, strict=True):
                    name = name.replace(f"{{{index}}}", str(number))
                yield name, Target(path=path, place=place, transform=rule.transform), disk_shape


@runtime_checkable
class TensorSource(Protocol):
    """Named tensors on disk that can be described without being read."""

    def shapes(self) -> Mapping[str, tuple[Shape, str]]:
        """Shape and dtype name of every tensor."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        ...


READABLE = ("float32", "bfloat16", "float16", "float64")


def numpy_dtype(name: str) -> np.dtype:
    """The numpy dtype of a name, bfloat16 included.

    Raises:
        ValueError: not one of the floating dtypes that weights can have here.
    """
    if name not in READABLE:
        msg = f"dtype is {name!r}; choose one of {', '.join(READABLE)}."
        raise ValueError(msg)
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def import_tensors(
    table: Table, source: TensorSource, shapes: Mapping[str, Shape], dtype: str, what: str
) -> dict[str, np.ndarray]:
    """Reads all leaves, one tensor at a time, so that memory holds the leaves and one tensor more.

    Args:
        table: names and layouts.
        source: tensors on disk.
        shapes: leaf shapes by path.
        dtype: dtype of the leaves.
        what: the source's name in messages.

    Returns:
        Leaves by path.

    Raises:
        ValueError: tensors are missing, unexpected, misshapen or of a dtype that cannot be read; all of them
            are listed.
    """
    expected = check_tensors(table, source, shapes, what)
    leaves = {path: np.empty(shape, numpy_dtype(dtype)) for path, shape in shapes.items()}
    for name in expected:
        # By the regular expressions and not by `expected`, so that a table is used as it is written.
        target = table.match(name)
        assert target is not None
        leaves[target.path][target.place] = target.transform.to_leaf(source.read(name))
    return leaves


def check_tensors(
    table: Table, source: TensorSource, shapes: Mapping[str, Shape], what: str
) -> dict[str, tuple[Target, Shape]]:
    """Place and shape on disk of every tensor that the leaves need, checked against the source.

    Args:
        table, source, shapes, what: see `import_tensors`.

    Raises:
        ValueError: see `import_tensors`.
    """
    on_disk = source.shapes()
    expected = {name: (target, shape) for name, target, shape in table.entries(shapes)}
    problems = []
    for name, (_, shape) in expected.items():
        if name not in on_disk:
            problems.append(f"missing {name} {list(shape)}")
            continue
        got, stored = on_disk[name]
        if tuple(got) != tuple(shape):
            problems.append(f"misshapen {name}: got {list(got)}, expected {list(shape)}")
        if stored not in READABLE:
            problems.append(f"{name} is stored as {stored}, not as one of {', '.join(READABLE)}")
    problems += [
        f"unexpected {name} {list(shape)}"
        for name, (shape, _) in on_disk.items()
        if name not in expected and not table.is_ignored(name)
    ]
    if problems:
        msg = f"{what} does not hold the tensors that its configuration calls for ({len(problems)}): " + "; ".join(
            problems
        )
        raise ValueError(msg)
    return expected


def export_tensors(table: Table, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors as they go to disk: the inverse of `import_tensors`.

    Args:
        table: names and layouts.
        leaves: arrays by path.

    Returns:
        Contiguous arrays by name; safetensors writes a transposed view without noticing.

    Raises:
        ValueError: a leaf that no rule writes.
    """
    arrays = {path: np.asarray(leaf) for path, leaf in leaves.items()}
    out = {}
    for name, target, _ in table.entries({path: array.shape for path, array in arrays.items()}):
        out[name] = np.ascontiguousarray(target.transform.to_disk(arrays[target.path][target.place]))
    return out
