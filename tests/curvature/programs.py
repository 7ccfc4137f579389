"""Reading the programs that functions trace to."""

from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import core


def equations(jaxpr: core.Jaxpr) -> Iterator[Any]:
    """All equations of a program, at every depth, a loop's body once."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program):
            if _is_program(value):
                yield from equations(getattr(value, "jaxpr", value))


def products(jaxpr: core.Jaxpr) -> list[Any]:
    """Those that multiply matrices."""
    return [equation for equation in equations(jaxpr) if equation.primitive.name == "dot_general"]


def _is_program(value) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")
