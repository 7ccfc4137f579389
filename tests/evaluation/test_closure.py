"""Gap closure against hand-computed values, and every case in which it is undefined."""

import math

import pytest

from llmeraser_jax.evaluation.closure import gap_closure, kl_gap_closure


@pytest.mark.parametrize(
    ("unlearned", "expected"),
    [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0), (1.5, 0.5), (2.0, 0.0), (3.0, -1.0), (-1.0, -1.0)],
)
def test_overshooting_counts_as_much_as_undershooting(unlearned, expected):
    # before 0, retrained mean 1, deviation 0.1: the gap of 1 is well outside.
    closure = gap_closure(0.0, unlearned, [0.9, 1.0, 1.1])
    assert closure.value == pytest.approx(expected, abs=1e-12)
    assert closure.reason == ""


def test_closure_works_when_the_loss_has_to_fall():
    # Loss on the wanted pair: 1.77 before, 0.02 retrained, 0.37 unlearned: 1 - 0.35 / 1.75.
    assert gap_closure(1.77, 0.37, [0.01, 0.03]).value == pytest.approx(0.8)


def test_undefined_within_two_seed_standard_deviations():
    # stdev([0, 1, 2]) with ddof 1 is exactly 1, the mean is 1.
    inside = gap_closure(3.0, 1.0, [0.0, 1.0, 2.0])
    assert inside.value is None
    assert "two seed standard deviations" in inside.reason
    assert "one is 1" in inside.reason
    outside = gap_closure(3.01, 1.0, [0.0, 1.0, 2.0])
    assert outside.value == pytest.approx(1.0)


def test_the_deviation_is_the_samples_not_the_populations():
    # Two seeds 0 and 2: ddof 1 gives sqrt(2), two of them 2.83; ddof 0 would give 1, two of them 2.
    assert gap_closure(1 + 2.5, 1.0, [0.0, 2.0]).value is None


def test_one_seed_gives_a_value_and_says_that_no_deviation_is_known():
    closure = gap_closure(0.0, 0.75, [1.0])
    assert closure.value == pytest.approx(0.75)
    assert "no deviation between seeds is known" in closure.reason
    assert gap_closure(1.0, 0.5, [1.0]).value is None


def test_no_retrained_model_is_said_in_words():
    closure = gap_closure(0.0, 1.0, [])
    assert closure.value is None
    assert closure.reason == "no retrained model was given"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diverged_model_has_no_closure_but_a_reason(bad):
    closure = gap_closure(0.0, bad, [1.0, 1.1])
    assert closure.value is None
    assert "unlearned" in closure.reason


def test_kl_closure_targets_the_floor():
    # Floor 0.5 = mean(0.49, 0.51); before 1.5, unlearned 0.7: 1 - 0.2 / 1.0.
    assert kl_gap_closure(1.5, 0.7, [0.49, 0.51]).value == pytest.approx(0.8)
    # Below the floor by as much counts the same.
    assert kl_gap_closure(1.5, 0.3, [0.49, 0.51]).value == pytest.approx(0.8)


@pytest.mark.parametrize("before", [0.446, 0.5])
def test_kl_closure_is_undefined_unless_before_exceeds_the_floor(before):
    closure = kl_gap_closure(before, 0.45, [0.49, 0.51])
    assert closure.value is None
    assert "does not exceed the seed floor" in closure.reason


def test_kl_closure_also_needs_a_gap_beyond_the_seeds_spread():
    closure = kl_gap_closure(0.6, 0.5, [0.4, 0.5, 0.6])
    assert closure.value is None
    assert "two seed standard deviations" in closure.reason


def test_kl_closure_needs_two_retrained_models():
    assert kl_gap_closure(1.0, 0.5, [0.2]).value is None
