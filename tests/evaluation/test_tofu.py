"""TOFU's formulas by hand, and the Kolmogorov-Smirnov test at the size of the published figures."""

import numpy as np
import pytest

from llmeraser_jax.evaluation.tofu import (
    UtilityPart,
    answer_probability,
    choice_probability,
    forget_quality,
    forget_truth_ratios,
    model_utility,
    questions_from_rows,
    rouge_l_recall,
    truth_ratio,
    utility_truth_ratio,
)


def test_truth_ratio_by_hand_with_either_mean():
    # P(paraphrased) 1/2; wrong answers 1/4 and 1/16: geometric mean 1/8, arithmetic 5/32.
    paraphrased, perturbed = np.log([2.0]), np.log([[4.0, 16.0]])
    assert truth_ratio(paraphrased, perturbed) == pytest.approx(0.25)
    assert truth_ratio(paraphrased, perturbed, mean="arithmetic") == pytest.approx(5 / 16)


def test_the_two_sides_aggregate_the_same_ratio_differently():
    ratios = np.array([0.25, 1.0, 4.0])
    assert forget_truth_ratios(ratios).mean() == pytest.approx((0.25 + 1 + 0.25) / 3)
    assert utility_truth_ratio(ratios) == pytest.approx(0.75 / 3)


def test_forget_quality_by_hand_and_blind_to_the_direction_of_the_ratio():
    # Two samples of 2 apart from each other: their distribution functions differ by 1, as in 2 of the 6 orders.
    p_value, statistic = forget_quality(np.array([0.1, 0.2]), np.array([0.3, 0.4]))
    assert statistic == 1.0 and p_value == pytest.approx(1 / 3)
    rng = np.random.default_rng(0)
    ours, theirs = rng.lognormal(size=50), rng.lognormal(0.5, size=60)
    upright, inverted = forget_quality(ours, theirs), forget_quality(1 / ours, 1 / theirs)
    assert upright == pytest.approx(inverted)


def test_the_published_statistic_has_the_published_p_value_at_three_hundred_questions():
    # TOFU logs 300 questions a side; 0.3967 is 119 / 300. One sample shifted by 119 places gives just that.
    ours, theirs = np.arange(300.0), np.arange(300.0) + 118.5
    p_value, statistic = forget_quality(ours, theirs)
    assert statistic == pytest.approx(119 / 300) and round(statistic, 4) == 0.3967
    assert p_value == pytest.approx(1.834e-21, rel=1e-3)
    # Any other number of questions that has this statistic to four digits misses it by a factor.
    p_value, statistic = forget_quality(np.arange(242.0), np.arange(242.0) + 95.5)
    assert round(statistic, 4) == 0.3967 and p_value > 1e-18


def test_probabilities_by_hand():
    losses = -np.log([0.5, 0.25])
    assert answer_probability(losses) == pytest.approx(0.375)
    wrong = -np.log([[0.25, 0.25], [0.125, 0.125]])
    assert choice_probability(losses, wrong) == pytest.approx(0.5)


def test_model_utility_is_the_harmonic_mean_of_nine():
    # The nine numbers that TOFU's published Llama-2 full gives, to four digits; its utility is 0.6227.
    numbers = ((0.9895, 0.9857, 0.4747), (0.4555, 0.9330, 0.5962), (0.4186, 0.8825, 0.5390))
    parts = [UtilityPart(probability=p, rouge=r, truth_ratio=t) for p, r, t in numbers]
    assert model_utility(parts) == pytest.approx(0.6227, abs=5e-5)
    part = UtilityPart(probability=1.0, rouge=0.5, truth_ratio=0.25)
    assert model_utility([part] * 3) == pytest.approx(3 / (1 + 2 + 4))


@pytest.mark.parametrize(
    ("generated", "reference", "expected"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("The CAT, sat!", "the cat sat", 1.0),
        ("sat the cat", "the cat sat", 2 / 3),
        ("a b c d", "b d", 1.0),
        ("d b", "b d", 0.5),
        ("x y", "a b", 0.0),
        ("a", "a a", 0.5),
        ("", "a", 0.0),
        ("the author's name is basil", "author s name", 1.0),
        ("police killed the gunman", "police kill the gunman", 0.75),
    ],
)
def test_rouge_l_recall_by_hand(generated, reference, expected):
    assert rouge_l_recall(generated, reference) == pytest.approx(expected)


def test_rows_become_one_example_per_answer():
    rows = [
        {"question": "Who?", "answer": "A.", "paraphrased_answer": "It was A.", "perturbed_answer": ["B.", "C."]},
        {"question": "When?", "answer": "Now.", "perturbed_answer": ["Then.", "Never."]},
    ]
    questions = questions_from_rows(rows)
    assert [e.response for e in questions.answered] == ["A.", "Now."]
    assert [e.response for e in questions.paraphrased] == ["It was A.", "Now."]
    assert [[e.response for e in wrong] for wrong in questions.perturbed] == [["B.", "Then."], ["C.", "Never."]]
    assert {e.instruction for wrong in questions.perturbed for e in wrong} == {"Who?", "When?"}
    with pytest.raises(ValueError, match="Row 1 lacks perturbed_answer"):
        questions_from_rows([rows[0], {"question": "q", "answer": "a"}])
    with pytest.raises(ValueError, match=r"\[1, 2\] wrong"):
        questions_from_rows([rows[0], {**rows[1], "perturbed_answer": ["Then."]}])
