"""Owns the layout of examples in PyTorch: right-padded micro-batches with a coefficient for each example.

Everything computed over data is `sum_i weights_i * f(example_i)`, as in `llmeraser_jax.types.ExampleStack`, and the
fields of a batch are those of `llmeraser_jax.types.TokenBatch`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from llmeraser_jax.data import BucketShape, TokenDataset


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One micro-batch.

    Attributes:
        tokens: token ids, right-padded [batch, time].
        attention_mask: 1 for a real token, 0 for padding [batch, time].
        positions: where the logits that predict the targets are read [batch, response].
        targets: token ids to predict [batch, response].
        target_weights: `1 / (tokens averaged over)`; 0 for padding [batch, response].
        weights: the examples' coefficients [batch]; 0 for a padding row.
        size: rows that are examples; costs are counted on them.
    """

    tokens: torch.Tensor
    attention_mask: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    target_weights: torch.Tensor
    weights: torch.Tensor
    size: int

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        moved = {f.name: getattr(self, f.name).to(device) for f in dataclasses.fields(self) if f.name != "size"}
        return Batch(**moved, size=self.size)


def make_batches(
    dataset: TokenDataset,
    indices: np.ndarray,
    weights: np.ndarray,
    *,
    chunk_size: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    shape: BucketShape | None = None,
) -> list[Batch]:
    """Lays examples out, those of similar length together, each micro-batch as long as its longest example.

    Args:
        dataset: encoded examples.
        indices: which [n]; repeats are allowed.
        weights: a coefficient each [n].
        chunk_size: examples in a micro-batch.
        dtype: of coefficients and target weights.
        device: where the tensors go.
        shape: pad every row to this instead, and the last micro-batch to `chunk_size` rows of weight 0, so that
            all micro-batches have one shape (for compilers).

    Raises:
        ValueError: no examples, not one weight each, or a `shape` that does not hold an example.
    """
    indices, weights = np.asarray(indices), np.asarray(weights, np.float64)
    if len(indices) == 0 or indices.shape != weights.shape:
        msg = f"{len(indices)} indices with weights of shape {weights.shape}; give some, and one weight each."
        raise ValueError(msg)
    lengths = np.array([len(dataset.encoded[i].tokens) for i in indices])
    order = np.argsort(lengths, kind="stable")
    batches = []
    for start in range(0, len(order), chunk_size):
        rows = order[start : start + chunk_size]
        num_rows = len(rows) if shape is None else chunk_size
        batches.append(_lay_out(dataset, indices[rows], weights[rows], num_rows, shape, dtype).to(device))
    return batches


def _lay_out(
    dataset: TokenDataset,
    indices: np.ndarray,
    weights: np.ndarray,
    num_rows: int,
    shape: BucketShape | None,
    dtype: torch.dtype,
) -> Batch:
    examples = [dataset.encoded[i] for i in indices]
    time, response = max(len(e.tokens) for e in examples), max(e.num_targets for e in examples)
    if shape is not None:
        if not shape.holds(time, response):
            msg = f"An example of {time} tokens, {response} under the loss, does not fit {shape}."
            raise ValueError(msg)
        time, response = shape.time, shape.response
    tokens, mask = np.zeros((num_rows, time), np.int64), np.zeros((num_rows, time), np.int64)
    positions, targets = np.zeros((num_rows, response), np.int64), np.zeros((num_rows, response), np.int64)
    target_weights, row_weights = np.zeros((num_rows, response)), np.zeros(num_rows)
    row_weights[: len(weights)] = weights
    mask[len(examples) :, 0] = 1  # a padding row sees one token, so that its attention is defined
    for row, example in enumerate(examples):
        length, count = len(example.tokens), example.num_targets
        tokens[row, :length] = example.tokens
        mask[row, :length] = 1
        positions[row, :count] = example.targets - 1
        targets[row, :count] = example.tokens[example.targets]
        target_weights[row, :count] = 1.0 / (count if dataset.normalizer is None else dataset.normalizer)
    return Batch(
        tokens=torch.from_numpy(tokens),
        attention_mask=torch.from_numpy(mask),
        positions=torch.from_numpy(positions),
        targets=torch.from_numpy(targets),
        target_weights=torch.from_numpy(target_weights).to(dtype),
        weights=torch.from_numpy(row_weights).to(dtype),
        size=len(examples),
    )


def reweighted(batches: Sequence[Batch], factor: float) -> list[Batch]:
    """The batches with every coefficient times `factor`."""
    return [dataclasses.replace(batch, weights=factor * batch.weights) for batch in batches]


def num_examples(batches: Sequence[Batch]) -> int:
    """Examples in the batches, padding rows left out."""
    return sum(batch.size for batch in batches)


def weight_sum(batches: Sequence[Batch]) -> float:
    """Sum of all coefficients."""
    return float(sum(float(batch.weights.double().sum()) for batch in batches))
