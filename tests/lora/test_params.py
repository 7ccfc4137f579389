import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax import trees
from llmeraser_jax.lora import Lora, LoraConfig, add_delta, init_lora, merge_lora, product_norms
from tests.models.tiny import MASK, TOKENS, apply, random_lora, tiny_config, tiny_model


def test_a_fresh_adapter_has_uniform_a_and_zero_b_in_float32():
    config = tiny_config(width=64, num_layers=3)
    lora = init_lora(jax.random.key(0), LoraConfig(rank=32, target_modules=("o_proj", "q_proj")), config)
    leaves = lora.params["layers"]
    assert list(leaves) == ["q_proj", "o_proj"]
    assert leaves["q_proj"]["a"].shape == (3, 32, 64)
    assert leaves["q_proj"]["b"].shape == (3, 24, 32)
    assert leaves["o_proj"]["a"].shape == (3, 32, 24)
    assert {leaf.dtype for leaf in jax.tree.leaves(lora)} == {jnp.dtype("float32")}
    a = np.asarray(leaves["q_proj"]["a"])
    # Uniform on +-1/8: variance (1/8)^2 / 3.
    assert np.abs(a).max() <= 1 / 8
    np.testing.assert_allclose(a.var(), 1 / 192, rtol=0.05)
    assert abs(a.mean()) < 4 * np.sqrt(1 / 192 / a.size)
    assert not np.any(leaves["q_proj"]["b"])
    assert not np.array_equal(a[0], a[1])


def test_equal_adapters_have_equal_tree_structures_however_their_targets_were_written():
    config = tiny_config()
    key = jax.random.key(0)
    structures = {
        jax.tree.structure(init_lora(key, LoraConfig(target_modules=targets), config))
        for targets in (("v_proj", "q_proj"), ("q_proj", "v_proj"), r".*[qv]_proj")
    }
    assert len(structures) == 1


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True, "rank": 4}, {"target_modules": ("k_proj",)}])
def test_the_merged_base_alone_gives_the_logits_of_base_and_adapter(changes):
    model = tiny_model()
    lora = random_lora(model, **changes)
    merged = merge_lora(model.base, lora)
    expected = apply(model.apply, model.base, lora, TOKENS, MASK)
    np.testing.assert_allclose(apply(model.apply, merged, None, TOKENS, MASK), expected, rtol=1e-5, atol=1e-5)


def test_merging_adds_scaling_times_b_a():
    model = tiny_model()
    lora = random_lora(model, target_modules=("down_proj",), alpha=5.0)
    a, b = (np.asarray(lora.params["layers"]["down_proj"][side], np.float64) for side in ("a", "b"))
    before = model.base["layers"]["down_proj"]["kernel"]
    after = merge_lora(model.base, lora)["layers"]["down_proj"]["kernel"]
    for layer in range(2):
        expected = np.asarray(before[layer], np.float64) + 5 / 3 * (b[layer] @ a[layer]).T
        np.testing.assert_allclose(after[layer], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(before, model.base["layers"]["down_proj"]["kernel"])


def test_merging_keeps_the_bases_dtype():
    model = tiny_model(dtype="bfloat16")
    merged = merge_lora(model.base, random_lora(model))
    assert merged["layers"]["q_proj"]["kernel"].dtype == jnp.bfloat16


def test_adding_a_delta_and_subtracting_it_again_returns_the_adapter():
    model = tiny_model()
    lora, delta = random_lora(model, seed=1), random_lora(model, seed=2)
    moved = add_delta(lora, delta)
    assert isinstance(moved, Lora)
    assert moved.config == lora.config
    np.testing.assert_array_equal(
        moved.params["layers"]["q_proj"]["a"],
        lora.params["layers"]["q_proj"]["a"] + delta.params["layers"]["q_proj"]["a"],
    )
    back = add_delta(moved, trees.tree_scale(-1.0, delta))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), back, lora)


def test_a_delta_of_another_adapter_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="structure"):
        add_delta(random_lora(model), random_lora(model, target_modules=("q_proj",)))


def products(lora):
    """`scaling * B A` of every module and layer, written out in float64."""
    return np.concatenate(
        [
            np.einsum("lor,lri->loi", np.asarray(x["b"], np.float64), np.asarray(x["a"], np.float64)).ravel()
            for x in lora.params["layers"].values()
        ]
    ) * (lora.config.alpha / lora.config.rank)


@pytest.mark.parametrize("size", [0.5, 1e-4])
def test_product_norms_are_those_of_the_products_written_out(size):
    lora = random_lora(tiny_model())
    delta = trees.tree_scale(size, trees.tree_random_normal(jax.random.key(3), lora))
    change, before = product_norms(lora, delta)
    old = products(lora)
    new = products(jax.tree.map(lambda x, d: np.float64(x) + np.float64(d), lora, delta))
    np.testing.assert_allclose(before, np.linalg.norm(old), rtol=1e-5)
    np.testing.assert_allclose(change, np.linalg.norm(new - old), rtol=1e-5)


def test_a_change_of_basis_inside_the_adapter_changes_no_product():
    lora = random_lora(tiny_model())
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(lora.config.rank,) * 2))
    turned = {
        name: {"a": jnp.einsum("sr,lri->lsi", turn, x["a"]), "b": jnp.einsum("lor,sr->los", x["b"], turn)}
        for name, x in lora.params["layers"].items()
    }
    delta = trees.tree_sub(Lora(params={"layers": turned}, config=lora.config), lora)
    change, before = product_norms(lora, delta)
    assert float(trees.tree_norm(delta)) > 0.1 * float(trees.tree_norm(lora))
    assert float(change) < 1e-3 * float(before)
