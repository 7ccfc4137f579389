"""Hessian and Gauss-Newton products on a real decoder with LoRA, against dense matrices and differences."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from llmeraser_jax import trees
from llmeraser_jax.curvature import CURVATURES, Damped, DatasetCurvature, product_asymmetry
from llmeraser_jax.losses import gradient_sum, loss_sum, weight_sum
from tests.dense import materialise
from tests.small_lm import random_stack, small_config, small_lora, small_objective

L2 = 1e-2


@pytest.fixture(scope="module")
def problem():
    """A float64 problem small enough for dense matrices: rank 1 on two modules."""
    with jax.enable_x64(True):
        config = small_config()
        lora = small_lora(config, "float64", rank=1, targets=("q_proj", "down_proj"))
        yield small_objective(config, "float64", L2), lora, random_stack(2, 3, "float64")


def total_objective(objective, stack, params):
    """`sum_i w_i l_i` with the L2 term, written without the package's own sums."""
    total = 0.0
    for batches, weights in zip(stack.batches, stack.weights, strict=True):
        for chunk in range(weights.shape[0]):
            batch = jax.tree.map(lambda x, chunk=chunk: x[chunk], batches)
            logits = objective.outputs(params, batch)
            nll = -jax.nn.log_softmax(logits) * jax.nn.one_hot(batch.targets, logits.shape[-1])
            losses = (nll.sum(-1) * batch.target_weights).sum(-1)
            squares = sum(jnp.sum(x**2) for x in jax.tree.leaves(params))
            total = total + jnp.sum(weights[chunk] * (losses + 0.5 * L2 * squares))
    return total


def flat_function(problem):
    objective, lora, stack = problem
    flat, unravel = ravel_pytree(lora)
    return flat, unravel, lambda x: total_objective(objective, stack, unravel(x))


def test_gradient_is_that_of_the_objective_written_out(problem):
    with jax.enable_x64(True):
        objective, lora, stack = problem
        flat, _, f = flat_function(problem)
        got = ravel_pytree(gradient_sum(objective, lora, stack))[0]
        np.testing.assert_allclose(got, jax.grad(f)(flat), rtol=1e-9, atol=1e-12)
        data_term = loss_sum(objective, lora, stack)
        l2_term = weight_sum(stack) * 0.5 * L2 * flat @ flat
        assert float(data_term + l2_term) == pytest.approx(float(f(flat)), rel=1e-12)


def test_hessian_product_equals_dense_jax_hessian(problem):
    with jax.enable_x64(True):
        objective, lora, stack = problem
        flat, _, f = flat_function(problem)
        got = materialise(DatasetCurvature(objective, lora, stack, CURVATURES["hessian"]), lora)
        dense = jax.hessian(f)(flat)
        np.testing.assert_allclose(got, dense, rtol=1e-5, atol=1e-10)
        assert np.linalg.eigvalsh(dense).min() < 0, "the oracle should see an indefinite Hessian"


def test_hessian_product_equals_central_differences_of_the_gradient(problem):
    with jax.enable_x64(True):
        objective, lora, stack = problem
        v = trees.tree_random_normal(jax.random.key(5), lora)
        product = DatasetCurvature(objective, lora, stack, CURVATURES["hessian"]).mv(v)
        h = 1e-6
        ahead, behind = (gradient_sum(objective, trees.tree_axpy(s * h, v, lora), stack) for s in (1, -1))
        difference = trees.tree_scale(0.5 / h, trees.tree_sub(ahead, behind))
        error = trees.tree_norm(trees.tree_sub(product, difference)) / trees.tree_norm(product)
        assert float(error) < 1e-6


def test_gauss_newton_product_equals_explicit_jacobians(problem):
    with jax.enable_x64(True):
        objective, lora, stack = problem
        flat, unravel, _ = flat_function(problem)
        got = materialise(DatasetCurvature(objective, lora, stack, CURVATURES["gauss-newton"]), lora)
        expected = L2 * float(weight_sum(stack)) * np.eye(flat.size)
        for batches, weights in zip(stack.batches, stack.weights, strict=True):
            for chunk in range(weights.shape[0]):
                batch = jax.tree.map(lambda x, chunk=chunk: x[chunk], batches)
                jacobian = jax.jacobian(lambda x, batch=batch: objective.outputs(unravel(x), batch))(flat)
                probs = jax.nn.softmax(objective.outputs(lora, batch))
                for i in range(weights.shape[1]):
                    for t in range(probs.shape[1]):
                        p, j = np.asarray(probs[i, t]), np.asarray(jacobian[i, t])
                        scale = float(weights[chunk, i] * batch.target_weights[i, t])
                        expected += scale * j.T @ (np.diag(p) - np.outer(p, p)) @ j
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-10)
        assert np.linalg.eigvalsh(np.asarray(got)).min() >= L2 * float(weight_sum(stack)) * (1 - 1e-9)


@pytest.mark.parametrize("kind", CURVATURES)
def test_products_are_symmetric_and_linear(problem, kind):
    with jax.enable_x64(True):
        objective, lora, stack = problem
        operator = DatasetCurvature(objective, lora, stack, CURVATURES[kind])
        u, v = (trees.tree_random_normal(jax.random.key(k), lora) for k in (1, 2))
        assert float(jax.jit(product_asymmetry)(operator, u, v)) < 1e-13
        product = jax.jit(lambda operator, x: operator.mv(x))
        left = product(operator, trees.tree_axpy(2.5, u, v))
        right = trees.tree_axpy(2.5, product(operator, u), product(operator, v))
        assert float(trees.tree_norm(trees.tree_sub(left, right)) / trees.tree_norm(left)) < 1e-13


def test_gauge_directions_are_null_for_gauss_newton(problem):
    """(A, B) -> (A M, M^-1 B) leaves the function unchanged: B -= e B, A += e A is a null direction of the data."""
    with jax.enable_x64(True):
        objective, lora, stack = problem
        direction = trees.tree_zeros_like(lora)
        pair = lora.params["layers"]["q_proj"]
        direction.params["layers"]["q_proj"] = {"a": pair["a"], "b": -pair["b"]}
        product = DatasetCurvature(objective, lora, stack, CURVATURES["gauss-newton"]).mv(direction)
        expected = trees.tree_scale(L2 * float(weight_sum(stack)), direction)
        assert float(trees.tree_norm(trees.tree_sub(product, expected))) < 1e-12


def test_damping_adds_rho(problem):
    with jax.enable_x64(True):
        objective, lora, stack = problem
        operator = DatasetCurvature(objective, lora, stack, CURVATURES["gauss-newton"])
        v = trees.tree_random_normal(jax.random.key(3), lora)
        shift = trees.tree_sub(Damped(operator, 0.7).mv(v), operator.mv(v))
        np.testing.assert_allclose(ravel_pytree(shift)[0], 0.7 * ravel_pytree(v)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", CURVATURES)
def test_float32_products_agree_with_float64(problem, kind):
    with jax.enable_x64(True):
        objective, lora, stack = problem
        v = trees.tree_random_normal(jax.random.key(4), lora)
        exact = DatasetCurvature(objective, lora, stack, CURVATURES[kind]).mv(v)

        def narrow(tree):
            return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.float64 else x, tree)

        single = DatasetCurvature(narrow(objective), narrow(lora), narrow(stack), CURVATURES[kind])
        got = single.mv(narrow(v))
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(got))
        assert float(trees.tree_norm(trees.tree_sub(exact, got)) / trees.tree_norm(exact)) < 1e-5
        u = trees.tree_random_normal(jax.random.key(5), lora)
        assert float(product_asymmetry(single, narrow(u), narrow(v))) < 1e-6


@pytest.mark.parametrize("kind", CURVATURES)
def test_base_and_data_are_arguments_so_one_trace_serves_all(problem, kind):
    with jax.enable_x64(True):
        objective, lora, stack = problem
        chex.clear_trace_counter()

        @jax.jit
        @partial(chex.assert_max_traces, n=1)
        def product(operator, v):
            return operator.mv(v)

        norms = []
        for scale in (1.0, 2.0):
            scaled = stack.replace(weights=tuple(scale * w for w in stack.weights))
            operator = DatasetCurvature(objective, lora, scaled, CURVATURES[kind])
            norms.append(float(trees.tree_norm(product(operator, lora))))
        assert norms[1] == pytest.approx(2 * norms[0], rel=1e-12)
