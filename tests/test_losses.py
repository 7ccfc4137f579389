"""Log-odds of losses far below rounding, against decimal arithmetic; values of single examples, in order."""

import dataclasses
from decimal import Decimal, getcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax.losses import (
    cross_entropy_log_odds,
    data_losses,
    example_losses,
    example_places,
    loss_log_odds,
    per_example,
    response_cross_entropy,
    response_token_losses,
)
from llmeraser_jax.parallel import make_mesh, place_stack
from llmeraser_jax.types import ExampleStack, TokenBatch
from tests.problems import ArrayBatch, ArrayExamples, ridge_objective, split_params


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


# Repeats, no order, and rows that count for nothing; 11 of them leave padding in every bucket.
ASKED = np.array([7, 0, 3, 7, 12, 5, 1, 0, 9, 7, 2])
COEFFICIENTS = np.where(np.arange(len(ASKED)) % 3 == 0, 0.0, np.linspace(-1, 1, len(ASKED)))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("num_buckets", [1, 3])
def test_values_of_examples_come_in_the_order_asked_for(num_buckets, devices):
    rng = np.random.default_rng(0)
    x, y, theta = rng.normal(size=(13, 4)), rng.normal(size=13), rng.normal(size=4)
    stack = ArrayExamples(x, y, num_buckets).stack(ASKED, COEFFICIENTS, chunk_size=8)
    assert len(stack.weights) == num_buckets and sum(w.size for w in stack.weights) > len(ASKED)
    stack = place_stack(stack, None if devices == 1 else make_mesh(data=devices))
    objective, params = ridge_objective(0.1), split_params(theta)
    expected = 0.5 * (x[ASKED] @ theta - y[ASKED]) ** 2
    found = example_losses(objective, params, stack)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_array_equal(per_example(data_losses, stack, objective, params), found)
    rows, classes = per_example(_rows_and_numbers, stack)
    np.testing.assert_allclose(rows, x[ASKED], rtol=1e-6)
    np.testing.assert_array_equal(classes, np.round(100 * y[ASKED].astype(np.float32)))
    assert classes.dtype == np.int32
    # The same places as in the rows that other programs make of a stack.
    flat = np.concatenate([np.asarray(batch.inputs).reshape(-1, 4) for batch in stack.batches])
    np.testing.assert_allclose(flat[example_places(stack)], x[ASKED], rtol=1e-6)


def _rows_and_numbers(batch):
    return batch.inputs, jnp.round(100 * batch.targets).astype(jnp.int32)


def test_rows_of_other_widths_end_in_what_is_no_number():
    batches = tuple(
        ArrayBatch(jnp.full((1, 2, width), float(width)), jnp.full((1, 2, width), width)) for width in (2, 3)
    )
    places = (jnp.array([[1, -1]]), jnp.array([[2, 0]]))
    stack = ExampleStack(batches, (jnp.zeros((1, 2)), jnp.ones((1, 2))), places)
    floats, integers = per_example(lambda batch: tuple(batch), stack)
    np.testing.assert_array_equal(floats, [[3, 3, 3], [2, 2, np.nan], [3, 3, 3]])
    np.testing.assert_array_equal(integers, [[3, 3, 3], [2, 2, -1], [3, 3, 3]])


def test_a_stack_that_does_not_know_its_rows_is_refused():
    stack = ArrayExamples(np.ones((2, 2)), np.ones(2)).stack(np.arange(2), np.ones(2), chunk_size=2)
    with pytest.raises(ValueError, match=r"make it with ExampleSet\.stack"):
        per_example(_rows_and_numbers, dataclasses.replace(stack, places=None))
