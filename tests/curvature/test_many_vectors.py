"""Several vectors in one product: the same numbers, and one pass over the primal values."""

import jax
import pytest

from llmeraser_jax.curvature import CURVATURES, DatasetCurvature, mv_many
from tests.curvature.problem import compile_product, decoder_problem, random_vectors, relative_difference

NUM_VECTORS = 8


@pytest.mark.parametrize("kind", CURVATURES)
def test_products_together_equal_those_apart_and_cost_less(kind):
    with jax.enable_x64(True):
        operator = DatasetCurvature(*decoder_problem("float64"), CURVATURES[kind])
        vectors = random_vectors(operator.params, NUM_VECTORS)
        first = jax.tree.map(lambda x: x[0], vectors)
        one, many = compile_product(operator, first), compile_product(operator, vectors, mv_many)
        together = many(operator, vectors)
        for k in range(NUM_VECTORS):
            apart = one(operator, jax.tree.map(lambda x, k=k: x[k], vectors))
            assert relative_difference(jax.tree.map(lambda x, k=k: x[k], together), apart) < 1e-12
        assert many.flops < 0.8 * NUM_VECTORS * one.flops
