"""Importance sampling of the examples that a curvature is estimated from, unbiased by their coefficients."""

from __future__ import annotations

import numpy as np


def importance_probabilities(similarities: np.ndarray, *, mix: float) -> np.ndarray:
    """`p_i = mix / n + (1 - mix) * s_i / sum(s)`: draws that favour examples similar to the named ones.

    The variance of the estimate `f_i / p_i` of a sum is least where `p_i` is proportional to the size of `f_i`; the
    uniform part bounds every coefficient by `1 / mix` times the uniform draw's, however wrong the similarities.

    Args:
        similarities: [n], finite and at least 0; larger is more similar. Only proportions matter. All
            zero gives the uniform draw.
        mix: share of the uniform draw, in (0, 1].

    Returns:
        Probabilities [n], each at least `mix / n`, summing to 1.

    Raises:
        ValueError: an argument is out of its range.
    """
    s = np.asarray(similarities, np.float64)
    if s.ndim != 1 or s.size == 0 or not np.all(np.isfinite(s)) or np.any(s < 0):
        msg = f"similarities must be one or more finite numbers of at least 0; got shape {s.shape}: {s}."
        raise ValueError(msg)
    if not 0 < mix <= 1:
        msg = f"mix is {mix}; it must be in (0, 1]: without a uniform part some examples could never be drawn."
        raise ValueError(msg)
    largest = s.max()
    # In units of the largest, so that the sum stays in range.
    shares = s / largest / np.sum(s / largest) if largest > 0 else np.full(s.size, 1 / s.size)
    p = mix / s.size + (1 - mix) * shares
    return p / p.sum()


def importance_sample(
    which: np.ndarray, probabilities: np.ndarray, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draws with replacement; `sum_j coefficients_j f(indices_j)` estimates `sum over which of f` without bias.

    The estimator of Hansen and Hurwitz (1943), Horvitz and Thompson's counterpart for draws with replacement:
    a draw of example i counts `1 / (size p_i)`, and an example drawn several times is returned once with the
    sum of its coefficients. Multiply by `1/n` for a mean.

    Args:
        which: [n] example indices.
        probabilities: [n], above 0, summing to 1.
        size: number of draws, at least 1.
        rng: random numbers.

    Returns:
        Distinct indices [m] in the order of `which`, m at most `size`, and float64 coefficients [m].

    Raises:
        ValueError: an argument is out of its range.
    """
    which, p = np.asarray(which), np.asarray(probabilities, np.float64)
    if which.shape != p.shape or which.ndim != 1:
        msg = f"which has shape {which.shape} and probabilities {p.shape}; they must be one-dimensional and equal."
        raise ValueError(msg)
    if not np.all(p > 0) or not np.isclose(p.sum(), 1.0, rtol=0, atol=1e-9):
        msg = f"Probabilities must be above 0 and sum to 1; got least {p.min()} and sum {p.sum()}."
        raise ValueError(msg)
    if size < 1:
        msg = f"size is {size}; it must be at least 1."
        raise ValueError(msg)
    counts = rng.multinomial(size, p / p.sum())
    drawn = np.flatnonzero(counts)
    return which[drawn], counts[drawn] / (size * p[drawn])
