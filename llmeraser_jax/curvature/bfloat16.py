"""An operator whose matrix multiplications use bfloat16 inputs with float32 accumulation.

Matrix units multiply bfloat16 several times as fast as float32. Parameters, activations, elementwise values and
sums stay float32. The result is only nearly linear and nearly symmetric: a solver's tolerance must stay above the
asymmetry (`product_asymmetry`), and a final residual must come from the exact operator (`solvers.Refined`).
"""

from __future__ import annotations

import flax.struct

from llmeraser_jax._jaxprs import with_bfloat16_matmuls
from llmeraser_jax.types import LoraParams, Operator


@flax.struct.dataclass
class Bfloat16Products:
    """`exact`, computed with bfloat16 matmul inputs and float32 accumulation.

    Attributes:
        exact: any operator on float32 vectors. It may be damped; damping multiplies no matrices.
    """

    exact: Operator

    @property
    def positive_semidefinite(self) -> bool:
        """That of `exact`; rounding may move an eigenvalue across zero."""
        return self.exact.positive_semidefinite

    def mv(self, v: LoraParams) -> LoraParams:
        """The product with `v`, approximately."""
        return with_bfloat16_matmuls(self.exact.mv)(v)
