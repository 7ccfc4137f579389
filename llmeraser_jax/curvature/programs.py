"""Rewriting the program that a function traces to, at every depth: in loops, calls, branches and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.extend import core


def evaluate_program(fn: Callable, evaluate: Callable[[core.ClosedJaxpr, list[Any]], Sequence[Any]]) -> Callable:
    """`fn` with its program evaluated in another way.

    Args:
        fn: a pure function of pytrees of arrays.
        evaluate: `(program, inputs) -> outputs`, both flat.
    """

    def evaluated(*args):
        closed, result = jax.make_jaxpr(fn, return_shape=True)(*args)
        return jax.tree.unflatten(jax.tree.structure(result), evaluate(closed, jax.tree.leaves(args)))

    return evaluated


def rewrite_program(fn: Callable, rewrite: Callable[[core.Jaxpr], core.Jaxpr]) -> Callable:
    """`fn` with its program, and every program inside it, replaced.

    Args:
        fn: a pure function of pytrees of arrays.
        rewrite: a program, whose inner programs are rewritten already, to one of the same inputs and outputs.
    """

    def evaluate(closed, inputs):
        program = core.ClosedJaxpr(_rewrite_jaxpr(closed.jaxpr, rewrite), closed.consts)
        return core.jaxpr_as_fun(program)(*inputs)

    return evaluate_program(fn, evaluate)


def rewrite_equations(fn: Callable, rewrite: Callable[[core.JaxprEqn], Iterable[core.JaxprEqn]]) -> Callable:
    """`fn` with every equation of its program replaced.

    Args:
        fn: a pure function of pytrees of arrays.
        rewrite: an equation, whose own programs are rewritten already, to the equations that take its place. They
            read and define the same variables, besides their own.
    """

    def each(jaxpr):
        return jaxpr.replace(eqns=[new for equation in jaxpr.eqns for new in rewrite(equation)])

    return rewrite_program(fn, each)


def equations_of(fn: Callable, inputs: Sequence[Any], output: core.Var) -> list[core.JaxprEqn]:
    """The equations that compute `output = fn(*inputs)`.

    Args:
        fn: a pure function of arrays; closes over none.
        inputs: what it reads: variables and literals of the program that the equations are for.
        output: the variable that they define.
    """
    shapes = [jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype) for atom in inputs]
    traced = jax.make_jaxpr(fn)(*shapes).jaxpr
    outer = dict(zip((*traced.invars, *traced.outvars), (*inputs, output), strict=True))

    def renamed(atoms):
        return [outer.get(atom, atom) if isinstance(atom, core.Var) else atom for atom in atoms]

    return [inner.replace(invars=renamed(inner.invars), outvars=renamed(inner.outvars)) for inner in traced.eqns]


def _rewrite_jaxpr(jaxpr: core.Jaxpr, rewrite) -> core.Jaxpr:
    equations = [
        equation.replace(params={name: _rewrite_value(value, rewrite) for name, value in equation.params.items()})
        for equation in jaxpr.eqns
    ]
    return rewrite(jaxpr.replace(eqns=equations))


def _rewrite_value(value, rewrite):
    """Programs among an equation's parameters; anything else as it is."""
    if isinstance(value, core.ClosedJaxpr):
        return core.ClosedJaxpr(_rewrite_jaxpr(value.jaxpr, rewrite), value.consts)
    if isinstance(value, core.Jaxpr):
        return _rewrite_jaxpr(value, rewrite)
    if type(value) in (tuple, list):
        return type(value)(_rewrite_value(item, rewrite) for item in value)
    return value
