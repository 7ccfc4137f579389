"""Importance sampling: without bias whatever the probabilities, and less noisy where they fit."""

import numpy as np
import pytest

from llmeraser_jax.curvature import importance_probabilities, importance_sample

# A few examples carry most of the sum, as the neighbours of the named ones do.
VALUES = np.concatenate([np.full(5, 20.0), np.full(95, 0.5)])
WHICH = np.arange(100) + 1000


def estimates(probabilities, size, repeats, seed=0):
    rng = np.random.default_rng(seed)
    out = np.empty(repeats)
    for r in range(repeats):
        indices, coefficients = importance_sample(WHICH, probabilities, size, rng)
        out[r] = coefficients @ VALUES[indices - 1000]
    return out


@pytest.mark.parametrize("mix", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("fits", [True, False])
def test_the_estimate_is_unbiased_whatever_the_similarities(mix, fits):
    similarities = VALUES if fits else 1 / VALUES
    got = estimates(importance_probabilities(similarities, mix=mix), 10, 4000)
    standard_error = got.std() / np.sqrt(len(got))
    assert abs(got.mean() - VALUES.sum()) < 4 * standard_error


def test_the_variance_is_the_closed_form_and_below_the_uniform_draw_s():
    variances = []
    for mix in (0.2, 1.0):
        p = importance_probabilities(VALUES, mix=mix)
        closed_form = (np.sum(VALUES**2 / p) - VALUES.sum() ** 2) / 10
        measured = estimates(p, 10, 8000).var()
        assert measured == pytest.approx(closed_form, rel=0.1)
        variances.append(measured)
    assert variances[0] < 0.05 * variances[1]


def test_a_perfect_fit_has_no_variance():
    p = VALUES / VALUES.sum()
    np.testing.assert_allclose(estimates(p, 3, 20), VALUES.sum(), rtol=1e-12)


def test_similar_examples_are_drawn_more_and_none_is_left_out():
    p = importance_probabilities(VALUES, mix=0.25)
    assert p.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(p, 0.25 / 100 + 0.75 * VALUES / VALUES.sum(), rtol=1e-12)
    np.testing.assert_allclose(importance_probabilities(np.zeros(4), mix=0.3), 0.25)
    np.testing.assert_allclose(importance_probabilities(np.full(4, 1e308), mix=0.3), 0.25)


def test_examples_drawn_twice_are_merged_and_coefficients_are_bounded():
    p = importance_probabilities(VALUES, mix=0.5)
    indices, coefficients = importance_sample(WHICH, p, 400, np.random.default_rng(0))
    assert len(np.unique(indices)) == len(indices) < 400 and set(indices) <= set(WHICH)
    counts = coefficients * 400 * p[indices - 1000]
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-9)
    assert counts.sum() == pytest.approx(400) and counts.max() > 1
    assert np.all(coefficients / np.round(counts) <= 100 / (0.5 * 400) * (1 + 1e-12))


@pytest.mark.parametrize(
    ("similarities", "mix", "message"),
    [
        ([1.0, -1.0], 0.5, "at least 0"),
        ([1.0, np.nan], 0.5, "finite"),
        ([], 0.5, "one or more"),
        ([1.0], 0.0, "mix is 0.0"),
        ([1.0], 1.5, "mix is 1.5"),
    ],
)
def test_similarities_out_of_range_are_refused(similarities, mix, message):
    with pytest.raises(ValueError, match=message):
        importance_probabilities(np.array(similarities), mix=mix)


@pytest.mark.parametrize(
    ("probabilities", "size", "message"),
    [([0.5, 0.6], 1, "sum to 1"), ([1.0, 0.0], 1, "above 0"), ([1.0], 1, "shape"), ([0.5, 0.5], 0, "size is 0")],
)
def test_draws_that_cannot_be_unbiased_are_refused(probabilities, size, message):
    with pytest.raises(ValueError, match=message):
        importance_sample(np.arange(2), np.array(probabilities), size, np.random.default_rng(0))
