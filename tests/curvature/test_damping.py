"""Damping by a number and by block, scales for it from random probes, and curvatures as means of terms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from llmeraser_jax import trees
from llmeraser_jax.curvature import (
    CURVATURES,
    Damped,
    DatasetCurvature,
    block_mean_eigenvalues,
    mean_eigenvalue,
    relative_damping,
    stacked_axes,
)
from llmeraser_jax.types import FiniteSum, Operator
from tests.curvature.problem import decoder_problem, relative_difference
from tests.dense import DenseOperator, materialise
from tests.problems import ArrayExamples, join_params, ridge_objective, split_params
from tests.small_lm import small_config, small_lora

LIKE = {
    "head": {"bias": jnp.zeros(3)},
    "layers": {"q_proj": {"a": jnp.zeros((2, 1, 4)), "b": jnp.zeros((2, 3, 1))}},
}
SIZE = 3 + 8 + 6


def symmetric_matrix(seed=0):
    half = np.random.default_rng(seed).standard_normal((SIZE, SIZE))
    return half @ half.T


def block_slices():
    """Blocks in flattened order: tree order sorts keys, and a stacked leaf is layer by layer."""
    return {
        "bias": [slice(0, 3)],
        "a": [slice(3, 7), slice(7, 11)],
        "b": [slice(11, 14), slice(14, 17)],
    }


def ridge_operator():
    """Five micro-batches of two over two buckets, one of them padded, with unequal weights."""
    rng = np.random.default_rng(1)
    examples = ArrayExamples(rng.standard_normal((9, 4)), rng.standard_normal(9), num_buckets=2)
    stack = examples.stack(np.arange(9), rng.uniform(0.5, 1.5, 9), chunk_size=2)
    return DatasetCurvature(ridge_objective(0.3), split_params(np.ones(4)), stack, CURVATURES["hessian"])


def test_block_damping_adds_each_block_s_own_number():
    with jax.enable_x64(True):
        like = jax.tree.map(lambda x: x.astype(jnp.float64), LIKE)
        rhos = {
            "head": jnp.asarray(0.5),
            "layers": {"q_proj": {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 0.25])}},
        }
        operator = Damped(DenseOperator(jnp.asarray(symmetric_matrix()), True), rhos)
        expected = np.concatenate([np.full(n, r) for n, r in ((3, 0.5), (4, 1.0), (4, 2.0), (3, 3.0), (3, 0.25))])
        got = np.asarray(materialise(operator, like)) - symmetric_matrix()
        np.testing.assert_allclose(got, np.diag(expected), rtol=1e-9, atol=1e-12)
        assert isinstance(operator, Operator) and operator.positive_semidefinite
        assert np.linalg.eigvalsh(np.asarray(materialise(operator, like))).min() >= 0.25


def test_one_number_as_a_prefix_is_constant_damping():
    operator = DenseOperator(jnp.asarray(symmetric_matrix(), jnp.float32), True)
    v = trees.tree_random_normal(jax.random.key(0), LIKE)
    by_leaf = jax.tree.map(lambda _: jnp.asarray(0.7), LIKE)
    assert relative_difference(Damped(operator, by_leaf).mv(v), Damped(operator, 0.7).mv(v)) < 1e-7


def test_definiteness_is_passed_on():
    indefinite = DenseOperator(jnp.eye(SIZE), False)
    assert not Damped(indefinite, 0.7).positive_semidefinite


def test_a_damping_that_does_not_fit_its_leaf_is_refused():
    operator = Damped(DenseOperator(jnp.eye(SIZE), True), jax.tree.map(lambda _: jnp.ones(3), LIKE))
    with pytest.raises(ValueError, match=r"shape \(3,\).*\(2, 1, 4\)"):
        operator.mv(LIKE)


def test_block_damping_crosses_jit_without_a_second_trace():
    operator = DenseOperator(jnp.eye(SIZE), True)
    traces = []

    @jax.jit
    def product(op, v):
        traces.append(1)
        return op.mv(v)

    v = trees.tree_random_normal(jax.random.key(0), LIKE)
    for scale in (1.0, 2.0):
        rhos = jax.tree.map(lambda axes, s=scale: jnp.full((2,) * axes, s), stacked_axes(LIKE))
        assert relative_difference(product(Damped(operator, rhos), v), trees.tree_scale(1 + scale, v)) < 1e-6
    assert len(traces) == 1


def test_blocks_of_an_adapter_are_the_matrices_of_its_layers():
    lora = small_lora(small_config(), "float32", targets=("q_proj", "down_proj"))
    assert jax.tree.leaves(stacked_axes(lora)) == [1] * 4
    assert jax.tree.leaves(stacked_axes(LIKE)) == [0, 1, 1]


def test_mean_eigenvalues_of_a_block_diagonal_constant_are_exact():
    """Random signs are exact on a diagonal matrix, whatever the number of probes."""
    diagonal = np.concatenate([np.full(n, r) for n, r in ((3, 5.0), (4, 1.0), (4, 2.0), (3, 3.0), (3, -4.0))])
    operator = DenseOperator(jnp.asarray(np.diag(diagonal), jnp.float32))
    got = block_mean_eigenvalues(operator, jax.random.key(0), LIKE, 1)
    assert jax.tree.map(lambda x: x.tolist(), got) == {
        "head": {"bias": 5.0},
        "layers": {"q_proj": {"a": [1.0, 2.0], "b": [3.0, -4.0]}},
    }
    assert float(mean_eigenvalue(operator, jax.random.key(0), LIKE, 1)) == pytest.approx(diagonal.mean(), rel=1e-6)


def test_mean_eigenvalues_converge_to_the_dense_traces():
    with jax.enable_x64(True):
        matrix = symmetric_matrix()
        like = jax.tree.map(lambda x: x.astype(jnp.float64), LIKE)
        operator, probes = DenseOperator(jnp.asarray(matrix), True), 20_000
        got = block_mean_eigenvalues(operator, jax.random.key(1), like, probes)
        # One probe's variance is 2 sum_(i != j) of the symmetrised block row: at most 2 ||A||_F^2 here.
        five_sigma = 5 * np.sqrt(2 * np.sum(matrix**2) / probes)
        leaves = {"bias": got["head"]["bias"], **got["layers"]["q_proj"]}
        for name, slices in block_slices().items():
            values = np.atleast_1d(leaves[name])
            for value, block in zip(values, slices, strict=True):
                size = block.stop - block.start
                assert abs(value - np.trace(matrix[block, block]) / size) < five_sigma / size
        mean = float(mean_eigenvalue(operator, jax.random.key(2), like, probes))
        assert abs(mean - np.trace(matrix) / SIZE) < five_sigma / SIZE


def test_relative_damping_scales_and_never_falls_below_its_floor():
    means = {"x": jnp.asarray(4.0), "y": jnp.array([-1.0, 0.5])}
    rhos = relative_damping(means, 0.1, floor=0.02)
    np.testing.assert_allclose(rhos["x"], 0.4, rtol=1e-6)
    np.testing.assert_allclose(rhos["y"], [0.02, 0.05], rtol=1e-6)
    for factor, floor in ((0.0, 0.1), (0.1, 0.0), (-1.0, 0.1), (float("nan"), 0.1)):
        with pytest.raises(ValueError, match="above 0"):
            relative_damping(means, factor, floor=floor)


def test_an_estimate_without_probes_is_refused():
    with pytest.raises(ValueError, match="num_probes is 0"):
        mean_eigenvalue(DenseOperator(jnp.eye(SIZE)), jax.random.key(0), LIKE, 0)


def test_the_mean_over_terms_is_the_product():
    with jax.enable_x64(True):
        plain = ridge_operator()
        rhos = {"head": jnp.asarray(0.1), "tail": jnp.asarray(0.4)}
        v = trees.tree_random_normal(jax.random.key(0), plain.params)
        for operator in (plain, Damped(plain, 0.2), Damped(plain, rhos)):
            assert isinstance(operator, FiniteSum) and operator.num_terms == 5
            terms = jax.jit(jax.vmap(operator.term_mv, (0, None)))(jnp.arange(5), v)
            mean = jax.tree.map(lambda x: x.mean(0), terms)
            np.testing.assert_allclose(join_params(mean), join_params(operator.mv(v)), rtol=1e-12)
            assert np.ptp(np.asarray(terms["tail"]), axis=0).min() > 1e-3, "terms should differ"


def test_each_term_is_its_own_micro_batch_s():
    with jax.enable_x64(True):
        operator = ridge_operator()
        v = trees.tree_random_normal(jax.random.key(0), operator.params)
        total = sum(float(w.sum()) for w in operator.stack.weights)
        term = jax.jit(operator.term_mv)
        k = 0
        for batches, weights in zip(operator.stack.batches, operator.stack.weights, strict=True):
            for x, w in zip(np.asarray(batches.inputs), np.asarray(weights), strict=True):
                expected = 5 * (x.T * w) @ x @ join_params(v) + 0.3 * total * join_params(v)
                np.testing.assert_allclose(join_params(term(jnp.asarray(k), v)), expected, rtol=1e-12)
                k += 1


@pytest.mark.parametrize("kind", ["gauss-newton", "empirical-fisher"])
def test_the_mean_over_a_decoder_s_terms_is_the_product(kind):
    operator = DatasetCurvature(*decoder_problem("float32"), CURVATURES[kind])
    v = trees.tree_random_normal(jax.random.key(0), operator.params)

    @jax.jit
    def both(operator, v):
        terms = jax.lax.map(lambda k: operator.term_mv(k, v), jnp.arange(operator.num_terms))
        return jax.tree.map(lambda x: x.mean(0), terms), operator.mv(v)

    assert operator.num_terms == 3
    assert relative_difference(*both(operator, v)) < 1e-6


def test_an_operator_that_is_no_mean_of_terms_has_none():
    damped = Damped(DenseOperator(jnp.eye(SIZE)), 0.1)
    with pytest.raises(AttributeError, match="DenseOperator has no terms"):
        _ = damped.num_terms
    assert ravel_pytree(damped.mv(LIKE))[0].shape == (SIZE,)
