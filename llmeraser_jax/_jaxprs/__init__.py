"""Private: rewriting of jaxprs, and one primitive. Nothing else in the package uses `jax.extend.core`."""

from llmeraser_jax._jaxprs.bfloat16 import bfloat16_matmul, with_bfloat16_matmuls
from llmeraser_jax._jaxprs.checkpoints import MATMULS, MATMULS_WITH_MATRICES, Policy, set_checkpoints
from llmeraser_jax._jaxprs.rewriting import equations_of, rewrite_equations

__all__ = [
    "MATMULS",
    "MATMULS_WITH_MATRICES",
    "Policy",
    "bfloat16_matmul",
    "equations_of",
    "rewrite_equations",
    "set_checkpoints",
    "with_bfloat16_matmuls",
]
