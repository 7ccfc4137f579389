"""Typed reading of a JSON object that collects all problems for one error message."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llmeraser_jax.text import show

LARGEST = 2**31 - 1


class Fields:
    """Fields of a JSON object, each read as one kind of value; problems are collected, not raised.

    A field that is absent or null has its default; without a default it is a problem. What is returned for a field
    with a problem is a valid value of its kind, so that reading continues.
    """

    def __init__(self, content: Mapping[str, Any], prefix: str = "") -> None:
        """Reads from `content`; `prefix` stands before every name in messages."""
        self.content = content
        self.prefix = prefix
        self.problems: list[str] = []

    def refuse(self, name: str, expected: str) -> None:
        """Records that a field has an unexpected value."""
        self.problems.append(f"{self.prefix}{name} = {show(self.content.get(name))} (expected {expected})")

    def _absent(self, name: str, default: Any, stand_in: Any) -> Any:
        if default is not None:
            if name in self.content:
                self.refuse(name, "a value, not null")
            return default
        self.problems.append(f"{self.prefix}{name} is missing")
        return stand_in

    def integer(self, name: str, default: int | None = None, *, least: int = 1, most: int = LARGEST) -> int:
        """A whole number from `least` to `most`."""
        value = self.content.get(name)
        if value is None:
            return self._absent(name, default, least)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self.refuse(name, f"a whole number from {least} to {most}")
            return least
        return value

    def number(self, name: str, default: float | None = None, *, least: float = 0.0) -> float:
        """A finite number of at least `least`, or above it where that is 0."""
        value = self.content.get(name)
        if value is None:
            return self._absent(name, default, 1.0)
        # An int is asked for its size first: one beyond float's range has no float.
        ordinary = not isinstance(value, bool) and isinstance(value, int | float) and abs(value) < 1e300
        if not (ordinary and math.isfinite(value) and (value > 0 if least == 0 else value >= least)):
            self.refuse(name, "a number above 0" if least == 0 else f"a number of at least {least:g}")
            return max(least, 1.0)
        return float(value)

    def optional_integer(self, name: str) -> int | None:
        """A whole number of at least 1; None where absent or null."""
        return None if self.content.get(name) is None else self.integer(name)

    def optional_number(self, name: str) -> float | None:
        """A number above 0; None where absent or null."""
        return None if self.content.get(name) is None else self.number(name)

    def boolean(self, name: str, default: bool = False) -> bool:
        """True or false; null is false."""
        value = self.content.get(name, default)
        if value is not None and not isinstance(value, bool):
            self.refuse(name, "true or false")
        return value is True

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of numbers above 0."""
        value = self.content.get(name)
        if value is None:
            return self._absent(name, None, ())
        good = isinstance(value, list | tuple) and all(
            isinstance(v, int | float) and not isinstance(v, bool) and 0 < v < 1e300 for v in value
        )
        if not good:
            self.refuse(name, "a list of numbers above 0")
            return ()
        return tuple(float(v) for v in value)

    def token_ids(self, name: str) -> list[int]:
        """One token or a list of them; older checkpoints write -1 for none."""
        value = self.content.get(name)
        ids = value if isinstance(value, list | tuple) else [value]
        ids = [v for v in ids if v is not None]
        if any(isinstance(v, bool) or not isinstance(v, int) or v > LARGEST for v in ids):
            self.refuse(name, "a token, a list of tokens, or null")
            return []
        return [v for v in ids if v >= 0]
