"""A dataset curvature whose examples stay on the host; one micro-batch at a time is on the devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llmeraser_jax.curvature.operators import Curvature, DatasetCurvature
from llmeraser_jax.losses import Objective
from llmeraser_jax.parallel import place_stack
from llmeraser_jax.types import Batch, ExampleStack, LoraParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamedOperator:
    """`sum over batches of product(batch, v) + shift * v`, with one batch in memory at a time.

    `mv` is a Python function: this operator is for `solvers.Resumable` and for solvers with `python_while_loop`,
    not for jit.

    Attributes:
        batches: called once for each product. It has to yield the same batches in the same order every time, or the
            operator is not one linear map and a solver's recurrence is invalid.
        product: `(batch, v) -> vector of adapter space`, linear and symmetric in `v`, already weighted; jitted by
            the caller, so that one compilation serves all products.
        shift: L2 term and damping together.
        positive_semidefinite: declared, not measured.
    """

    batches: Callable[[], Iterable[Batch]]
    product: Callable[[Batch, LoraParams], LoraParams]
    shift: float = 0.0
    positive_semidefinite: bool = False

    def mv(self, v: LoraParams) -> LoraParams:
        """The product with `v`, summed in at least float32; leaves have the dtypes of `v`."""
        total = jax.tree.map(lambda x: (self.shift * x).astype(jnp.promote_types(x.dtype, jnp.float32)), v)
        for batch in self.batches():
            total = _accumulate(total, self.product(batch, v))
        return jax.tree.map(lambda t, x: t.astype(x.dtype), total, v)


def streamed_operator(
    objective: Objective,
    params: LoraParams,
    stack: ExampleStack,
    kind: Curvature,
    *,
    damping: float = 0.0,
    mesh: Mesh | None = None,
) -> StreamedOperator:
    """`sum_i weights_i * C(z_i) + damping * I` with the L2 term, streamed one micro-batch at a time.

    Args:
        objective: the loss.
        params: where the curvature is taken.
        stack: the examples and their coefficients, on the host.
        kind: of curvature.
        damping: rho, one number.
        mesh: devices that share out each micro-batch; None is the default device.
    """
    data_term = dataclasses.replace(objective, l2=0.0)

    def batches() -> Iterable[ExampleStack]:
        for batch, weights in zip(stack.batches, stack.weights, strict=True):
            for chunk in range(len(weights)):
                part = jax.tree.map(lambda x, chunk=chunk: x[chunk : chunk + 1], ((batch,), (weights,)))
                yield place_stack(ExampleStack(*part), mesh)

    return StreamedOperator(
        batches=batches,
        product=partial(_product, data_term, params, kind),
        shift=damping
        + objective.l2 * sum(float(np.asarray(weights, np.float64).sum()) for weights in stack.weights),
        positive_semidefinite=kind.positive_semidefinite,
    )


@partial(jax.jit, static_argnums=2)
def _product(objective, params, kind, stack, v):
    return DatasetCurvature(objective, params, stack, kind).mv(v)


@jax.jit
def _accumulate(total: LoraParams, term: LoraParams) -> LoraParams:
    return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, term)
