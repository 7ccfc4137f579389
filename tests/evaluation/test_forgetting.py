"""Held-out KL against small distributions worked out by hand, and against scipy; membership AUC."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError
from scipy.special import log_softmax
from scipy.stats import entropy
from sklearn.metrics import roc_auc_score

from llmeraser_jax.evaluation import forgetting
from llmeraser_jax.evaluation.forgetting import HeldOutKL, heldout_kl
from llmeraser_jax.evaluation.membership import attacks, min_k_scores


def _logs(*rows):
    with np.errstate(divide="ignore"):
        return np.log(np.array(rows, np.float64))


def _random_log_probs(rng, shape):
    return log_softmax(rng.normal(scale=3.0, size=shape), axis=-1)


def test_two_symbols_and_two_retrained_models_by_hand():
    retrained = [_logs([0.5, 0.5]), _logs([0.25, 0.75])]
    result = heldout_kl({"model": _logs([0.5, 0.5])}, retrained, np.array([True]))
    quarter_from_half = 0.25 * np.log(0.5) + 0.75 * np.log(1.5)  # KL((1/4, 3/4) || (1/2, 1/2))
    half_from_quarter = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)  # KL((1/2, 1/2) || (1/4, 3/4))
    # Leaving out 0 the reference is retrained 1 and the other way round.
    np.testing.assert_allclose(result.candidates["model"], [quarter_from_half, 0.0], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(result.retrained_left_out, [quarter_from_half, half_from_quarter], rtol=1e-12)
    assert result.heldout_kl("model") == pytest.approx(quarter_from_half / 2)
    assert result.seed_floor == pytest.approx((quarter_from_half + half_from_quarter) / 2)
    assert result.num_positions == 1


def test_three_symbols_and_three_retrained_models_use_the_mean_of_the_other_two():
    retrained = [_logs([0.6, 0.2, 0.2]), _logs([0.2, 0.6, 0.2]), _logs([0.2, 0.2, 0.6])]
    result = heldout_kl({"uniform": _logs([1 / 3, 1 / 3, 1 / 3])}, retrained, np.array([True]))
    # Every reference is a permutation of (0.4, 0.4, 0.2); the model left out has 0.2, 0.2, 0.6 there.
    to_uniform = 0.8 * np.log(1.2) + 0.2 * np.log(0.6)
    to_left_out = 0.8 * np.log(2) + 0.2 * np.log(1 / 3)
    np.testing.assert_allclose(result.candidates["uniform"], [to_uniform] * 3, rtol=1e-12)
    np.testing.assert_allclose(result.retrained_left_out, [to_left_out] * 3, rtol=1e-12)


def test_agrees_with_scipys_relative_entropy_and_averages_over_masked_positions_only():
    rng = np.random.default_rng(0)
    retrained = [_random_log_probs(rng, (4, 5, 17)) for _ in range(4)]
    models = {"before": _random_log_probs(rng, (4, 5, 17)), "after": _random_log_probs(rng, (4, 5, 17))}
    mask = rng.random((4, 5)) < 0.6
    models["after"][~mask] = np.nan  # padding may hold anything
    result = heldout_kl(models, retrained, mask)
    for r in range(4):
        reference = np.mean([np.exp(retrained[s]) for s in range(4) if s != r], axis=0)[mask]
        for name, array in models.items():
            expected = entropy(reference, np.exp(array[mask]), axis=-1).mean()
            assert result.candidates[name][r] == pytest.approx(expected, rel=1e-10)
        expected = entropy(reference, np.exp(retrained[r][mask]), axis=-1).mean()
        assert result.retrained_left_out[r] == pytest.approx(expected, rel=1e-10)
    assert result.num_positions == mask.sum()


def test_streaming_equals_one_shot_also_with_chunks_of_unequal_size(monkeypatch):
    monkeypatch.setattr(forgetting, "_BLOCK_NUMBERS", 40)  # blocks of 3 rows, so that chunks span several
    rng = np.random.default_rng(1)
    retrained = [_random_log_probs(rng, (23, 13)) for _ in range(3)]
    model, mask = _random_log_probs(rng, (23, 13)), rng.random(23) < 0.7
    whole = heldout_kl({"model": model}, retrained, mask)
    accumulator = HeldOutKL()
    for rows in (slice(0, 1), slice(1, 2), slice(2, 12), slice(12, 23)):
        accumulator.update({"model": model[rows]}, [array[rows] for array in retrained], mask[rows])
    streamed = accumulator.result()
    np.testing.assert_allclose(streamed.candidates["model"], whole.candidates["model"], rtol=1e-13)
    np.testing.assert_allclose(streamed.retrained_left_out, whole.retrained_left_out, rtol=1e-13)
    assert streamed.num_positions == whole.num_positions == mask.sum()


def test_a_model_equal_to_a_retrained_one_meets_the_floor_of_its_fold():
    rng = np.random.default_rng(2)
    retrained = [_random_log_probs(rng, (6, 9)) for _ in range(3)]
    result = heldout_kl({"copy": retrained[1]}, retrained, np.ones(6, bool))
    assert result.candidates["copy"][1] == result.retrained_left_out[1]


def test_jax_float32_arrays_give_the_float64_result():
    rng = np.random.default_rng(3)
    logits = [rng.normal(scale=4.0, size=(7, 50)) for _ in range(3)]
    mask = np.ones(7, bool)
    exact = heldout_kl({"m": log_softmax(logits[0], -1)}, [log_softmax(x, -1) for x in logits[1:]], mask)
    device = [jax.nn.log_softmax(jnp.asarray(x, jnp.float32)) for x in logits]
    measured = heldout_kl({"m": device[0]}, device[1:], jnp.asarray(mask))
    assert measured.heldout_kl("m") == pytest.approx(exact.heldout_kl("m"), rel=1e-5)


def test_probability_zero_costs_nothing_in_the_reference_and_everything_in_the_model():
    retrained = [_logs([1.0, 0.0]), _logs([1.0, 0.0])]
    result = heldout_kl({"fits": _logs([0.5, 0.5]), "excludes": _logs([0.0, 1.0])}, retrained, np.array([True]))
    assert result.heldout_kl("fits") == pytest.approx(np.log(2))
    assert result.heldout_kl("excludes") == np.inf
    assert result.seed_floor == 0.0


def test_a_diverged_model_reads_nan_and_leaves_the_others_alone():
    retrained = [_logs([0.5, 0.5]), _logs([0.5, 0.5])]
    models = {"diverged": np.full((1, 2), np.nan), "fine": _logs([0.25, 0.75])}
    result = heldout_kl(models, retrained, np.array([True]))
    assert np.isnan(result.heldout_kl("diverged"))
    assert result.heldout_kl("fine") == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3))
    with pytest.raises(ValueError, match="cannot serve as a reference"):
        heldout_kl({"fine": models["fine"]}, [retrained[0], models["diverged"]], np.array([True]))


@pytest.mark.parametrize(
    ("candidates", "retrained", "mask", "message"),
    [
        ({"m": _logs([0.5, 0.5])}, [_logs([0.5, 0.5])], [True], "at least two, got 1"),
        ({"m": np.array([[1.0, 2.0]])}, [_logs([0.5, 0.5])] * 2, [True], "m: .*log_softmax"),
    ],
)
def test_bad_input_is_named(candidates, retrained, mask, message):
    with pytest.raises(ValueError, match=message):
        HeldOutKL().update(candidates, retrained, np.array(mask))


def test_shapes_that_differ_are_refused():
    half = _logs([0.5, 0.5])
    # With run-time shape checks on, as in these tests, those may speak first.
    with pytest.raises((ValueError, TypeCheckError)):
        HeldOutKL().update({"m": _logs([0.2, 0.3, 0.5])}, [half, half], np.array([True]))
    with pytest.raises((ValueError, TypeCheckError)):
        HeldOutKL().update({"m": half}, [half, half], np.array([True, True]))


def test_chunks_must_agree_with_the_first_and_a_refused_chunk_leaves_nothing_behind():
    half, skewed = _logs([0.5, 0.5]), _logs([0.25, 0.75])
    accumulator, mask = HeldOutKL(), np.array([True])
    accumulator.update({"m": half}, [half, skewed], mask)
    before = accumulator.result()
    with pytest.raises(ValueError, match=r"\['m'\] and 2 retrained models, got \['other'\]"):
        accumulator.update({"other": half}, [half, skewed], mask)
    with pytest.raises(ValueError, match=r"and 2 retrained models, got .* and 3"):
        accumulator.update({"m": half}, [half, skewed, half], mask)
    with pytest.raises(ValueError, match="log_softmax"):
        accumulator.update({"m": half + 1.0}, [half, skewed], mask)
    assert accumulator.result() == before


def test_no_position_is_an_error_not_a_nan():
    accumulator = HeldOutKL()
    half = _logs([0.5, 0.5])
    accumulator.update({"m": half}, [half, half], np.array([False]))
    with pytest.raises(ValueError, match="No position"):
        accumulator.result()


def test_min_k_averages_the_least_probable_tokens_rounding_up():
    log_probs = np.array([[-1.0, -5.0, -2.0, -4.0, -3.0], [-1.0, -9.0, -3.0, 0.0, 0.0], [0.0] * 5])
    mask = np.array([[True] * 5, [True, False, True, False, False], [False] * 5])
    # 40 % of 5 tokens are 2, of 2 tokens 0.8, hence 1; masked tokens do not count.
    scores = min_k_scores(log_probs, mask, fraction=0.4)
    np.testing.assert_array_equal(scores, [-4.5, -3.0, np.nan])
    # 0.7 * 10 is 7 and 0.07 * 100 is 7.000000000000001 in floating point: still 7 tokens.
    row = -np.arange(1.0, 101.0)[None]
    assert min_k_scores(row, np.ones((1, 100), bool), fraction=0.07)[0] == -97.0


def test_min_k_of_everything_is_the_mean_log_probability():
    rng = np.random.default_rng(4)
    log_probs = -rng.random((3, 6))
    scores = min_k_scores(log_probs, np.ones((3, 6), bool), fraction=1.0)
    np.testing.assert_allclose(scores, log_probs.mean(axis=1))
    with pytest.raises(ValueError, match="fraction is 0"):
        min_k_scores(log_probs, np.ones((3, 6), bool), fraction=0.0)


def test_membership_auc_reads_low_loss_and_high_min_k_as_member():
    members, others = np.array([0.1, 0.2, 0.9]), np.array([0.5, 1.0, 2.0])
    scores = {"losses": members, "min_k": -members, "min_k_plus_plus": -members}
    beside = {"losses": others, "min_k": -others, "min_k_plus_plus": -others}
    # Of nine pairs only (0.9, 0.5) is in the wrong order.
    found = attacks({"named": scores, "heldout": beside})
    assert [metric.value for metric in found] == pytest.approx([8 / 9] * 3)
    labels, both = [1] * 3 + [0] * 3, -np.concatenate([members, others])
    assert found[0].value == pytest.approx(roc_auc_score(labels, both))
