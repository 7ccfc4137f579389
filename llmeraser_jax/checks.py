"""Checks of a configuration's fields, each with the message that names the field, its value and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def check_choice(config: Any, name: str, allowed: Sequence[str]) -> None:
    """Refuses a field that is none of the allowed values.

    Raises:
        ValueError: the name, the value and what is allowed.
    """
    if getattr(config, name) not in allowed:
        msg = f"{name} is {getattr(config, name)!r}; it must be one of {', '.join(allowed)}."
        raise ValueError(msg)


def check_at_least(config: Any, **least: int | float) -> None:
    """Refuses fields below their least value, and nan; None passes.

    Raises:
        ValueError: the name, the value and the bound of the first one.
    """
    for name, bound in least.items():
        value = getattr(config, name)
        if value is not None and not value >= bound:
            msg = f"{name} is {value}; it must be at least {bound}."
            raise ValueError(msg)


def check_positive(config: Any, *names: str) -> None:
    """Refuses fields that are not above 0; None passes.

    Raises:
        ValueError: the name and the value of the first one.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            msg = f"{name} is {value}; it must be above 0."
            raise ValueError(msg)
