"""Held-out KL to retrained models with its seed floor. Membership inference is in `evaluation.membership`.

Whatever is summed is summed in float64 on the host; log-probabilities may come as float32 from any device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Array, Bool, Float

from llmeraser_jax.evaluation.closure import seed_mean

_BLOCK_NUMBERS = 1 << 20  # numbers of one model that are in float64 at a time
_NORMALISATION_TOLERANCE = 1e-3  # float32 log-softmax over 256k tokens stays far below, logits and bf16 above


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutKLResult:
    """Held-out KL of every model, in nats per response position.

    Fold r leaves retrained model r out: the reference is the mean prediction of the others.

    Attributes:
        candidates: per model, the KL of each fold.
        retrained_left_out: per fold r, the KL of retrained model r itself.
        num_positions: positions averaged over.
    """

    candidates: Mapping[str, tuple[float, ...]]
    retrained_left_out: tuple[float, ...]
    num_positions: int

    def heldout_kl(self, name: str) -> float:
        """Mean over folds for one model."""
        return seed_mean(self.candidates[name])

    @property
    def seed_floor(self) -> float:
        """The same quantity for the retrained model left out: what a change of seed alone amounts to."""
        return seed_mean(self.retrained_left_out)


class HeldOutKL:
    """Accumulates `KL(mean prediction of R - 1 retrained models || model)` over chunks of positions.

    For each retrained model left out, the reference is the arithmetic mean of the other models' probabilities; the
    KL is averaged over positions and over the one left out. All models share the references.
    """

    def __init__(self) -> None:
        self._sums: dict[str | None, np.ndarray] | None = None  # name -> [retrained]; None: the one left out
        self._num_positions = 0

    def update(
        self,
        candidate_log_probs: Mapping[str, Float[Array | np.ndarray, "*lead vocab"]],
        retrained_log_probs: Sequence[Float[Array | np.ndarray, "*lead vocab"]],
        mask: Bool[Array | np.ndarray, "*lead"],
    ) -> None:
        """Adds one chunk.

        Args:
            candidate_log_probs: log-probabilities of each model to be judged, in nats; the same names at
                every call.
            retrained_log_probs: log-probabilities of each retrained model, in the same order at every call.
            mask: True where a position counts: a response position of a held-out prompt.

        Raises:
            ValueError: fewer than two retrained models, names, counts or shapes that do not agree, arrays
                that are not log-probabilities, or retrained predictions that are nan.
        """
        num_retrained = len(retrained_log_probs)
        if num_retrained < 2:
            msg = f"The held-out KL leaves one retrained model out and needs at least two, got {num_retrained}."
            raise ValueError(msg)
        found = {name: np.zeros(num_retrained) for name in (*candidate_log_probs, None)}
        sums = found if self._sums is None else self._sums
        if found.keys() != sums.keys() or len(found[None]) != len(sums[None]):
            expected, got = (f"{[*each][:-1]} and {len(each[None])} retrained models" for each in (sums, found))
            msg = f"Every chunk must hold the models of the first, {expected}, got {got}."
            raise ValueError(msg)
        selected = np.asarray(mask).astype(bool)
        retrained = [np.asarray(array) for array in retrained_log_probs]
        candidates = {name: np.asarray(array) for name, array in candidate_log_probs.items()}
        vocab = retrained[0].shape[-1]
        named = {**{f"retrained {r}": array for r, array in enumerate(retrained)}, **candidates}
        for name, array in named.items():
            if array.shape != (*selected.shape, vocab):
                msg = f"{name}: expected shape {(*selected.shape, vocab)} for this mask, got {array.shape}."
                raise ValueError(msg)
        rows = np.flatnonzero(selected)
        block = max(1, _BLOCK_NUMBERS // vocab)
        # Summed apart and added at the end, so that a chunk that is refused leaves nothing behind.
        for start in range(0, rows.size, block):
            chosen = rows[start : start + block]
            references = np.stack([_log_prob_rows(f"retrained {r}", a, chosen) for r, a in enumerate(retrained)])
            if np.isnan(references).any():
                msg = "A retrained model's log-probabilities are nan; it cannot serve as a reference."
                raise ValueError(msg)
            judged = {name: _log_prob_rows(name, array, chosen) for name, array in candidates.items()}
            probs = np.exp(references)
            for r in range(num_retrained):
                # Summed directly: total minus p_r would cancel where p_r dominates.
                mean = np.delete(probs, r, axis=0).mean(axis=0)
                found[None][r] += _kl_sum(mean, references[r])
                for name, log_probs in judged.items():
                    found[name][r] += _kl_sum(mean, log_probs)
        self._sums = found if self._sums is None else {name: self._sums[name] + found[name] for name in found}
        self._num_positions += rows.size

    def result(self) -> HeldOutKLResult:
        """The averages over everything added so far.

        Raises:
            ValueError: no position was added.
        """
        if self._num_positions == 0 or self._sums is None:
            msg = "No position was added; the held-out set has no response token."
            raise ValueError(msg)
        means = {name: tuple((sums / self._num_positions).tolist()) for name, sums in self._sums.items()}
        left_out = means.pop(None)
        candidates = {str(name): each for name, each in means.items()}
        return HeldOutKLResult(
            candidates=candidates, retrained_left_out=left_out, num_positions=self._num_positions
        )


def heldout_kl(
    candidate_log_probs: Mapping[str, Float[Array | np.ndarray, "*lead vocab"]],
    retrained_log_probs: Sequence[Float[Array | np.ndarray, "*lead vocab"]],
    mask: Bool[Array | np.ndarray, "*lead"],
) -> HeldOutKLResult:
    """`HeldOutKL` of positions that fit into memory at once. Arguments and errors as `HeldOutKL.update`."""
    accumulator = HeldOutKL()
    accumulator.update(candidate_log_probs, retrained_log_probs, mask)
    return accumulator.result()


def _log_prob_rows(name: str, array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows `[rows, vocab]` in float64, refused unless normalised; nan passes: divergence is a result."""
    log_probs = array.reshape(-1, array.shape[-1])[rows].astype(np.float64)
    with np.errstate(over="ignore"):  # logits may overflow; the message below is clearer than the warning
        off = np.abs(np.exp(log_probs).sum(axis=-1) - 1)
    if np.any(off > _NORMALISATION_TOLERANCE):
        msg = (
            f"{name}: probabilities sum to 1 only within {np.nanmax(off):.3g}, expected "
            f"{_NORMALISATION_TOLERANCE:g}; pass log_softmax of the logits, taken in at least float32."
        )
        raise ValueError(msg)
    return log_probs


def _kl_sum(probs: np.ndarray, log_probs: np.ndarray) -> float:
    """`sum probs (log probs - log_probs)`; 0 where probs is 0, inf where only the model's is."""
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = probs * (np.log(probs) - log_probs)
    # Nan predictions must not hide behind a reference probability of 0.
    return float(np.sum(np.where((probs > 0) | np.isnan(log_probs), terms, 0.0)))
