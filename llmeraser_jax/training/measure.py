"""Loss and gradient over a data set, measured with the compiled pass that training uses."""

from __future__ import annotations

import dataclasses

import numpy as np
from jax.sharding import Mesh

from llmeraser_jax import losses, parallel, trees
from llmeraser_jax.data import TokenDataset
from llmeraser_jax.losses import Objective
from llmeraser_jax.training.batches import lay_out_mean
from llmeraser_jax.types import LoraParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """Loss and gradient of an adapter on some examples.

    Attributes:
        loss: mean data loss, without the L2 term.
        gradient_norm: norm of the gradient of the objective, with the L2 term.
        data_gradient_norm: norm of the gradient of its data term alone.
        num_examples: how many examples the means are over.
    """

    loss: float
    gradient_norm: float
    data_gradient_norm: float
    num_examples: int


def _all_indices(dataset: TokenDataset, indices: np.ndarray | None) -> np.ndarray:
    indices = np.arange(len(dataset)) if indices is None else np.asarray(indices)
    if not len(indices):
        msg = "There are no examples to measure on; give at least one."
        raise ValueError(msg)
    return indices


def _split(indices: np.ndarray, batch_size: int) -> list[np.ndarray]:
    return [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]


def measure(
    objective: Objective,
    params: LoraParams,
    dataset: TokenDataset,
    *,
    batch_size: int,
    microbatch_size: int | None = None,
    indices: np.ndarray | None = None,
    mesh: Mesh | None = None,
) -> Measurement:
    """Loss and gradient norms over a data set or part of it.

    With training's batch sizes it runs the executable that training compiled. The model is evaluated batch by
    batch from the host, so that memory is one batch's.

    Args:
        objective: gives the loss of an example and the L2 term.
        params: the adapter.
        dataset: the examples.
        batch_size: examples per call of the compiled pass.
        microbatch_size: examples per forward and backward pass; None is `batch_size`.
        indices: which examples; None is all.
        mesh: devices to share a micro-batch out over.

    Raises:
        ValueError: there are no examples.
    """
    indices = _all_indices(dataset, indices)
    loss, gradient = 0.0, trees.tree_zeros_like(params)
    for members in _split(indices, batch_size):
        stack = lay_out_mean(
            dataset,
            members,
            1.0 / len(indices),
            batch_size=batch_size,
            microbatch_size=microbatch_size or batch_size,
        )
        stack = parallel.place_stack(stack, mesh)
        batch_loss, batch_gradient = losses.loss_and_gradient_sums(objective, params, stack)
        loss += float(batch_loss)
        gradient = trees.tree_add(gradient, batch_gradient)
    whole = trees.tree_axpy(objective.l2, objective.from_prior(params), gradient)
    return Measurement(
        loss=loss,
        gradient_norm=float(trees.tree_norm(whole)),
        data_gradient_norm=float(trees.tree_norm(gradient)),
        num_examples=len(indices),
    )


def mean_loss(
    objective: Objective,
    params: LoraParams,
    dataset: TokenDataset,
    *,
    batch_size: int,
    indices: np.ndarray | None = None,
    mesh: Mesh | None = None,
) -> float:
    """Mean data loss over a data set or part of it, by forward passes only.

    Args:
        objective: gives the loss of an example.
        params: the adapter.
        dataset: the examples.
        batch_size: examples per forward pass.
        indices: which examples; None is all.
        mesh: devices to share a batch out over.

    Raises:
        ValueError: there are no examples.
    """
    indices = _all_indices(dataset, indices)
    loss = 0.0
    for members in _split(indices, batch_size):
        stack = lay_out_mean(
            dataset, members, 1.0 / len(indices), batch_size=batch_size, microbatch_size=batch_size
        )
        loss += float(losses.loss_sum(objective, params, parallel.place_stack(stack, mesh)))
    return loss
