"""Damping as a wrapper around any operator, and mean eigenvalues, estimated by products, to scale it with.

A block is one LoRA matrix: one leaf, or one layer of a leaf that is stacked over layers.
"""

from __future__ import annotations

from functools import reduce

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llmeraser_jax import trees
from llmeraser_jax.types import FiniteSum, LoraParams, Operator, PyTree, mv_many


@flax.struct.dataclass
class Damped:
    """`A + rho I`, or `A + diag(rho_b I)` with one damping for each block. A `types.FiniteSum` where `A` is one.

    Attributes:
        operator: `A`.
        rho: at least 0: one number; or a pytree prefix of adapter space, where each leaf's shape is the beginning
            of the shapes of the leaves below it: `[]` for one number, `[layers]` for one per layer of leaves
            stacked over layers.
    """

    operator: Operator
    rho: Float[Array, ""] | float | PyTree

    @property
    def positive_semidefinite(self) -> bool:
        return self.operator.positive_semidefinite

    @property
    def num_terms(self) -> int:
        return _finite_sum(self.operator).num_terms

    def mv(self, v: LoraParams) -> LoraParams:
        """`A v + rho v`."""
        return self._add(self.operator.mv(v), v)

    def mv_many(self, vs: LoraParams) -> LoraParams:
        """The products with vectors on a leading axis of every leaf."""
        return jax.vmap(self._add)(mv_many(self.operator, vs), vs)

    def term_mv(self, k: Int[Array, ""] | int, v: LoraParams) -> LoraParams:
        """`A_k v + rho v`, whose mean over `k` is `mv(v)`."""
        return self._add(_finite_sum(self.operator).term_mv(jnp.asarray(k), v), v)

    def _add(self, product: LoraParams, v: LoraParams) -> LoraParams:
        if jax.tree_util.all_leaves([self.rho]) and jnp.ndim(self.rho) == 0:
            return trees.tree_axpy(self.rho, v, product)
        return trees.tree_add(product, damping_product(self.rho, v))


def damping_product(rhos: PyTree, v: LoraParams) -> LoraParams:
    """`rho_b v_b`: the damping term of a product.

    Args:
        rhos: as `Damped.rho`.
        v: a vector of adapter space.

    Raises:
        ValueError: a leaf's shape does not begin with its damping's.
    """

    def scale(rho, x):
        rho = jnp.asarray(rho)
        if rho.shape != x.shape[: rho.ndim]:
            msg = f"A damping of shape {rho.shape} was given for a leaf of shape {x.shape}; the leaf's shape "
            msg += "must begin with it."
            raise ValueError(msg)
        return (rho.reshape(rho.shape + (1,) * (x.ndim - rho.ndim)) * x).astype(x.dtype)

    return jax.tree.map(lambda rho, below: jax.tree.map(lambda x: scale(rho, x), below), rhos, v)


def _finite_sum(operator: Operator) -> FiniteSum:
    if not isinstance(operator, FiniteSum):
        msg = f"{type(operator).__name__} has no terms; num_terms and term_mv need an operator that is a FiniteSum."
        raise AttributeError(msg)
    return operator


def stacked_axes(like: LoraParams) -> PyTree:
    """For each leaf how many leading axes count blocks: 1 below a key "layers", as in `lora.Lora`, else 0."""

    def axes(path, _):
        return int(any(getattr(key, "key", getattr(key, "name", None)) == "layers" for key in path))

    return jax.tree_util.tree_map_with_path(axes, like)


def mean_eigenvalue(operator: Operator, key: Array, like: LoraParams, num_probes: int = 8) -> Float[Array, ""]:
    """Estimate of `trace(A) / p`, without bias.

    Hutchinson (1990): the mean of `z'Az` over vectors z of random signs; exact for a diagonal `A`.

    Args:
        operator: `A`, without damping.
        key: random key.
        like: the structure, shapes and dtypes of adapter space.
        num_probes: products that it takes; the standard error falls as one over its root.

    Raises:
        ValueError: `num_probes` is below 1.
    """
    estimates = _block_traces(operator, key, like, num_probes, jax.tree.map(lambda _: 0, like))
    return reduce(jnp.add, jax.tree.leaves(estimates)) / trees.tree_size(like)


def block_mean_eigenvalues(
    operator: Operator, key: Array, like: LoraParams, num_probes: int = 8, axes: PyTree | None = None
) -> PyTree:
    """Estimate of `trace(A_bb) / p_b` for every block's own `p_b x p_b` matrix on the diagonal, without bias.

    The blocks share each probe's product. Off-diagonal blocks add variance and no bias.

    Args:
        operator: `A`, without damping.
        key: random key.
        like: the structure, shapes and dtypes of adapter space.
        num_probes: products that it takes.
        axes: for each leaf of `like` how many leading axes count blocks; None is `stacked_axes(like)`.

    Returns:
        The structure of `like`, each leaf [] or [layers]: what `Damped` takes, once scaled.

    Raises:
        ValueError: `num_probes` is below 1.
    """
    axes = stacked_axes(like) if axes is None else axes
    traces = _block_traces(operator, key, like, num_probes, axes)
    return jax.tree.map(lambda t, x: t / (x.size // max(t.size, 1)), traces, like)


def relative_damping(mean_eigenvalues: PyTree, factor: float, *, floor: float) -> PyTree:
    """`rho = max(factor * mean eigenvalue, floor)`, for one number or for each block.

    Args:
        mean_eigenvalues: from `mean_eigenvalue` or `block_mean_eigenvalues`; may be negative where the operator
            is indefinite or the estimate noisy.
        factor: above 0.
        floor: the least damping, above 0, because memorised data shrink the eigenvalues.

    Raises:
        ValueError: `factor` or `floor` is not above 0.
    """
    if not factor > 0 or not floor > 0:
        msg = f"factor is {factor} and floor {floor}; both must be above 0."
        raise ValueError(msg)
    return jax.tree.map(lambda mean: jnp.maximum(factor * mean, floor), mean_eigenvalues)


def _block_traces(operator: Operator, key: Array, like: LoraParams, num_probes: int, axes: PyTree) -> PyTree:
    if num_probes < 1:
        msg = f"num_probes is {num_probes}; it must be at least 1."
        raise ValueError(msg)

    def probe(probe_key):
        signs = trees.tree_random_signs(probe_key, like)
        product = operator.mv(signs)

        def inner(z, az, num_axes):
            dtype = jnp.promote_types(z.dtype, jnp.float32)
            return jnp.sum(z.astype(dtype) * az.astype(dtype), axis=tuple(range(num_axes, z.ndim)))

        return jax.tree.map(inner, signs, product, axes)

    samples = jax.lax.map(probe, jax.random.split(key, num_probes))
    return jax.tree.map(lambda sample: jnp.mean(sample, axis=0), samples)
