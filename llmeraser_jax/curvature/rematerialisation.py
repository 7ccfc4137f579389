"""Deciding after the fact which intermediate values of a computation are kept.

A model that rematerialises its layers keeps only their inputs, so that its linearised function would run the primal
pass again at every product. Keeping everything instead is no gain over keeping the products of matrices: what is
elementwise, and the products of attention, is two fifths and more of all values, and reading them takes about as
long as computing them (measured in `experiments/benchmarks`).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.extend.core.primitives import remat_p

from llmeraser_jax.curvature.programs import rewrite_equations
from llmeraser_jax.models.precision import narrow_product_p

Policy = Callable[..., bool]  # as `jax.checkpoint` takes it


def _narrow_products(primitive, *_, **__) -> bool:
    return primitive is narrow_product_p


_either = jax.checkpoint_policies.save_from_both_policies
PRODUCTS: Policy = _either(jax.checkpoint_policies.dots_saveable, _narrow_products)
PRODUCTS_WITH_MATRICES: Policy = _either(  # not those of attention
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _narrow_products
)


def set_checkpoints(fn: Callable, policy: Policy) -> Callable:
    """`fn` with every `jax.checkpoint` inside it set to keep what `policy` says. Its values are unchanged.

    Args:
        fn: a pure function of pytrees of arrays, before any derivative is taken.
        policy: what is kept; the rest is computed again where a derivative needs it.
    """

    def with_policy(equation):
        if equation.primitive is not remat_p:
            return [equation]
        return [equation.replace(params={**equation.params, "policy": policy})]

    return rewrite_equations(fn, with_policy)
