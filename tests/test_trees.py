"""Random vectors of adapter space: shapes, dtypes, moments, no draw that two leaves share; and digests of trees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from llmeraser_jax import trees
from llmeraser_jax.parallel import make_mesh
from llmeraser_jax.types import ExampleStack

LIKE = {
    "a": jnp.zeros((3, 40, 50), jnp.float32),
    "b": {"c": jnp.zeros(6000, jnp.float32), "d": jnp.zeros((), jnp.float32)},
}


def test_normals_have_the_shapes_of_the_tree_and_are_normal():
    drawn = trees.tree_random_normal(jax.random.key(1), LIKE)
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, LIKE)
    for leaf in (drawn["a"], drawn["b"]["c"]):
        assert stats.kstest(np.ravel(leaf), "norm").pvalue > 1e-3
    # Two leaves of 6000: independent ones are this correlated with a probability of 1e-4.
    assert abs(np.corrcoef(np.ravel(drawn["a"]), drawn["b"]["c"])[0, 1]) < 3.9 / np.sqrt(6000)


def test_signs_are_one_or_minus_one_and_balanced():
    drawn = trees.tree_random_signs(jax.random.key(1), LIKE)
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, LIKE)
    for leaf in (drawn["a"], drawn["b"]["c"]):
        assert set(np.unique(leaf)) == {-1.0, 1.0}
        assert abs(float(leaf.mean())) < 3.9 / np.sqrt(6000)
    assert abs(float(jnp.mean(drawn["a"].ravel() * drawn["b"]["c"]))) < 3.9 / np.sqrt(6000)


@pytest.mark.parametrize("draw", [trees.tree_random_normal, trees.tree_random_signs])
def test_every_leaf_keeps_its_dtype_and_keys_draw_anew(draw):
    like = {"half": jnp.zeros(64, jnp.bfloat16), "single": jnp.zeros(64, jnp.float32)}
    first, again, other = (draw(jax.random.key(k), like) for k in (1, 1, 2))
    assert jax.tree.map(lambda x: x.dtype, first) == jax.tree.map(lambda x: x.dtype, like)
    for name in like:
        assert (first[name] == again[name]).all() and not (first[name] == other[name]).all()


def test_a_digest_is_of_places_and_bits_not_of_where_the_arrays_are():
    x, y = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(2, np.float32)
    digest = trees.tree_sha256({"x": x, "y": y})
    assert digest == trees.tree_sha256({"y": jnp.asarray(y), "x": jnp.asarray(x)})
    one_bit_off = np.nextafter(x, np.float32(9))
    others = [
        {"x": x},
        {"x": x, "z": y},
        {"x": x, "y": -y},
        {"x": one_bit_off, "y": y},
        {"x": x.reshape(3, 2), "y": y},
        {"x": x.view(np.int32), "y": y},
        {"x": x, "y": {"y": y}},
    ]
    digests = {digest, *map(trees.tree_sha256, others)}
    assert len(digests) == 1 + len(others)
    stack = ExampleStack(batches=(x,), weights=(jnp.asarray(x),))
    on_mesh = stack.replace(mesh=make_mesh(data=1, model=1))  # pyright: ignore[reportAttributeAccessIssue]
    assert trees.tree_sha256(stack) == trees.tree_sha256(on_mesh)
