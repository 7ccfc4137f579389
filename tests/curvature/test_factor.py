"""Factored Gauss-Newton curvature: unbiased, and its inverse is that of the dense matrix."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from llmeraser_jax import trees
from llmeraser_jax.curvature import CURVATURES, Damped, DatasetCurvature
from llmeraser_jax.curvature.dual import BlockCurvature, factorise
from llmeraser_jax.curvature.factor import (
    ROW_KINDS,
    FactoredCurvature,
    example_rows,
    factored_curvature,
    stacked_weights,
)
from llmeraser_jax.curvature.row_blocks import RowBlocks
from llmeraser_jax.losses import (
    gradient_sum,
    half_squared_error_root,
    response_cross_entropy_root,
)
from llmeraser_jax.types import TokenBatch
from tests.dense import materialise
from tests.problems import ArrayExamples, ridge_objective, split_params
from tests.small_lm import random_stack, small_config, small_lora, small_objective


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def random_rows(num_rows: int, seed: int):
    rng = np.random.default_rng(seed)
    return {"a": jnp.asarray(rng.normal(size=(num_rows, 3))), "b": jnp.asarray(rng.normal(size=(num_rows, 2, 2)))}


def in_blocks(rows, size: int) -> RowBlocks:
    """The rows backwards, in blocks of one size with another row as padding; their places give the order back."""
    count = len(rows["a"])
    order = np.concatenate([np.arange(count)[::-1], np.zeros(-count % size, int)]).reshape(-1, size)
    blocks = tuple(jax.tree.map(lambda x, o=o: x[o], rows) for o in order)
    return RowBlocks(blocks, np.arange(count)[::-1])


def dense_rows(rows) -> np.ndarray:
    return np.stack(
        [np.asarray(ravel_pytree(jax.tree.map(lambda x, i=i: x[i], rows))[0]) for i in range(len(rows["a"]))]
    )


def test_root_of_cross_entropy_squares_to_its_hessian_on_average():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(3 * rng.normal(size=(1, 2, 5)))
    weights = jnp.asarray([[0.75, 0.25]])
    zeros = jnp.zeros((1, 2), jnp.int32)
    batch = TokenBatch(zeros, zeros, zeros, zeros, weights)
    draws = jax.vmap(lambda k: response_cross_entropy_root(logits, batch, k)[0].reshape(-1))(
        jax.random.split(jax.random.key(0), 200_000)
    )
    p = np.asarray(jax.nn.softmax(logits[0]))
    expected = np.zeros((10, 10))
    for t in range(2):
        block = np.diag(p[t]) - np.outer(p[t], p[t])
        expected[5 * t : 5 * t + 5, 5 * t : 5 * t + 5] = float(weights[0, t]) * block
    np.testing.assert_allclose(np.asarray(draws.T @ draws) / len(draws), expected, atol=2e-3)


def test_root_is_exact_for_two_outcomes_of_which_one_is_unlikely():
    logits = jnp.asarray([[[0.0, -9.0]]])
    zero = jnp.zeros((1, 1), jnp.int32)
    batch = TokenBatch(zero, zero, zero, zero, jnp.ones((1, 1)))
    p = np.asarray(jax.nn.softmax(logits[0, 0]))
    for seed in range(8):
        c = np.asarray(response_cross_entropy_root(logits, batch, jax.random.key(seed)))[0, 0]
        np.testing.assert_allclose(np.outer(c, c), np.diag(p) - np.outer(p, p), rtol=0.05)  # sqrt(p) is 0.01


def test_rows_on_ridge_give_the_gauss_newton_matrix_exactly():
    rng = np.random.default_rng(1)
    examples = ArrayExamples(rng.normal(size=(12, 4)), rng.normal(size=12), num_buckets=2)
    objective = dataclasses.replace(ridge_objective(0.1), output_root_fn=half_squared_error_root)
    params = split_params(rng.normal(size=4))
    stack = examples.stack(np.arange(12), rng.uniform(0.5, 2, 12), chunk_size=5)
    factored = factored_curvature(objective, params, stack, jax.random.key(0), damping=0.3)
    exact = Damped(DatasetCurvature(objective, params, stack, CURVATURES["gauss-newton"]), 0.3)
    np.testing.assert_allclose(materialise(factored, params), materialise(exact, params), rtol=1e-12, atol=1e-12)


def test_rows_of_a_decoder_are_unbiased_and_gradients_add_up():
    config = small_config()
    objective, lora = (
        small_objective(config, "float64"),
        small_lora(config, "float64", targets=("q_proj", "down_proj")),
    )
    stack = random_stack(2, 3, "float64")
    found = example_rows(objective, lora, stack, jax.random.key(0), "loss")
    weighted = jax.tree.map(lambda g: jnp.einsum("m,m...->...", stacked_weights(stack), g), found.rows)
    whole = trees.tree_axpy(objective.l2 * float(stacked_weights(stack).sum()), lora, weighted)
    np.testing.assert_allclose(
        ravel_pytree(whole)[0], ravel_pytree(gradient_sum(objective, lora, stack))[0], rtol=1e-9, atol=1e-12
    )

    v = trees.tree_random_normal(jax.random.key(5), lora)
    exact = ravel_pytree(DatasetCurvature(objective, lora, stack, CURVATURES["gauss-newton"]).mv(v))[0]

    @jax.jit
    def product(key, num_roots=64):
        return ravel_pytree(
            factored_curvature(objective, lora, stack, key, damping=0.0, num_roots=num_roots).mv(v)
        )[0]

    errors = []
    total = jnp.zeros_like(exact)
    for count, key in enumerate(jax.random.split(jax.random.key(1), 32), start=1):
        total += product(key)
        errors.append(float(jnp.linalg.norm(total / count - exact) / jnp.linalg.norm(exact)))
    assert errors[-1] < 0.1
    assert errors[-1] < 0.5 * np.mean(errors[:2])  # falls as one over the root of the number of draws


@pytest.mark.parametrize("num_rows", [4, 30])
def test_dual_inverse_is_the_dense_inverse(num_rows):
    rows = random_rows(num_rows, 0)
    weights, mu = jnp.asarray(np.random.default_rng(3).uniform(0, 2, num_rows)), 0.05
    operator = FactoredCurvature(rows, weights, mu)
    u = dense_rows(rows)
    dense = u.T @ (np.asarray(weights)[:, None] * u) + mu * np.eye(7)
    one = jax.tree.map(lambda x: x[0], random_rows(1, 9))
    np.testing.assert_allclose(materialise(operator, one), dense, atol=1e-12)
    inverse = factorise(BlockCurvature.of(RowBlocks.whole(rows), np.asarray(weights), mu))
    np.testing.assert_allclose(ravel_pytree(inverse.curvature.mv(one))[0], ravel_pytree(operator.mv(one))[0])
    flat = np.asarray(ravel_pytree(one)[0])
    np.testing.assert_allclose(ravel_pytree(inverse.solve(one))[0], np.linalg.solve(dense, flat), rtol=1e-9)
    np.testing.assert_allclose(trees.rows_vdot(rows, one), u @ flat, rtol=1e-12)


def test_rows_in_blocks_are_the_rows():
    rows, others, rng = random_rows(5, 0), random_rows(3, 1), np.random.default_rng(2)
    both = in_blocks(rows, 2).joined(in_blocks(others, 2))
    dense, coefficients = np.concatenate([dense_rows(rows), dense_rows(others)]), rng.normal(size=8)
    one = jax.tree.map(lambda x: x[0], random_rows(1, 9))
    flat = np.asarray(ravel_pytree(one)[0])
    np.testing.assert_allclose(both.gram(both), dense @ dense.T, rtol=1e-12)
    np.testing.assert_allclose(both.gram(in_blocks(rows, 3)), dense @ dense_rows(rows).T, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(both.products(one), dense @ flat, rtol=1e-12, atol=1e-12)
    for start, expected in ((None, 0.0), (one, flat)):
        found = ravel_pytree(both.combine(coefficients, start))[0]
        np.testing.assert_allclose(found, coefficients @ dense + expected, rtol=1e-12, atol=1e-12)


def test_joined_curvatures_are_the_curvature_of_joined_rows():
    first, second = (BlockCurvature.of(in_blocks(random_rows(m, m), 2), np.full(m, 1 / m), 0.1) for m in (2, 6))
    both = first.joined(second)
    np.testing.assert_allclose(both.gram, both.rows.gram(both.rows), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(both.weights, np.full(8, 1 / 8), rtol=1e-12)


def test_one_program_computes_every_kind_of_row_and_a_layout_does_not_change_the_draws():
    config = small_config()
    objective, lora = small_objective(config, "float64"), small_lora(config, "float64", targets=("q_proj",))
    stack, key = random_stack(2, 3, "float64"), jax.random.key(0)
    stack = dataclasses.replace(stack, places=(jnp.arange(6, dtype=jnp.int32).reshape(2, 3),))
    halves = [jax.tree.map(lambda x, k=k: x[k : k + 1], stack) for k in range(2)]
    program = jax.jit(example_rows, static_argnames="num_roots")
    for place, kind in enumerate(ROW_KINDS):
        expected = example_rows(objective, lora, stack, key, kind)
        parts = [program(objective, lora, half, key, np.asarray(place, np.int32)) for half in halves]
        found = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
        for leaf, like in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(leaf, like, rtol=1e-9, atol=1e-12)


def test_constrained_step_solves_the_dense_quadratic_program():
    """minimise 1/2 d'Ad subject to Hd = t, by its KKT system."""
    rows, normals = random_rows(5, 0), random_rows(3, 1)
    blocks, others = in_blocks(rows, 2), in_blocks(normals, 2)
    t = np.array([1.0, -2.0, 0.5])
    inverse = factorise(BlockCurvature.of(blocks, np.full(5, 0.5), 0.01))
    metric, solved = inverse.metric(blocks.gram(others), others.gram(others))
    coefficients = np.linalg.solve(metric, t) / 0.01
    found = blocks.combine(-solved @ coefficients, others.combine(coefficients))
    step = np.asarray(ravel_pytree(found)[0])
    u, h = dense_rows(rows), dense_rows(normals)
    a = 0.5 * u.T @ u + 0.01 * np.eye(7)
    kkt = np.block([[a, h.T], [h, np.zeros((3, 3))]])
    expected = np.linalg.solve(kkt, np.concatenate([np.zeros(7), t]))[:7]
    np.testing.assert_allclose(step, expected, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(h @ step, t, rtol=1e-9)


def test_singular_and_negative_factors_are_refused():
    rows = random_rows(2, 0)
    for weights, mu in ((np.ones(2), 0.0), (np.asarray([1.0, -1.0]), 0.1)):
        with pytest.raises(ValueError, match="mu"):
            factorise(BlockCurvature.of(RowBlocks.whole(rows), weights, mu))


def test_an_objective_without_a_root_says_so():
    examples = ArrayExamples(np.ones((3, 2)), np.ones(3))
    stack = examples.stack(np.arange(3), np.ones(3), chunk_size=3)
    with pytest.raises(ValueError, match="output_root_fn"):
        example_rows(ridge_objective(0.0), split_params(np.ones(2)), stack, jax.random.key(0), "roots")


def test_rows_concatenate_in_order():
    parts = random_rows(2, 0), random_rows(3, 1)
    np.testing.assert_array_equal(
        dense_rows(trees.concatenate_rows(*parts)), np.concatenate([dense_rows(part) for part in parts])
    )


def test_products_of_rows_ask_for_all_digits():
    # Accelerators' default would round to 8 or 11 bits what the inverse divides by a small mu.
    v = split_params(np.ones(5))
    rows = jax.tree.map(lambda x: jnp.ones((3, *x.shape)), v)
    for fn, args in (
        (trees.rows_vdot, (rows, v)),
        (trees.rows_gram, (rows, rows)),
        (trees.combine_rows, (jnp.ones(3), rows)),
    ):
        products = [e for e in jax.make_jaxpr(fn)(*args).eqns if "dot_general" in str(e)]
        assert products and all("HIGHEST" in str(e) for e in products)
