"""Checkpoints come back bit for bit, and a wrong one is named rather than padded."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax import checkpoint


@flax.struct.dataclass
class Adapter:
    params: dict
    name: str = flax.struct.field(pytree_node=False)


def adapter(scale=1.0):
    values = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32) * scale
    return Adapter(params={"q": {"a": jnp.asarray(values)}, "count": jnp.int32(7)}, name="x")


def assert_identical(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert g.dtype == e.dtype
        np.testing.assert_array_equal(np.asarray(g), np.asarray(e))


def test_a_tree_comes_back_bit_for_bit(tmp_path):
    tree = (adapter(), [jnp.ones((2, 2), jnp.bfloat16)], None)
    checkpoint.save_pytree(tmp_path / "deep" / "x", tree)
    assert_identical(checkpoint.restore_pytree(tmp_path / "deep" / "x", jax.tree.map(jnp.zeros_like, tree)), tree)


def test_saving_over_a_checkpoint_is_refused_and_leaves_it_as_it_was(tmp_path):
    checkpoint.save_pytree(tmp_path / "x", adapter())
    with pytest.raises(FileExistsError, match="x already holds"):
        checkpoint.save_pytree(tmp_path / "x", adapter(2.0))
    assert_identical(checkpoint.restore_pytree(tmp_path / "x", adapter(3.0)), adapter())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["x"]


def test_every_difference_between_checkpoint_and_expectation_is_named(tmp_path):
    checkpoint.save_pytree(tmp_path / "x", adapter())
    like = Adapter(params={"q": {"a": jnp.zeros((2, 4)), "b": jnp.zeros(())}}, name="x")
    with pytest.raises(ValueError) as error:
        checkpoint.restore_pytree(tmp_path / "x", like)
    message = str(error.value)
    assert "params.q.a is float32[2, 3], expected float32[2, 4]" in message
    assert "params.q.b is missing" in message
    assert "params.count is not expected" in message


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        checkpoint.restore_pytree(tmp_path / "nowhere", adapter())


def test_step_checkpoints_keep_the_latest_two_and_their_info(tmp_path):
    with checkpoint.StepCheckpoints(tmp_path / "steps") as steps:
        assert steps.latest_step() is None
        for step in (1, 3, 5):
            steps.save(step, adapter(float(step)), {"seconds": step / 2})
    with checkpoint.StepCheckpoints(tmp_path / "steps") as steps:
        assert steps.latest_step() == 5
        tree, info = steps.restore(5, adapter())
        assert_identical(tree, adapter(5.0))
        assert info == {"seconds": 2.5}
        assert_identical(steps.restore(3, adapter())[0], adapter(3.0))
    assert not (tmp_path / "steps" / "1").exists()


def test_an_incomplete_save_is_not_taken_for_a_checkpoint(tmp_path):
    with checkpoint.StepCheckpoints(tmp_path / "steps") as steps:
        steps.save(1, adapter(), {})
    (tmp_path / "steps" / "2.orbax-checkpoint-tmp").mkdir()
    with checkpoint.StepCheckpoints(tmp_path / "steps") as steps:
        assert steps.latest_step() == 1
