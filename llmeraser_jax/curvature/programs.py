"""Rewriting the program that a function traces to, at every depth: in loops, calls, branches and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import jax
from jax.extend import core


def rewrite_program(fn: Callable, rewrite: Callable[[core.JaxprEqn], Iterable[core.JaxprEqn]]) -> Callable:
    """`fn` with every equation of its program replaced.

    Args:
        fn: a pure function of pytrees of arrays.
        rewrite: an equation, whose own programs are rewritten already, to the equations that take its place. They
            read and define the same variables, besides their own.
    """

    def rewritten(*args):
        closed, result = jax.make_jaxpr(fn, return_shape=True)(*args)
        program = core.ClosedJaxpr(_rewrite_jaxpr(closed.jaxpr, rewrite), closed.consts)
        flat = core.jaxpr_as_fun(program)(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(result), flat)

    return rewritten


def _rewrite_jaxpr(jaxpr: core.Jaxpr, rewrite) -> core.Jaxpr:
    equations = []
    for equation in jaxpr.eqns:
        params = {name: _rewrite_value(value, rewrite) for name, value in equation.params.items()}
        equations.extend(rewrite(equation.replace(params=params)))
    return jaxpr.replace(eqns=equations)


def _rewrite_value(value, rewrite):
    """Programs among an equation's parameters; anything else as it is."""
    if isinstance(value, core.ClosedJaxpr):
        return core.ClosedJaxpr(_rewrite_jaxpr(value.jaxpr, rewrite), value.consts)
    if isinstance(value, core.Jaxpr):
        return _rewrite_jaxpr(value, rewrite)
    if type(value) in (tuple, list):
        return type(value)(_rewrite_value(item, rewrite) for item in value)
    return value
