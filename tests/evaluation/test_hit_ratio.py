"""HitRatio@1 and ValidRatio counted by hand, as the released code does; means over seeds with both errors."""

import dataclasses
import math

import numpy as np
import pytest

from llmeraser_jax.evaluation.summary import _mean_metrics, _metric
from llmeraser_jax.evaluation.tasks import auc_metric, count_metric, hit_ratio, hit_ratio_of_valid

TITLES = ["Alien", "Aliens", "Heat (1995)", "Dr. No"]


def counts(metric):
    return metric.correct, metric.valid, metric.total


def hits(*arguments):
    return hit_ratio(*arguments, name="hit_ratio@1")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Alien", (1, 1, 1)),
        (' "alien". ', (1, 1, 1)),
        ("ALIEN\nHeat (1995)", (1, 1, 1)),  # the first line only
        ("Heat (1995)", (0, 1, 1)),
        ("The answer is Alien", (1, 1, 1)),
        ("Aliens", (0, 0, 1)),  # holds "Alien" too: two are named
        ("Alien or Dr. No", (0, 0, 1)),
        ("", (0, 0, 1)),
    ],
)
def test_an_answer_is_read_as_the_released_code_reads_it(text, expected):
    assert counts(hits([text], ["Alien"], [TITLES])) == expected


def test_shares_are_over_all_answers_and_over_the_valid_ones():
    generated = ["Alien", "Dr. No", "something", "Heat (1995)", "Dr. No"]
    truths = ["Alien", "Alien", "Heat (1995)", "Heat (1995)", "Dr. No"]
    metric = hits(generated, truths, [TITLES] * 5)
    assert counts(metric) == (3, 4, 5)
    assert metric.value == pytest.approx(0.6) and metric.valid_ratio == pytest.approx(0.8)
    assert metric.standard_error == pytest.approx(math.sqrt(0.6 * 0.4 / 5))
    released = hit_ratio_of_valid(metric)
    assert released.value == pytest.approx(0.75)
    assert released.valid_ratio == 1.0 and (released.correct, released.total) == (3, 4)


def test_a_title_that_stands_twice_is_two_candidates():
    titles = ["Chasing Amy (1997)", "Chasing Amy (1997)", "Heat (1995)"]
    assert counts(hits(["Chasing Amy (1997)"], ["Chasing Amy (1997)"], [titles])) == (0, 0, 1)


def test_rows_that_do_not_go_together_are_named():
    with pytest.raises(ValueError, match="2 answers, 1 right"):
        hits(["a", "b"], ["a"], [["a"]])
    with pytest.raises(ValueError, match="Row 1: the right answer 'c'"):
        hits(["a", "b"], ["a", "c"], [["a"], ["b"]])


def test_means_over_seeds_have_one_deviation_over_seeds_and_one_error_over_examples():
    metrics = [dataclasses.asdict(count_metric("accuracy", correct=c, valid=90, total=100)) for c in (50, 60, 70)]
    result = _mean_metrics([{"accuracy": metric} for metric in metrics])["accuracy"]
    assert result["value"] == pytest.approx(0.6)
    assert (result["correct"], result["valid"], result["total"]) == (60, 90, 100)
    assert result["seed_standard_deviation"] == pytest.approx(0.1)
    expected = (0.05 + math.sqrt(0.24 / 100) + math.sqrt(0.21 / 100)) / 3
    assert result["standard_error"] == pytest.approx(expected)


def test_one_seed_or_a_seed_without_a_value_is_said_in_words():
    single = _mean_metrics([{"a": dataclasses.asdict(count_metric("a", correct=1, valid=2, total=2))}])["a"]
    assert single["value"] == 0.5 and "one retraining seed" in single["reason"]["seed_standard_deviation"]
    metrics = [_metric(dataclasses.asdict(auc_metric("auc", np.ones(2), np.zeros(size)))) for size in (2, 0)]
    undefined = _mean_metrics([{"auc": metric} for metric in metrics])["auc"]
    assert undefined["value"] is None and "0 negative scores" in undefined["reason"]["value"]
