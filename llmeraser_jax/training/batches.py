"""The examples of each training step, and their layout in one shape.

The order of an epoch is a pure function of seed and epoch number, so that a training restarted at any step
needs no random state to go on as it would have.
"""

from __future__ import annotations

import numpy as np

from llmeraser_jax.data import TokenDataset
from llmeraser_jax.types import ExampleStack


def epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """A permutation of the examples [num_examples] that depends on its arguments alone.

    Args:
        seed: from 0 to 2**32 - 1.
        epoch: counted from 0.
        num_examples: at least 1.
    """
    # RandomState's stream is frozen across NumPy versions; that of default_rng is not promised to be.
    return np.random.RandomState(np.array([seed, epoch], np.uint32)).permutation(num_examples)


def step_indices(step: int, *, seed: int, num_examples: int, batch_size: int) -> np.ndarray:
    """The examples of a step [at most batch_size]; the last batch of an epoch may be smaller.

    Args:
        step: counted from 0 over all epochs.
        seed: as for `epoch_order`.
        num_examples: in the data set.
        batch_size: examples per step.
    """
    steps_per_epoch = -(-num_examples // batch_size)
    epoch, position = divmod(step, steps_per_epoch)
    return epoch_order(seed, epoch, num_examples)[position * batch_size : (position + 1) * batch_size]


def step_rows(places: np.ndarray, step: int, *, seed: int, batch_size: int) -> np.ndarray:
    """The rows of a step [at most batch_size]: what is in the places that it takes.

    Args:
        places: [places] the row in each; -1 is none, and takes no room in the step.
        step: counted from 0 over all epochs.
        seed: as for `epoch_order`.
        batch_size: places per step.
    """
    rows = places[step_indices(step, seed=seed, num_examples=len(places), batch_size=batch_size)]
    return rows[rows >= 0]


def lay_out_mean(
    dataset: TokenDataset, indices: np.ndarray, weight: float, *, batch_size: int, microbatch_size: int
) -> ExampleStack:
    """Lays out at most `batch_size` examples, always in the same shape, so that one trace serves them all.

    Args:
        dataset: where the examples are.
        indices: [at most batch_size], at least one.
        weight: coefficient of each; `1 / len(indices)` for their mean.
        batch_size: examples that the layout has room for.
        microbatch_size: examples per forward and backward pass.

    Returns:
        A stack of one entry: leaves [ceil(batch_size / microbatch_size), microbatch_size, ...].
    """
    return dataset.stack_uniform(
        indices,
        np.full(len(indices), weight),
        chunk_size=microbatch_size,
        num_chunks=-(-batch_size // microbatch_size),
    )
