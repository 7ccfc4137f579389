"""The types that cross module borders: pytree aliases, batches, and the Protocols of operators and solvers.

Dimension letters used in every shape string of the package:

    batch     examples in one micro-batch          chunks    micro-batches that a scan runs over
    time      tokens of one example                response  response tokens of one example
    vocab     vocabulary                           width     model width
    heads     query heads                          kv_heads  key/value heads
    head_dim  numbers per head                     rank      LoRA rank
    layers    decoder layers                       p         all numbers of the adapter together
    images    places for pictures of one example   features  vectors of one picture

This module imports nothing from the package: every other module may import it.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

PyTree: TypeAlias = Any
BaseParams: TypeAlias = Any  # nested dict of arrays, the frozen base; a jit argument, never a constant
LoraParams: TypeAlias = Any  # pytree of float32 arrays: the adapter, and any vector of its space
Batch: TypeAlias = Any  # pytree whose leaves all begin with the axis "batch"
Outputs: TypeAlias = Any  # pytree of network outputs whose leaves all begin with the axis "batch"


@flax.struct.dataclass
class TokenBatch:
    """Token sequences, right-padded, and the positions under the loss.

    Logits are computed at `positions` only, which saves the vocabulary head on the prompt. What stands in `tokens`
    and `images` for a picture: see `models.vision`.
    """

    tokens: Int[Array, "*lead batch time"]
    attention_mask: Int[Array, "*lead batch time"]  # 1 for a real token, 0 for padding
    positions: Int[Array, "*lead batch response"]  # the position whose logits predict the target (target's - 1)
    targets: Int[Array, "*lead batch response"]  # token ids to predict
    target_weights: Float[Array, "*lead batch response"]  # 1 / (tokens averaged over); 0 for padding
    # Features of each example's pictures, in their order, zeros after the last; None where no example has one.
    images: Float[Array, "*lead batch images features size"] | None = None

    @property
    def inputs(self) -> tuple[Array, ...]:
        """What a model's `apply` reads after base and adapter: tokens, mask, positions, and pictures if any."""
        return (self.tokens, self.attention_mask, self.positions, *self.pictures)

    @property
    def pictures(self) -> tuple[Array, ...]:
        """`images` where there are some: the arguments that a text model's `apply` does not have."""
        return () if self.images is None else (self.images,)


@flax.struct.dataclass
class ExampleStack:
    """Examples as stacked micro-batches, one entry per length bucket, each with a coefficient.

    Everything the package computes over data is `sum_i weights_i * f(example_i)`; means, removals, edits and
    path weights differ in `weights` only. Padding has weight 0; so may an example.
    """

    batches: tuple[Batch, ...]  # leaves [chunks, batch, ...]
    weights: tuple[Float[Array, "_chunks _batch"], ...]  # [chunks, batch], as many chunks as the bucket needs
    # [chunks, batch]: the place of each example in the order that was asked for, -1 for padding. None where nobody
    # asks for values of single examples.
    places: tuple[Int[Array, "_chunks _batch"], ...] | None = None
    mesh: Mesh | None = flax.struct.field(pytree_node=False, default=None)  # "data" and "fsdp" share each batch out

    @property
    def entries(self) -> tuple[ExampleStack, ...]:
        """Each entry as a stack of its own; programs for one do not know how many there are."""
        places = [None] * len(self.batches) if self.places is None else [(place,) for place in self.places]
        return tuple(
            ExampleStack((batches,), (weights,), place, self.mesh)
            for batches, weights, place in zip(self.batches, self.weights, places, strict=True)
        )


@runtime_checkable
class ExampleSet(Protocol):
    """A data set that can be laid out as an `ExampleStack`. Implementations live on the host."""

    def __len__(self) -> int: ...

    def bucket_of(self, index: int) -> int:
        """The length bucket that holds example `index`; equal buckets give equal shapes."""
        ...

    def stack(self, indices: np.ndarray, weights: np.ndarray, *, chunk_size: int) -> ExampleStack:
        """Lays out `indices` with coefficients `weights`; `places` says where each went."""
        ...


@runtime_checkable
class Operator(Protocol):
    """A symmetric linear map on adapter space, the same map at every call. A pytree, so that jit takes it.

    `positive_semidefinite` is declared, not measured; a solver may refuse an operator without it.
    """

    @property
    def positive_semidefinite(self) -> bool: ...

    def mv(self, v: LoraParams) -> LoraParams:
        """The product with a vector of adapter space."""
        ...


@flax.struct.dataclass
class Solution:
    """What a solver returns. Failure is a value: read `status` with `solvers.status.describe`."""

    value: LoraParams
    status: Int[Array, ""]  # a `solvers.status.Status`
    num_steps: Int[Array, ""]
    # Every product that was computed, that of the residual included; of stochastic solvers, products of terms.
    num_products: Int[Array, ""]
    relative_residual: Float[Array, ""]  # ||b - A x|| / ||b||, recomputed with one more product
    negative_curvature: Bool[Array, ""]  # some direction p had p'Ap <= 0
    history: Float[Array, " max_steps"]  # recurrence's relative residual after each step; nan beyond num_steps
    # Least and largest Ritz value of the operator on the Krylov space explored; nan where a solver has none.
    ritz_extremes: Float[Array, " least_and_largest"] = flax.struct.field(
        default_factory=lambda: jnp.full((2,), jnp.nan, jnp.float32)
    )


@runtime_checkable
class Solver(Protocol):
    """Hyper-parameters only; sees an operator and a right-hand side, never data."""

    @property
    def max_products(self) -> int:
        """The most products that a solve takes."""
        ...

    def solve(self, operator: Operator, rhs: LoraParams) -> Solution: ...


@runtime_checkable
class Preconditioner(Protocol):
    """A symmetric positive definite approximate inverse. A pytree, so that jit takes it."""

    def solve(self, v: LoraParams) -> LoraParams:
        """`P^-1 v`, where `P` approximates the operator."""
        ...


@runtime_checkable
class FiniteSum(Operator, Protocol):
    """An operator that is a mean of terms: what stochastic solvers draw mini-batch products from."""

    @property
    def num_terms(self) -> int: ...

    def term_mv(self, k: Int[Array, ""], v: LoraParams) -> LoraParams:
        """The product of term `k` in [0, num_terms), scaled so that the mean over `k` is `mv(v)`."""
        ...


@runtime_checkable
class ManyVectors(Operator, Protocol):
    """An operator that multiplies several vectors at once in its own way."""

    def mv_many(self, vs: LoraParams) -> LoraParams:
        """The products with vectors on a leading axis of every leaf, on the same axis."""
        ...


def mv_many(operator: Operator, vs: LoraParams) -> LoraParams:
    """`operator` times vectors on a leading axis of every leaf; vectorised where the operator has no own way."""
    return operator.mv_many(vs) if isinstance(operator, ManyVectors) else jax.vmap(operator.mv)(vs)


@runtime_checkable
class WeightedRows(Protocol):
    """A curvature in factored form, `sum_j weights_j rows_j rows_j' + mu I`."""

    @property
    def rows(self) -> LoraParams:
        """Leaves [m, ...]."""
        ...

    @property
    def weights(self) -> Float[Array, " m"]: ...

    @property
    def mu(self) -> Float[Array, ""] | float: ...


@runtime_checkable
class AdaptableConfig(Protocol):
    """What an adapter has to know of a decoder's configuration (`models.ModelConfig`)."""

    @property
    def model_type(self) -> str: ...

    @property
    def num_layers(self) -> int: ...

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the linear layers of a decoder layer, in its order."""
        ...

    @property
    def projector_shapes(self) -> dict[str, tuple[int, int]]:
        """The same of the linear layers that project pictures; empty for a text model."""
        ...

    @property
    def module_names(self) -> tuple[str, ...]:
        """Names of all modules as PyTorch's `named_modules` gives them."""
        ...


@runtime_checkable
class AdaptableModel(Protocol):
    """What reading and writing an adapter has to know of its base model (`models.Model`)."""

    @property
    def config(self) -> AdaptableConfig: ...

    @property
    def base(self) -> BaseParams: ...

    @property
    def path(self) -> str: ...

    @property
    def adapter_extras(self) -> tuple[str, ...]: ...


Key: TypeAlias = jax.Array
