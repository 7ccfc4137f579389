"""Deciding after the fact which intermediate values of a computation are kept."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.extend import core
from jax.extend.core.primitives import remat_p


def store_matrix_products(fn: Callable) -> Callable:
    """`fn`, whose linearisation keeps its products with matrices and computes everything else again from them.

    What is elementwise, and the products of attention (they have batch axes), is two thirds and more of what a
    gradient's linearisation keeps, and reading it takes about as long as computing it: measured in
    `experiments/benchmarks`.

    Args:
        fn: a pure function of pytrees of arrays.
    """
    return jax.checkpoint(fn, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable, prevent_cse=False)


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
