"""Owns how products with frozen matrices are computed: one setting for training, evaluation and curvature alike.

A kernel is handed to the product as it is stored. Converting it first would make a float32 copy of a narrow base,
and on a matrix unit float32 operands take six bfloat16 passes.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.core as jax_core
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

MatmulPrecision = Literal["auto", "float32", "tf32", "bfloat16"]
MATMUL_PRECISIONS: tuple[str, ...] = get_args(MatmulPrecision)


def resolve_precision(setting: str, kernel_dtype: jnp.dtype) -> str:
    """What a setting means for a kernel on the devices that there are: "float32", "tf32" or "bfloat16".

    Args:
        setting: one of `MATMUL_PRECISIONS`; "auto" is bfloat16 on an accelerator where the kernel is stored so,
            else float32.
        kernel_dtype: as stored, or as a quantised kernel is dequantised.
    """
    if setting != "auto":
        return setting
    narrow = jax.default_backend() != "cpu" and kernel_dtype == jnp.bfloat16
    return "bfloat16" if narrow else "float32"


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
        setting: "float32" and "tf32" are XLA's precisions HIGHEST and HIGH: exact, and what a GPU multiplies as
            TF32 and a TPU in three bfloat16 passes; a CPU does not tell them apart. "bfloat16" rounds both operands
            and adds in float32, in every derivative too. "auto": see `resolve_precision`.
        transposed: the kernel is [outer, inner].
    """
    setting = resolve_precision(setting, kernel.dtype)
    if setting == "bfloat16":
        return narrow_product_p.bind(x, kernel, transposed=transposed)
    precision = {"float32": jax.lax.Precision.HIGHEST, "tf32": jax.lax.Precision.HIGH}[setting]
    return jax.lax.dot_general(
        x, kernel, _dimensions(x, transposed), precision=precision, preferred_element_type=x.dtype
    )


def _dimensions(x, transposed):
    return ((x.ndim - 1,), (int(transposed),)), ((), ())


# A primitive of its own, because the transpose of a `dot_general` of rounded operands does not round the cotangent
# that it multiplies, and rounds its result instead. Linear in each operand; the transpose by `x` is itself.
narrow_product_p = core.Primitive("narrow_product")


def _narrow_product(x, kernel, *, transposed):
    narrow = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    out = jax.lax.dot_general(*narrow, _dimensions(x, transposed), preferred_element_type=jnp.float32)
    return out.astype(x.dtype)


@narrow_product_p.def_abstract_eval
def _narrow_product_shape(x, kernel, *, transposed):
    return jax_core.ShapedArray((*x.shape[:-1], kernel.shape[0 if transposed else 1]), x.dtype)


def _transpose_by_x(cotangent, _, kernel, *, transposed):
    return narrow_product_p.bind(cotangent, kernel, transposed=not transposed)


def _transpose_by_kernel(cotangent, x, kernel, *, transposed):
    rows = [a.reshape(-1, a.shape[-1]).astype(jnp.bfloat16) for a in (x, cotangent)]
    left, right = reversed(rows) if transposed else rows
    out = jax.lax.dot_general(left, right, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return out.astype(kernel.aval.dtype)


def _narrow_products(operands, axes, *, transposed):
    x, kernel = (a if axis is None else jnp.moveaxis(a, axis, 0) for a, axis in zip(operands, axes, strict=True))
    if axes[1] is None:
        return narrow_product_p.bind(x, kernel, transposed=transposed), 0
    x = jnp.broadcast_to(x, (len(kernel), *x.shape)) if axes[0] is None else x
    return jax.lax.map(lambda pair: narrow_product_p.bind(*pair, transposed=transposed), (x, kernel)), 0


narrow_product_p.def_impl(jax.jit(_narrow_product, static_argnames="transposed"))
ad.defbilinear(narrow_product_p, _transpose_by_x, _transpose_by_kernel)
batching.primitive_batchers[narrow_product_p] = _narrow_products
mlir.register_lowering(narrow_product_p, mlir.lower_fun(_narrow_product, multiple_results=False))
