"""Turning rematerialisation off after the fact, for computations whose intermediate values are to be kept."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.extend import core
from jax.extend.core.primitives import remat_p


def store_everything(fn: Callable) -> Callable:
    """`fn` with every `jax.checkpoint` inside it set to save all of its intermediate values.

    A model that rematerialises its layers keeps only their inputs, so that its linearised function would run
    the primal pass again at every product. The values of `fn` are unchanged.

    Args:
        fn: a pure function of pytrees of arrays.
    """

    def stored(*args):
        closed, result = jax.make_jaxpr(fn, return_shape=True)(*args)
        rewritten = core.ClosedJaxpr(_save_all(closed.jaxpr), closed.consts)
        flat = core.jaxpr_as_fun(rewritten)(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(result), flat)

    return stored


def _save_all(jaxpr: core.Jaxpr) -> core.Jaxpr:
    """The same program, checkpoints at every depth (in scans, calls and branches) saving everything."""
    equations = []
    for equation in jaxpr.eqns:
        params = {name: _rewrite(value) for name, value in equation.params.items()}
        if equation.primitive is remat_p:
            params["policy"] = jax.checkpoint_policies.everything_saveable
        equations.append(equation.replace(params=params))
    return jaxpr.replace(eqns=equations)


def _rewrite(value):
    if isinstance(value, core.ClosedJaxpr):
        return core.ClosedJaxpr(_save_all(value.jaxpr), value.consts)
    if isinstance(value, core.Jaxpr):
        return _save_all(value)
    if type(value) in (tuple, list):
        return type(value)(_rewrite(item) for item in value)
    return value
