"""Length buckets: from encoded examples to the stacked micro-batches that JAX sees.

Sequences stay ragged on the host; `TokenDataset` lays any selection of them out in a few fixed shapes, so
that jitted functions trace once per shape and short examples are not padded to the longest.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from llmeraser_jax.data.examples import Example
from llmeraser_jax.data.pictures import places_of
from llmeraser_jax.data.templates import Recipe
from llmeraser_jax.data.tokens import EncodedExample, encode_rows
from llmeraser_jax.text import short_repr, show
from llmeraser_jax.types import ExampleStack, TokenBatch

logger = logging.getLogger(__name__)

_TIME_MULTIPLE = 16
_RESPONSE_MULTIPLE = 4
_BUCKET_SLACK = 1.05  # one bucket fewer is worth 5 % more padded tokens: each shape is compiled anew


@dataclasses.dataclass(frozen=True, kw_only=True)
class BucketShape:
    """The padded shape of one length bucket.

    Attributes:
        time: tokens per row.
        response: loss positions per row.
    """

    time: int
    response: int

    def __post_init__(self):
        if not 1 <= self.response < self.time:
            msg = f"a bucket of {self.time} tokens cannot hold {self.response} loss positions."
            raise ValueError(msg)

    def holds(self, num_tokens: int, num_targets: int) -> bool:
        """Whether an example of these sizes fits."""
        return num_tokens <= self.time and num_targets <= self.response


class TokenDataset:
    """Encoded examples that lay themselves out in length buckets; implements `types.ExampleSet`.

    Attributes:
        encoded: the examples in order.
        examples: their texts, in the same order; empty for a set made of tokens alone.
        recipe: the resolved recipe.
        buckets: padded shapes; an index into them is what `bucket_of` returns.
        normalizer: with reduction "token", the mean number of loss tokens that every example's summed loss is
            divided by; None with reduction "example".
        truncated_ids: examples that were cut, by id.
        dropped_ids: examples that cutting left without a token under the loss; they are not in the set.
        features: features [features, size] of every picture that the examples name, by its key; all of one shape.
            None where no model reads the set: it can be looked at and not laid out.
    """

    def __init__(
        self,
        encoded: Sequence[EncodedExample],
        recipe: Recipe,
        *,
        buckets: Sequence[BucketShape],
        examples: Sequence[Example] = (),
        normalizer: float | None = None,
        truncated_ids: Sequence[str] = (),
        dropped_ids: Sequence[str] = (),
        features: Mapping[str, np.ndarray] | None = None,
    ):
        if examples and [e.id for e in examples] != [e.id for e in encoded]:
            msg = f"{len(examples)} examples and {len(encoded)} encoded ones; expected the same ids in one order."
            raise ValueError(msg)
        if (recipe.reduction == "token") != (normalizer is not None):
            msg = f"reduction is {recipe.reduction!r} and normalizer {normalizer}; only 'token' takes a normalizer."
            raise ValueError(msg)
        if normalizer is not None and not (np.isfinite(normalizer) and normalizer > 0):
            msg = f"normalizer is {normalizer}; it must be a positive number of tokens."
            raise ValueError(msg)
        self.encoded = tuple(encoded)
        self.examples = tuple(examples)
        self.recipe = recipe
        self.buckets = tuple(buckets)
        self.normalizer = normalizer
        self.truncated_ids = tuple(truncated_ids)
        self.dropped_ids = tuple(dropped_ids)
        self.features = features
        absent = (
            []
            if features is None
            else [(e.id, key) for e in self.encoded for key in e.images if key not in features]
        )
        if absent:
            msg = f"Example {absent[0][0]!r} has the picture {absent[0][1]}, of which there are no features."
            raise ValueError(msg)
        self._num_images = max((len(e.images) for e in self.encoded), default=0)
        self._lengths = np.array([len(e.tokens) for e in self.encoded], np.int64)
        targets = [e.targets for e in self.encoded]
        self._target_counts = np.array([len(t) for t in targets], np.int64)
        self._bucket_of = _assign_buckets(self.encoded, self.buckets)
        # Flat arrays, so that a micro-batch is a gather and not a loop over rows.
        self._offsets = np.cumsum(self._lengths) - self._lengths
        self._flat = np.concatenate([np.zeros(0, np.int32), *(e.tokens for e in self.encoded)])
        self._target_offsets = np.cumsum(self._target_counts) - self._target_counts
        self._flat_targets = np.concatenate([np.zeros(0, np.int64), *targets])

    def __repr__(self) -> str:
        return short_repr(
            self,
            examples=len(self),
            tokens=int(self._lengths.sum()),
            under_loss=int(self._target_counts.sum()),
            template=self.recipe.template,
            cut=len(self.truncated_ids) or None,
            dropped=len(self.dropped_ids) or None,
        )

    def require_vocabulary(self, size: int | None) -> None:
        """Refuses tokens that a model does not have; its losses would be nan.

        Args:
            size: how many it has; None refuses nothing.

        Raises:
            ValueError: names the first example with such a token.
        """
        if size is None:
            return
        for encoded in self.encoded:
            highest = int(encoded.tokens.max())
            if highest >= size:
                msg = (
                    f"Example {show(encoded.id)} has the token {highest}, and the model's vocabulary ends at "
                    f"{size - 1}: the tokenizer is another model's, or tokens were added. Give the model's own."
                )
                raise ValueError(msg)

    def __len__(self) -> int:
        return len(self.encoded)

    @property
    def ids(self) -> tuple[str, ...]:
        """The examples' ids in order."""
        return tuple(e.id for e in self.encoded)

    @functools.cached_property
    def token_sha256(self) -> dict[str, str]:
        """By id, the hash of each example's tokens and loss mask."""
        return {e.id: e.sha256 for e in self.encoded}

    @property
    def num_truncated(self) -> int:
        """How many examples were cut."""
        return len(self.truncated_ids)

    @property
    def num_targets(self) -> Int32[np.ndarray, " examples"]:
        """Loss tokens of each example."""
        return self._target_counts.astype(np.int32)

    @property
    def uniform_shape(self) -> BucketShape:
        """The smallest shape that holds every bucket: what `stack_uniform` pads to."""
        if not self.buckets:
            msg = "the data set has no buckets, since it was encoded from no examples."
            raise ValueError(msg)
        return BucketShape(time=max(b.time for b in self.buckets), response=max(b.response for b in self.buckets))

    @functools.cached_property
    def _index_of_id(self) -> dict[str, int]:
        return {e.id: index for index, e in enumerate(self.encoded)}

    def indices_of(self, ids: Iterable[str]) -> np.ndarray:
        """Positions of the examples with these ids, in the order given.

        Raises:
            KeyError: ids that are not in the set.
            ValueError: an id of a dropped example.
        """
        ids = list(ids)
        dropped = [id_ for id_ in ids if id_ in self.dropped_ids]
        if dropped:
            msg = (
                f"Example {dropped[0]!r} was dropped: within max_length = {self.recipe.max_length} it has no token "
                "under the loss, so it was never trained on."
            )
            raise ValueError(msg)
        unknown = [id_ for id_ in ids if id_ not in self._index_of_id]
        if unknown:
            msg = f"{len(unknown)} id(s) are not in the data set, the first is {unknown[0]!r}."
            raise KeyError(msg)
        return np.array([self._index_of_id[id_] for id_ in ids], np.int64)

    def bucket_of(self, index: int) -> int:
        """The length bucket that holds example `index`; equal buckets give equal shapes."""
        return int(self._bucket_of[index])

    def num_chunks_of(self, indices: np.ndarray, *, chunk_size: int) -> tuple[int, ...]:
        """Micro-batches that each bucket needs for `indices`; the `num_chunks` that `stack` then takes."""
        indices, _ = self._check(indices, np.zeros(len(indices)), chunk_size)
        counts = np.bincount(self._bucket_of[indices], minlength=len(self.buckets))
        return tuple(int(-(-count // chunk_size)) for count in counts)

    def stack(
        self,
        indices: np.ndarray,
        weights: np.ndarray,
        *,
        chunk_size: int,
        num_chunks: tuple[int, ...] | None = None,
    ) -> ExampleStack:
        """Lays out `indices` with coefficient `weights`, in order within each bucket, padded with weight 0.

        Args:
            indices: positions in the set [n]; repeats are allowed.
            weights: one coefficient each [n].
            chunk_size: examples in a micro-batch.
            num_chunks: micro-batches of each bucket, empty ones included, so that samples drawn anew keep
                their shapes; None is as many as are needed, and leaves empty buckets out.

        Returns:
            One entry per bucket in bucket order; leaves [chunks, chunk_size, ...]. Padding rows repeat the
            bucket's first row (its own first position alone where the bucket is empty), never fully masked
            ones.

        Raises:
            ValueError: nothing to lay out, indices out of range, or more examples than `num_chunks` holds.
        """
        indices, weights = self._check(indices, weights, chunk_size)
        needed = self.num_chunks_of(indices, chunk_size=chunk_size)
        if num_chunks is None:
            num_chunks = needed
        elif len(num_chunks) != len(needed) or any(n > m for n, m in zip(needed, num_chunks, strict=True)):
            msg = f"num_chunks is {tuple(num_chunks)}, but {chunk_size} at a time these examples need {needed}."
            raise ValueError(msg)
        if not any(num_chunks):
            msg = "there are no examples to lay out."
            raise ValueError(msg)
        parts = []
        for bucket, (shape, chunks) in enumerate(zip(self.buckets, num_chunks, strict=True)):
            if chunks:
                chosen = np.flatnonzero(self._bucket_of[indices] == bucket)
                batch, row_weights = self._lay_out(indices[chosen], weights[chosen], shape, chunks, chunk_size)
                parts.append((batch, row_weights, place_rows(chosen, chunks, chunk_size)))
        batches, row_weights, places = zip(*parts, strict=True)
        return ExampleStack(batches=batches, weights=row_weights, places=places)

    def stack_uniform(
        self, indices: np.ndarray, weights: np.ndarray, *, chunk_size: int, num_chunks: int | None = None
    ) -> ExampleStack:
        """Like `stack`, with every example in `uniform_shape`: one entry, in the order given.

        Args:
            indices: positions in the set [n].
            weights: one coefficient each [n].
            chunk_size: examples in a micro-batch.
            num_chunks: micro-batches in all; None is as many as are needed.
        """
        indices, weights = self._check(indices, weights, chunk_size)
        needed = -(-len(indices) // chunk_size)
        num_chunks = needed if num_chunks is None else num_chunks
        if not num_chunks or num_chunks < needed:
            msg = (
                f"num_chunks is {num_chunks}; {len(indices)} examples, {chunk_size} at a time, need "
                f"{needed} (at least 1)."
            )
            raise ValueError(msg)
        batch, row_weights = self._lay_out(indices, weights, self.uniform_shape, num_chunks, chunk_size)
        places = place_rows(np.arange(len(indices)), num_chunks, chunk_size)
        return ExampleStack(batches=(batch,), weights=(row_weights,), places=(places,))

    def _check(self, indices: np.ndarray, weights: np.ndarray, chunk_size: int) -> tuple[np.ndarray, np.ndarray]:
        indices, weights = np.asarray(indices), np.asarray(weights, np.float64)
        if indices.size == 0:
            indices = indices.astype(np.int64)
        if indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer):
            msg = f"indices have shape {indices.shape} and dtype {indices.dtype}; expected a vector of integers."
            raise ValueError(msg)
        if weights.shape != indices.shape:
            msg = f"weights have shape {weights.shape}, indices {indices.shape}; expected one weight per index."
            raise ValueError(msg)
        if indices.size and not (indices.min() >= 0 and indices.max() < len(self)):
            msg = f"indices range from {indices.min()} to {indices.max()}; the data set has {len(self)} examples."
            raise ValueError(msg)
        if not np.all(np.isfinite(weights)):
            msg = "weights hold a nan or an infinity."
            raise ValueError(msg)
        if chunk_size < 1:
            msg = f"chunk_size is {chunk_size}; it must be at least 1."
            raise ValueError(msg)
        return indices, weights

    def _lay_out(
        self, indices: np.ndarray, weights: np.ndarray, shape: BucketShape, num_chunks: int, chunk_size: int
    ) -> tuple[TokenBatch, jax.Array]:
        """Rows of one shape, as leaves [num_chunks, chunk_size, ...]."""
        num_rows = num_chunks * chunk_size
        dtype = jnp.float64 if jax.config.read("jax_enable_x64") else jnp.float32
        rows = np.concatenate([indices, np.repeat(indices[:1], num_rows - len(indices))])
        if len(rows) == 0:
            # No example to repeat: one real token keeps attention finite, and nothing is predicted.
            tokens = np.zeros((num_rows, shape.time), np.int32)
            mask = np.zeros_like(tokens)
            mask[:, 0] = 1
            targets = positions = np.zeros((num_rows, shape.response), np.int32)
            target_weights = np.zeros((num_rows, shape.response))
        else:
            lengths, offsets = self._lengths[rows], self._offsets[rows]
            time = np.arange(shape.time)
            mask = time < lengths[:, None]
            tokens = np.where(mask, self._flat[np.where(mask, offsets[:, None] + time, 0)], 0)
            number = np.arange(shape.response)
            real = number < self._target_counts[rows][:, None]
            target_index = self._flat_targets[np.where(real, self._target_offsets[rows][:, None] + number, 0)]
            targets = np.where(real, self._flat[np.where(real, offsets[:, None] + target_index, 0)], 0)
            positions = np.where(real, target_index - 1, 0)
            counts = self._target_counts[rows] if self.normalizer is None else np.full(len(rows), self.normalizer)
            target_weights = np.where(real, 1.0 / counts[:, None], 0.0)
        images = self._images_of(rows, num_rows)
        row_weights = np.zeros(num_rows)
        row_weights[: len(weights)] = weights

        def chunked(array: np.ndarray, dtype: Any) -> jax.Array:
            # NumPy converts: JAX would compile a program for every shape.
            return jax.device_put(array.reshape(num_chunks, chunk_size, *array.shape[1:]).astype(dtype))

        batch = TokenBatch(
            tokens=chunked(tokens, jnp.int32),
            attention_mask=chunked(mask, jnp.int32),
            positions=chunked(positions, jnp.int32),
            targets=chunked(targets, jnp.int32),
            target_weights=chunked(target_weights, dtype),
            images=None if images is None else chunked(images, images.dtype),
        )
        return batch, chunked(row_weights, dtype)

    def images_of(self, indices: Sequence[int] | np.ndarray) -> np.ndarray | None:
        """Features of the examples' pictures [n, images, features, size], zeros after an example's last picture.

        None where no example of the set has one.
        """
        return self._images_of(np.asarray(indices), len(indices))

    def _images_of(self, rows: np.ndarray, num_rows: int) -> np.ndarray | None:
        if not self._num_images:
            return None
        if self.features is None:
            msg = (
                "the examples have pictures, and their features were not computed: encode them for a loaded model."
            )
            raise ValueError(msg)
        first = self.features[next(key for e in self.encoded for key in e.images)]
        images = np.zeros((num_rows, self._num_images, *first.shape), first.dtype)
        for place, row in enumerate(rows):
            for number, key in enumerate(self.encoded[row].images):
                images[place, number] = self.features[key]
        return images


def encode_examples(
    examples: Sequence[Example],
    recipe: Recipe,
    tokenizer: Any,
    *,
    buckets: Sequence[BucketShape] | None = None,
    normalizer: float | None = None,
    max_buckets: int = 3,
    features_directory: Path | None = None,
) -> TokenDataset:
    """Tokenises examples and chooses their length buckets.

    Tokens and loss are as `Recipe` says. An example that cutting leaves without a token under the loss is not in
    the set; `dropped_ids` names it.

    Args:
        examples: may be empty when `recipe` is resolved (edited pairs of a request that only removes).
        recipe: resolved here if it is not; `TokenDataset.recipe` has the result.
        tokenizer: a Hugging Face tokenizer.
        buckets: shapes of another data set, to share compiled functions with it; a bucket is appended where
            an example fits none. None chooses from the lengths found.
        normalizer: with reduction "token", the training set's (`TokenDataset.normalizer`); None computes it
            from these examples, which must then be the training set.
        max_buckets: shapes at most, when they are chosen here.
        features_directory: where features of pictures are kept; None keeps them in memory.

    Raises:
        DataError: a picture that cannot be decoded.
        ValueError: there is no tokenizer, or an example that does not fit where nothing may be cut, whose prompt
            has no token to predict the response from, or that the template would lose part of; the message names
            it.
    """
    if tokenizer is None:
        msg = "there is no tokenizer: the base model's directory has no tokenizer files, such as tokenizer.json."
        raise ValueError(msg)
    if not examples and not recipe.is_resolved:
        msg = "there are no examples to resolve the recipe by; pass a resolved recipe."
        raise ValueError(msg)
    formats = sorted({example.format for example in examples})
    if len(formats) > 1 and not recipe.is_resolved:
        msg = f"examples of several formats ({', '.join(formats)}); name one template for all in the recipe."
        raise ValueError(msg)
    if formats:
        recipe = recipe.resolve(formats[0], tokenizer)
    rows = encode_rows(examples, recipe, tokenizer)
    encoded = rows.kept
    if rows.truncated_ids:
        logger.warning(
            "%d of %d examples were cut on the %s to fit max_length = %d (truncate = %r).",
            len(rows.truncated_ids),
            len(examples),
            recipe.truncation_side,
            recipe.max_length,
            recipe.truncate,
        )
    if rows.dropped_ids:
        logger.warning(
            "%d of %d examples were dropped: within max_length = %d no token under the loss is left, as of %r.",
            len(rows.dropped_ids),
            len(examples),
            recipe.max_length,
            rows.dropped_ids[0],
        )
    if examples and not encoded:
        msg = (
            f"all {len(examples)} examples were dropped: max_length = {recipe.max_length} leaves no token to train "
            "on. Raise it."
        )
        raise ValueError(msg)
    if recipe.reduction == "token" and normalizer is None:
        if not encoded:
            msg = "reduction is 'token' and there are no examples; pass the training set's normalizer."
            raise ValueError(msg)
        normalizer = float(np.mean([e.num_targets for e in encoded]))
    kept = [examples[index] for index in rows.kept_indices]
    places = places_of(tokenizer)
    pictures = [(example.id, example.images) for example in kept]
    return TokenDataset(
        encoded,
        recipe,
        buckets=_extend_buckets(encoded, buckets) if buckets else choose_buckets(encoded, max_buckets),
        examples=kept,
        normalizer=normalizer,
        truncated_ids=rows.truncated_ids,
        dropped_ids=rows.dropped_ids,
        features=None if places is None else places.features_of(pictures, features_directory),
    )


def choose_buckets(encoded: Sequence[EncodedExample], max_buckets: int = 3) -> tuple[BucketShape, ...]:
    """The time bounds that waste fewest padded tokens, multiples of 16, shortest first.

    Exact, by dynamic programming over the distinct rounded lengths. Fewer buckets are taken while that costs
    at most 5 % more padded tokens. Each bucket is as wide in loss positions (a multiple of 4) as its own
    examples need.
    """
    if max_buckets < 1:
        msg = f"max_buckets is {max_buckets}; it must be at least 1."
        raise ValueError(msg)
    if not encoded:
        return ()
    rounded = np.array([_round_up(len(e.tokens), _TIME_MULTIPLE) for e in encoded])
    bounds, counts = np.unique(rounded, return_counts=True)
    # plans[k][j]: (padded tokens, chosen bounds) for the examples up to bounds[j] in k + 1 buckets.
    cumulative = np.concatenate([[0], np.cumsum(counts)])
    plans: list[list[tuple[int, tuple[int, ...]]]] = [
        [(int(cumulative[j + 1] * bound), (int(bound),)) for j, bound in enumerate(bounds)]
    ]
    for _ in range(1, min(max_buckets, len(bounds))):
        previous = plans[-1]
        plans.append(
            [
                min(
                    [previous[j]]
                    + [
                        (
                            previous[i][0] + int((cumulative[j + 1] - cumulative[i + 1]) * bound),
                            (*previous[i][1], int(bound)),
                        )
                        for i in range(j)
                    ]
                )
                for j, bound in enumerate(bounds)
            ]
        )
    best = min(plan[-1][0] for plan in plans)
    chosen = next(plan[-1][1] for plan in plans if plan[-1][0] <= _BUCKET_SLACK * best)
    targets = np.array([e.num_targets for e in encoded])
    lower = 0
    shapes = []
    for bound in chosen:
        inside = (rounded > lower) & (rounded <= bound)
        shapes.append(_make_bucket(bound, int(targets[inside].max())))
        lower = bound
    return tuple(shapes)


def place_rows(places: np.ndarray, num_chunks: int, chunk_size: int) -> jax.Array:
    """`ExampleStack.places` of one bucket: the places given, then -1 for padding."""
    padded = np.full(num_chunks * chunk_size, -1, np.int32)
    padded[: len(places)] = places
    return jax.device_put(padded.reshape(num_chunks, chunk_size))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _make_bucket(num_tokens: int, num_targets: int) -> BucketShape:
    """Rounded up; a row has one loss position fewer than tokens at most."""
    time = _round_up(num_tokens, _TIME_MULTIPLE)
    return BucketShape(time=time, response=min(_round_up(num_targets, _RESPONSE_MULTIPLE), time - 1))


def _extend_buckets(encoded: Sequence[EncodedExample], buckets: Sequence[BucketShape]) -> tuple[BucketShape, ...]:
    """`buckets`, and one more for whatever they do not hold."""
    outside = [e for e in encoded if not any(b.holds(len(e.tokens), e.num_targets) for b in buckets)]
    if not outside:
        return tuple(buckets)
    extra = _make_bucket(max(len(e.tokens) for e in outside), max(e.num_targets for e in outside))
    return (*buckets, extra)


def _assign_buckets(encoded: Sequence[EncodedExample], buckets: Sequence[BucketShape]) -> np.ndarray:
    """The bucket of fewest tokens, then fewest loss positions, that holds each example."""
    by_size = sorted(range(len(buckets)), key=lambda k: (buckets[k].time, buckets[k].response, k))
    assigned = []
    for e in encoded:
        fitting = (k for k in by_size if buckets[k].holds(len(e.tokens), e.num_targets))
        bucket = next(fitting, None)
        if bucket is None:
            msg = f"Example {e.id!r} ({len(e.tokens)} tokens, {e.num_targets} under the loss) fits no bucket."
            raise ValueError(msg)
        assigned.append(bucket)
    return np.array(assigned, np.int64)
