"""Several vectors in one product: the same numbers, and one pass over the primal values."""

import jax
import pytest

from llmeraser_jax.curvature import CURVATURES, Damped, DatasetCurvature
from llmeraser_jax.types import mv_many
from tests.curvature.problem import compile_product, decoder_problem, random_vectors, relative_difference
from tests.curvature.programs import equations, products

NUM_VECTORS = 8


def at_once(operator, vectors):
    """As on an accelerator."""
    return jax.vmap(operator.mv)(vectors)


@pytest.mark.parametrize("together", [mv_many, at_once])
@pytest.mark.parametrize("kind", CURVATURES)
def test_products_together_equal_those_apart(kind, together):
    with jax.enable_x64(True):
        operator = DatasetCurvature(*decoder_problem("float64"), CURVATURES[kind])
        vectors = random_vectors(operator.params, NUM_VECTORS)
        first = jax.tree.map(lambda x: x[0], vectors)
        one, many = compile_product(operator, first), compile_product(operator, vectors, together)
        products = many(operator, vectors)
        for k in range(NUM_VECTORS):
            apart = one(operator, jax.tree.map(lambda x, k=k: x[k], vectors))
            assert relative_difference(jax.tree.map(lambda x, k=k: x[k], products), apart) < 1e-12
        if together is at_once:
            assert many.flops < 0.8 * NUM_VECTORS * one.flops


def _matrix_products(jaxpr) -> int:
    """Products without batch axes (the frozen matrices', and the adapter's)."""
    return sum(product.params["dimension_numbers"][1] == ((), ()) for product in products(jaxpr))


def _loops_over_vectors(jaxpr) -> list:
    """Bodies of the scans over `NUM_VECTORS`."""
    scans = (equation for equation in equations(jaxpr) if equation.primitive.name == "scan")
    return [scan.params["jaxpr"].jaxpr for scan in scans if scan.params["length"] == NUM_VECTORS]


@pytest.mark.parametrize("kind", CURVATURES)
def test_one_after_the_other_they_share_the_primal_pass(kind):
    operator = DatasetCurvature(*decoder_problem("float32"), CURVATURES[kind])
    vectors = random_vectors(operator.params, NUM_VECTORS)
    bodies = (_loops_over_vectors(_program(f, operator, vectors)) for f in (DatasetCurvature.mv_many, _apart))
    shared, apart = (sum(_matrix_products(body) for body in found) for found in bodies)
    assert 0 < shared < 0.6 * apart


def _apart(operator, vectors):
    return jax.lax.map(operator.mv, vectors)


def _program(function, operator, vectors):
    leaves, structure = jax.tree.flatten((operator, vectors))
    return jax.make_jaxpr(lambda leaves: function(*jax.tree.unflatten(structure, leaves)))(leaves).jaxpr


@pytest.mark.parametrize(
    "damped", [lambda a: Damped(a, 0.3), lambda a: Damped(a, jax.tree.map(lambda _: 0.3, a.params))]
)
def test_damping_is_added_to_every_product(damped):
    operator = DatasetCurvature(*decoder_problem("float32"), CURVATURES["gauss-newton"])
    vectors = random_vectors(operator.params, 2)
    assert relative_difference(mv_many(damped(operator), vectors), at_once(damped(operator), vectors)) < 1e-5
