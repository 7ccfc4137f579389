"""A curvature matrix summed over data, as an operator."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llmeraser_jax import trees
from llmeraser_jax.curvature.empirical_fisher import empirical_fisher_product, linearise_empirical_fisher
from llmeraser_jax.curvature.gauss_newton import gauss_newton_product, linearise_gauss_newton
from llmeraser_jax.curvature.hessian import hessian_product, linearise_hessian
from llmeraser_jax.losses import Objective, sum_over_examples, weight_sum
from llmeraser_jax.parallel import sum_over_devices
from llmeraser_jax.types import ExampleStack, LoraParams, Operator


@dataclasses.dataclass(frozen=True)
class Curvature:
    """A kind of curvature matrix.

    Attributes:
        product: `(objective, params, batch, weights, v) -> sum_i weights_i * C_i v` over one micro-batch.
        positive_semidefinite: whether that holds for every data set (weights at least 0).
        gradient_equivalents: cost of the product with one example, in units of one gradient.
        linearise: `(objective, params, stack) -> (v -> sum_i weights_i * C_i v)`, a linear map that is a pytree
            and holds its primal pass; None where a kind has none. See `curvature.linearised`.
        linearise_gradient_equivalents: cost of `linearise` with one example: a gradient for the Hessian, a
            forward pass where only the network is linearised.
    """

    product: Callable[..., LoraParams]
    positive_semidefinite: bool
    gradient_equivalents: float
    linearise: Callable[..., Callable[[LoraParams], LoraParams]] | None = None
    linearise_gradient_equivalents: float = 0.0


_FORWARD = 1 / 3

# On a frozen base a matmul, its tangent and its transpose cost the same. A gradient takes two of them, a Hessian
# product four, Gauss-Newton and the empirical Fisher matrix three.
CURVATURES: Mapping[str, Curvature] = MappingProxyType(
    {
        "hessian": Curvature(
            hessian_product,
            positive_semidefinite=False,
            gradient_equivalents=2.0,
            linearise=linearise_hessian,
            linearise_gradient_equivalents=1.0,
        ),
        "gauss-newton": Curvature(
            gauss_newton_product,
            positive_semidefinite=True,
            gradient_equivalents=1.5,
            linearise=linearise_gauss_newton,
            linearise_gradient_equivalents=_FORWARD,
        ),
        "empirical-fisher": Curvature(
            empirical_fisher_product,
            positive_semidefinite=True,
            gradient_equivalents=1.5,
            linearise=linearise_empirical_fisher,
            linearise_gradient_equivalents=_FORWARD,
        ),
    }
)


@flax.struct.dataclass
class DatasetCurvature:
    """`sum_i weights_i * C(z_i)`, each term with the L2 term's `l2 * I`.

    The data are fixed when the operator is made, so every product is of one linear map, as Krylov solvers require.
    Memory is that of one micro-batch. The micro-batches are the terms of a `types.FiniteSum`.
    """

    objective: Objective
    params: LoraParams
    stack: ExampleStack
    kind: Curvature = flax.struct.field(pytree_node=False)

    @property
    def positive_semidefinite(self) -> bool:
        return self.kind.positive_semidefinite

    @property
    def setup_cost(self) -> float:
        """Gradient equivalents computed before the first product, per example."""
        return 0.0

    @property
    def product_cost(self) -> float:
        """Gradient equivalents of a product, per example."""
        return self.kind.gradient_equivalents

    @property
    def num_terms(self) -> int:
        """Micro-batches, over all buckets."""
        return sum(weights.shape[0] for weights in self.stack.weights)

    def _chunk_mv(self, objective, params, v, batch, weights):
        """One micro-batch's share, without the L2 term."""
        return self.kind.product(objective, params, batch, weights, v)

    def _sum(self, fn: Callable[..., LoraParams], vs: LoraParams) -> LoraParams:
        """`sum over micro-batches of fn(objective, params, vs, batch, weights)`, and the L2 term times `vs`."""
        total_weight, data_term = sum_over_examples(
            fn, self.stack, self.objective, self.params, vs, zero=trees.tree_zeros_like(vs)
        )
        return trees.tree_axpy(self.objective.l2 * total_weight, vs, data_term)

    def mv(self, v: LoraParams) -> LoraParams:
        """The product with `v`, micro-batch by micro-batch."""
        return self._sum(self._chunk_mv, v)

    def mv_many(self, vs: LoraParams) -> LoraParams:
        """The products with vectors on a leading axis of every leaf; they share each micro-batch's primal pass.

        A CPU linearises a micro-batch and multiplies the vectors one after the other: each of 8 takes 0.7 of a
        product alone at a million parameters, and less memory than vectorised (`experiments/benchmarks`).
        """
        linearise = self.kind.linearise
        if linearise is None or jax.default_backend() != "cpu":
            return jax.vmap(self.mv)(vs)

        def of_chunk(objective, params, vs, batch, weights):
            one = ExampleStack(*jax.tree.map(lambda x: x[None], ((batch,), (weights,))))
            return jax.lax.map(linearise(objective, params, one), vs)

        return self._sum(of_chunk, vs)

    def term_mv(self, k: Int[Array, ""] | int, v: LoraParams) -> LoraParams:
        """`num_terms` times micro-batch `k`'s share of the product, so that the mean over `k` is `mv(v)`.

        Every term has the whole L2 term, which is the same for all of them.

        Args:
            k: in [0, num_terms), buckets in order; may be traced.
            v: a vector of adapter space.
        """
        counts = [weights.shape[0] for weights in self.stack.weights]
        starts = np.cumsum([0, *counts])[:-1]

        def product(stack, objective, params, k, v):
            def from_bucket(bucket):
                def term(k, v):
                    batch, weights = jax.tree.map(
                        lambda x: jax.lax.dynamic_index_in_dim(x, k - starts[bucket], keepdims=False),
                        (stack.batches[bucket], stack.weights[bucket]),
                    )
                    return self._chunk_mv(objective, params, v, batch, weights)

                return term

            bucket = jnp.sum(k >= jnp.asarray(starts)) - 1
            data_term = jax.lax.switch(bucket, [from_bucket(b) for b in range(len(counts))], k, v)
            l2 = objective.l2 * weight_sum(stack)
            return trees.tree_axpy(l2, v, trees.tree_scale(float(self.num_terms), data_term))

        return sum_over_devices(product, self.stack, self.objective, self.params, jnp.asarray(k), v)


def product_asymmetry(operator: Operator, u: LoraParams, v: LoraParams) -> Float[Array, ""]:
    """`|u'Av - v'Au| / (||u|| ||Av||)`: rounding only, where the operator is symmetric.

    Conjugate gradients need it well below their tolerance. Costs two products.

    Args:
        operator: any.
        u: a vector of adapter space, drawn at random (`trees.tree_random_normal`).
        v: another one.
    """
    return _asymmetry(u, v, operator.mv(u), operator.mv(v))


@partial(jax.jit, inline=True)
def _asymmetry(u: LoraParams, v: LoraParams, au: LoraParams, av: LoraParams) -> Float[Array, ""]:
    return abs(trees.tree_vdot(u, av) - trees.tree_vdot(v, au)) / (trees.tree_norm(u) * trees.tree_norm(av))
