"""Dense matrices: the oracle of small problems. Adapter space is flattened here."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from llmeraser_jax.types import LoraParams, Operator


@flax.struct.dataclass
class DenseOperator:
    """A symmetric matrix [p, p] that acts on pytrees through their flattening (leaves in tree order)."""

    matrix: Float[Array, "p p"]
    positive_semidefinite: bool = flax.struct.field(pytree_node=False, default=False)

    def mv(self, v: LoraParams) -> LoraParams:
        """`matrix @ v`."""
        flat, unravel = ravel_pytree(v)
        return unravel(self.matrix @ flat)


def materialise(operator: Operator, like: LoraParams) -> Float[Array, "p p"]:
    """The operator's matrix [p, p], column by column; `p` products, so only for small `p`."""
    flat, unravel = ravel_pytree(like)
    columns = jax.lax.map(lambda e: ravel_pytree(operator.mv(unravel(e)))[0], jnp.eye(flat.size, dtype=flat.dtype))
    return columns.T
