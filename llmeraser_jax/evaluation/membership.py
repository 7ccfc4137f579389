"""Membership inference: can the named examples S still be told from examples that were never trained on?

Members are S, non-members held-out examples of the same kind. A score is oriented so that higher reads as member,
and what is reported is its AUC. The target is the retrained model's AUC, never 0.5: S and the held-out set need not
be equally hard, and a model that was retrained without S shows by how much.

    loss                 -loss                                         (Yeom et al. 2018, arXiv 1709.01604)
    min_k                mean of the least log p(x_t), k % of the tokens (Shi et al. 2024, arXiv 2310.16789)
    min_k_plus_plus      the same of (log p(x_t) - mu_t) / sigma_t      (Zhang et al. 2024, arXiv 2404.02936)
    reference_*          reference model's loss - loss                 (Watson et al. 2022, arXiv 2111.08440)

`mu_t` and `sigma_t` are mean and standard deviation of `log p(v)` over tokens v drawn from the model's own
prediction at position t.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Float

from llmeraser_jax.evaluation.closure import Number
from llmeraser_jax.evaluation.tasks import Metric, auc_metric

# A prediction with less spread than this is certain; dividing by its rounding error would invent a score.
LEAST_DEVIATION = 1e-3


def min_k_scores(
    token_log_probs: Float[Array | np.ndarray, "examples response"],
    mask: Bool[Array | np.ndarray, "examples response"],
    *,
    fraction: Number = 0.2,
) -> Float[np.ndarray, " examples"]:
    """Min-k% score: mean log-probability of the least probable `fraction` of each example's response tokens.

    Follows Shi et al. 2024 (arXiv 2310.16789); differs in rounding the number of tokens up, so that a
    response of few tokens still has one.

    Args:
        token_log_probs: log-probability of each response token, in nats.
        mask: True for a response token, False for padding.
        fraction: k, in (0, 1].

    Returns:
        One score per example, higher for what looks memorised; nan where an example has no response token.

    Raises:
        ValueError: `fraction` out of range or shapes that differ.
    """
    log_probs, selected = np.asarray(token_log_probs, np.float64), np.asarray(mask).astype(bool)
    if not 0 < fraction <= 1:
        msg = f"fraction is {fraction}; it must lie in (0, 1]."
        raise ValueError(msg)
    if log_probs.ndim != 2 or log_probs.shape != selected.shape:
        msg = f"Expected [examples, response] twice, got {log_probs.shape} and mask {selected.shape}."
        raise ValueError(msg)
    scores = np.full(len(log_probs), np.nan)
    for i, (row, keep) in enumerate(zip(log_probs, selected, strict=True)):
        tokens = np.sort(row[keep])
        if tokens.size:
            # Rounded first: fraction * size may exceed an integer by one unit in the last place.
            count = math.ceil(round(fraction * tokens.size, 9))
            scores[i] = np.nan if np.isnan(tokens).any() else tokens[:count].mean()
    return scores


def min_k_plus_plus_scores(
    token_log_probs: Float[Array | np.ndarray, "examples response"],
    means: Float[Array | np.ndarray, "examples response"],
    deviations: Float[Array | np.ndarray, "examples response"],
    mask: Bool[Array | np.ndarray, "examples response"],
    *,
    fraction: Number = 0.2,
) -> Float[np.ndarray, " examples"]:
    """Min-k%++ score: `min_k_scores` of `(log p(x_t) - mu_t) / sigma_t`.

    Follows Zhang et al. 2024 (arXiv 2404.02936), eq. 3; differs in rounding the number of tokens up, and in
    taking `LEAST_DEVIATION` for a smaller sigma.

    Args:
        token_log_probs: log-probability of each response token, in nats.
        means: mu, `sum_v p(v) log p(v)` at each position.
        deviations: sigma, `sqrt(sum_v p(v) (log p(v) - mu)^2)`.
        mask: True for a response token, False for padding.
        fraction: k, in (0, 1].

    Raises:
        ValueError: as `min_k_scores`, or shapes that differ.
    """
    log_probs, mu, sigma = (np.asarray(x, np.float64) for x in (token_log_probs, means, deviations))
    if not log_probs.shape == mu.shape == sigma.shape:
        msg = f"Expected three arrays of one shape, got {log_probs.shape}, {mu.shape} and {sigma.shape}."
        raise ValueError(msg)
    return min_k_scores((log_probs - mu) / np.maximum(sigma, LEAST_DEVIATION), mask, fraction=fraction)


def mean_of_others(losses: Sequence[np.ndarray], left_out: int | None) -> np.ndarray:
    """Mean over models of each example's loss, one model left out: a retrained model is not its own reference.

    Args:
        losses: per model [examples]; more than one.
        left_out: a position in `losses`, or None.
    """
    return np.mean([row for position, row in enumerate(losses) if position != left_out], axis=0)


def attacks(
    scores: Mapping[str, Any],
    *,
    base: Mapping[str, Any] | None = None,
    retrained: Sequence[Mapping[str, Any]] = (),
    left_out: int | None = None,
    nonmembers: Sequence[bool] | None = None,
) -> tuple[Metric, ...]:
    """The AUC of every attack on one model; none where no non-member was scored.

    Args:
        scores: of the model attacked, see `measures`.
        base: of the base without adapter, a reference.
        retrained: of the retrained models, whose mean loss is another; at least two.
        left_out: which of them is the model attacked, where it is one.
        nonmembers: which held-out examples are; None is all.
    """

    def sides(of: Mapping[str, Any], name: str = "losses") -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the forget set and of the non-members; nan for what is no finite number."""
        lists = [np.array(of.get(part, {}).get(name, ()), np.float64) for part in ("named", "heldout")]
        keep = slice(None) if nonmembers is None or not lists[1].size else np.asarray(nonmembers, bool)
        return lists[0], lists[1][keep]

    losses = sides(scores)
    if not losses[1].size:
        return ()
    found = [auc_metric("loss", *(-side for side in losses))]
    found += [auc_metric(name, *sides(scores, name)) for name in ("min_k", "min_k_plus_plus")]
    references = [] if base is None else [("reference_base", sides(base))]
    if len(retrained) >= 2:
        pairs = zip(*map(sides, retrained), strict=True)
        inside, outside = (mean_of_others(each, left_out) for each in pairs)
        references.append(("reference_retrained", (inside, outside)))
    for name, reference in references:
        # How much better the model knows an example than the reference does, which takes out how hard it is.
        found.append(auc_metric(name, *(theirs - own for theirs, own in zip(reference, losses, strict=True))))
    return tuple(found)
