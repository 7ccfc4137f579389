"""Empirical Fisher products against outer products of per-example gradients, written out densely."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from llmeraser_jax.curvature import CURVATURES, DatasetCurvature
from llmeraser_jax.losses import Objective, half_squared_error
from tests.curvature.problem import L2, decoder_problem
from tests.dense import materialise
from tests.problems import ArrayExamples, join_params, linear_outputs, split_params


def test_products_equal_outer_products_of_per_example_gradients():
    with jax.enable_x64(True):
        objective, lora, stack = decoder_problem("float64")
        flat, unravel = ravel_pytree(lora)
        gradients_of = jax.jit(jax.jacrev(lambda x, batch: objective.data_losses(unravel(x), batch)))
        total = sum(float(w.sum()) for w in stack.weights)
        expected = L2 * total * np.eye(flat.size)
        for batches, weights in zip(stack.batches, stack.weights, strict=True):
            for chunk in range(weights.shape[0]):
                g = gradients_of(flat, jax.tree.map(lambda x, chunk=chunk: x[chunk], batches))
                expected += np.einsum("i,ip,iq->pq", weights[chunk], g, g)
        operator = DatasetCurvature(objective, lora, stack, CURVATURES["empirical-fisher"])
        got = np.asarray(jax.jit(materialise)(operator, lora))
        np.testing.assert_allclose(got, expected, rtol=1e-7, atol=1e-12 * np.abs(expected).max())
        np.testing.assert_allclose(got, got.T, atol=1e-12 * np.abs(got).max())
        assert np.linalg.eigvalsh(got).min() >= L2 * total * (1 - 1e-9)
        # Nine examples: everything else is the L2 term's.
        assert np.sum(np.linalg.eigvalsh(got) > L2 * total * (1 + 1e-6)) == 9


def test_the_l2_term_is_no_part_of_a_gradient():
    """On a linear model `g_i = (x_i'theta - y_i) x_i`, whatever theta's own pull."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, y, theta, c = rng.standard_normal((5, 3)), rng.standard_normal(5), np.array([1.0, -2.0, 0.5]), 0.2
        stack = ArrayExamples(x, y).stack(np.arange(5), np.full(5, c), chunk_size=2)
        objective = Objective((), None, linear_outputs, half_squared_error, 0.4)
        operator = DatasetCurvature(objective, split_params(theta), stack, CURVATURES["empirical-fisher"])
        g = (x @ theta - y)[:, None] * x
        v = np.array([0.3, 1.0, -0.7])
        got = join_params(operator.mv(split_params(v)))
        np.testing.assert_allclose(got, c * g.T @ (g @ v) + 0.4 * 5 * c * v, rtol=1e-12)


def test_memorised_examples_leave_no_curvature():
    x = np.eye(3)
    stack = ArrayExamples(x, x @ np.ones(3)).stack(np.arange(3), np.ones(3), chunk_size=3)
    objective = Objective((), None, linear_outputs, half_squared_error, 0.0)
    params = split_params(jnp.ones(3))
    fisher, gauss_newton = (
        DatasetCurvature(objective, params, stack, CURVATURES[kind]).mv(params)
        for kind in ("empirical-fisher", "gauss-newton")
    )
    np.testing.assert_allclose(join_params(fisher), 0.0, atol=1e-6)
    np.testing.assert_allclose(join_params(gauss_newton), 1.0, rtol=1e-6)
