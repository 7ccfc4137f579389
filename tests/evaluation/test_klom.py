"""KLOM against histograms counted by hand, and what its floor says of equal and of different seeds."""

import numpy as np
import pytest

from llmeraser_jax.evaluation import klom as module
from llmeraser_jax.evaluation.klom import histogram_kl, klom, response_margins


def test_margins_are_log_odds_of_the_mean_token_probability():
    p = np.array([0.5, 0.9, 0.01])
    np.testing.assert_allclose(response_margins(-np.log(p)), np.log(p / (1 - p)), rtol=1e-12, atol=1e-12)
    assert response_margins(np.array([0.0]))[0] == np.inf
    assert response_margins(np.array([1e-12]))[0] == pytest.approx(-np.log(1e-12))


def test_histograms_over_shared_bins_by_hand(monkeypatch):
    monkeypatch.setattr(module, "NUM_BINS", 2)
    # Two bins over [0, 4]: the unlearned have 3/4 and 1/4, the retrained 1/2 and 1/2.
    unlearned, retrained = np.array([0.0, 1.0, 1.9, 4.0]), np.array([0.0, 1.0, 3.0, 3.5])
    expected = 0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5)
    assert histogram_kl(unlearned, retrained) == pytest.approx(expected)
    swapped = 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)
    assert histogram_kl(retrained, unlearned) == pytest.approx(swapped)


def test_an_empty_bin_of_the_retrained_costs_log_of_one_over_epsilon_times_the_share():
    # Bins of 0.5 over [0, 10]: half of the unlearned share the retrained ones' bin, half are far away.
    value = histogram_kl(np.array([0.1, 10.0]), np.array([0.0, 0.2]))
    assert value == pytest.approx(0.5 * np.log(0.5) + 0.5 * np.log(0.5 / 1e-5))


def test_margins_are_clipped_and_equal_ones_have_no_divergence():
    assert histogram_kl(np.array([np.inf, 5e3]), np.array([200.0])) == 0.0
    # Clipped to 100 and 99: twenty bins lie between, so that they are still told apart.
    assert histogram_kl(np.array([np.inf]), np.array([99.0])) == pytest.approx(np.log(1e5))


def test_the_floor_is_met_by_equal_seeds_and_exceeded_by_others():
    rng = np.random.default_rng(0)
    retrained = rng.normal(size=(40, 30))
    same = klom(rng.normal(size=(40, 30)), retrained)
    other = klom(rng.normal(loc=3.0, size=(40, 30)), retrained)
    assert same.floor is not None and same.matched is not None and same.caveat == ""
    assert same.matched.mean() == pytest.approx(same.floor.mean(), rel=0.1)
    assert same.values.mean() < 1.2 * same.floor.mean() < other.values.mean()
    near = klom(rng.normal(loc=1.0, size=(40, 30)), retrained)
    assert near.matched is not None and near.matched.mean() > 1.2 * same.floor.mean() > near.values.mean()


def test_with_four_seeds_the_floor_is_the_mean_over_halves_written_out():
    rng = np.random.default_rng(1)
    retrained = rng.normal(size=(4, 3))
    result = klom(retrained[:2], retrained)
    halves = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    for example in range(3):
        column = retrained[:, example]
        values = [histogram_kl(column[list(h)], np.delete(column, h)) for h in halves]
        assert result.floor is not None and result.floor[example] == pytest.approx(np.mean(values))
        ours = retrained[:2, example]  # the only two, against the half that each floor compares with
        values = [histogram_kl(ours, np.delete(column, h)) for h in halves]
        assert result.matched is not None and result.matched[example] == pytest.approx(np.mean(values))
    assert "empty bins" in result.caveat
    assert klom(retrained[:1], retrained).matched is None


def test_three_seeds_have_no_floor_and_say_so():
    result = klom(np.zeros((1, 2)), np.array([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0]]))
    assert result.floor is None
    assert "too few" in result.caveat
    # One unlearned seed: log of one over the retrained share of its bin, or log of one over epsilon.
    np.testing.assert_allclose(result.values, [0.0, np.log(1e5)])


def test_other_examples_and_diverged_models_are_refused():
    with pytest.raises(Exception, match=r"(?s)\[seeds, examples\]|examples"):
        klom(np.zeros((1, 2)), np.zeros((1, 3)))
    with pytest.raises(ValueError, match="nan"):
        klom(np.full((1, 2), np.nan), np.zeros((1, 2)))
