"""An approximate inverse as a solver, with one product to measure the residual."""

from __future__ import annotations

import flax.struct
import jax.numpy as jnp

from llmeraser_jax import trees
from llmeraser_jax.solvers import common, descent
from llmeraser_jax.types import LoraParams, Operator, Preconditioner, Solution


@flax.struct.dataclass
class DirectInverse:
    """The solver: a pytree, since its inverse holds arrays.

    Attributes:
        inverse: approximates the operator's inverse: a `SpectralPreconditioner` or a `curvature.EkFac`.
        rtol: call the solution converged where the true relative residual is at most this.
    """

    inverse: Preconditioner
    rtol: float = flax.struct.field(pytree_node=False, default=1e-2)

    @property
    def max_products(self) -> int:
        """The true residual's."""
        return 1

    def solve(self, operator: Operator, rhs: LoraParams) -> Solution:
        """`inverse.solve(rhs)`.

        Args:
            operator: for the residual only, at one product.
            rhs: a vector of adapter space, float32 or wider.

        Returns:
            The solution, after 0 steps. Its status is `MAX_STEPS`, not converged, where the true relative residual
            is above `rtol`, and `DIVERGED` where the step does not lower the quadratic `1/2 x'Ax - b'x` either.
            `negative_curvature` says that `x'Ax <= 0`. `history` is empty, `ritz_extremes` are nan.
        """
        unit_rhs, unit = common.to_units(rhs)
        value = trees.tree_scale(unit, self.inverse.solve(unit_rhs))
        return descent.conclude(
            operator,
            rhs,
            value,
            common.effective_tolerance(self.rtol, trees.tree_vdot(rhs, rhs).dtype),
            num_steps=jnp.zeros((), jnp.int32),
            num_products=jnp.ones((), jnp.int32),
            non_finite=~(trees.tree_all_finite(value) & trees.tree_all_finite(rhs)),
            diverged=jnp.zeros((), bool),
            history=jnp.zeros((0,), trees.tree_vdot(rhs, rhs).dtype),
            worse_than_nothing_diverged=True,
        )
