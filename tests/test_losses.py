"""Log-odds of losses far below rounding, from logits; the oracle is Python's decimal arithmetic."""

from decimal import Decimal, getcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax.losses import (
    cross_entropy_log_odds,
    loss_log_odds,
    response_cross_entropy,
    response_token_losses,
)
from llmeraser_jax.types import TokenBatch


def decimal_log_odds(logits, targets, weights) -> float:
    getcontext().prec = 60
    loss = Decimal(0)
    for row, target, weight in zip(logits, targets, weights, strict=True):
        terms = ((Decimal(float(z)) - Decimal(float(row[target]))).exp() for z in np.delete(row, target))
        odds = sum(terms, Decimal(0))
        loss += Decimal(float(weight)) * (1 + odds).ln()
    return float((loss.exp() - 1).ln())


@pytest.mark.parametrize("margin", [-8.0, 0.0, 5.0, 9.9, 10.1, 14.0, 31.0, 80.0])
def test_log_odds_and_their_gradient_are_exact_however_well_a_response_is_known(margin):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 7)).astype(np.float32)
    targets = np.array([2, 0, 6])
    logits[np.arange(3), targets] += np.float32(margin)
    weights = np.array([0.5, 0.25, 0.25], np.float32)

    def value(z):
        return cross_entropy_log_odds(z[None], jnp.asarray(targets)[None], jnp.asarray(weights)[None])[0]

    found, slope = jax.value_and_grad(value)(jnp.asarray(logits))
    assert float(found) == pytest.approx(decimal_log_odds(logits, targets, weights), abs=2e-5, rel=1e-6)
    # A shift of all target logits moves memorised log-odds one for one; the rounded loss has no gradient there.
    eps = 1e-2
    shifted = []
    for sign in (1, -1):
        z = logits.astype(np.float64)
        z[1, 3] += sign * eps
        shifted.append(decimal_log_odds(z, targets, weights))
    assert float(slope[1, 3]) == pytest.approx((shifted[0] - shifted[1]) / (2 * eps), rel=1e-3, abs=1e-6)


def test_a_rounded_loss_has_log_odds_down_to_rounding():
    losses = jnp.asarray([2.0, 1e-3, 0.0, 1e-12], jnp.float32)
    eps = float(np.finfo(np.float32).eps)
    expected = np.log(np.expm1(np.array([2.0, 1e-3, eps, eps])))
    np.testing.assert_allclose(loss_log_odds(losses), expected, rtol=1e-4)


def test_token_losses_average_to_the_response_loss():
    rng = np.random.default_rng(1)
    batch = TokenBatch(
        tokens=jnp.zeros((2, 5), jnp.int32),
        attention_mask=jnp.ones((2, 5), jnp.int32),
        positions=jnp.zeros((2, 3), jnp.int32),
        targets=jnp.asarray(rng.integers(0, 7, (2, 3))),
        target_weights=jnp.asarray([[0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]], jnp.float32),
    )
    logits = jnp.asarray(rng.normal(size=(2, 3, 7)), jnp.float32)
    tokens = np.asarray(response_token_losses(logits, batch))
    assert np.isnan(tokens[0, 2]) and not np.isnan(tokens[1]).any()
    np.testing.assert_allclose(np.nanmean(tokens, axis=1), response_cross_entropy(logits, batch), rtol=1e-5)
