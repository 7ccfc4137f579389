"""A dataset curvature whose primal pass is computed once and stored, for many products at one point.

A recomputed product repeats the primal pass. Here the values that tangents need ("residuals") are stored for all
micro-batches, which trades memory for time: `linearise` takes a memory budget.
"""

from __future__ import annotations

from typing import Any, overload

import flax.struct
import jax
import numpy as np

from llmeraser_jax import trees
from llmeraser_jax.curvature.operators import DatasetCurvature
from llmeraser_jax.losses import weight_sum
from llmeraser_jax.parallel import Kept, keep_on_devices, sum_over_devices
from llmeraser_jax.types import LoraParams

CACHED_PRODUCT_COST = 1.0  # a cached product passes forward and backward through the frozen weights once each
_OWN = -1  # source of a leaf that is stored here


@flax.struct.dataclass
class Residuals:
    """The leaves of a linear map: those stored here, and where among the operator's leaves the others are.

    So the base and the data are not stored twice.
    """

    values: Any  # tuple of arrays, each [chunks, ...], or without the axis where no example enters
    structure: Any = flax.struct.field(pytree_node=False)  # of the linear map
    sources: tuple[int, ...] = flax.struct.field(pytree_node=False)  # a leaf of the operator, or `_OWN`


@flax.struct.dataclass
class LinearisedCurvature:
    """Equal to `operator`, with its primal pass stored. Make it with `linearise`."""

    operator: DatasetCurvature
    residuals: Residuals | Kept  # `Kept` where devices share the examples

    @property
    def positive_semidefinite(self) -> bool:
        return self.operator.positive_semidefinite

    @property
    def setup_cost(self) -> float:
        """Gradient equivalents of the stored pass, per example."""
        return self.operator.kind.linearise_gradient_equivalents

    @property
    def product_cost(self) -> float:
        """Gradient equivalents of a product, per example."""
        return CACHED_PRODUCT_COST

    def mv(self, v: LoraParams) -> LoraParams:
        """The product with `v`: tangents only."""
        operator = self.operator

        def of_stack(stack, residuals, objective, params, v):
            given = jax.tree.leaves(DatasetCurvature(objective, params, stack, operator.kind))
            own = iter(residuals.values)
            leaves = [next(own) if source == _OWN else given[source] for source in residuals.sources]
            linear_map = jax.tree.unflatten(residuals.structure, leaves)
            return trees.tree_axpy(objective.l2 * weight_sum(stack), v, linear_map(v))

        return sum_over_devices(
            of_stack, operator.stack, operator.objective, operator.params, v, kept=self.residuals
        )


# One jitted function for all operators: equal shapes give the same linear program, so that a compiled solve serves
# every operator of these shapes.
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


@overload
def linearise(operator: DatasetCurvature) -> LinearisedCurvature: ...
@overload
def linearise(operator: DatasetCurvature, memory_budget_bytes: int) -> DatasetCurvature | LinearisedCurvature: ...
def linearise(
    operator: DatasetCurvature, memory_budget_bytes: int | None = None
) -> DatasetCurvature | LinearisedCurvature:
    """An equal operator with its primal pass stored, if the stored values fit into the budget.

    Args:
        operator: a dataset's curvature.
        memory_budget_bytes: for the stored values, over all devices; 0 never stores, None has no limit.

    Returns:
        A `LinearisedCurvature`, a pytree that a jitted solver takes as an argument. With a budget: `operator`
        itself where the values do not fit or its kind of curvature has no `linearise`.

    Raises:
        ValueError: the budget is negative, or there is none and the kind of curvature has no `linearise`.
    """
    if memory_budget_bytes is None:
        _require_linearise(operator)
        return LinearisedCurvature(operator=operator, residuals=_residuals(operator))
    if memory_budget_bytes < 0:
        msg = f"memory_budget_bytes is {memory_budget_bytes}; it must be at least 0 (0 recomputes always)."
        raise ValueError(msg)
    if operator.kind.linearise is None or memory_budget_bytes == 0:
        return operator
    return linearise(operator) if linearisation_bytes(operator) <= memory_budget_bytes else operator


def linearisation_bytes(operator: DatasetCurvature) -> int:
    """How many bytes `linearise` would store, over all devices; from shapes alone.

    A product works on top of that: with Gauss-Newton on the tangents of all examples' outputs, twice.

    Raises:
        ValueError: the kind of curvature has no `linearise`.
    """
    _require_linearise(operator)
    values = jax.tree.leaves(jax.eval_shape(_residuals, operator))
    return sum(int(np.prod(value.shape)) * value.dtype.itemsize for value in values)


def _require_linearise(operator: DatasetCurvature) -> None:
    if operator.kind.linearise is None:
        msg = "This kind of curvature has no `linearise`; use the operator as it is, or give the kind one."
        raise ValueError(msg)
