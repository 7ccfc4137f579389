"""Text from files in messages: bounded, and nothing in it that a terminal would obey."""

from __future__ import annotations

import unicodedata
from typing import Any

LONGEST_MESSAGE = 2000
# Controls, formatting (direction, joiners), half surrogates, line and paragraph separators.
_UNPRINTABLE = ("Cc", "Cf", "Cs", "Zl", "Zp")


def printable(text: str, *, keep: str = "\n\t") -> str:
    """`text` with the characters that a terminal obeys, or that cannot be encoded, written out as escapes.

    Args:
        text: any.
        keep: such characters to leave as they are.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in _UNPRINTABLE and c not in keep else c
        for c in text
    )


def show(value: Any, longest: int = 60) -> str:
    """A value for a message, cut where it is long; a text's quotes say that it is one."""
    if isinstance(value, str):
        text = repr(value[: longest + 1])  # not all of ten megabytes
    elif isinstance(value, int) and value.bit_length() > 400:
        text = f"a whole number of {value.bit_length()} bits"
    else:
        try:
            text = repr(value)
        except (RecursionError, ValueError):  # nested too deep, or an integer with too many digits inside
            text = f"a {type(value).__name__}"
    return text if len(text) <= longest else text[: longest - 3] + "..."


def bounded(message: str, longest: int = LONGEST_MESSAGE) -> str:
    """A message without unprintable characters, cut in the middle where it is long."""
    if len(message) > longest:
        half = longest // 2
        message = f"{message[:half]} [... {len(message) - 2 * half} characters ...] {message[-half:]}"
    return printable(message)


def one_line(message: object, longest: int = LONGEST_MESSAGE) -> str:
    """`bounded`, with line breaks as spaces."""
    return " ".join(bounded(str(message), longest).split())


def short_repr(value: object, **facts: object) -> str:
    """What a notebook shows of an object: its class and a few facts, in at most 480 characters."""
    shown = ", ".join(f"{name}={show(fact, 160)}" for name, fact in facts.items() if fact is not None)
    return f"{type(value).__name__}({shown if len(shown) <= 440 else shown[:437] + '...'})"
