"""The largest eigenvalue of an operator's terms, for the step sizes of stochastic solvers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llmeraser_jax import trees
from llmeraser_jax.types import FiniteSum, Key, LoraParams


def largest_term_eigenvalue(
    operator: FiniteSum, key: Key, like: LoraParams, *, num_terms: int = 4, num_products: int = 5
) -> Float[Array, ""]:
    """A lower estimate of the largest absolute eigenvalue of any term, by power iteration on a few of them.

    Mini-batch descent and LiSSA are stable only if every mini-batch's step is. The mean's eigenvalue is smaller, so
    it does not show that.

    Args:
        operator: a mean of terms.
        key: random key of the terms and of the start vectors.
        like: the structure, shapes and dtypes of adapter space.
        num_terms: terms tried.
        num_products: products with each.
    """

    def of_term(key):
        which, start = jax.random.split(key)
        term = jax.random.randint(which, (), 0, operator.num_terms)

        def iterate(v, _):
            product = operator.term_mv(term, v)
            size = trees.tree_norm(product)
            return trees.tree_scale(1 / jnp.where(size > 0, size, 1), product), size

        v = trees.tree_random_normal(start, like)
        v = trees.tree_scale(1 / trees.tree_norm(v), v)
        _, sizes = jax.lax.scan(iterate, v, length=num_products)
        return sizes[-1]

    return jnp.max(jax.lax.map(of_term, jax.random.split(key, num_terms)))
