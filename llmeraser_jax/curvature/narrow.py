"""Products with bfloat16 operands and float32 sums, as a wrapper around any operator.

Matrix units multiply bfloat16 numbers several times as fast as float32 ones. Only the operands of matrix products
are rounded, and only after all derivatives were taken: parameters, activations, what is elementwise and every sum
stay as wide as they are. The product is then close to a linear map and close to symmetric, and no closer: a
solver's tolerance has to stay above that (`product_asymmetry`), and a residual that is to be believed is the exact
operator's (`solvers.refinement`).
"""

from __future__ import annotations

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core.primitives import dot_general_p

from llmeraser_jax.curvature.programs import equations_of, rewrite_equations
from llmeraser_jax.types import LoraParams, Operator

_WIDE = jnp.dtype("float32")


@flax.struct.dataclass
class NarrowProducts:
    """`exact`, its matrix products computed from bfloat16 operands.

    Attributes:
        exact: any operator with float32 vectors; damping may be inside, it multiplies no matrices.
    """

    exact: Operator

    @property
    def positive_semidefinite(self) -> bool:
        """Of `exact`; rounding may move an eigenvalue near zero to either side of it."""
        return self.exact.positive_semidefinite

    def mv(self, v: LoraParams) -> LoraParams:
        """The product with `v`, approximately."""
        return narrow_products(self.exact.mv)(v)


def narrow_products(fn: Callable) -> Callable:
    """`fn` with the operands of all its float32 matrix products rounded to bfloat16, sums in float32.

    Applied to the finished program, loops, branches and calls inside it included; a derivative of the result would
    see the rounding. Products of other dtypes are left as they are.

    Args:
        fn: a pure function of pytrees of arrays.
    """

    def narrow(equation):
        is_product = equation.primitive is dot_general_p
        dtypes = {atom.aval.dtype for atom in equation.invars}
        # A frozen kernel may be stored in bfloat16 already.
        if is_product and _WIDE in dtypes and dtypes <= {_WIDE, jnp.dtype("bfloat16")}:
            return _narrow_product(equation)
        return [equation]

    return rewrite_equations(fn, narrow)


def _narrow_product(equation: core.JaxprEqn) -> list[core.JaxprEqn]:
    def product(left, right):
        return jax.lax.dot_general(
            left.astype(jnp.bfloat16),
            right.astype(jnp.bfloat16),
            equation.params["dimension_numbers"],
            preferred_element_type=jnp.float32,
        )

    return equations_of(product, equation.invars, equation.outvars[0])
