"""Matmuls with bfloat16 inputs and float32 accumulation: a primitive, and the rewriting of a whole function."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.core as jax_core
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core.primitives import dot_general_p
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from llmeraser_jax._jaxprs.rewriting import equations_of, rewrite_equations

_FLOAT32, _BFLOAT16 = jnp.dtype("float32"), jnp.dtype("bfloat16")


def bfloat16_matmul(
    x: Float[Array, "*lead inner"], kernel: Float[Array, "rows columns"], *, transposed: bool = False
) -> Float[Array, "*lead outer"]:
    """`x @ kernel` with bfloat16 inputs and float32 accumulation, in the dtype of `x`; so are all its derivatives.

    Args:
        x: activations.
        kernel: [inner, outer].
        transposed: the kernel is [outer, inner].
    """
    return bfloat16_matmul_p.bind(x, kernel, transposed=transposed)


# A primitive of its own, because JAX transposes a `dot_general` of rounded inputs without rounding the cotangent,
# and rounds the result. Linear in each input; its transpose with respect to `x` is the same primitive.
bfloat16_matmul_p = core.Primitive("bfloat16_matmul")


def _matmul(x, kernel, *, transposed):
    dimensions = ((x.ndim - 1,), (int(transposed),)), ((), ())
    out = _dot(x, kernel, dimensions)
    return out.astype(x.dtype)


def _dot(left, right, dimensions):
    return jax.lax.dot_general(
        left.astype(_BFLOAT16), right.astype(_BFLOAT16), dimensions, preferred_element_type=_FLOAT32
    )


@bfloat16_matmul_p.def_abstract_eval
def _matmul_shape(x, kernel, *, transposed):
    return jax_core.ShapedArray((*x.shape[:-1], kernel.shape[0 if transposed else 1]), x.dtype)


def _transpose_by_x(cotangent, _, kernel, *, transposed):
    return bfloat16_matmul_p.bind(cotangent, kernel, transposed=not transposed)


def _transpose_by_kernel(cotangent, x, kernel, *, transposed):
    rows = [a.reshape(-1, a.shape[-1]) for a in (x, cotangent)]
    left, right = reversed(rows) if transposed else rows
    return _dot(left, right, (((0,), (0,)), ((), ()))).astype(kernel.aval.dtype)


def _batch(inputs, axes, *, transposed):
    x, kernel = (a if axis is None else jnp.moveaxis(a, axis, 0) for a, axis in zip(inputs, axes, strict=True))
    if axes[1] is None:
        return bfloat16_matmul_p.bind(x, kernel, transposed=transposed), 0
    x = jnp.broadcast_to(x, (len(kernel), *x.shape)) if axes[0] is None else x
    return jax.lax.map(lambda pair: bfloat16_matmul_p.bind(*pair, transposed=transposed), (x, kernel)), 0


bfloat16_matmul_p.def_impl(jax.jit(_matmul, static_argnames="transposed"))
ad.defbilinear(bfloat16_matmul_p, _transpose_by_x, _transpose_by_kernel)
batching.primitive_batchers[bfloat16_matmul_p] = _batch
mlir.register_lowering(bfloat16_matmul_p, mlir.lower_fun(_matmul, multiple_results=False))


def with_bfloat16_matmuls(fn: Callable) -> Callable:
    """`fn` with bfloat16 inputs and float32 accumulation in all its float32 matrix multiplications.

    Rewrites the traced function, its loops, branches and calls included. Apply it after taking derivatives: a
    derivative of the result would see the rounding. Multiplications of other dtypes do not change.

    Args:
        fn: a pure function of pytrees of arrays.
    """

    def rewrite(equation):
        dtypes = {atom.aval.dtype for atom in equation.invars}
        # A frozen kernel may be stored in bfloat16 already.
        if equation.primitive is not dot_general_p or _FLOAT32 not in dtypes or not dtypes <= {_FLOAT32, _BFLOAT16}:
            return [equation]
        dimensions = equation.params["dimension_numbers"]
        return equations_of(lambda a, b: _dot(a, b, dimensions), equation.invars, equation.outvars[0])

    return rewrite_equations(fn, rewrite)
