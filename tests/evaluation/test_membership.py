"""Membership scores against hand-worked predictions and the published formulas written out; the token moments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax.evaluation.membership import (
    LEAST_DEVIATION,
    attacks,
    mean_of_others,
    min_k_plus_plus_scores,
)
from llmeraser_jax.evaluation.scoring import token_statistics


def test_moments_of_two_symbols_by_hand():
    # p = (3/4, 1/4): the mean of log p is 0.75 log 0.75 + 0.25 log 0.25, its deviation sqrt(3/16) log 3.
    log_probs = jnp.log(jnp.array([[[0.75, 0.25], [0.75, 0.25], [0.5, 0.5]]]))
    statistics = token_statistics(log_probs, jnp.array([[0, 1, 0]]))
    mean = 0.75 * np.log(0.75) + 0.25 * np.log(0.25)
    np.testing.assert_allclose(statistics.means[0], [mean, mean, np.log(0.5)], rtol=1e-6)
    deviation = np.sqrt(3 / 16) * np.log(3)
    np.testing.assert_allclose(statistics.deviations[0], [deviation, deviation, 0], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(statistics.target_log_probs[0], np.log([0.75, 0.25, 0.5]), rtol=1e-6)
    np.testing.assert_array_equal(statistics.hits[0], [True, False, True])
    # Standardised: sqrt((1 - p) / p) for the likely symbol, -sqrt(p / (1 - p)) for the other.
    scores = (statistics.target_log_probs - statistics.means)[0, :2] / statistics.deviations[0, :2]
    np.testing.assert_allclose(scores, [np.sqrt(1 / 3), -np.sqrt(3)], rtol=1e-5)


def test_moments_in_float32_stay_exact_where_one_token_has_nearly_all_the_mass():
    logits = np.zeros((1, 1, 50))
    logits[..., 7] = 25.0
    reference = jax.nn.log_softmax(logits[0, 0])
    exact = logits[0, 0] - np.log(np.exp(logits[0, 0]).sum())
    p = np.exp(exact)
    mean = (p * exact).sum()
    deviation = np.sqrt((p * (exact - mean) ** 2).sum())
    assert deviation < LEAST_DEVIATION
    statistics = token_statistics(jnp.asarray(reference, jnp.float32)[None, None], jnp.array([[7]]))
    assert float(statistics.deviations[0, 0]) == pytest.approx(deviation, rel=1e-4)


def test_moments_take_tokens_of_probability_zero():
    statistics = token_statistics(jnp.array([[[0.0, -jnp.inf]]]), jnp.array([[1]]))
    assert float(statistics.means[0, 0]) == 0 and float(statistics.deviations[0, 0]) == 0
    assert float(statistics.target_log_probs[0, 0]) == -np.inf


def test_min_k_plus_plus_is_the_published_formula_on_random_predictions():
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=3, size=(4, 10, 30))
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    targets = rng.integers(0, 30, (4, 10))
    mask = np.ones((4, 10), bool)
    mask[2, 5:] = False
    statistics = token_statistics(jnp.asarray(log_probs, jnp.float32), jnp.asarray(targets))
    scores = min_k_plus_plus_scores(
        np.asarray(statistics.target_log_probs),
        np.asarray(statistics.means),
        np.asarray(statistics.deviations),
        mask,
    )
    for i in range(4):
        # Second moment minus squared mean, as the authors' code has it; k = 20 % of 10 or of 5 tokens.
        p = np.exp(log_probs[i])
        mu = (p * log_probs[i]).sum(-1)
        sigma = np.sqrt((p * log_probs[i] ** 2).sum(-1) - mu**2)
        tokens = ((log_probs[i][np.arange(10), targets[i]] - mu) / sigma)[mask[i]]
        count = len(tokens) // 5
        assert scores[i] == pytest.approx(np.sort(tokens)[:count].mean(), rel=1e-4)


def test_a_certain_prediction_scores_zero_not_infinity():
    scores = min_k_plus_plus_scores(np.zeros((1, 2)), np.zeros((1, 2)), np.zeros((1, 2)), np.ones((1, 2), bool))
    np.testing.assert_array_equal(scores, [0.0])
    with pytest.raises(Exception, match=r"(?s)shape|deviations"):
        min_k_plus_plus_scores(np.zeros((1, 2)), np.zeros((1, 2)), np.zeros((1, 3)), np.ones((1, 2), bool))


def test_a_reference_takes_out_how_hard_an_example_is():
    # Members are hard and known 1 nat better than by the reference; others are easy and known as well as by it.
    found = attacks(view([3.0, 4.0], [0.5, 1.0]), base=view([4.0, 5.0], [0.5, 1.0]))
    assert {metric.name: metric.value for metric in found} == pytest.approx(
        {"loss": 0.0, "min_k": 0.0, "min_k_plus_plus": 0.0, "reference_base": 1.0}
    )


def test_a_retrained_model_is_never_its_own_reference():
    losses = [np.array([1.0, 2.0]), np.array([3.0, 4.0]), np.array([8.0, 0.0])]
    np.testing.assert_array_equal(mean_of_others(losses, None), [4, 2])
    np.testing.assert_array_equal(mean_of_others(losses, 2), [2, 3])


def view(members, others, *, plus_plus=None):
    """Scores of a model of which only the losses matter here."""

    def side(losses):
        low = [-loss for loss in losses]
        return {"losses": losses, "min_k": low, "min_k_plus_plus": low if plus_plus is None else plus_plus}

    return {"named": side(members), "heldout": side(others)}


def test_a_comparison_measures_every_attack_and_leaves_a_retrained_model_out_of_its_reference():
    base = view([3.0, 3.0], [1.0, 1.0])
    retrained = [view([2.0, 2.0], [1.0, 1.5]), view([0.0, 0.0], [1.0, 1.5]), view([2.0, 2.0], [1.0, 1.5])]
    judged = view([2.0, 2.0], [1.0, 1.5], plus_plus=[1, 0])

    def aucs(scores, left_out=None, retrained=retrained):
        return {m.name: m.value for m in attacks(scores, base=base, retrained=retrained, left_out=left_out)}

    # Loss: members are the harder ones. Base: 1 better than the base against 0 and -0.5. Mean of the three
    # retrained: members 4/3, so 2/3 worse; the others exactly as well.
    expected = {"loss": 0, "min_k": 0, "min_k_plus_plus": 0.5, "reference_base": 1, "reference_retrained": 0}
    assert aucs(judged) == expected
    # The others' means are 2 on the members: 2 better there, as well elsewhere. With itself they would be 4/3.
    assert aucs(retrained[1], 1)["reference_retrained"] == 1
    assert aucs(retrained[0], 0)["reference_retrained"] == 0  # the others' mean is 1, so that it is 1 worse
    assert "reference_retrained" not in aucs(retrained[0], 0, retrained[:1])
    assert attacks({"named": judged["named"]}, retrained=retrained) == ()
    # One non-member is left out, and the other is easier than both members.
    alone = attacks(judged, nonmembers=[False, True])
    assert [metric.value for metric in alone[:2]] == [0, 0]
