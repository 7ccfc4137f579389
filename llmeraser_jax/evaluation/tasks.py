"""Task metrics with counts and standard errors: yes/no accuracy, AUC, exact match, HitRatio@1.

An answer is *valid* when it parses. Invalid answers stay in the denominator N: a model that answers nothing
scores 0, it is not excused. The AUC alone is over the valid rows, because nothing else can be ranked.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Array, Bool, Float
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

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
    if total == 0:
        return Metric(
            name=name,
            value=None,
            correct=0,
            valid=0,
            total=0,
            standard_error=None,
            standard_error_method=BINOMIAL,
            reason="there is no test example",
        )
    share = correct / total
    return Metric(
        name=name,
        value=share,
        correct=correct,
        valid=valid,
        total=total,
        standard_error=math.sqrt(share * (1 - share) / total),
        standard_error_method=BINOMIAL,
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
        ranks = rankdata(scores)
        labels = np.arange(valid) < positives.size
        value = float(roc_auc_score(labels, ranks))
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
    *,
    name: str = "accuracy",
) -> Metric:
    """Accuracy of the more probable of two answers.

    A row is valid when neither number is nan and they differ: a tie is no answer.

    Args:
        yes_log_probs: log-probability of the whole answer that means yes, in nats.
        no_log_probs: the same for no.
        labels: True where yes is right.
        name: the metric's name.

    Raises:
        ValueError: the lengths differ.
    """
    yes, no, truth = _yes_no_rows(yes_log_probs, no_log_probs, labels)
    answered_yes, answered_no = yes > no, no > yes
    return count_metric(
        name,
        correct=int(np.sum(np.where(truth, answered_yes, answered_no))),
        valid=int(np.sum(answered_yes | answered_no)),
        total=truth.size,
    )


def yes_no_auc(
    yes_log_probs: Float[Array | np.ndarray, " examples"],
    no_log_probs: Float[Array | np.ndarray, " examples"],
    labels: Bool[Array | np.ndarray, " examples"],
    *,
    name: str = "auc",
) -> Metric:
    """AUC of `log p(yes) - log p(no)`, the log-odds between the two answers.

    Args and Raises: as `yes_no_accuracy`. A row whose log-odds are nan is invalid; ties count one half.
    """
    yes, no, truth = _yes_no_rows(yes_log_probs, no_log_probs, labels)
    with np.errstate(invalid="ignore"):  # -inf minus -inf is nan: the row gives no ranking and is invalid
        log_odds = yes - no
    return auc_metric(name, log_odds[truth], log_odds[~truth])


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


def parse_text(text: str) -> str | None:
    """The text with its white space collapsed, or None when nothing is left. Case is kept."""
    return " ".join(text.split()) or None


def make_choice_parser(choices: Sequence[str]) -> Callable[[str], str | None]:
    """A parser that accepts only the given answers, up to case, white space, quotes and a closing period.

    Args:
        choices: the possible answers, e.g. ("Yes", "No") or the titles of the candidate items.

    Raises:
        ValueError: two choices read the same once normalised, or one is empty.
    """

    def normalise(text: str) -> str:
        return " ".join(text.split()).strip(" \"'.").casefold()

    table = {normalise(choice): choice for choice in choices}
    if len(table) != len(choices) or "" in table:
        msg = f"The choices {list(choices)!r} are not distinct non-empty answers once normalised."
        raise ValueError(msg)
    return lambda text: table.get(normalise(text))


def exact_match(
    generated: Sequence[str],
    expected: Sequence[str],
    *,
    parse: Callable[[str], str | None] = parse_text,
    name: str = "exact_match",
) -> Metric:
    """Share of generated answers that equal the expected one after parsing.

    With `make_choice_parser` of the candidate items this is HitRatio@1 over N, and `valid / total` the
    ValidRatio.

    Args:
        generated: one answer of the model per example, special tokens removed.
        expected: the right answers.
        parse: text -> answer, or None when the text is no answer; applied to both sides.
        name: the metric's name.

    Raises:
        ValueError: the lengths differ, or an expected answer does not parse.
    """
    if len(generated) != len(expected):
        msg = f"Got {len(generated)} generated answers for {len(expected)} expected ones; they must pair up."
        raise ValueError(msg)
    truths = [parse(text) for text in expected]
    if None in truths:
        row = truths.index(None)
        msg = f"The expected answer of row {row}, {expected[row]!r}, does not parse; correct it or the parser."
        raise ValueError(msg)
    answers = [parse(text) for text in generated]
    return count_metric(
        name,
        correct=sum(answer == truth for answer, truth in zip(answers, truths, strict=True)),
        valid=sum(answer is not None for answer in answers),
        total=len(answers),
    )


def hit_ratio(
    generated: Sequence[str],
    expected: Sequence[str],
    candidates: Sequence[Sequence[str]],
    *,
    matching: Literal["title", "contained"] = "title",
    name: str = "hit_ratio@1",
) -> Metric:
    """HitRatio@1 of a next-item task: the share of all N answers that name the right one of their candidates.

    An answer is valid when it names exactly one candidate: `valid_ratio` is the ValidRatio of LLaRA (Liao et al.
    2024, arXiv 2312.02445). Only its first line is read, case and outer white space aside. With `matching`

    * "title": the line is a candidate's title (quotes around it and a closing period are allowed);
    * "contained": exactly one candidate's title stands somewhere in the line, as in LLaRA's released code. Titles
      that contain others ("Alien", "Aliens"), or stand there twice, then make an answer that is right invalid.

    LLaRA divides by the valid answers, not by N: see `hit_ratio_of_valid`. The product of its two numbers is this
    one.

    Args:
        generated: one answer of the model per example, special tokens removed.
        expected: the right titles.
        candidates: per example the titles offered, the right one among them; the same for every model.
        matching: how an answer names a candidate.
        name: the metric's name.

    Raises:
        ValueError: the lengths differ, or a right title is not among its candidates.
    """
    if not len(generated) == len(expected) == len(candidates):
        msg = (
            f"Got {len(generated)} generated answers, {len(expected)} right ones and {len(candidates)} lists of "
            "candidates; they must go together."
        )
        raise ValueError(msg)
    if matching not in ("title", "contained"):
        msg = f"matching is {matching!r}; it must be 'title' or 'contained'."
        raise ValueError(msg)
    correct = valid = 0
    for row, (text, truth, titles) in enumerate(zip(generated, expected, candidates, strict=True)):
        offered = [_item_title(title) for title in titles]
        if _item_title(truth) not in offered:
            msg = f"Row {row}: the right answer {truth!r} is not among its candidates, {list(titles)!r}."
            raise ValueError(msg)
        line = text.strip().split("\n")[0].strip().lower()
        if matching == "title":
            bare = line.strip(" \"'").removesuffix(".").strip(" \"'")
            named = [title for title in dict.fromkeys(offered) if title in (line, bare)]
        else:
            named = [title for title in offered if title in line]
        valid += len(named) == 1
        correct += named == [_item_title(truth)]
    return count_metric(name, correct=correct, valid=valid, total=len(generated))


def _item_title(title: str) -> str:
    return title.strip().lower()


def hit_ratio_of_valid(metric: Metric) -> Metric:
    """`correct / valid`: HitRatio@1 as LLaRA's released code counts it, invalid answers excused.

    Args:
        metric: from `hit_ratio`.
    """
    if metric.correct is None:
        msg = f"{metric.name} has no count of correct answers."
        raise ValueError(msg)
    return count_metric(f"{metric.name}_of_valid", correct=metric.correct, valid=metric.valid, total=metric.valid)
