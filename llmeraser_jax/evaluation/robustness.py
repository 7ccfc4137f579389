"""Does forgetting last? What rounding the weights, or a little training on other data, brings back.

A model may hide what it still knows. Two cheap probes are known to uncover it:

* rounding the merged model to 4 bits (Zhang et al. 2024, arXiv 2410.16454): a change of the weights that is smaller
  than a rounding step is rounded away, and with it the forgetting;
* a short training on data that have nothing to do with what was forgotten (Hu et al. 2024, arXiv 2406.13356;
  Łucki et al. 2024, arXiv 2409.18025): suppressed knowledge returns without being shown.

`evaluation.measures` takes the loss on the forget set after each. The number to compare with is the same probe on a
retrained model: rounding harms it too, and relearning moves it too. Only what the unlearned model regains beyond
the retrained one was hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from llmeraser_jax.convert import dequantized
from llmeraser_jax.data import TokenDataset
from llmeraser_jax.lora import COPIES, Lora, low_rank_updates, merge_lora
from llmeraser_jax.models import Model
from llmeraser_jax.training import TrainConfig, finetune
from llmeraser_jax.types import BaseParams

BITS, GROUP_SIZE = 4, 64


def round_to_nearest(
    kernel: Float[Array | np.ndarray, "*lead inputs outputs"], *, bits: int = BITS, group_size: int = GROUP_SIZE
) -> Float[Array, "*lead inputs outputs"]:
    """Round-to-nearest quantisation, as the values that the integers stand for.

    Each output's weights are cut along the inputs into groups, the last as long as it comes. A group's least and
    largest weight are exact and `2^bits - 1` equal steps lie between them (asymmetric min-max, no calibration
    data).

    Args:
        kernel: weights.
        bits: per weight, from 2 to 8.
        group_size: inputs that share one scale.

    Returns:
        In the kernel's dtype.

    Raises:
        ValueError: `bits` or `group_size` out of range.
    """
    if not 2 <= bits <= 8 or group_size < 1:
        msg = f"bits is {bits} and group_size {group_size}; expected 2 to 8 bits and groups of at least 1."
        raise ValueError(msg)
    weights = jnp.asarray(kernel)
    inputs, outputs = weights.shape[-2:]
    padding = -inputs % group_size
    # A repeated last weight changes neither the least nor the largest of its group.
    wide = jnp.concatenate([weights, jnp.repeat(weights[..., -1:, :], padding, axis=-2)], axis=-2)
    groups = wide.astype(jnp.promote_types(weights.dtype, jnp.float32))
    groups = groups.reshape(*weights.shape[:-2], -1, group_size, outputs)
    low = groups.min(axis=-2, keepdims=True)
    step = (groups.max(axis=-2, keepdims=True) - low) / (2**bits - 1)
    levels = jnp.round((groups - low) / jnp.where(step > 0, step, 1))
    rounded = (low + levels * step).reshape(*weights.shape[:-2], -1, outputs)
    return rounded[..., :inputs, :].astype(weights.dtype)


@dataclasses.dataclass(frozen=True)
class ApplyRounded:
    """`apply` of a merged and rounded adapter, which is merged and rounded in the program; hashable.

    Attributes:
        apply: of the model.
        bits, group_size: see `round_to_nearest`.
    """

    apply: Callable[..., Array]
    bits: int
    group_size: int

    def __call__(self, base: BaseParams, lora: Lora | None, *inputs: Any) -> Array:
        """As `apply` with the rounded base, and what of the adapter did not merge."""
        rounded = _merged_and_rounded(base, lora, bits=self.bits, group_size=self.group_size)
        return self.apply(rounded, _unmerged(lora), *inputs)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RoundingModel(Model):
    """A model that merges and rounds each adapter whenever it is applied; for adapters that share a base.

    Attributes:
        inner: the model of one adapter; all other fields are its own.
        bits, group_size: see `round_to_nearest`.
    """

    inner: Model
    bits: int
    group_size: int

    @classmethod
    def of(
        cls, model: Model, lora: Lora | None, *, bits: int = BITS, group_size: int = GROUP_SIZE
    ) -> RoundingModel:
        """The model of adapters that are like `lora`.

        Raises:
            ValueError: as `quantise_merged`.
        """
        _check_extras(model, lora)
        fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(Model)}
        return cls(**fields, inner=model, bits=bits, group_size=group_size)

    @property
    def apply(self) -> Any:
        """An `ApplyRounded`."""
        return ApplyRounded(self.inner.apply, self.bits, self.group_size)


def quantise_merged(
    model: Model, lora: Lora | None, *, bits: int = BITS, group_size: int = GROUP_SIZE
) -> tuple[Model, Lora | None]:
    """The base with the adapter merged in and its linear layers rounded, and what of the adapter did not merge.

    Embedding, norms and the output head are not rounded, as is usual, and so is not what an adapter holds besides
    low-rank updates (`Model.adapter_extras`: a projector that makes input embeddings, say). The merge is in the
    base's own dtype, as serving it would be.

    Args:
        model: the base.
        lora: the adapter; None rounds the base alone.
        bits, group_size: see `round_to_nearest`.

    Returns:
        The rounded model, and the adapter's extras without any low-rank update, or None where there are none.

    Raises:
        ValueError: the adapter has parts that neither are updates of a layer nor the model's extras, which a merge
            would lose.
    """
    _check_extras(model, lora)
    rounded = _merged_and_rounded(model.base, lora, bits=bits, group_size=group_size)
    return dataclasses.replace(model, base=rounded), _unmerged(lora)


def _check_extras(model: Model, lora: Lora | None) -> None:
    merged = set() if lora is None else {group for group, _, _ in low_rank_updates(lora)}
    stray = set() if lora is None else set(lora.params) - {"layers", COPIES, *merged, *model.adapter_extras}
    if stray:
        msg = f"The adapter holds {', '.join(sorted(stray))} besides its low-rank updates; those cannot be merged."
        raise ValueError(msg)


def _merged_and_rounded(base: BaseParams, lora: Lora | None, *, bits: int, group_size: int) -> BaseParams:
    merged: BaseParams = base if lora is None else merge_lora(base, lora)
    layers: dict[str, Any] = dict(merged["layers"])
    for name, leaves in layers.items():
        kernels = [leaf for leaf in leaves if leaf == "kernel" or (name == "experts" and leaf != "router")]
        rounded = {k: round_to_nearest(dequantized(leaves[k]), bits=bits, group_size=group_size) for k in kernels}
        if rounded:
            layers[name] = {**leaves, **rounded}
    return dict(merged, layers=layers)


def _unmerged(lora: Lora | None) -> Lora | None:
    """The extras of an adapter, without any low-rank update; None where there are none."""
    if lora is None:
        return None
    merged = {"layers", COPIES, *(group for group, _, _ in low_rank_updates(lora))}
    extras = {name: leaves for name, leaves in lora.params.items() if name not in merged}
    config = dataclasses.replace(lora.config, modules_to_save=())
    return Lora(params={**extras, "layers": {}}, config=config) if extras else None


def relearn(model: Model, lora: Lora, unrelated: TokenDataset, config: TrainConfig, *, num_steps: int) -> Lora:
    """The adapter after a short training on unrelated examples.

    Args:
        model: the base.
        lora: where training starts.
        unrelated: retained examples that say nothing of what was forgotten; `num_steps` batches are drawn of them
            by the configuration's seed.
        config: of the training; its epochs are not used, its schedule spans the steps.
        num_steps: optimiser steps.

    Raises:
        ValueError: no step, or no example.
    """
    if num_steps < 1 or not len(unrelated):
        msg = f"num_steps is {num_steps} and there are {len(unrelated)} unrelated examples; both must be 1 or more."
        raise ValueError(msg)
    rng = np.random.default_rng(config.seed)
    size = min(len(unrelated), num_steps * config.batch_size)
    chosen = rng.permutation(len(unrelated))[:size]
    short = TokenDataset(
        [unrelated.encoded[i] for i in chosen],
        unrelated.recipe,
        buckets=unrelated.buckets,
        normalizer=unrelated.normalizer,
        features=unrelated.features,
    )
    steps_per_epoch = -(-size // config.batch_size)
    if num_steps % steps_per_epoch:
        msg = (
            f"{len(unrelated)} examples make {steps_per_epoch} batches of {config.batch_size}, and num_steps = "
            f"{num_steps} is no multiple of that; choose one that is, or give more examples."
        )
        raise ValueError(msg)
    config = dataclasses.replace(config, epochs=num_steps // steps_per_epoch)
    return finetune(model, short, config, lora=lora).lora


def retained_only(dataset: TokenDataset, named: np.ndarray) -> TokenDataset:
    """The examples that a request does not name, as a set of their own.

    Args:
        dataset: the training set as it stood.
        named: positions of the named examples.
    """
    kept = np.setdiff1d(np.arange(len(dataset)), named)
    return TokenDataset(
        [dataset.encoded[i] for i in kept],
        dataset.recipe,
        buckets=dataset.buckets,
        examples=[dataset.examples[i] for i in kept] if dataset.examples else (),
        normalizer=dataset.normalizer,
        features=dataset.features,
    )
