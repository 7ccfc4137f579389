"""The matmul precision of products with frozen matrices: one setting for training, evaluation and curvature.

A kernel enters the product in its storage dtype. Converting it first would make a float32 copy of a bfloat16 base,
and a matrix unit takes six bfloat16 passes for float32 inputs.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llmeraser_jax._jaxprs import bfloat16_matmul

MatmulPrecision = Literal["auto", "float32", "tf32", "bfloat16"]
MATMUL_PRECISIONS: tuple[str, ...] = get_args(MatmulPrecision)


def resolve_precision(setting: str, kernel_dtype: jnp.dtype) -> str:
    """The precision that a setting selects for a kernel on the available devices: "float32", "tf32" or "bfloat16".

    Args:
        setting: one of `MATMUL_PRECISIONS`; "auto" is bfloat16 on an accelerator where the kernel is stored so,
            else float32.
        kernel_dtype: the storage dtype; of a quantised kernel, the dtype that it is dequantised to.
    """
    if setting != "auto":
        return setting
    return "bfloat16" if jax.default_backend() != "cpu" and kernel_dtype == jnp.bfloat16 else "float32"


def frozen_product(
    x: Float[Array, "*lead inner"],
    kernel: Float[Array, "rows columns"],
    setting: str = "float32",
    *,
    transposed: bool = False,
) -> Float[Array, "*lead outer"]:
    """`x @ kernel` in the dtype of `x`, which is float32 or wider.

    Args:
        x: activations.
        kernel: as stored, [inner, outer].
        setting: "float32" is XLA's precision HIGHEST; "tf32" is HIGH: TF32 on a GPU, three bfloat16 passes on a
            TPU, float32 on a CPU. "bfloat16" uses bfloat16 inputs with float32 accumulation, in every derivative
            too. "auto": see `resolve_precision`.
        transposed: the kernel is [outer, inner].
    """
    setting = resolve_precision(setting, kernel.dtype)
    if setting == "bfloat16":
        return bfloat16_matmul(x, kernel, transposed=transposed)
    precision = {"float32": jax.lax.Precision.HIGHEST, "tf32": jax.lax.Precision.HIGH}[setting]
    return jax.lax.dot_general(
        x,
        kernel,
        (((x.ndim - 1,), (int(transposed),)), ((), ())),
        precision=precision,
        preferred_element_type=x.dtype,
    )
