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
from collections.abc import Sequence

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


def reference_scores(
    losses: Float[Array | np.ndarray, " examples"], reference_losses: Float[Array | np.ndarray, " examples"]
) -> Float[np.ndarray, " examples"]:
    """Reference loss minus loss: how much better the model knows an example than one that never saw it does.

    It takes out how hard an example is by itself, which the plain loss mistakes for membership.

    Args:
        losses: of the model under test, in nats per token.
        reference_losses: of the reference on the same examples: the base without adapter, or the mean of retrained
            models.

    Raises:
        ValueError: the lengths differ.
    """
    own, reference = np.asarray(losses, np.float64), np.asarray(reference_losses, np.float64)
    if own.shape != reference.shape:
        msg = f"Got {own.size} losses and {reference.size} of the reference; they must be of the same examples."
        raise ValueError(msg)
    return reference - own


def mean_of_others(losses: Sequence[np.ndarray], left_out: int | None) -> np.ndarray | None:
    """Mean over models of each example's loss, one model left out; None where no model remains.

    A retrained model must not be its own reference. The models that are no retraining have all of them, one more.

    Args:
        losses: per model [examples].
        left_out: a position in `losses`, or None.
    """
    others = [row for position, row in enumerate(losses) if position != left_out]
    return np.mean(np.stack(others).astype(np.float64), axis=0) if others else None


def membership_auc(
    name: str,
    member_scores: Float[Array | np.ndarray, " members"],
    nonmember_scores: Float[Array | np.ndarray, " nonmembers"],
) -> Metric:
    """AUC of telling members S from held-out examples by any score, higher for member.

    Args:
        name: of the score, e.g. "min_k_plus_plus".
        member_scores: of S.
        nonmember_scores: of the held-out examples.
    """
    return auc_metric(name, member_scores, nonmember_scores)


def membership_loss_auc(
    member_losses: Float[Array | np.ndarray, " members"], nonmember_losses: Float[Array | np.ndarray, " nonmembers"]
) -> Metric:
    """AUC of telling members S from held-out examples by their loss; lower loss reads as member.

    The target is the retrained model's AUC, not 0.5: S and the held-out set need not be equally hard.
    """
    return membership_auc("loss", -np.asarray(member_losses, np.float64), -np.asarray(nonmember_losses, np.float64))


def membership_min_k_auc(
    member_scores: Float[Array | np.ndarray, " members"], nonmember_scores: Float[Array | np.ndarray, " nonmembers"]
) -> Metric:
    """AUC of telling members S from held-out examples by `min_k_scores`; target as for the loss."""
    return membership_auc("min_k", member_scores, nonmember_scores)
