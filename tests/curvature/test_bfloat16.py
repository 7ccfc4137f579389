"""bfloat16 matmul inputs: what is rounded, at every depth of a program, against NumPy on rounded numbers."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from llmeraser_jax import trees
from llmeraser_jax._jaxprs import with_bfloat16_matmuls
from llmeraser_jax.curvature import CURVATURES, Bfloat16Products, Damped, DatasetCurvature
from llmeraser_jax.types import ExampleStack
from tests.curvature.problem import compile_product, decoder_problem, relative_difference


def rounded(x):
    return np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float64)


def matrices(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def test_a_product_is_that_of_rounded_inputs_summed_in_float32():
    left, right = matrices((2, 5, 600), (2, 600, 7))
    product = jax.jit(
        with_bfloat16_matmuls(partial(jnp.einsum, "bik,bkj->bij", precision=jax.lax.Precision.HIGHEST))
    )
    got, expected = product(left, right), rounded(left) @ rounded(right)
    assert got.dtype == jnp.float32
    # Sums of 600 terms: in bfloat16 they would be wrong in the third digit.
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)
    assert np.abs(expected - left.astype(np.float64) @ right).max() > 1e-2


def test_products_inside_loops_branches_calls_and_checkpoints_are_narrow_and_nothing_else_is():
    w, x = matrices((4, 4), (3, 4))

    @jax.jit
    def layer(x):
        return x + jnp.tanh(x @ w)

    def fn(x):
        x, _ = jax.lax.scan(lambda x, _: (jax.checkpoint(layer)(x), None), x, None, length=2)
        x = jax.lax.cond(x.sum() > 1e9, lambda x: x, layer, x)
        return jax.lax.while_loop(lambda s: s[0] < 1, lambda s: (s[0] + 1, layer(s[1])), (0, x))[1]

    expected = x.astype(np.float64)
    for _ in range(4):
        expected = expected + np.tanh(rounded(expected) @ rounded(w))
    got = jax.jit(with_bfloat16_matmuls(fn))(x)
    # Rounding float32 where this rounds float64 may tip a number over to its neighbour, once in thousands.
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)
    assert np.abs(got - fn(x)).max() > 5e-3
    # Values that no product reads keep digits that bfloat16 does not have.
    np.testing.assert_array_equal(with_bfloat16_matmuls(lambda x: x * x + 1)(x), x * x + 1)


def test_other_dtypes_are_left_alone():
    with jax.enable_x64(True):
        left, right = (m.astype(np.float64) for m in matrices((3, 4), (4, 5)))
        np.testing.assert_allclose(with_bfloat16_matmuls(jnp.matmul)(left, right), left @ right, rtol=1e-14)
    counts = jnp.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(with_bfloat16_matmuls(jnp.matmul)(counts, counts.T), counts @ counts.T)


def test_a_curvature_product_is_close_to_the_exact_one_and_nearly_symmetric():
    objective, lora, stack = decoder_problem("float32", rank=2)
    stack = ExampleStack(stack.batches[:1], stack.weights[:1])
    exact = Damped(DatasetCurvature(objective, lora, stack, CURVATURES["gauss-newton"]), 0.5)
    u, v = (trees.tree_random_normal(jax.random.key(seed), lora) for seed in (3, 4))
    narrow = compile_product(Bfloat16Products(exact), v)
    product = narrow(Bfloat16Products(exact), v)
    # bfloat16 keeps 8 binary digits, and a product passes through a few dozen roundings.
    assert 1e-4 < relative_difference(product, compile_product(exact, v)(exact, v)) < 0.05
    across = trees.tree_vdot(v, narrow(Bfloat16Products(exact), u))
    asymmetry = abs(trees.tree_vdot(u, product) - across) / trees.tree_norm(u) / trees.tree_norm(product)
    assert 1e-7 < float(asymmetry) < 4e-3
    assert Bfloat16Products(exact).positive_semidefinite
