"""Task metrics against counts made by hand, scikit-learn and DeLong's formula written out over all pairs."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from llmeraser_jax.evaluation.tasks import (
    auc_metric,
    count_metric,
    exact_match,
    yes_no_accuracy,
    yes_no_auc,
)


def _delong_over_all_pairs(positives, negatives):
    wins = np.array([[1.0 if p > n else 0.5 if p == n else 0.0 for n in negatives] for p in positives])
    v10, v01 = wins.mean(axis=1), wins.mean(axis=0)
    return wins.mean(), np.sqrt(v10.var(ddof=1) / len(positives) + v01.var(ddof=1) / len(negatives))


def test_accuracy_counts_correct_valid_and_all():
    yes = np.array([-1.0, -3.0, -1.0, -2.0, np.nan])
    no = np.array([-2.0, -1.0, -1.0, -1.0, -1.0])
    labels = np.array([True, False, True, True, False])
    # Right, right, tie (no answer), wrong, unreadable.
    metric = yes_no_accuracy(yes, no, labels)
    assert (metric.correct, metric.valid, metric.total) == (2, 3, 5)
    assert metric.value == pytest.approx(0.4)
    assert metric.standard_error == pytest.approx(np.sqrt(0.4 * 0.6 / 5))
    assert metric.valid_ratio == pytest.approx(0.6)


def test_auc_ranks_by_log_odds_not_by_the_yes_answer_alone():
    yes, no = np.array([-5.0, -1.0, -4.0, -2.0]), np.array([-9.0, -0.5, -3.0, -1.0])
    labels = np.array([True, False, True, False])
    # Log-odds 4, -0.5, -1, -1: positives 4 and -1, negatives -0.5 and -1: 1, 1, 0 and a tie.
    metric = yes_no_auc(yes, no, labels)
    assert metric.value == pytest.approx(2.5 / 4)
    assert (metric.correct, metric.valid, metric.total) == (None, 4, 4)
    assert "no count of correct" in metric.reason
    assert metric.value == pytest.approx(roc_auc_score(labels, yes - no))


def test_auc_standard_error_by_hand():
    # Placements of the positives 1, 3 among 0, 2: 1/2, 1; of the negatives among the positives: 1, 1/2.
    metric = auc_metric("auc", np.array([1.0, 3.0]), np.array([0.0, 2.0]))
    assert metric.value == pytest.approx(0.75)
    assert metric.standard_error == pytest.approx(np.sqrt(0.125 / 2 + 0.125 / 2))
    assert metric.standard_error_method.startswith("DeLong")


@pytest.mark.parametrize("seed", range(3))
def test_auc_and_delong_match_the_definition_over_all_pairs_with_ties(seed):
    rng = np.random.default_rng(seed)
    positives = rng.integers(0, 8, 31).astype(float) + 1
    negatives = rng.integers(0, 8, 19).astype(float)
    value, error = _delong_over_all_pairs(positives, negatives)
    metric = auc_metric("auc", positives, negatives)
    assert metric.value == pytest.approx(value, rel=1e-12)
    assert metric.standard_error == pytest.approx(error, rel=1e-12)


def test_auc_takes_infinite_scores_and_leaves_nan_out():
    metric = auc_metric("auc", np.array([np.inf, 1.0, np.nan]), np.array([-np.inf, 0.0]))
    assert metric.value == 1.0
    assert (metric.valid, metric.total) == (4, 5)


@pytest.mark.parametrize("positives", [[], [np.nan]])
def test_auc_of_one_class_is_undefined_in_words(positives):
    metric = auc_metric("auc", np.array(positives, float), np.array([1.0, 2.0]))
    assert metric.value is None
    assert metric.standard_error is None
    assert "0 positive and 2 negative" in metric.reason


def test_auc_of_a_single_positive_has_a_value_but_no_standard_error():
    metric = auc_metric("auc", np.array([1.5]), np.array([1.0, 2.0]))
    assert metric.value == 0.5
    assert metric.standard_error is None
    assert "no standard error" in metric.reason


def test_yes_no_refuses_labels_that_are_not_boolean_vectors():
    yes = np.array([-1.0, -2.0])
    with pytest.raises(Exception, match=r"(?s)(boolean|labels)"):
        yes_no_accuracy(yes, yes, np.array([1, 0]))


def test_exact_match_ignores_white_space_only():
    metric = exact_match(["Ada  Lovelace\n", "ada lovelace", " ", "Bo"], ["Ada Lovelace"] * 3 + ["Bo"])
    assert (metric.correct, metric.valid, metric.total) == (2, 3, 4)
    assert metric.value == 0.5


def test_bad_answers_and_counts_are_named():
    with pytest.raises(ValueError, match="2 generated answers for 1"):
        exact_match(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="row 1 is empty"):
        exact_match(["Yes", "No"], ["Yes", " "])
    with pytest.raises(ValueError, match="3, 2, 4"):
        count_metric("x", correct=3, valid=2, total=4)


def test_an_empty_test_set_has_no_value_and_says_so():
    metric = exact_match([], [])
    assert metric.value is None
    assert metric.reason == "there is no test example"
