"""TOFU's metrics for question-answer data: truth ratio, forget quality, model utility.

Maini et al. 2024 (arXiv 2401.06121). All start from losses in nats per answer token, so that `exp(-loss)` is the
paper's length-normalised probability `P(a | q)^(1 / |a|)`. Each question has its answer, the answer in other words
(paraphrased), and several wrong answers in the same words (perturbed).

    truth ratio       R = mean P(perturbed) / P(paraphrased), low where the truth is preferred

The mean over the perturbed answers is geometric in the released code, from which the published figures come, and
arithmetic in the paper's formula; `mean` chooses. R is used in two ways:

    forget side       R itself: its distribution over the questions, against the retrained model's (forget quality).
                      As one number: mean min(R, 1 / R), largest where truth and untruth are alike
    utility side      mean max(0, 1 - R), large where the truth is preferred

    forget quality    p-value of the two-sample Kolmogorov-Smirnov test between R under the unlearned and under the
                      retrained model, on the forget questions. High: not to be told apart
    model utility     harmonic mean of nine numbers: probability, ROUGE-L recall and utility-side truth ratio, each
                      on retained authors, real authors and world facts

A large p-value is no proof of forgetting: few questions, or two broken models, give one too.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Array, Float

from llmeraser_jax.data import Example, TokenDataset
from llmeraser_jax.evaluation.scoring import answer, score_examples
from llmeraser_jax.models import Model
from llmeraser_jax.types import LoraParams

_WORD_BREAK = re.compile(r"[^a-z0-9]+")

Mean = Literal["geometric", "arithmetic"]


def truth_ratio(
    paraphrased_losses: Float[Array | np.ndarray, " questions"],
    perturbed_losses: Float[Array | np.ndarray, "questions wrong"],
    *,
    mean: Mean = "geometric",
) -> Float[np.ndarray, " questions"]:
    """R of each question: mean probability of the wrong answers over that of the right one in other words.

    Args:
        paraphrased_losses: nats per token of the paraphrased answer.
        perturbed_losses: nats per token of each wrong answer.
        mean: over the wrong answers: geometric as in the released code, arithmetic as in the paper.

    Raises:
        ValueError: the numbers of questions differ, or `mean` is neither.
    """
    right, wrong = np.asarray(paraphrased_losses, np.float64), np.asarray(perturbed_losses, np.float64)
    if right.ndim != 1 or wrong.ndim != 2 or len(right) != len(wrong) or not wrong.shape[1]:
        msg = f"Expected losses [questions] and [questions, wrong answers], got {right.shape} and {wrong.shape}."
        raise ValueError(msg)
    if mean not in ("geometric", "arithmetic"):
        msg = f"mean is {mean!r}; it must be 'geometric' (released code) or 'arithmetic' (paper)."
        raise ValueError(msg)
    log_wrong = -wrong.mean(axis=1) if mean == "geometric" else np.log(np.exp(-wrong).mean(axis=1))
    return np.exp(log_wrong + right)


def forget_truth_ratios(ratios: Float[Array | np.ndarray, " questions"]) -> np.ndarray:
    """The forget side's number of each question, min(R, 1 / R): 1 where truth and untruth are alike."""
    r = np.asarray(ratios, np.float64)
    with np.errstate(divide="ignore"):
        return np.minimum(r, 1 / r)


def utility_truth_ratio(ratios: Float[Array | np.ndarray, " questions"]) -> float:
    """The utility side's one number, mean of max(0, 1 - R): 1 where only the truth is probable."""
    return float(np.mean(np.maximum(0.0, 1 - np.asarray(ratios, np.float64))))


def forget_quality(
    unlearned_ratios: Float[Array | np.ndarray, " unlearned"],
    retrained_ratios: Float[Array | np.ndarray, " retrained"],
) -> tuple[float, float]:
    """Two-sample test between the truth ratios of two models on the forget questions.

    It depends on the order of the ratios only, so that R and 1 / R (the released code's) give the same.

    Args:
        unlearned_ratios: R under the model after unlearning.
        retrained_ratios: R under the retrained model.

    Returns:
        The p-value, which is forget quality, and the statistic: the largest difference of distribution functions.

    Raises:
        ValueError: no question on a side, or a ratio that is nan.
    """
    ours, theirs = np.asarray(unlearned_ratios, np.float64), np.asarray(retrained_ratios, np.float64)
    if 0 in (ours.size, theirs.size) or np.isnan(ours).any() or np.isnan(theirs).any():
        msg = f"Got {ours.size} and {theirs.size} truth ratios; both sides need some, and none may be nan."
        raise ValueError(msg)
    from scipy.stats import ks_2samp  # slow to import, and only this test needs it

    test: Any = ks_2samp(ours, theirs)
    return float(test.pvalue), float(test.statistic)


def answer_probability(answer_losses: Float[Array | np.ndarray, " questions"]) -> float:
    """Mean of `P(a | q)^(1 / |a|)`: the probability on retained and forget questions."""
    return float(np.mean(np.exp(-np.asarray(answer_losses, np.float64))))


def choice_probability(
    answer_losses: Float[Array | np.ndarray, " questions"],
    wrong_losses: Float[Array | np.ndarray, "questions wrong"],
) -> float:
    """Mean share of the right answer among all the answers offered: the probability on real authors and facts."""
    right = np.exp(-np.asarray(answer_losses, np.float64))
    wrong = np.exp(-np.asarray(wrong_losses, np.float64))
    if wrong.shape[:1] != right.shape or wrong.ndim != 2:
        msg = f"Expected losses [questions] and [questions, wrong answers], got {right.shape} and {wrong.shape}."
        raise ValueError(msg)
    return float(np.mean(right / (right + wrong.sum(axis=1))))


@dataclasses.dataclass(frozen=True, kw_only=True)
class UtilityPart:
    """The three numbers of one set of questions, each in [0, 1].

    Attributes:
        probability: `answer_probability` on retained authors, `choice_probability` on the other two sets.
        rouge: mean `rouge_l_recall` of greedy answers.
        truth_ratio: `utility_truth_ratio`.
    """

    probability: float
    rouge: float
    truth_ratio: float


def model_utility(parts: Sequence[UtilityPart]) -> float:
    """Harmonic mean of all numbers, 0 as soon as one is; TOFU's own is of retained and real authors and facts."""
    return float(statistics.harmonic_mean([float(x) for part in parts for x in dataclasses.astuple(part)]))


def rouge_l_recall(generated: str, reference: str) -> float:
    """ROUGE-L recall in [0, 1]: longest common subsequence of words over the words of the reference.

    Words are runs of letters a-z and digits, lower-cased, as in Google's rouge-score. TOFU also stems words of more
    than three letters with NLTK's Porter stemmer; without it, on TOFU's published logs the mean recall of Llama-2
    full is 0.985 against 0.986 on retained authors, 0.875 against 0.883 on world facts, and that of retain90 on the
    forget questions 0.402 against 0.408; the model utility of the former 0.6223 for 0.6227.
    """
    said, wanted = ([word for word in _WORD_BREAK.split(text.lower()) if word] for text in (generated, reference))
    if not said or not wanted:
        return 0.0
    row = [0] * (len(said) + 1)  # row[j]: longest common subsequence of what of `wanted` was seen and said[:j]
    for word in wanted:
        diagonal = 0
        for j, other in enumerate(said, start=1):
            above = row[j]
            row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
            diagonal = above
    return row[-1] / len(wanted)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Questions:
    """A set of questions as examples; the same question in all sets of one row.

    Attributes:
        answered: with their answers.
        paraphrased: with the answer in other words; the answer itself where a set has none, as on TOFU's real
            authors and world facts.
        perturbed: with each wrong answer, one sequence per place.
    """

    answered: tuple[Example, ...]
    paraphrased: tuple[Example, ...]
    perturbed: tuple[tuple[Example, ...], ...]


def questions_from_rows(rows: Iterable[Mapping[str, Any]]) -> Questions:
    """Rows of TOFU's `*_perturbed.json` as questions, each named after its place.

    Args:
        rows: each with `question`, `answer`, `perturbed_answer` (a list, equally long in all), and
            `paraphrased_answer` if there is one.

    Raises:
        ValueError: a row without one of these fields, or with another number of wrong answers; named by place.
    """
    answered, paraphrased, wrong = [], [], []
    for place, row in enumerate(rows):
        missing = [name for name in ("question", "answer", "perturbed_answer") if not row.get(name)]
        if missing:
            msg = f"Row {place} lacks {', '.join(missing)}; TOFU's files named *_perturbed.json have them."
            raise ValueError(msg)

        def example(text: str, place: int = place, question: str = row["question"]) -> Example:
            return Example(id=str(place), instruction=question, response=text, format="question")

        answered.append(example(row["answer"]))
        paraphrased.append(example(row.get("paraphrased_answer") or row["answer"]))
        wrong.append([example(text) for text in row["perturbed_answer"]])
    counts = sorted({len(row) for row in wrong})
    if len(counts) != 1:
        msg = f"The rows have {counts or 'no'} wrong answers; all need the same number of them."
        raise ValueError(msg)
    return Questions(
        answered=tuple(answered), paraphrased=tuple(paraphrased), perturbed=tuple(zip(*wrong, strict=True))
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class QuestionScores:
    """One model's losses on a set of questions, nats per token, and its greedy answers.

    Attributes:
        answer_losses, paraphrased_losses: per question.
        perturbed_losses: per question and wrong answer.
        answers: what the model says; empty where it was not asked.
        references: the right answers.
    """

    answer_losses: Float[np.ndarray, " questions"]
    paraphrased_losses: Float[np.ndarray, " questions"]
    perturbed_losses: Float[np.ndarray, "questions wrong"]
    answers: tuple[str, ...]
    references: tuple[str, ...]

    def truth_ratio(self, *, mean: Mean = "geometric") -> np.ndarray:
        """R of each question."""
        return truth_ratio(self.paraphrased_losses, self.perturbed_losses, mean=mean)

    def utility(self, *, choice: bool) -> UtilityPart:
        """The three numbers that model utility takes of this set.

        Args:
            choice: whether the probability is relative to the wrong answers (real authors, world facts).

        Raises:
            ValueError: the model was not asked for answers.
        """
        if len(self.answers) != len(self.references):
            msg = f"There are {len(self.answers)} answers to {len(self.references)} questions; score with answers."
            raise ValueError(msg)
        probability = (
            choice_probability(self.answer_losses, self.perturbed_losses)
            if choice
            else answer_probability(self.answer_losses)
        )
        recalls = [rouge_l_recall(*pair) for pair in zip(self.answers, self.references, strict=True)]
        return UtilityPart(
            probability=probability,
            rouge=float(np.mean(recalls)),
            truth_ratio=utility_truth_ratio(self.truth_ratio()),
        )


def score_questions(
    model: Model,
    lora: LoraParams | None,
    questions: Questions,
    encode: Callable[[Sequence[Example]], TokenDataset],
    *,
    with_answers: bool = True,
) -> QuestionScores:
    """Losses of every answer under one model, and what it answers by itself.

    Args:
        model: the base, or what reads `lora` in its place.
        lora: what `model.apply` reads; None is the base alone.
        questions: from `questions_from_rows`.
        encode: examples as the adapter's training saw them (`Run.encode` with the tokenizer).
        with_answers: also generate.

    Raises:
        ValueError: the recipe has a loss on the prompt too: its losses are not those of answers.
    """

    def losses(examples: Sequence[Example]) -> np.ndarray:
        dataset = encode(examples)
        if dataset.recipe.loss_on != "response":
            msg = f"loss_on is {dataset.recipe.loss_on!r}; encode with a recipe whose loss is on the response only."
            raise ValueError(msg)
        # Not `losses`, which with reduction "token" are divided by the training set's mean length.
        return -score_examples(model, lora, dataset).log_probs / dataset.num_targets

    answered = encode(questions.answered)
    return QuestionScores(
        answer_losses=losses(questions.answered),
        paraphrased_losses=losses(questions.paraphrased),
        perturbed_losses=np.stack([losses(examples) for examples in questions.perturbed], axis=1),
        answers=tuple(answer(model, lora, answered)) if with_answers else (),
        references=tuple(example.response for example in questions.answered),
    )
