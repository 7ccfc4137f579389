"""Attacks with many models: closed forms on normal distributions, and chance where nothing differs."""

import numpy as np
import pytest
from scipy import stats

from llmeraser_jax.evaluation.attacks import classifier_attack, likelihood_ratio_attack


def models(count, rows, shift=0.0, seed=0):
    return np.random.default_rng(seed).normal(shift, 1.0, (count, rows))


@pytest.mark.parametrize("shift", [0.0, 1.0, 3.0])
def test_rows_are_told_apart_as_often_as_two_normal_distributions_are(shift):
    """The best test of equal spreads is right with probability Phi(shift / 2); the fit takes a little away."""
    found = likelihood_ratio_attack(models(40, 300), models(40, 300, shift, seed=1))
    assert found.success.shape == (300,)
    assert found.success.mean() == pytest.approx(stats.norm.cdf(shift / 2), abs=0.03)
    assert 0.48 < found.chance < 0.6 and (found.success.mean() > found.chance) == (shift > 0)


def test_a_difference_in_spread_alone_tells_rows_apart():
    """Two centred normal distributions with spreads 1 and 3 cross at |x| = c."""
    c = np.sqrt(2 * np.log(3) / (1 - 1 / 9))
    best = 0.5 * ((2 * stats.norm.cdf(c) - 1) + 2 * stats.norm.sf(c / 3))
    found = likelihood_ratio_attack(models(60, 300), 3 * models(60, 300, seed=1))
    assert found.success.mean() == pytest.approx(best, abs=0.03)


def test_a_row_that_differs_is_found_among_others():
    unlearned = models(16, 5)
    unlearned[:, 2] += 8
    success = likelihood_ratio_attack(unlearned, models(16, 5, seed=1)).success
    assert success[2] == 1.0 and np.delete(success, 2).max() < 0.8


def test_the_classifier_sees_a_direction_that_no_row_shows():
    """Two rows move against each other by far less than either varies."""
    rng, common = np.random.default_rng(2), models(60, 1, seed=3)
    noise = 0.02 * rng.normal(size=(60, 2))
    rows = np.concatenate([common, common], axis=1) + noise
    rows[:30, 0] += 0.3
    found = classifier_attack(rows[:30], rows[30:])
    assert found.success[0] > 0.95 > found.chance
    assert likelihood_ratio_attack(rows[:30], rows[30:]).success.mean() < 0.7


def test_equal_distributions_leave_the_classifier_at_chance():
    found = [classifier_attack(models(16, 30, seed=k), models(16, 30, seed=100 + k)) for k in range(3)]
    assert sum(attack.success[0] > attack.chance for attack in found) <= 1
    assert np.mean([attack.success[0] for attack in found]) == pytest.approx(0.5, abs=0.15)
    assert all(0.55 < attack.chance < 0.8 for attack in found)


@pytest.mark.parametrize(
    ("unlearned", "retrained", "message"),
    [
        (models(3, 2), models(8, 2), "at least 4 each"),
        (np.full((8, 2), np.inf), models(8, 2), "not finite"),
    ],
)
def test_what_cannot_be_attacked_is_refused(unlearned, retrained, message):
    for attack in (likelihood_ratio_attack, classifier_attack):
        with pytest.raises(ValueError, match=message):
            attack(unlearned, retrained)
