"""Cached linearisation: a dataset curvature whose primal pass is made once, for products at one point.

A solve multiplies by the same matrix many times, and every recomputed product repeats the pass over the primal
values. Here the values that the tangents need ("residuals") are kept instead, for all micro-batches. It trades
memory for time: rematerialisation is given up, so it is chosen by a memory budget.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import numpy as np

from llmeraser_jax import trees
from llmeraser_jax.curvature.operators import Curvature, DatasetCurvature
from llmeraser_jax.curvature.slicing import slice_in_inner_loops
from llmeraser_jax.losses import weight_sum
from llmeraser_jax.parallel import Kept, keep_on_devices, sum_over_devices
from llmeraser_jax.types import LoraParams, Operator

_OWN = -1  # source of a leaf that only the linear map has


@flax.struct.dataclass
class Residuals:
    """A linear map taken apart: what it alone holds, and where among the operator's leaves the rest is.

    The base and the data are not held twice.
    """

    values: Any  # tuple of arrays, each [chunks, ...], or without the axis where no example enters
    structure: Any = flax.struct.field(pytree_node=False)  # of the linear map
    sources: tuple[int, ...] = flax.struct.field(pytree_node=False)  # a leaf of the operator, or `_OWN`


@flax.struct.dataclass
class LinearisedCurvature:
    """Equal to `operator`, with its primal pass made already."""

    operator: DatasetCurvature
    residuals: Residuals | Kept  # the latter where devices share the examples

    @property
    def positive_semidefinite(self) -> bool:
        return self.operator.positive_semidefinite

    def mv(self, v: LoraParams) -> LoraParams:
        """The product with `v`: tangents only."""
        operator = self.operator

        def of_stack(stack, residuals, objective, params, v):
            given = jax.tree.leaves(DatasetCurvature(objective, params, stack, operator.kind))
            own = iter(residuals.values)
            leaves = [next(own) if source == _OWN else given[source] for source in residuals.sources]
            product = slice_in_inner_loops(lambda leaves, v: jax.tree.unflatten(residuals.structure, leaves)(v))
            return trees.tree_axpy(objective.l2 * weight_sum(stack), v, product(leaves, v))

        return sum_over_devices(
            of_stack, operator.stack, operator.objective, operator.params, v, kept=self.residuals
        )


# One jitted function for all operators: equal shapes give the very same linear program back, so that a solve
# compiled for one linearisation serves the next.
@jax.jit
def _residuals(operator: DatasetCurvature) -> Residuals | Kept:
    def of_stack(stack, objective, params):
        linear_map = operator.kind.linearise(objective, params, stack)  # pyright: ignore
        leaves, structure = jax.tree.flatten(linear_map)
        given = jax.tree.leaves(DatasetCurvature(objective, params, stack, operator.kind))
        places = {id(leaf): place for place, leaf in enumerate(given)}
        sources = tuple(places.get(id(leaf), _OWN) for leaf in leaves)
        own = tuple(leaf for leaf, source in zip(leaves, sources, strict=True) if source == _OWN)
        return Residuals(values=own, structure=structure, sources=sources)

    return keep_on_devices(of_stack, operator.stack, operator.objective, operator.params)


def _check(kind: Curvature) -> None:
    if kind.linearise is None:
        msg = "This kind of curvature has no `linearise`; use the operator as it is, or give the kind one."
        raise ValueError(msg)


def make_linearised(operator: DatasetCurvature) -> LinearisedCurvature:
    """Makes the primal pass over all of the operator's data and keeps what products need.

    Args:
        operator: what to linearise.

    Returns:
        An equal operator: a pytree that a jitted solver takes as an argument.

    Raises:
        ValueError: the kind of curvature cannot be linearised.
    """
    _check(operator.kind)
    return LinearisedCurvature(operator=operator, residuals=_residuals(operator))


def linearisation_bytes(operator: DatasetCurvature) -> int:
    """How many bytes `make_linearised` would keep, over all devices; found from shapes, nothing is computed.

    A product works on top of that: with Gauss-Newton on the tangents of all examples' outputs, twice.

    Raises:
        ValueError: the kind of curvature cannot be linearised.
    """
    _check(operator.kind)
    values = jax.tree.leaves(jax.eval_shape(_residuals, operator))
    return sum(int(np.prod(value.shape)) * value.dtype.itemsize for value in values)


def choose_linearisation(operator: DatasetCurvature, memory_budget_bytes: int) -> Operator:
    """The linearised operator where its residuals fit into the budget, else the operator as it is.

    Args:
        operator: the curvature.
        memory_budget_bytes: how much may be kept, over all devices; 0 is never.

    Raises:
        ValueError: the budget is negative.
    """
    if memory_budget_bytes < 0:
        msg = f"memory_budget_bytes is {memory_budget_bytes}; it must be at least 0 (0 recomputes always)."
        raise ValueError(msg)
    if operator.kind.linearise is None or memory_budget_bytes == 0:
        return operator
    fits = linearisation_bytes(operator) <= memory_budget_bytes
    return make_linearised(operator) if fits else operator


def product_cost(kind: Curvature, *, cached: bool) -> float:
    """Gradient equivalents of one product with one example: 1 when cached, for every kind.

    A product on a frozen base passes forward and backward through the weights once more than the primal does.
    """
    return 1.0 if cached else kind.gradient_equivalents
