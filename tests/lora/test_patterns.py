"""Adapters whose ranks, scales and targets differ between layers: padding that nothing reads, files unchanged."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax import trees
from llmeraser_jax.cli import main
from llmeraser_jax.convert import write_safetensors
from llmeraser_jax.curvature import CURVATURES, Damped, DatasetCurvature
from llmeraser_jax.lora import (
    LoraConfig,
    add_delta,
    init_lora,
    load_adapter,
    merge_lora,
    product_norms,
    save_adapter,
)
from llmeraser_jax.losses import gradient_sum
from llmeraser_jax.models import ApplyDecoder, init_base
from llmeraser_jax.solvers import ConjugateGradients
from tests.models.tiny import MASK, TOKENS, apply, tiny_config, tiny_model
from tests.small_lm import random_stack, small_config, small_objective

CONFIG = LoraConfig(
    rank=3,
    alpha=6.0,
    target_modules=("q_proj", "v_proj", "model.layers.1.mlp.down_proj"),
    exclude_modules=r".*\.0\..*v_proj",
    rank_pattern={r"layers\.1\.self_attn\.q_proj": 1, "v_proj": 2, "down_proj": 4},
    alpha_pattern={r".*0.*q_proj": 9.0, "down_proj": 1.0},
)
# By hand: (module, layer) -> rank and scale.
EXPECTED = {
    ("q_proj", 0): (3, 3.0),
    ("q_proj", 1): (1, 6.0),
    ("v_proj", 0): (0, 0.0),
    ("v_proj", 1): (2, 3.0),
    ("down_proj", 0): (0, 0.0),
    ("down_proj", 1): (4, 0.25),
}


def real(lora):
    """1 for an adapter's numbers, 0 for padding."""
    ones = {}
    for name, leaves in lora.params["layers"].items():
        a, b = np.zeros(leaves["a"].shape), np.zeros(leaves["b"].shape)
        for layer in range(2):
            rank = EXPECTED[name, layer][0]
            a[layer, :rank], b[layer, :, :rank] = 1, 1
        ones[name] = {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}
    return lora.replace(params={"layers": ones})


def random_adapter(model_config):
    lora = init_lora(jax.random.key(0), CONFIG, model_config)
    return jax.tree.map(
        lambda x, mask: mask * (x + x.dtype.type(0.3) * jax.random.normal(jax.random.key(x.size), x.shape)),
        lora,
        real(lora),
    )


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def adapter(model):
    return random_adapter(model.config)


def test_ranks_and_scales_are_those_that_the_patterns_say(adapter):
    for (module, layer), (rank, scaling) in EXPECTED.items():
        assert adapter.config.rank_of(module, layer) == rank
        scales = adapter.config.row_scales(module, 2)
        got = np.zeros(adapter.params["layers"][module]["a"].shape[1]) if scales is None else scales[layer]
        np.testing.assert_allclose(adapter.config.scaling * got[:rank], scaling)
        assert np.all(got[rank:] == 0)
    assert {name: leaves["a"].shape[1] for name, leaves in adapter.params["layers"].items()} == {
        "q_proj": 3,
        "v_proj": 2,
        "down_proj": 4,
    }


def test_without_patterns_no_operation_is_added():
    config = LoraConfig(rank=3, rank_pattern={"q_proj": 3}, layers_to_transform=(0, 1))
    a = jnp.ones((2, 3, 4))
    assert config.scaled_rows("q_proj", a) is a


def test_the_network_sees_each_layers_own_update(model, adapter):
    base = model.base
    layers = {name: dict(leaves) for name, leaves in base["layers"].items()}
    for name, leaves in adapter.params["layers"].items():
        kernel = np.array(layers[name]["kernel"])
        for layer in range(2):
            rank, scaling = EXPECTED[name, layer]
            a, b = np.asarray(leaves["a"])[layer, :rank], np.asarray(leaves["b"])[layer, :, :rank]
            kernel[layer] += scaling * (b @ a).T
        layers[name]["kernel"] = kernel
    expected = apply(model.apply, {**base, "layers": layers}, None, TOKENS, MASK)
    np.testing.assert_allclose(apply(model.apply, base, adapter, TOKENS, MASK), expected, rtol=1e-5, atol=1e-5)
    merged = apply(model.apply, merge_lora(base, adapter), None, TOKENS, MASK)
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-5)
    # Whatever stands in the padding, nothing reads it.
    noise = jax.tree.map(lambda x, mask: jnp.where(mask == 0, 1.0, x), adapter, real(adapter))
    np.testing.assert_array_equal(
        apply(model.apply, base, noise, TOKENS, MASK), apply(model.apply, base, adapter, TOKENS, MASK)
    )


def test_norms_of_the_product_are_those_of_the_merged_kernels(model, adapter):
    delta = jax.tree.map(lambda x: 0.1 * x, adapter)
    zero = jax.tree.map(jnp.zeros_like, model.base)
    before, after = (merge_lora(zero, lora)["layers"] for lora in (adapter, add_delta(adapter, delta)))
    names = adapter.params["layers"]
    product = np.sqrt(sum(float(jnp.sum(before[n]["kernel"] ** 2)) for n in names))
    change = np.sqrt(sum(float(jnp.sum((after[n]["kernel"] - before[n]["kernel"]) ** 2)) for n in names))
    np.testing.assert_allclose(product_norms(adapter, delta), (change, product), rtol=1e-5)


def test_padding_has_neither_gradient_nor_curvature_and_conjugate_gradients_leave_it_at_zero():
    config = small_config()
    objective, stack = small_objective(config, "float32", l2=1e-3), random_stack(2, 3, "float32")
    lora = random_adapter(config)
    mask = real(lora)
    padding = jax.tree.map(lambda m: 1 - m, mask)
    gradient = gradient_sum(objective, lora, stack)
    assert float(trees.tree_norm(jax.tree.map(jnp.multiply, gradient, padding))) == 0
    assert float(trees.tree_norm(gradient)) > 0.1
    total = sum(float(w.sum()) for w in stack.weights)
    v = trees.tree_random_normal(jax.random.key(3), lora)
    for kind in ("hessian", "gauss-newton"):
        operator = DatasetCurvature(objective, lora, stack, CURVATURES[kind])
        product = jax.jit(operator.mv)(v)
        # In the padding there is the L2 term alone, which a vector that is zero there does not feel.
        expected = jax.tree.map(lambda x, p: total * 1e-3 * x * p, v, padding)
        found = jax.tree.map(jnp.multiply, product, padding)
        assert float(trees.tree_norm(trees.tree_sub(found, expected))) < 1e-6
        inside = jax.jit(operator.mv)(jax.tree.map(jnp.multiply, v, mask))
        difference = trees.tree_sub(inside, jax.tree.map(jnp.multiply, product, mask))
        assert float(trees.tree_norm(difference)) < 1e-5 * float(trees.tree_norm(inside))
    damped = Damped(operator, 1.0)
    solution = jax.jit(ConjugateGradients(rtol=1e-4, max_steps=100).solve)(damped, gradient)
    assert float(trees.tree_norm(jax.tree.map(jnp.multiply, solution.value, padding))) == 0
    residual = trees.tree_sub(jax.jit(damped.mv)(solution.value), gradient)
    assert float(trees.tree_norm(residual)) < 1e-3 * float(trees.tree_norm(gradient))


def test_a_fresh_adapter_is_zero_in_the_padding_and_leaves_the_function_unchanged(model):
    fresh = init_lora(jax.random.key(4), CONFIG, model.config)
    padding = jax.tree.map(lambda x, m: x * (1 - m), fresh, real(fresh))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(padding))
    assert np.count_nonzero(fresh.params["layers"]["q_proj"]["a"]) == (3 + 1) * 16
    np.testing.assert_array_equal(
        apply(model.apply, model.base, fresh, TOKENS, MASK), apply(model.apply, model.base, None, TOKENS, MASK)
    )


def test_the_files_come_back_bit_for_bit(model, adapter, tmp_path):
    save_adapter(tmp_path / "first", adapter, model)
    again = load_adapter(tmp_path / "first", model)
    assert again.config == adapter.config and hash(again.config) == hash(adapter.config)
    jax.tree.map(np.testing.assert_array_equal, again, adapter)
    save_adapter(tmp_path / "second", again, model)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    # A configuration goes through run.json in the same way.
    stored = json.loads(json.dumps(dataclasses.asdict(adapter.config)))
    assert LoraConfig.from_mapping(stored) == adapter.config


def test_a_tensor_of_another_rank_or_layer_is_named(model, adapter, tmp_path):
    from safetensors.numpy import load_file

    save_adapter(tmp_path / "adapter", adapter, model)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    prefix = "base_model.model.model.layers"
    tensors[f"{prefix}.1.self_attn.q_proj.lora_A.weight"] = np.ones((3, 16), np.float32)
    tensors[f"{prefix}.0.mlp.down_proj.lora_A.weight"] = np.ones((4, 24), np.float32)
    write_safetensors(path, tensors)
    with pytest.raises(ValueError, match=r"misshapen .*1\.self_attn\.q_proj.*unexpected .*0\.mlp\.down_proj"):
        load_adapter(tmp_path / "adapter", model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers_to_transform": (2,)}, r"layers_to_transform names \[2\].*0 to 1"),
        ({"layers_to_transform": ()}, "layers_to_transform is"),
        ({"exclude_modules": ("q_proj", "v_proj")}, "leaves none"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] is 0"),
        ({"rank_pattern": {"(": 1}}, "rank_pattern is '\\(', which is no regular expression"),
        ({"alpha_pattern": {"q_proj": -1.0}}, r"alpha_pattern\['q_proj'\] is -1"),
        ({"target_modules": ".*q_proj", "layers_to_transform": (0,)}, "put the layers into the regular expression"),
    ],
)
def test_options_that_cannot_be_honoured_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        init_lora(jax.random.key(0), LoraConfig(**changes), tiny_config())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["all-linear"], "all-linear"),
        (["q_proj"], ("q_proj",)),
        (["q_proj", "self_attn.v_proj"], ("q_proj", "self_attn.v_proj")),
        ([r".*\.(q|v)_proj"], r".*\.(q|v)_proj"),
    ],
)
def test_the_console_takes_names_an_expression_or_all_linear(given, expected, monkeypatch, tmp_path):
    from llmeraser_jax import cli

    seen = []
    monkeypatch.setattr(cli.Finetune, "run", lambda self: seen.append(self.lora) or 0)
    arguments = ["finetune", "--model", "m", "--data", "d", "--workdir", str(tmp_path), "--target-modules", *given]
    assert main([*arguments, "--rank-pattern", '{"v_proj": 2}', "--exclude-modules", "k_proj"]) == 0
    assert seen[-1].target_modules == expected
    assert seen[-1].rank_pattern == {"v_proj": 2} and seen[-1].exclude_modules == ("k_proj",)


def test_training_leaves_the_padding_at_zero():
    config = small_config()
    lora = init_lora(jax.random.key(5), CONFIG, config)
    base = init_base(config, jax.random.key(0))
    stack = random_stack(1, 4, "float32")
    import optax

    from llmeraser_jax.losses import lm_objective, loss_and_gradient_sums

    objective = lm_objective(ApplyDecoder(config), base, l2=0.0)
    adam: Any = optax.adam(0.01)
    state = adam.init(lora)
    for _ in range(3):
        _, gradient = loss_and_gradient_sums(objective, lora, stack)
        updates, state = adam.update(gradient, state)
        lora = trees.tree_add(lora, updates)
    padding = jax.tree.map(lambda x, m: x * (1 - m), lora, real(lora))
    assert float(trees.tree_norm(padding)) == 0
    assert np.all(np.asarray(lora.params["layers"]["q_proj"]["b"])[1, :, 0] != 0)
