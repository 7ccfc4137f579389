"""Vector-space operations on pytrees.

Reductions run in at least float32 and leaf by leaf. Flattening into one vector (`ravel_pytree`) would gather
sharded leaves, so the package does not use it. What is called outside of compiled functions is one program itself,
and not several for each shape of a leaf.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from llmeraser_jax.parallel import to_host
from llmeraser_jax.types import PyTree

_as_one_program = partial(jax.jit, inline=True)


@_as_one_program
def tree_add(a: PyTree, b: PyTree) -> PyTree:
    """`a + b`, leaf by leaf."""
    return jax.tree.map(jnp.add, a, b)


@_as_one_program
def tree_sub(a: PyTree, b: PyTree) -> PyTree:
    """`a - b`, leaf by leaf."""
    return jax.tree.map(jnp.subtract, a, b)


@_as_one_program
def tree_scale(scalar: float | Array, a: PyTree) -> PyTree:
    """`scalar * a`; keeps each leaf's dtype."""
    return jax.tree.map(lambda x: (scalar * x).astype(x.dtype), a)


@_as_one_program
def tree_axpy(scalar: float | Array, x: PyTree, y: PyTree) -> PyTree:
    """`scalar * x + y`; keeps the dtype of `y`."""
    return jax.tree.map(lambda xi, yi: (scalar * xi + yi).astype(yi.dtype), x, y)


def tree_multiply(a: PyTree, b: PyTree) -> PyTree:
    """`a * b`, number by number; leaves broadcast, so that `b` may scale every one of many rows."""
    return jax.tree.map(lambda x, y: x * y, a, b)


def tree_zeros_like(a: PyTree) -> PyTree:
    """Zeros of the structure, shapes and dtypes of `a`."""
    return jax.tree.map(jnp.zeros_like, a)


@_as_one_program
def tree_vdot(a: PyTree, b: PyTree) -> Float[Array, ""]:
    """Inner product of two real pytrees, accumulated in at least float32."""

    def leaf_vdot(x, y):
        dtype = jnp.promote_types(jnp.promote_types(x.dtype, y.dtype), jnp.float32)
        return jnp.sum(x.astype(dtype) * y.astype(dtype))

    return reduce(jnp.add, jax.tree.leaves(jax.tree.map(leaf_vdot, a, b)))


@_as_one_program
def tree_norm(a: PyTree) -> Float[Array, ""]:
    """Euclidean norm."""
    return jnp.sqrt(tree_vdot(a, a))


def tree_max_abs(a: PyTree) -> Float[Array, ""]:
    """The largest absolute entry; 0 where there is none."""
    return reduce(jnp.maximum, (jnp.max(jnp.abs(leaf), initial=0) for leaf in jax.tree.leaves(a)))


def tree_size(a: PyTree) -> int:
    """How many numbers the tree holds."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(a))


def tree_sha256(a: PyTree) -> bytes:
    """SHA-256 over path, dtype, shape and bytes of every leaf; computed on every host.

    The tree structure is not hashed: its text differs between versions of JAX.
    """
    digest = hashlib.sha256()
    for place, leaf in jax.tree_util.tree_leaves_with_path(a):
        array = np.ascontiguousarray(to_host(leaf))
        digest.update(f"{jax.tree_util.keystr(place)} {array.dtype} {np.shape(leaf)}".encode())
        digest.update(array.tobytes())
    return digest.digest()


def tree_where(condition: Array, a: PyTree, b: PyTree) -> PyTree:
    """`a` where the scalar `condition` holds, else `b`."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def tree_all_finite(a: PyTree) -> Array:
    """True when no leaf holds a nan or an infinity."""
    return reduce(jnp.logical_and, (jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(a)))


def tree_random_normal(key: Array, like: PyTree) -> PyTree:
    """Independent standard normals of the structure, shapes and dtypes of `like`."""
    return _draw(jax.random.normal, key, like)


def tree_random_signs(key: Array, like: PyTree) -> PyTree:
    """Independent signs, 1 or -1, of the structure, shapes and dtypes of `like`."""
    return _draw(jax.random.rademacher, key, like)


def _draw(sample: Callable[..., Array], key: Array, like: PyTree) -> PyTree:
    """One draw, cut into leaves. XLA compiles a draw for every leaf more slowly than a curvature product."""
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([leaf.size for leaf in leaves])
    parts = jnp.split(sample(key, (int(ends[-1]),), jnp.result_type(*leaves)), ends[:-1])
    cut = [part.reshape(leaf.shape).astype(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)]
    return structure.unflatten(cut)


# Rows: vectors on a leading axis of every leaf, [m, ...]. Inverses divide differences of their products by a small
# damping, so these use the highest matmul precision.
_EXACT = jax.lax.Precision.HIGHEST


def rows_vdot(rows: PyTree, v: PyTree) -> Float[Array, " m"]:
    """`U v`: the inner product of each row with `v`, [m]."""

    def leaf(r, x):
        return jnp.einsum("m...,...->m", r, x, precision=_EXACT)

    return sum(jax.tree.leaves(jax.tree.map(leaf, rows, v)), start=jnp.zeros(()))


def rows_gram(rows: PyTree, others: PyTree) -> Float[Array, "m k"]:
    """`U V'`: the inner products of two sets of rows, [m, k]."""

    def leaf(a, b):
        return jnp.einsum("mx,kx->mk", a.reshape(len(a), -1), b.reshape(len(b), -1), precision=_EXACT)

    return sum(jax.tree.leaves(jax.tree.map(leaf, rows, others)), start=jnp.zeros(()))


def combine_rows(coefficients: Float[Array, " m"] | Float[Array, "m k"], rows: PyTree) -> PyTree:
    """Linear combinations of the rows: `sum_i c_i u_i`, or [k, ...] `sum_i c_ij u_i` for coefficients [m, k]."""
    subscripts = "m,m...->..." if coefficients.ndim == 1 else "mk,m...->k..."

    def leaf(r):
        return jnp.einsum(subscripts, coefficients.astype(r.dtype), r, precision=_EXACT)

    return jax.tree.map(leaf, rows)


def concatenate_rows(*parts: PyTree) -> PyTree:
    """Several sets of rows as one set."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
