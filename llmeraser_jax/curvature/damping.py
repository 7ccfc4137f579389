"""Damping as a wrapper around any operator."""

from __future__ import annotations

import flax.struct
from jaxtyping import Array, Float

from llmeraser_jax import trees
from llmeraser_jax.types import LoraParams, Operator


@flax.struct.dataclass
class Damped:
    """`A + rho I`."""

    operator: Operator
    rho: Float[Array, ""] | float  # damping, at least 0

    @property
    def positive_semidefinite(self) -> bool:
        return self.operator.positive_semidefinite

    def mv(self, v: LoraParams) -> LoraParams:
        """`A v + rho v`."""
        return trees.tree_axpy(self.rho, v, self.operator.mv(v))
