"""Random vectors of adapter space: shapes, dtypes, moments, and no draw that two leaves share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from llmeraser_jax import trees

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
