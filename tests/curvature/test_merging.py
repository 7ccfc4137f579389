"""Sums of thin matrix products as one product: which are merged, at every depth, and to what values (NumPy)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax import trees
from llmeraser_jax.curvature import CURVATURES, DatasetCurvature, merge_thin_products
from llmeraser_jax.types import ExampleStack
from tests.curvature.problem import compile_product, decoder_problem, relative_difference
from tests.curvature.programs import products

dot = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def matrices(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def depths(fn, *args) -> list[int]:
    """Contracted lengths of all products of a function's program, in order."""
    lengths = []
    for product in products(jax.make_jaxpr(fn)(*args).jaxpr):
        ((axis,), _), _ = product.params["dimension_numbers"]
        lengths.append(product.invars[0].aval.shape[axis])
    return lengths


def exact(x):
    return np.asarray(x, np.float64)


def test_the_tangent_of_a_thin_product_is_one_product_of_twice_the_depth():
    a, b, da, db = matrices((20, 3), (3, 30), (20, 3), (3, 30))

    def tangent(a, b, da, db):
        return jax.jvp(dot, (a, b), (da, db))[1]

    assert depths(tangent, a, b, da, db) == [3, 3, 3]  # the product itself, and the two of its tangent
    merged = merge_thin_products(tangent)
    assert depths(merged, a, b, da, db) == [3, 6]
    np.testing.assert_allclose(merged(a, b, da, db), exact(da) @ b + exact(a) @ db, rtol=1e-5, atol=1e-5)


def test_products_with_batch_axes_are_joined_along_what_they_contract():
    q, k, dq, dk = matrices((2, 8, 3), (2, 9, 3), (2, 8, 3), (2, 9, 3))
    scores = partial(jnp.einsum, "bqd,bkd->bqk", precision=jax.lax.Precision.HIGHEST)
    merged = merge_thin_products(lambda q, k, dq, dk: scores(dq, k) + scores(q, dk))
    assert depths(merged, q, k, dq, dk) == [6]
    expected = np.einsum("bqd,bkd->bqk", exact(dq), k) + np.einsum("bqd,bkd->bqk", exact(q), dk)
    np.testing.assert_allclose(merged(q, k, dq, dk), expected, rtol=1e-5, atol=1e-5)


def test_sums_of_many_terms_are_merged_by_what_is_alike_and_keep_the_rest():
    # Three thin products of different depths, two that contract another axis, a wide one, and one term besides.
    thin = matrices((20, 2), (2, 20), (20, 3), (3, 20), (20, 1), (1, 20))
    turned = matrices((2, 20), (2, 20), (4, 20), (4, 20), seed=1)
    wide = matrices((20, 30), (30, 20), (20, 20), seed=2)

    def fn(thin, turned, wide):
        a, b, c, d, e, f = thin
        g, h, i, j = turned
        left = dot(a, b) + (wide[2] + dot(wide[0], wide[1]))
        right = jnp.einsum("ki,kj->ij", g, h) + dot(c, d)
        return (left + right) + (dot(e, f) + jnp.einsum("ki,kj->ij", i, j))

    merged = merge_thin_products(fn)
    assert sorted(depths(fn, thin, turned, wide)) == [1, 2, 2, 3, 4, 30]
    assert sorted(depths(merged, thin, turned, wide)) == [6, 6, 30]
    (a, b, c, d, e, f), (g, h, i, j), (x, y, z) = ([exact(m) for m in group] for group in (thin, turned, wide))
    expected = a @ b + c @ d + e @ f + g.T @ h + i.T @ j + x @ y + z
    np.testing.assert_allclose(merged(thin, turned, wide), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "fn",
    [
        pytest.param(lambda a, b, c, d: dot(a, b) - dot(c, d), id="a difference"),
        pytest.param(lambda a, b, c, d: (dot(a, b) + dot(c, d).T).T, id="a transpose in between"),
        pytest.param(lambda a, b, c, d: [p := dot(a, b), p + dot(c, d)], id="a product that is an output too"),
        pytest.param(lambda a, b, c, d: jnp.sin(p := dot(a, b)) + (p + dot(c, d)), id="a product read twice"),
        pytest.param(lambda a, b, c, d: dot(b, a) + dot(d, c), id="operands larger than the result"),
        pytest.param(lambda a, b, c, d: (p := dot(a, b)) + p + d[0, 0], id="one product twice"),
    ],
)
def test_what_is_no_sum_of_thin_products_read_once_stays_as_it_is(fn):
    args = matrices((20, 3), (3, 20), (20, 3), (3, 20))
    assert str(jax.make_jaxpr(merge_thin_products(fn))(*args)) == str(jax.make_jaxpr(fn)(*args))


def test_a_sum_inside_a_sum_that_is_read_elsewhere_is_a_sum_of_its_own():
    a, b, c, d = matrices((20, 3), (3, 20), (20, 3), (3, 20))

    def fn(a, b, c, d):
        inner = dot(a, b) + dot(c, d)
        return inner + (dot(a, d) + dot(c, b)), inner

    merged = merge_thin_products(fn)
    assert depths(merged, a, b, c, d) == [6, 6]
    for got, expected in zip(merged(a, b, c, d), fn(*map(exact, (a, b, c, d))), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_sums_in_loops_branches_calls_and_checkpoints_are_merged():
    w, x = matrices((2, 12), (12, 12))

    @jax.jit
    def layer(x):
        return jnp.tanh(dot(x[:, :2], w) + dot(x[:, 2:4], w))

    def fn(x):
        x, _ = jax.lax.scan(lambda x, _: (jax.checkpoint(layer)(x), None), x, None, length=2)
        x = jax.lax.cond(x.sum() > 1e9, lambda x: x, layer, x)
        return jax.lax.while_loop(lambda s: s[0] < 1, lambda s: (s[0] + 1, layer(s[1])), (0, x))[1]

    merged = merge_thin_products(fn)
    assert set(depths(fn, x)) == {2} and set(depths(merged, x)) == {4}
    np.testing.assert_allclose(merged(x), fn(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", list(CURVATURES))
def test_an_operators_products_are_merged_and_the_same_in_double_precision(kind):
    with jax.enable_x64(True):
        objective, params, stack = decoder_problem("float64")
        v = trees.tree_random_normal(jax.random.key(3), params)
        chunk, weights = jax.tree.map(lambda x: x[0], (stack.batches[0], stack.weights[0]))
        one = ExampleStack(*jax.tree.map(lambda x: x[None], ((chunk,), (weights,))))
        operator = DatasetCurvature(objective, params, one, CURVATURES[kind])

        def plain(operator, v):
            product = operator.kind.product(operator.objective, params, chunk, weights, v)
            return trees.tree_axpy(objective.l2 * jnp.sum(weights), v, product)

        unmerged = depths(partial(plain, operator), v)
        assert len(depths(operator.mv, v)) < len(unmerged)
        assert len(depths(partial(operator.term_mv, 0), v)) < len(unmerged)
        merged, apart = (compile_product(operator, v, f)(operator, v) for f in (DatasetCurvature.mv, plain))
        assert relative_difference(merged, apart) < 1e-12
