"""Rows that are never stored: their sums, products and sketches against rows that are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax import trees
from llmeraser_jax.curvature import example_rows
from llmeraser_jax.curvature.factor import RowKind, stacked_weights
from llmeraser_jax.curvature.row_sets import RowSet
from tests.curvature.problem import decoder_problem, relative_difference

KEY = jax.random.key(3)
KINDS = [("loss", 1), ("log-odds", 1), ("roots", 1), ("roots", 3)]


@pytest.fixture(scope="module", autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def problem():
    return decoder_problem("float64", rank=2)


def stored(problem, kind: RowKind, num_roots: int):
    """The rows, leaves [rows, ...], by `example_rows`."""
    objective, lora, stack = problem
    return example_rows(objective, lora, stack, KEY, kind, num_roots)


@pytest.mark.parametrize(("kind", "num_roots"), KINDS)
def test_combinations_and_products_are_those_of_stored_rows(problem, kind, num_roots):
    objective, lora, stack = problem
    rows = RowSet(objective, lora, stack, KEY, kind, num_roots)
    _, expected = stored(problem, kind, num_roots)
    coefficients = jax.random.normal(jax.random.key(0), (rows.num_rows,), jnp.float64)
    combined = jax.jit(RowSet.combine)(rows, coefficients)
    assert relative_difference(combined, trees.combine_rows(coefficients, expected)) < 1e-12
    v = trees.tree_random_normal(jax.random.key(1), lora)
    np.testing.assert_allclose(jax.jit(RowSet.products)(rows, v), trees.rows_vdot(expected, v), rtol=1e-10)


@pytest.mark.parametrize(("kind", "num_roots"), KINDS)
def test_squares_are_summed_with_the_weights_of_the_stack(problem, kind, num_roots):
    objective, lora, stack = problem
    found = RowSet(objective, lora, stack, KEY, kind, num_roots).squares()
    weights = jnp.repeat(stacked_weights(stack) / num_roots, num_roots)
    squares = jax.tree.map(lambda x: x**2, stored(problem, kind, num_roots).rows)
    assert relative_difference(found, trees.combine_rows(weights, squares)) < 1e-12


@pytest.mark.parametrize(("kind", "num_roots"), KINDS)
def test_a_sketch_wide_enough_for_every_leaf_has_the_exact_gram_matrix(problem, kind, num_roots):
    objective, lora, stack = problem
    values, expected = stored(problem, kind, num_roots)
    found, sketch = RowSet(objective, lora, stack, KEY, kind, num_roots).sketch(jax.random.key(5), 1000)
    gram = trees.rows_gram(expected, expected)
    np.testing.assert_allclose(sketch @ sketch.T, gram, rtol=1e-10, atol=1e-12 * float(jnp.abs(gram).max()))
    if kind != "log-odds":
        np.testing.assert_allclose(found, values, rtol=1e-12)


def test_the_gram_matrix_of_sketches_is_unbiased_and_its_error_falls_with_their_width(problem):
    objective, lora, stack = problem
    rows = RowSet(objective, lora, stack, KEY, "loss")
    exact = np.asarray(trees.rows_gram(*(stored(problem, "loss", 1)[1],) * 2))

    def grams(width, count):
        def gram(key):
            sketch = rows.sketch(key, width)[1]
            return sketch @ sketch.T

        return np.asarray(jax.jit(lambda keys: jax.lax.map(gram, keys))(jax.random.split(jax.random.key(8), count)))

    narrow, wide = grams(2, 40), grams(8, 40)
    spread = lambda g: np.linalg.norm(g - exact, axis=(1, 2)).mean() / np.linalg.norm(exact)  # noqa: E731
    assert spread(wide) < 0.7 * spread(narrow), "a quarter of the variance"
    assert np.linalg.norm(narrow.mean(0) - exact) < 0.4 * spread(narrow) * np.linalg.norm(exact)


def test_no_array_of_rows_by_parameters_is_made(problem):
    objective, lora, stack = problem
    rows = RowSet(objective, lora, stack, KEY, "roots", 3)
    size = rows.num_rows * sum(leaf.size for leaf in jax.tree.leaves(lora))
    for fn, argument in (
        (RowSet.combine, jnp.ones(rows.num_rows)),
        (RowSet.products, trees.tree_zeros_like(lora)),
    ):
        equations = _equations(jax.make_jaxpr(fn)(rows, argument).jaxpr)
        largest = max(variable.aval.size for equation in equations for variable in equation.outvars)
        assert largest < size / 4


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)
