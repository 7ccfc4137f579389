"""A curvature matrix summed over data, as an operator."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import flax.struct
import jax
from jaxtyping import Array, Float

from llmeraser_jax import trees
from llmeraser_jax.curvature.gauss_newton import gauss_newton_product
from llmeraser_jax.curvature.hessian import hessian_product
from llmeraser_jax.losses import Objective, scan_weighted_sum, weight_sum
from llmeraser_jax.types import ExampleStack, LoraParams, Operator


@dataclasses.dataclass(frozen=True)
class Curvature:
    """One kind of curvature matrix.

    Attributes:
        product: `(objective, params, batch, weights, v) -> sum_i weights_i * C_i v` over one micro-batch.
        positive_semidefinite: whether that holds for every data set (weights at least 0).
        gradient_equivalents: cost of the product with one example, in units of one gradient.
    """

    product: Callable[..., LoraParams]
    positive_semidefinite: bool
    gradient_equivalents: float


CURVATURES: Mapping[str, Curvature] = MappingProxyType(
    {
        "hessian": Curvature(hessian_product, positive_semidefinite=False, gradient_equivalents=2.0),
        "gauss-newton": Curvature(gauss_newton_product, positive_semidefinite=True, gradient_equivalents=1.5),
    }
)


@flax.struct.dataclass
class DatasetCurvature:
    """`sum_i weights_i * C(z_i)`, each term with the L2 term's `l2 * I`.

    The data, and so the linear map, are fixed when the operator is made: the recurrence of a Krylov solver is
    valid on it. Memory is that of one micro-batch.
    """

    objective: Objective
    params: LoraParams
    stack: ExampleStack
    kind: Curvature = flax.struct.field(pytree_node=False)

    @property
    def positive_semidefinite(self) -> bool:
        return self.kind.positive_semidefinite

    def mv(self, v: LoraParams) -> LoraParams:
        """The product with `v`, micro-batch by micro-batch."""
        product = partial(self.kind.product, self.objective, self.params, v=v)
        data_term = scan_weighted_sum(
            lambda batch, weights: product(batch=batch, weights=weights), self.stack, trees.tree_zeros_like(v)
        )
        return trees.tree_axpy(self.objective.l2 * weight_sum(self.stack), v, data_term)


def product_asymmetry(operator: Operator, key: Array, like: LoraParams) -> Float[Array, ""]:
    """`|u'Av - v'Au| / (||u|| ||Av||)` for random u and v: rounding alone, when the operator is symmetric.

    Conjugate gradients need this well below their tolerance. Costs two products.
    """
    u, v = (trees.tree_random_normal(k, like) for k in jax.random.split(key))
    av, au = operator.mv(v), operator.mv(u)
    return abs(trees.tree_vdot(u, av) - trees.tree_vdot(v, au)) / (trees.tree_norm(u) * trees.tree_norm(av))
