"""Losses of one example against formulas in numpy, and their gradients against limits and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from llmeraser_jax.rivals.terms import (
    CrossEntropy,
    FlatLogits,
    ForgettingTeacher,
    KLToReference,
    LoweredTarget,
    NegativePreference,
    SimpleNegativePreference,
    WeightedAscent,
)
from llmeraser_jax.types import TokenBatch

BATCH, RESPONSE, VOCAB = 3, 4, 7
COUNTS = np.array([4, 2, 1])


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def problem():
    """Logits of the model, the reference and an augmented adapter; responses of 4, 2 and 1 tokens."""
    rng = np.random.default_rng(0)
    logits, reference, augmented = rng.normal(size=(3, BATCH, RESPONSE, VOCAB))
    real = np.arange(RESPONSE) < COUNTS[:, None]
    batch = TokenBatch(
        tokens=jnp.zeros((BATCH, 6), jnp.int32),
        attention_mask=jnp.ones((BATCH, 6), jnp.int32),
        positions=jnp.zeros((BATCH, RESPONSE), jnp.int32),
        targets=jnp.asarray(rng.integers(0, VOCAB, (BATCH, RESPONSE)), jnp.int32),
        target_weights=jnp.asarray(np.where(real, 1 / COUNTS[:, None], 0.0)),
    )
    return logits, reference, augmented, batch, real


def softmax(z):
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def log_prob(z, batch, real):
    """`log p(y|x)` by a loop over examples and real tokens."""
    targets = np.asarray(batch.targets)
    return np.array(
        [sum(np.log(softmax(z)[i, t, targets[i, t]]) for t in np.flatnonzero(real[i])) for i in range(len(z))]
    )


def kl(p, q, real):
    """Mean over real tokens of `sum p log(p / q)`."""
    per_token = (p * np.log(p / q)).sum(-1)
    return np.array([per_token[i, real[i]].mean() for i in range(len(p))])


def evaluate(loss, logits, teachers, batch):
    return loss(jnp.asarray(logits), tuple(map(jnp.asarray, teachers)), batch)


def test_npo_is_its_formula(problem):
    logits, reference, _, batch, real = problem
    ratio = np.exp(log_prob(logits, batch, real) - log_prob(reference, batch, real))
    got = evaluate(NegativePreference(beta=0.3), logits, (reference,), batch)
    np.testing.assert_allclose(got, 2 / 0.3 * np.log(1 + ratio**0.3), rtol=1e-12)


def test_simnpo_is_its_formula(problem):
    logits, _, _, batch, real = problem
    margin = 0.7 / COUNTS * log_prob(logits, batch, real)
    sigmoid = 1 / (1 + np.exp(margin + 0.2))
    got = evaluate(SimpleNegativePreference(beta=0.7, gamma=0.2), logits, (), batch)
    np.testing.assert_allclose(got, -2 / 0.7 * np.log(sigmoid), rtol=1e-12)


def test_kl_is_from_the_reference_to_the_model(problem):
    logits, reference, _, batch, real = problem
    expected = kl(softmax(reference), softmax(logits), real)
    np.testing.assert_allclose(evaluate(KLToReference(), logits, (reference,), batch), expected, rtol=1e-12)
    loss = -log_prob(logits, batch, real) / COUNTS
    got = evaluate(KLToReference(cross_entropy=0.5), logits, (reference,), batch)
    np.testing.assert_allclose(got, expected + 0.5 * loss, rtol=1e-12)


def test_the_forgetting_teacher_lowers_what_more_training_would_raise(problem):
    logits, reference, augmented, batch, real = problem
    teacher = reference - 0.6 * np.maximum(augmented - reference, 0)
    got = evaluate(ForgettingTeacher(alpha=0.6), logits, (reference, augmented), batch)
    np.testing.assert_allclose(got, kl(softmax(teacher), softmax(logits), real), rtol=1e-12)
    # Where more training raises nothing, there is nothing to forget, and the teacher is the reference.
    none = evaluate(ForgettingTeacher(alpha=0.6), logits, (reference, reference - 1.0), batch)
    np.testing.assert_allclose(none, evaluate(KLToReference(), logits, (reference,), batch), rtol=1e-12)


def test_flat_logits_are_the_square_of_the_margin_over_the_mean(problem):
    logits, _, _, batch, real = problem
    margins = (logits.max(-1) - logits.mean(-1)) ** 2
    expected = [margins[i, real[i]].mean() for i in range(BATCH)]
    np.testing.assert_allclose(evaluate(FlatLogits(), logits, (), batch), expected, rtol=1e-12)


@pytest.mark.parametrize(("certainty", "doubt"), [(1.0, 0.0), (5.0, 1.0)])
def test_weighted_ascent_weighs_each_tokens_ascent_by_its_probability(problem, certainty, doubt):
    logits, _, _, batch, real = problem
    probs = softmax(logits)
    at_target = np.eye(VOCAB)[np.asarray(batch.targets)]
    right = (probs * at_target).sum(-1)
    weights = right**certainty * (1 - right) ** doubt * real / COUNTS[:, None]
    loss = WeightedAscent(certainty=certainty, doubt=doubt)
    np.testing.assert_allclose(evaluate(loss, logits, (), batch), (weights * np.log(right)).sum(-1), rtol=1e-12)
    # The gradient of `log p_t` times the weights, which have none of their own.
    expected = weights[..., None] * (at_target - probs)
    np.testing.assert_allclose(gradient(loss, logits, (), batch), expected, rtol=1e-10, atol=1e-15)


def test_lowered_targets_have_the_gradient_of_cross_entropy_against_soft_labels(problem):
    logits, reference, _, batch, real = problem
    labels = softmax(reference - 3.0 * np.eye(VOCAB)[np.asarray(batch.targets)])
    loss = LoweredTarget(strength=3.0)
    np.testing.assert_allclose(
        evaluate(loss, logits, (reference,), batch), kl(labels, softmax(logits), real), rtol=1e-12
    )
    expected = (real / COUNTS[:, None])[..., None] * (softmax(logits) - labels)
    np.testing.assert_allclose(gradient(loss, logits, (reference,), batch), expected, rtol=1e-10, atol=1e-15)


def gradient(loss, logits, teachers, batch):
    return np.asarray(jax.grad(lambda z: jnp.sum(evaluate(loss, z, teachers, batch)))(jnp.asarray(logits)))


def test_npos_gradient_becomes_gradient_ascents_as_beta_goes_to_zero(problem):
    logits, reference, _, batch, _ = problem
    # The ascent's loss is a mean over tokens and the preference's a sum.
    ascent = COUNTS[:, None, None] * gradient(CrossEntropy(sign=-1.0), logits, (), batch)
    errors = [
        np.abs(gradient(NegativePreference(beta=beta), logits, (reference,), batch) - ascent).max()
        for beta in (1e-1, 1e-2, 1e-3)
    ]
    assert errors[2] < 1e-3 * np.abs(ascent).max() * 5
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.2)  # first order in beta
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.05)


def test_npos_gradient_is_ascents_with_the_weight_of_the_paper(problem):
    logits, reference, _, batch, real = problem
    ascent = COUNTS[:, None, None] * gradient(CrossEntropy(sign=-1.0), logits, (), batch)
    p, p_reference = (np.exp(log_prob(z, batch, real)) for z in (logits, reference))
    weight = 2 * p**0.8 / (p**0.8 + p_reference**0.8)
    got = gradient(NegativePreference(beta=0.8), logits, (reference,), batch)
    np.testing.assert_allclose(got, weight[:, None, None] * ascent, rtol=1e-10, atol=1e-14)


def test_the_kl_anchor_pulls_nowhere_at_the_reference(problem):
    _, reference, _, batch, _ = problem
    np.testing.assert_allclose(gradient(KLToReference(), reference, (reference,), batch), 0, atol=1e-15)


@pytest.mark.parametrize(
    "loss",
    [
        NegativePreference(beta=0.5),
        SimpleNegativePreference(beta=2.0, gamma=0.3),
        KLToReference(cross_entropy=1.0),
        ForgettingTeacher(alpha=0.7),
        LoweredTarget(strength=2.0),
        FlatLogits(),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_gradients_against_finite_differences_and_padding_without_effect(problem, loss):
    logits, reference, augmented, batch, real = problem
    teachers = (reference, augmented)
    check_grads(
        lambda z: jnp.sum(evaluate(loss, z, teachers, batch)), (jnp.asarray(logits),), order=1, modes=["rev"]
    )
    moved = np.where(real[..., None], logits, logits + 3.0 * np.arange(VOCAB))
    np.testing.assert_array_equal(evaluate(loss, moved, teachers, batch), evaluate(loss, logits, teachers, batch))
    assert np.all(gradient(loss, logits, teachers, batch)[~real] == 0)
