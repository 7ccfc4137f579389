"""Eigenvalue-corrected Kronecker factors (EK-FAC) of the Gauss-Newton matrix, for adapters made of matrices.

Every matrix of the adapter (a leaf, or one layer of a leaf stacked over layers) gets a block of its own; blocks do
not couple. With `G_i = J_i' c_i` the pseudo-gradient of example i for that matrix, `E[c c'] = H_out` as in
`curvature.factor`, the block is `sum_i w_i E[vec(G_i) vec(G_i)']`. It is taken as diagonal in a Kronecker basis
`Q_left x Q_right`, with

    s = sum_i w_i (Q_left' G_i Q_right)^2       (elementwise square; `ekfac`)

on its diagonal, which no other diagonal in that basis beats in Frobenius norm (George et al. 2018,
arXiv 1806.03884; for influence functions Grosse et al. 2023, arXiv 2308.03296). The basis is that of the factors

    example_factors:   sum_i w_i G_i G_i'  and  sum_i w_i G_i' G_i        (Gupta et al. 2018, Shampoo's)
    curvature.taps:    sums over tokens of h h' and x x'                  (K-FAC's own)

which agree, up to a scalar and where tokens are independent, when an example is one token. The first needs only the
objective; the second the network's activations. Memory: `m^2 + n^2 + m n` numbers for a matrix [m, n].
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from llmeraser_jax import checkpoint, trees
from llmeraser_jax.curvature.factor import example_keys
from llmeraser_jax.lora import COPIES, Lora
from llmeraser_jax.losses import Objective, weight_sum
from llmeraser_jax.parallel import on_primary, to_host
from llmeraser_jax.types import Batch, ExampleStack, Key, LoraParams, PyTree

_EXACT = jax.lax.Precision.HIGHEST


@flax.struct.dataclass
class KroneckerFactors:
    """Two symmetric positive semidefinite matrices for every matrix of the adapter; their scale does not matter.

    Attributes:
        left: leaves [..., m, m] for an adapter's leaves [..., m, n].
        right: leaves [..., n, n].
    """

    left: LoraParams
    right: LoraParams


@flax.struct.dataclass
class EkFac:
    """`Q (diag(s) + mu) Q'` with `Q = Q_left x Q_right` for every matrix: an operator and its own inverse.

    Attributes:
        left: eigenvectors `Q_left`, columns of leaves [..., m, m].
        right: eigenvectors `Q_right`, columns of leaves [..., n, n].
        eigenvalues: `s` of the data term, leaves [..., m, n], at least 0.
        mu: above 0: the share of the L2 term and the damping.
    """

    left: LoraParams
    right: LoraParams
    eigenvalues: LoraParams
    mu: Float[Array, ""] | float

    @property
    def positive_semidefinite(self) -> bool:
        return True

    def mv(self, v: LoraParams) -> LoraParams:
        """The product with `v`."""
        return self._apply(v, lambda s, x: (s + self.mu) * x)

    def solve(self, v: LoraParams) -> LoraParams:
        """The inverse times `v`; no pass through the network."""
        return self._apply(v, lambda s, x: x / (s + self.mu))

    def with_mu(self, mu: Float[Array, ""] | float) -> EkFac:
        """The same factors for another damping."""
        return dataclasses.replace(self, mu=mu)

    def to_basis(self, v: LoraParams) -> LoraParams:
        """`Q' v`: its coordinates in the Kronecker basis, in which the operator is `diag(s) + mu`."""
        return jax.tree.map(_to_basis, self.left, self.right, v)

    def _apply(self, v: LoraParams, fn: Callable[[Array, Array], Array]) -> LoraParams:
        def leaf(left, right, s, x):
            inner = _to_basis(left, right, x)
            return jnp.einsum("...am,...mn,...bn->...ab", left, fn(s, inner), right, precision=_EXACT).astype(
                x.dtype
            )

        return jax.tree.map(leaf, self.left, self.right, self.eigenvalues, v)


def example_factors(
    objective: Objective, params: LoraParams, stack: ExampleStack, key: Key, *, num_roots: int = 1
) -> KroneckerFactors:
    """`sum_i w_i E[G_i G_i']` and `sum_i w_i E[G_i' G_i]`, one micro-batch at a time.

    Args:
        objective: with an `output_root_fn`.
        params: where; leaves have at least two axes.
        stack: the examples and their coefficients `w_i`, at least 0.
        key: of the random roots.
        num_roots: random roots per example, at one backward pass each.

    Raises:
        ValueError: no roots, a leaf that is no matrix, or trained copies.
    """

    def sums(rows, weights):
        return KroneckerFactors(
            left=jax.tree.map(lambda g: _einsum("bk...mi,bk...ni,b->...mn", g, g, weights), rows),
            right=jax.tree.map(lambda g: _einsum("bk...im,bk...in,b->...mn", g, g, weights), rows),
        )

    return _sum_over_rows(objective, params, stack, key, num_roots, sums)


def ekfac(
    objective: Objective,
    params: LoraParams,
    stack: ExampleStack,
    key: Key,
    *,
    factors: KroneckerFactors,
    damping: float | Float[Array, ""],
    num_roots: int = 1,
) -> EkFac:
    """The corrected eigenvalues in the factors' eigenbasis: an approximation of `sum_i w_i G(z_i) + damping I`.

    Args:
        objective: with an `output_root_fn`.
        params: where.
        stack: the examples and their coefficients `w_i`, at least 0.
        key: of the random roots; another one than the factors' had keeps the eigenvalues unbiased.
        factors: from `example_factors` or `curvature.taps.token_factors`.
        damping: rho; the L2 term's share is added to it.
        num_roots: random roots per example, at one backward pass each.

    Raises:
        ValueError: no roots, a leaf that is no matrix, or trained copies.
    """
    left, right = (jax.tree.map(lambda f: jnp.linalg.eigh(f)[1], side) for side in (factors.left, factors.right))

    def leaf(l, r, g, weights):
        inner = jnp.einsum("...am,bk...ac,...cn->bk...mn", l, g, r, precision=_EXACT)
        return _einsum("bk...mn,bk...mn,b->...mn", inner, inner, weights)

    def sums(rows, weights):
        return jax.tree.map(partial(leaf, weights=weights / num_roots), left, right, rows)

    eigenvalues = _sum_over_rows(objective, params, stack, key, num_roots, sums)
    return EkFac(left, right, eigenvalues, damping + objective.l2 * weight_sum(stack))


def _to_basis(left: Array, right: Array, x: Array) -> Array:
    return _einsum("...am,...ab,...bn->...mn", left, x, right)


def _einsum(subscripts: str, *operands: Array) -> Array:
    return jnp.einsum(subscripts, *operands, precision=_EXACT)


def refuse_copies(params: LoraParams) -> None:
    """Refuses an adapter with trained copies: a factor of an embedding has as many rows as there are tokens.

    Raises:
        ValueError: there are some.
    """
    if isinstance(params, Lora) and COPIES in params.params:
        msg = (
            f"Kronecker factors are for low-rank updates, and the adapter holds copies of "
            f"{', '.join(params.config.modules_to_save)} (modules_to_save); solve with rows, or without a "
            "preconditioner."
        )
        raise ValueError(msg)


def _sum_over_rows(
    objective: Objective,
    params: LoraParams,
    stack: ExampleStack,
    key: Key,
    num_roots: int,
    fn: Callable[[LoraParams, Float[Array, " batch"]], PyTree],
) -> PyTree:
    """`sum over micro-batches of fn(rows, weights)`, rows `J_i' c_i` with leaves [batch, roots, ...]."""
    root_fn = objective.output_root_fn
    if root_fn is None or num_roots < 1:
        msg = f"num_roots is {num_roots} and output_root_fn {root_fn}; Kronecker factors need both."
        raise ValueError(msg)
    refuse_copies(params)
    if flat := [leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim < 2]:
        msg = f"Leaves of shapes {flat} are no matrices; Kronecker factors need leaves [..., m, n]."
        raise ValueError(msg)

    def rows_of(batch: Batch, key: Key) -> LoraParams:
        outputs, pull_back = jax.vjp(lambda p: objective.outputs(p, batch), params)
        return jax.vmap(lambda k: pull_back(root_fn(outputs, batch, k))[0])(jax.random.split(key, num_roots))

    def chunk_sum(chunk):
        alone, weights, keys = chunk
        return fn(jax.vmap(rows_of)(alone, keys), weights)

    parts = []
    for batches, weights, keys in zip(stack.batches, stack.weights, example_keys(key, stack), strict=True):
        alone = jax.tree.map(lambda x: x[:, :, None], batches)  # micro-batches of batches of one
        parts.append((alone, weights, keys))
    return sum_over_chunks(chunk_sum, parts)


def sum_over_chunks(fn: Callable[[PyTree], PyTree], parts: Sequence[PyTree]) -> PyTree:
    """`sum of fn(chunk)` over the leading axis of every part, one chunk at a time."""
    shapes = jax.eval_shape(fn, jax.tree.map(lambda x: x[0], parts[0]))
    total = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    for chunks in parts:
        total, _ = jax.lax.scan(lambda t, chunk: (trees.tree_add(t, fn(chunk)), None), total, chunks)
    return total


def fingerprint(params: LoraParams, stack: ExampleStack) -> UInt8[np.ndarray, " 32"]:
    """A digest (SHA-256) of an adapter and of examples with their coefficients, bit for bit.

    The base is not in it: an adapter belongs to one.
    """
    return np.frombuffer(trees.tree_sha256((params, stack)), np.uint8)


def save_ekfac(path: str | os.PathLike[str], factors: EkFac, params: LoraParams, stack: ExampleStack) -> None:
    """Writes the factors, with a fingerprint of their adapter and examples, to the new directory `path`.

    Every process has to call this; the primary one writes.

    Raises:
        FileExistsError: `path` already holds something.
    """
    stored = to_host(_stored(factors, fingerprint(params, stack)))
    on_primary(lambda: checkpoint.save_pytree(path, stored))


def load_ekfac(
    path: str | os.PathLike[str], params: LoraParams, stack: ExampleStack, *, mu: float | Float[Array, ""]
) -> EkFac:
    """Reads factors that `save_ekfac` wrote for this adapter and these examples.

    Args:
        path: the directory.
        params: the adapter.
        stack: the examples and their coefficients, in the same layout.
        mu: damping and the share of the L2 term.

    Raises:
        FileNotFoundError: there are none at `path`.
        ValueError: they were made for an adapter of other shapes, for another adapter or other examples.
    """

    def square(axis):
        return jax.tree.map(
            # On the adapter's devices.
            lambda x: jnp.zeros((*x.shape[:-2], x.shape[axis], x.shape[axis]), x.dtype, device=x.sharding),
            params,
        )

    wanted = fingerprint(params, stack)
    like = EkFac(square(-2), square(-1), trees.tree_zeros_like(params), 0.0)
    stored = checkpoint.restore_pytree(path, _stored(like, wanted))
    if not np.array_equal(np.asarray(stored["fingerprint"]), wanted):
        msg = f"The factors in {os.fspath(path)} were made for another adapter or other examples; make them anew."
        raise ValueError(msg)
    return EkFac(stored["left"], stored["right"], stored["eigenvalues"], mu)


def _stored(factors: EkFac, digest: np.ndarray) -> dict[str, PyTree]:
    return {
        "left": factors.left,
        "right": factors.right,
        "eigenvalues": factors.eigenvalues,
        "fingerprint": jnp.asarray(digest),
    }
