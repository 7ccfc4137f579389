"""Task metrics with counts and standard errors: yes/no accuracy, AUC, exact match, HitRatio@1.

An answer is *valid* when it parses. Invalid answers stay in the denominator N: a model that answers nothing
scores 0, it is not excused. The AUC alone is over the valid rows, because nothing else can be ranked.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Bool, Float

BINOMIAL = "binomial: sqrt(v (1 - v) / N)"
DELONG = "DeLong, Biometrics 1988: variance of the placement values"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """One number about one model on one test set.

    Attributes:
        name: what is measured; the key under which a report files it.
        value: the number, or None where it is undefined.
        correct: how many of the `total` answers are right; None for a ranking metric.
        valid: how many answers parse.
        total: how many answers were asked for (N).
        standard_error: sampling error of `value` over test examples, or None where unknown.
        standard_error_method: the formula behind `standard_error`.
        reason: why a field is None, in words; empty when none is.
    """

    name: str
    value: float | None
    correct: int | None
    valid: int
    total: int
    standard_error: float | None
    standard_error_method: str
    reason: str = ""

    @property
    def valid_ratio(self) -> float | None:
        """valid / N, the ValidRatio of the recommendation literature."""
        return self.valid / self.total if self.total else None


def count_metric(name: str, *, correct: int, valid: int, total: int) -> Metric:
    """The share `correct / total` with its binomial standard error.

    Args:
        name: what is counted.
        correct: right answers.
        valid: answers that parse, at least `correct`.
        total: N, at least `valid`.

    Raises:
        ValueError: the counts contradict each other.
    """
    if not 0 <= correct <= valid <= total:
        msg = f"{name}: counts must satisfy 0 <= correct <= valid <= N, got {correct}, {valid}, {total}."
        raise ValueError(msg)
    share = correct / total if total else None
    return Metric(
        name=name,
        value=share,
        correct=correct,
        valid=valid,
        total=total,
        standard_error=None if share is None else math.sqrt(share * (1 - share) / total),
        standard_error_method=BINOMIAL,
        reason="there is no test example" if share is None else "",
    )


def auc_metric(
    name: str,
    positive_scores: Float[Array | np.ndarray, " positive"],
    negative_scores: Float[Array | np.ndarray, " negative"],
) -> Metric:
    """P(a positive scores above a negative) + half the ties, with DeLong's standard error.

    DeLong's variance is `var(V10) / positives + var(V01) / negatives` over placement values: V10 of a
    positive is the share of negatives below it, V01 of a negative the share of positives above it. It is 0
    for a perfect ranking, where it understates the uncertainty as every plug-in formula does.

    Args:
        name: what the scores are.
        positive_scores: higher should mean positive. Scores that are nan count as invalid and are left out.
        negative_scores: the same for the other class.
    """
    positives = np.asarray(positive_scores, np.float64).ravel()
    negatives = np.asarray(negative_scores, np.float64).ravel()
    total = positives.size + negatives.size
    positives, negatives = positives[~np.isnan(positives)], negatives[~np.isnan(negatives)]
    valid = positives.size + negatives.size
    reasons = ["an AUC ranks and has no count of correct answers"]
    value = standard_error = None
    if min(positives.size, negatives.size) == 0:
        reasons.append(
            f"undefined: {positives.size} positive and {negatives.size} negative scores are valid, "
            "at least one of each is needed"
        )
    else:
        scores = np.concatenate([positives, negatives])
        # Ranks keep order and ties, and unlike the scores themselves they are finite where a log-probability
        # is -inf.
        from scipy.stats import rankdata  # takes half a second, which commands without scores need not wait for

        ranks = rankdata(scores)
        labels = np.arange(valid) < positives.size
        least = positives.size * (positives.size + 1) / 2
        value = float((ranks[labels].sum() - least) / (positives.size * negatives.size))
        if min(positives.size, negatives.size) < 2:
            reasons.append("no standard error: it needs two examples of each class")
        else:
            above = (ranks[labels] - rankdata(positives)) / negatives.size
            below = 1 - (ranks[~labels] - rankdata(negatives)) / positives.size
            variance = above.var(ddof=1) / positives.size + below.var(ddof=1) / negatives.size
            standard_error = math.sqrt(variance)
    return Metric(
        name=name,
        value=value,
        correct=None,
        valid=valid,
        total=total,
        standard_error=standard_error,
        standard_error_method=DELONG,
        reason="; ".join(reasons),
    )


def yes_no_accuracy(
    yes_log_probs: Float[Array | np.ndarray, " examples"],
    no_log_probs: Float[Array | np.ndarray, " examples"],
    labels: Bool[Array | np.ndarray, " examples"],
) -> Metric:
    """Accuracy of the more probable of two answers; a tie or a nan is no answer.

    Args:
        yes_log_probs: log-probability of the whole answer that means yes, in nats.
        no_log_probs: the same for no.
        labels: True where yes is right.

    Raises:
        ValueError: the lengths differ.
    """
    yes, no, truth = _yes_no_rows(yes_log_probs, no_log_probs, labels)
    return count_metric(
        "accuracy",
        correct=int(np.sum(np.where(truth, yes > no, no > yes))),
        valid=int(np.sum((yes > no) | (no > yes))),
        total=truth.size,
    )


def yes_no_auc(
    yes_log_probs: Float[Array | np.ndarray, " examples"],
    no_log_probs: Float[Array | np.ndarray, " examples"],
    labels: Bool[Array | np.ndarray, " examples"],
) -> Metric:
    """AUC of `log p(yes) - log p(no)`; arguments as `yes_no_accuracy`. A row whose log-odds are nan is invalid."""
    yes, no, truth = _yes_no_rows(yes_log_probs, no_log_probs, labels)
    with np.errstate(invalid="ignore"):  # -inf minus -inf is nan
        log_odds = yes - no
    return auc_metric("auc", log_odds[truth], log_odds[~truth])


def _yes_no_rows(yes_log_probs, no_log_probs, labels) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    yes, no = (np.asarray(x, np.float64) for x in (yes_log_probs, no_log_probs))
    truth = np.asarray(labels)
    if not (yes.ndim == 1 and yes.shape == no.shape == truth.shape and truth.dtype == bool):
        msg = (
            f"Expected three vectors of one length, the labels boolean; got shapes {yes.shape}, {no.shape}, "
            f"{truth.shape} and labels of type {truth.dtype}."
        )
        raise ValueError(msg)
    return yes, no, truth


def exact_match(generated: Sequence[str], expected: Sequence[str]) -> Metric:
    """Share of generated answers that equal the expected one, white space aside; empty ones are not valid.

    Raises:
        ValueError: the lengths differ, or an expected answer is empty.
    """
    if len(generated) != len(expected):
        msg = f"Got {len(generated)} generated answers for {len(expected)} expected ones; they must pair up."
        raise ValueError(msg)
    answers, truths = ([" ".join(text.split()) for text in texts] for texts in (generated, expected))
    if "" in truths:
        msg = f"The expected answer of row {truths.index('')} is empty."
        raise ValueError(msg)
    correct = sum(answer == truth for answer, truth in zip(answers, truths, strict=True))
    return count_metric("exact_match", correct=correct, valid=sum(map(bool, answers)), total=len(answers))


def hit_ratio(
    generated: Sequence[str], expected: Sequence[str], candidates: Sequence[Sequence[str]], *, name: str
) -> Metric:
    """HitRatio@1 of a next-item task: the share of all N answers that name the right one of their candidates.

    An answer is valid when exactly one candidate's title stands somewhere in its first line, case and outer white
    space aside, as in LLaRA's released code (Liao et al. 2024, arXiv 2312.02445); `valid_ratio` is its ValidRatio.
    Titles that contain others ("Alien", "Aliens"), or stand there twice, make an answer that is right invalid.

    LLaRA divides by the valid answers, not by N: see `hit_ratio_of_valid`. The product of its two numbers is this
    one.

    Args:
        generated: one answer of the model per example, special tokens removed.
        expected: the right titles.
        candidates: per example the titles offered, the right one among them; the same for every model.
        name: the metric's name.

    Raises:
        ValueError: the lengths differ, or a right title is not among its candidates.
    """
    if not len(generated) == len(expected) == len(candidates):
        msg = f"Got {len(generated)} answers, {len(expected)} right ones and {len(candidates)} lists of candidates."
        raise ValueError(msg)
    correct = valid = 0
    for row, (text, truth, titles) in enumerate(zip(generated, expected, candidates, strict=True)):
        offered, right = [title.strip().lower() for title in titles], truth.strip().lower()
        if right not in offered:
            msg = f"Row {row}: the right answer {truth!r} is not among its candidates, {list(titles)!r}."
            raise ValueError(msg)
        line = text.strip().split("\n")[0].strip().lower()
        named = [title for title in offered if title in line]
        valid += len(named) == 1
        correct += named == [right]
    return count_metric(name, correct=correct, valid=valid, total=len(generated))


def hit_ratio_of_valid(metric: Metric) -> Metric:
    """`correct / valid`: HitRatio@1 as LLaRA's released code counts it, invalid answers excused.

    Args:
        metric: from `hit_ratio`.
    """
    assert metric.correct is not None
    return count_metric(f"{metric.name}_of_valid", correct=metric.correct, valid=metric.valid, total=metric.valid)
