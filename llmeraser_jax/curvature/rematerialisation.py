"""Deciding after the fact which intermediate values of a computation are kept."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.extend.core.primitives import remat_p

from llmeraser_jax.curvature.programs import rewrite_program


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

    def save_all(equation):
        if equation.primitive is not remat_p:
            return [equation]
        return [equation.replace(params={**equation.params, "policy": jax.checkpoint_policies.everything_saveable})]

    return rewrite_program(fn, save_all)
