"""Replaces the equations of a traced function, at every depth: in loops, calls, branches and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.extend import core

_Rewrite = Callable[[core.JaxprEqn], Iterable[core.JaxprEqn]]


def rewrite_equations(fn: Callable, rewrite: _Rewrite) -> Callable:
    """`fn` with every equation of its jaxpr replaced.

    Args:
        fn: a pure function of pytrees of arrays.
        rewrite: maps an equation, whose inner jaxprs are rewritten already, to the equations that replace it. They
            read and define the same variables, besides their own.
    """

    def rewritten(*args):
        closed, result = jax.make_jaxpr(fn, return_shape=True)(*args)
        program = core.ClosedJaxpr(_rewrite_jaxpr(closed.jaxpr, rewrite), closed.consts)
        return jax.tree.unflatten(jax.tree.structure(result), core.jaxpr_as_fun(program)(*jax.tree.leaves(args)))

    return rewritten


def equations_of(fn: Callable, inputs: Sequence[Any], output: core.Var) -> list[core.JaxprEqn]:
    """The equations that compute `output = fn(*inputs)`.

    Args:
        fn: a pure function of arrays; closes over none.
        inputs: variables and literals of the jaxpr that the equations are for.
        output: the variable of that jaxpr that they define.
    """
    shapes = [jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype) for atom in inputs]
    traced = jax.make_jaxpr(fn)(*shapes).jaxpr
    outer = dict(zip((*traced.invars, *traced.outvars), (*inputs, output), strict=True))

    def renamed(atoms):
        return [outer.get(atom, atom) if isinstance(atom, core.Var) else atom for atom in atoms]

    return [inner.replace(invars=renamed(inner.invars), outvars=renamed(inner.outvars)) for inner in traced.eqns]


def _rewrite_jaxpr(jaxpr: core.Jaxpr, rewrite: _Rewrite) -> core.Jaxpr:
    equations = []
    for equation in jaxpr.eqns:
        params = {name: _rewrite_value(value, rewrite) for name, value in equation.params.items()}
        equations.extend(rewrite(equation.replace(params=params)))
    return jaxpr.replace(eqns=equations)


def _rewrite_value(value, rewrite: _Rewrite):
    """Rewrites the jaxprs among an equation's parameters; returns anything else unchanged."""
    if isinstance(value, core.ClosedJaxpr):
        return core.ClosedJaxpr(_rewrite_jaxpr(value.jaxpr, rewrite), value.consts)
    if isinstance(value, core.Jaxpr):
        return _rewrite_jaxpr(value, rewrite)
    if type(value) in (tuple, list):
        return type(value)(_rewrite_value(item, rewrite) for item in value)
    return value
