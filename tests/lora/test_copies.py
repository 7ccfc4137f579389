"""Adapters that hold trained copies of modules: embedding, head, norms, whole linear layers."""

import dataclasses
import json
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from llmeraser_jax import trees
from llmeraser_jax.convert import quantize_base, write_safetensors
from llmeraser_jax.curvature import CURVATURES, DatasetCurvature, example_factors, token_factors
from llmeraser_jax.evaluation.robustness import quantise_merged
from llmeraser_jax.export import write_merged
from llmeraser_jax.lora import LoraConfig, init_lora, load_adapter, merge_lora, save_adapter
from llmeraser_jax.losses import gradient_sum, lm_objective, loss_sum
from llmeraser_jax.models import generate, load_model, save_model
from llmeraser_jax.training import TrainConfig
from llmeraser_jax.training.finetune import Adam, finetune
from llmeraser_jax.types import ExampleStack, TokenBatch
from tests.dense import materialise
from tests.models.tiny import MASK, TOKENS, apply, random_lora, tiny_model
from tests.training.toy import toy_dataset

NAMES = ("embed_tokens", "lm_head", "norm")


def copied(model, seed=5, names=NAMES, **changes):
    """An adapter whose copies are the base's moved."""
    lora = random_lora(model, seed=seed, modules_to_save=names, **changes)
    fresh = model.init_lora(jax.random.key(0), lora.config).params["copies"]
    return lora.replace(params={**lora.params, "copies": trees.tree_add(fresh, lora.params["copies"])})


def stack(dtype=jnp.float32):
    positions = jnp.array([[4, 5, 6, 7], [2, 3, 4, 0], [1, 2, 0, 0]])
    weights = jnp.array([[0.25] * 4, [1 / 3] * 3 + [0], [0.5, 0.5, 0, 0]], dtype)
    targets = jnp.take_along_axis(TOKENS, positions + 1, axis=1)
    batch = TokenBatch(TOKENS, MASK.astype(jnp.int32), positions, targets, weights)
    return ExampleStack(batches=(jax.tree.map(lambda x: x[None], batch),), weights=(jnp.ones((1, 3), dtype),))


@pytest.mark.parametrize(
    ("tied", "names"),
    [(False, ("lm_head", "layernorm")), (True, ("embed_tokens",)), (True, ("lm_head",)), (True, NAMES)],
)
def test_copies_take_the_place_of_the_bases_leaves(tied, names):
    model, untied = tiny_model(tied_embeddings=tied), tiny_model(tied_embeddings=False)
    lora = copied(model, names=names)
    base = jax.tree.map(jnp.copy, model.base)
    if tied:
        base["lm_head"] = {"kernel": base["embed_tokens"]["embedding"].T}
    for path, leaf in jax.tree_util.tree_leaves_with_path(lora.params["copies"]):
        place = base
        for key in path[:-1]:
            place = place[key.key]
        place[path[-1].key] = leaf
    plain = lora.replace(
        params={"layers": lora.params["layers"]}, config=dataclasses.replace(lora.config, modules_to_save=())
    )
    expected = apply(untied.apply, base, plain, TOKENS, MASK)
    found = apply(model.apply, model.base, lora, TOKENS, MASK)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    without = apply(model.apply, model.base, plain, TOKENS, MASK)
    assert float(jnp.max(jnp.abs(found - without))) > 1e-2
    merged = apply(model.apply, merge_lora(model.base, lora), None, TOKENS, MASK)
    np.testing.assert_allclose(merged, expected, rtol=0, atol=1e-4)


def test_a_fresh_adapter_copies_the_base_and_leaves_its_function_unchanged():
    model = tiny_model(tied_embeddings=True)
    lora = model.init_lora(jax.random.key(0), LoraConfig(modules_to_save=NAMES))
    assert set(lora.params["copies"]) == {"embed_tokens", "lm_head", "final_norm", "layers"}
    assert set(lora.params["copies"]["layers"]) == {"input_norm", "post_attention_norm"}  # they end with "norm"
    np.testing.assert_allclose(
        apply(model.apply, model.base, lora, TOKENS, MASK),
        apply(model.apply, model.base, None, TOKENS, MASK),
        rtol=0,
        atol=1e-5,
    )


def test_a_module_that_is_copied_carries_no_low_rank_update():
    model = tiny_model()
    lora = copied(model, names=("q_proj", "o_proj"))
    assert set(lora.params["layers"]) == {"k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(lora.params["copies"]["layers"]) == {"q_proj", "o_proj"}
    biased = tiny_model(qkv_bias=True, model_type="qwen2")
    copies = biased.init_lora(
        jax.random.key(0), LoraConfig(modules_to_save=("q_proj",), target_modules="all-linear")
    )
    assert set(copies.params["copies"]["layers"]["q_proj"]) == {"kernel", "bias"}


def test_a_module_that_holds_others_is_copied_with_them():
    lora = tiny_model().init_lora(jax.random.key(0), LoraConfig(modules_to_save=("mlp",)))
    assert set(lora.params["copies"]["layers"]) == {"gate_proj", "up_proj", "down_proj"}


def test_a_copy_of_a_quantised_kernel_is_what_it_stands_for():
    model = tiny_model()
    base = quantize_base(model.base, "int8")
    lora = init_lora(jax.random.key(0), LoraConfig(modules_to_save=("q_proj",)), model.config, base)
    np.testing.assert_allclose(
        apply(model.apply, base, lora, TOKENS, MASK), apply(model.apply, base, None, TOKENS, MASK), atol=1e-5
    )


@pytest.mark.parametrize(("kind", "tied"), [("hessian", True), ("gauss-newton", False)])
def test_curvature_products_with_copies_are_those_of_dense_matrices(kind, tied):
    with jax.enable_x64(True):
        sizes = {"width": 4, "mlp_width": 4, "vocab_size": 29, "num_heads": 1, "num_kv_heads": 1, "head_dim": 4}
        model = tiny_model(dtype="float64", tied_embeddings=tied, **sizes)
        names = ("embed_tokens", "model.norm") if tied else ("lm_head", "model.norm")
        lora = copied(model, names=names, dtype="float64", rank=1, target_modules=("q_proj",))
        lora = jax.tree.map(lambda x: x.astype("float64"), lora)
        rows = stack(jnp.float64)
        objective = lm_objective(model.apply, model.base, l2=0.0)
        flat, unravel = jax.flatten_util.ravel_pytree(lora)
        (batch,), (weights,) = rows.batches, rows.weights
        batch = jax.tree.map(lambda x: x[0], batch)

        def outputs(p):
            return objective.outputs(unravel(p), batch)

        if kind == "hessian":
            expected = jax.jit(jax.hessian(lambda p: loss_sum(objective, unravel(p), rows)))(flat)
        else:
            logits = outputs(flat)
            jacobian = jax.jit(jax.jacobian(outputs))(flat).reshape(-1, flat.size)
            inner = jax.hessian(
                lambda z: jnp.sum(weights[0] * objective.output_loss_fn(z.reshape(logits.shape), batch))
            )
            expected = jacobian.T @ inner(logits.ravel()) @ jacobian
        gradient = jax.grad(lambda p: loss_sum(objective, unravel(p), rows))(flat)
        np.testing.assert_allclose(
            jax.flatten_util.ravel_pytree(gradient_sum(objective, lora, rows))[0], gradient, atol=1e-12
        )
        products = materialise(DatasetCurvature(objective, lora, rows, CURVATURES[kind]), lora)
        np.testing.assert_allclose(products, expected, rtol=1e-8, atol=1e-10)
        assert float(jnp.linalg.norm(expected)) > 1e-3


def test_kronecker_factors_refuse_copies_by_name():
    model = tiny_model()
    lora = copied(model)
    objective = lm_objective(model.apply, model.base, l2=0.0)
    for factors in (example_factors, token_factors):
        with pytest.raises(ValueError, match="copies of embed_tokens, lm_head, norm"):
            factors(objective, lora, stack(), jax.random.key(0))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("embedding",), "'embedding' select no module of this llama model"),
        (("lm_head", "score"), "'score' select no module"),
        (("act_fn",), "'model.layers.0.mlp.act_fn'.* have no parameters of their own"),
        (("layers.0.input_layernorm",), "'model.layers.1.input_layernorm' are left out"),
        (("oj",), "carry a low-rank update too"),
        (("",), "must hold names"),
    ],
)
def test_a_name_that_cannot_be_copied_is_refused(names, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        model.init_lora(jax.random.key(0), LoraConfig(modules_to_save=names))


def test_copies_that_are_not_those_of_the_configuration_are_refused():
    model = tiny_model()
    lora = copied(model)
    less = {**lora.params["copies"]}
    del less["lm_head"]
    with pytest.raises(ValueError, match="lm_head/kernel is missing"):
        apply(model.apply, model.base, lora.replace(params={**lora.params, "copies": less}), TOKENS, MASK)
    with pytest.raises(ValueError, match=r"embed_tokens/embedding is \(29, 16\), expected \(31, 16\)"):
        apply(tiny_model(vocab_size=31).apply, tiny_model(vocab_size=31).base, lora, TOKENS, MASK)


@pytest.mark.parametrize("tied", [False, True])
def test_the_files_come_back_bit_for_bit_under_the_names_that_peft_gives_them(tied, tmp_path):
    model = tiny_model(tied_embeddings=tied)
    lora = copied(model)
    save_adapter(tmp_path / "adapter", lora, model)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    np.testing.assert_array_equal(
        saved["base_model.model.lm_head.weight"], lora.params["copies"]["lm_head"]["kernel"].T
    )
    assert "base_model.model.model.layers.1.post_attention_layernorm.weight" in saved
    again = load_adapter(tmp_path / "adapter", model)
    assert again.config == lora.config and jax.tree.structure(again) == jax.tree.structure(lora)
    jax.tree.map(np.testing.assert_array_equal, again, lora)
    del saved["base_model.model.model.embed_tokens.weight"]
    write_safetensors(tmp_path / "adapter" / "adapter_model.safetensors", saved)
    with pytest.raises(ValueError, match=r"missing base_model\.model\.model\.embed_tokens\.weight"):
        load_adapter(tmp_path / "adapter", model)


@pytest.mark.parametrize("tied", [False, True])
def test_tokens_that_training_added_are_read_used_and_exported(tied, tmp_path):
    save_model(tmp_path / "base", tiny_model(tied_embeddings=tied))
    model = load_model(tmp_path / "base")
    names = ("embed_tokens", "lm_head")
    lora = copied(model, names=names, vocab_size=31)
    embedding, head = (
        lora.params["copies"][k][leaf] for k, leaf in (("embed_tokens", "embedding"), ("lm_head", "kernel"))
    )
    assert embedding.shape == (31, 16) and head.shape == (16, 31)
    fresh = model.init_lora(jax.random.key(0), lora.config)
    np.testing.assert_allclose(
        fresh.params["copies"]["embed_tokens"]["embedding"][29:],
        np.broadcast_to(np.mean(model.base["embed_tokens"]["embedding"], 0), (2, 16)),
        rtol=1e-5,
    )
    save_adapter(tmp_path / "adapter", lora, model)
    again = load_adapter(tmp_path / "adapter", model)
    assert again.config == lora.config
    tokens = TOKENS.at[0, 2].set(30)
    logits = apply(model.apply, model.base, again, tokens, MASK)
    assert logits.shape == (3, 9, 31) and np.all(np.isfinite(logits))
    (tmp_path / "merged").mkdir()
    write_merged(tmp_path / "merged", model, lora, dtype="float32")
    merged = load_model(tmp_path / "merged")
    assert merged.config.vocab_size == 31
    np.testing.assert_allclose(apply(merged.apply, merged.base, None, tokens, MASK), logits, rtol=0, atol=1e-4)
    assert len(generate(model, lora, [[30, 4]], 2, stop_ids=())[0]) == 2
    for broken in ({"modules_to_save": ("embed_tokens",)}, {"vocab_size": 20}):
        with pytest.raises(ValueError, match="tokens can be added where 'embed_tokens' and 'lm_head' are both"):
            model.init_lora(jax.random.key(0), dataclasses.replace(lora.config, **broken))


def test_tied_copies_are_refused_where_the_base_is_tied(tmp_path):
    for tied in (False, True):
        model = tiny_model(tied_embeddings=tied)
        directory = tmp_path / str(tied)
        save_adapter(directory, copied(model, names=("embed_tokens",)), model)
        path = directory / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "ensure_weight_tying": True}))
        if tied:
            with pytest.raises(ValueError, match="ensure_weight_tying = true ties"):
                load_adapter(directory, model)
        else:
            load_adapter(directory, model)


def test_the_merged_export_has_the_copies(tmp_path):
    save_model(tmp_path / "base", tiny_model(tied_embeddings=True))
    model = load_model(tmp_path / "base")
    lora = copied(model)
    (tmp_path / "merged").mkdir()
    write_merged(tmp_path / "merged", model, lora, dtype="float32")
    merged = load_model(tmp_path / "merged")
    assert merged.config.tied_embeddings is False
    np.testing.assert_allclose(
        apply(merged.apply, merged.base, None, TOKENS, MASK),
        apply(model.apply, model.base, lora, TOKENS, MASK),
        rtol=0,
        atol=1e-4,
    )
    rounded, rest = quantise_merged(model, lora, bits=8, group_size=4)
    assert rest is None
    np.testing.assert_array_equal(rounded.base["lm_head"]["kernel"], lora.params["copies"]["lm_head"]["kernel"])


def test_decoupled_decay_spares_copied_norms_and_an_l2_term_is_refused():
    model = tiny_model()
    lora = copied(model)
    adam = Adam(0.9, 0.999, 1e-8, None, weight_decay=0.5).transformation()
    zero = trees.tree_zeros_like(lora)
    direction: Any = adam.update(zero, adam.init(lora), lora)[0]
    copies, moved = lora.params["copies"], direction.params["copies"]
    np.testing.assert_allclose(moved["embed_tokens"]["embedding"], 0.5 * copies["embed_tokens"]["embedding"])
    np.testing.assert_allclose(
        direction.params["layers"]["q_proj"]["a"], 0.5 * lora.params["layers"]["q_proj"]["a"]
    )
    assert not np.any(moved["final_norm"]["scale"]) and not np.any(moved["layers"]["input_norm"]["scale"])
    with pytest.raises(ValueError, match=r"l2 is 0\.001, which would pull the trained copies of embed_tokens"):
        finetune(model, toy_dataset(), TrainConfig(l2=1e-3), lora=lora)


def test_training_moves_the_copies_and_ends_below_the_start():
    model = tiny_model()
    start = model.init_lora(jax.random.key(0), LoraConfig(rank=2, modules_to_save=NAMES))
    config = TrainConfig(l2=0.0, weight_decay=0.1, epochs=5, batch_size=5, learning_rate=0.02)
    result = finetune(model, toy_dataset(), config, lora=start)
    moved = trees.tree_sub(result.lora, start).params["copies"]
    assert all(np.any(leaf) for leaf in jax.tree.leaves(moved))
    everything = np.arange(10)
    stacked = toy_dataset().stack(everything, np.full(10, 0.1), chunk_size=5)
    assert result.loss < 0.8 * float(loss_sum(lm_objective(model.apply, model.base, l2=0.0), start, stacked))
