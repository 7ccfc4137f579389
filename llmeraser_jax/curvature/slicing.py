"""Loops inside loops that cut their input once, where each would cut it in its turn.

A cached product loops over micro-batches and, inside, over layers. The outer loop copies what is kept of one
micro-batch for all layers, and the inner one what is kept of a layer out of that copy. Here the outer slice has a
name only, its index, and the inner loop cuts the layer out of the whole (measured in `experiments/benchmarks`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core.primitives import jit_p, remat_p, scan_p

from llmeraser_jax.curvature.programs import evaluate_program


def slice_in_inner_loops(fn: Callable) -> Callable:
    """`fn` with the slices that its loops run over taken where they are used. Its values are unchanged.

    Applied to the finished program: calls and checkpoints that a slice goes into are opened, and checkpoints matter
    to derivatives only.

    Args:
        fn: a pure function of pytrees of arrays.
    """
    return evaluate_program(fn, lambda closed, inputs: _evaluate(closed.jaxpr, closed.consts, inputs))


class _Slice:
    """`whole[index]`, taken when it is first asked for."""

    def __init__(self, whole: jax.Array, index: jax.Array):
        self._whole, self._index, self._taken = whole, index, None

    def take(self) -> jax.Array:
        if self._taken is None:
            self._taken = jax.lax.dynamic_index_in_dim(self._whole, self._index, keepdims=False)
        return self._taken

    def slice(self, index: jax.Array) -> _Slice:
        """`whole[self.index][index]`, without the former."""
        first, second, *rest = self._whole.shape
        return _Slice(self._whole.reshape(first * second, *rest), self._index * second + index)


def _take(value: Any) -> Any:
    return value.take() if isinstance(value, _Slice) else value


def _evaluate(jaxpr: core.Jaxpr, consts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """The outputs of a program; its inputs may be slices."""
    known: dict[core.Var, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *inputs), strict=True))

    def read(atom):
        return known[atom] if isinstance(atom, core.Var) else atom.val

    for equation in jaxpr.eqns:
        values = [read(atom) for atom in equation.invars]
        if equation.primitive is scan_p and equation.params["length"] > 0:
            outputs = _scan(equation, values)
        elif equation.primitive in (remat_p, jit_p) and any(isinstance(value, _Slice) for value in values):
            outputs = _evaluate(*_body(equation), values)
        else:
            read_here = {atom: _take(known[atom]) for atom in equation.invars if isinstance(atom, core.Var)}
            alone = jaxpr.replace(constvars=[], invars=list(read_here), outvars=equation.outvars, eqns=[equation])
            outputs = core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*read_here.values())
        known.update(zip(equation.outvars, outputs, strict=True))
    return [_take(read(atom)) for atom in jaxpr.outvars]


def _body(equation: core.JaxprEqn) -> tuple[core.Jaxpr, Sequence[Any]]:
    """The program inside an equation, and its constants."""
    inner = equation.params["jaxpr"]
    return (inner.jaxpr, inner.consts) if isinstance(inner, core.ClosedJaxpr) else (inner, ())


def _scan(equation: core.JaxprEqn, values: list[Any]) -> list[Any]:
    """A loop that counts, and whose slices are those of its input."""
    params, (body, its_consts) = equation.params, _body(equation)
    # Told by their shapes, since versions of JAX name them in different ways: what a loop runs over and what it
    # stacks has an axis more outside than inside.
    same_in, same_out = _as_outside(equation.invars, body.invars), _as_outside(equation.outvars, body.outvars)
    num_carry = sum(same_out)
    num_consts = sum(same_in) - num_carry
    consts, xs = list(map(_take, values[:num_consts])), values[num_consts + num_carry :]

    def step(carry, index):
        slices = [x.slice(index) if isinstance(x, _Slice) else _Slice(x, index) for x in xs]
        outputs = _evaluate(body, its_consts, [*consts, *carry, *slices])
        return outputs[:num_carry], outputs[num_carry:]

    carry, ys = jax.lax.scan(
        step,
        list(map(_take, values[num_consts : num_consts + num_carry])),
        jnp.arange(params["length"]),
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *ys]


def _as_outside(outer: Sequence[Any], inner: Sequence[Any]) -> list[bool]:
    return [o.aval.shape == i.aval.shape for o, i in zip(outer, inner, strict=True)]
