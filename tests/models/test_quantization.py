"""A quantised base: as bitsandbytes saved it, quantised here, and differentiated like its dequantised weights."""

import dataclasses
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from llmeraser_jax.convert import QUANTIZATIONS, dequantize_base, quantize_base
from llmeraser_jax.curvature import CURVATURES, DatasetCurvature, linearise
from llmeraser_jax.lora import merge_lora
from llmeraser_jax.losses import gradient_sum, lm_objective
from llmeraser_jax.models import ApplyDecoder, ModelConfig, init_base, load_model, save_model
from llmeraser_jax.parallel import make_mesh
from tests.golden import files
from tests.golden.cases import QUANTIZED, case_tokens, largest_relative_difference, write_checkpoint
from tests.models.test_precision import equations
from tests.models.tiny import random_lora, tiny_model
from tests.small_lm import random_stack, small_config, small_lora

dequantized = jax.jit(dequantize_base)


def golden(name, directory):
    """Its content and its checkpoint."""
    content = files.load(f"quantized_{name}")
    return content, files.checkpoint(content, directory)


@pytest.mark.parametrize("name", QUANTIZED)
def test_what_bitsandbytes_saved_is_read_bit_by_bit(name, tmp_path):
    content, directory = golden(name, tmp_path / "m")
    model = load_model(directory)
    assert model.quantization == name
    layers = dequantized(model.base)["layers"]
    weights = {key[2:]: value for key, value in content.items() if key.startswith("d:")}
    assert len(weights) == 14
    for key, weight in weights.items():
        layer, module = re.fullmatch(r"model\.layers\.(\d)\..*\.(\w+)", key).groups()  # type: ignore[union-attr]
        np.testing.assert_array_equal(layers[module]["kernel"][int(layer)].T, weight, err_msg=key)
    tokens, mask = case_tokens()
    logits = jax.jit(model.apply)(model.base, None, tokens, mask)
    assert largest_relative_difference(logits, content["logits"], mask) < 1e-5
    with pytest.raises(ValueError, match=f"quantised as {name} already"):
        load_model(directory, quantization="int8" if name == "nf4" else "nf4")


@pytest.mark.parametrize("name", ["nf4-double", "int8"])
def test_gradient_and_curvature_are_those_of_the_dequantised_base(name):
    config = small_config(hidden_size=64, intermediate_size=40)
    with jax.enable_x64(True):
        quantised = quantize_base(init_base(config, jax.random.key(0), "float64"), name)
        lora, stack = small_lora(config, "float64"), random_stack(1, 3, "float64")

        @jax.jit
        def compute(base):
            objective = lm_objective(ApplyDecoder(config), base, l2=1e-3)
            hessian = DatasetCurvature(objective, lora, stack, CURVATURES["hessian"])
            return gradient_sum(objective, lora, stack), hessian.mv(lora), linearise(hessian).mv(lora)

        for ours, expected in zip(
            *(jax.tree.leaves(compute(base)) for base in (quantised, dequantized(quantised))), strict=True
        ):
            assert np.abs(expected).max() > 0
            np.testing.assert_allclose(ours, expected, rtol=1e-8, atol=1e-10)


def test_layers_are_dequantised_one_at_a_time():
    config = small_config(hidden_size=64, intermediate_size=40)
    base = jax.eval_shape(lambda: quantize_base(init_base(config, jax.random.key(0)), "nf4-double"))
    tokens = jax.ShapeDtypeStruct((2, 5), jnp.int32)
    program = jax.make_jaxpr(lambda b, t: ApplyDecoder(config)(b, None, t, t))(base, tokens)
    leaves: dict[str, Any] = flatten_dict(base, sep="/")
    kernels = {leaf.shape for path, leaf in leaves.items() if path.endswith("_proj/kernel")}
    made = [out.aval for equation in equations(program.jaxpr) for out in equation.outvars]
    assert not [aval for aval in made if aval.shape in kernels]
    assert {shape[1:] for shape in kernels} <= {aval.shape for aval in made}


@pytest.mark.parametrize(
    ("name", "least_gib", "most_gib"), [("nf4", 3.5, 5), ("nf4-double", 3.4, 4), ("int8", 6, 7)]
)
def test_memory_of_seven_billion_parameters(name, least_gib, most_gib):
    config = ModelConfig(
        vocab_size=32000, width=4096, mlp_width=11008, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128
    )
    base = jax.eval_shape(lambda: quantize_base(init_base(config, jax.random.key(0), "bfloat16"), name))
    gib = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(base)) / 2**30
    assert least_gib < gib < most_gib
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    rest = 2 * (2 * 32000 * 4096 + 65 * 4096)
    bits = {"nf4": 4 + 32 / 64, "nf4-double": 4 + (8 + 32 / 256) / 64, "int8": 8}[name]
    assert gib == pytest.approx((weights * bits / 8 + rest) / 2**30, rel=1e-3)


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_quantising_while_loading_is_quantising_what_was_loaded(name, tmp_path):
    model = tiny_model(width=64, mlp_width=128)
    save_model(tmp_path / "m", model)
    loaded = load_model(tmp_path / "m", dtype="bfloat16", quantization=name)
    expected = jax.jit(quantize_base, static_argnums=1)(load_model(tmp_path / "m", dtype="bfloat16").base, name)
    assert jax.tree.structure(loaded.base) == jax.tree.structure(expected)
    for got, wanted in zip(*map(jax.tree.leaves, (loaded.base, expected)), strict=True):
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(np.asarray(got), np.asarray(wanted))
    save_model(tmp_path / "copy", loaded)
    again, plain = load_model(tmp_path / "copy", dtype="bfloat16").base, dequantized(loaded.base)
    for got, wanted in zip(*map(jax.tree.leaves, (again, plain)), strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(wanted))
    lora = random_lora(loaded)
    for got, wanted in zip(
        *(jax.tree.leaves(merge_lora(base, lora)) for base in (loaded.base, plain)), strict=True
    ):
        np.testing.assert_allclose(
            np.asarray(got, np.float32), np.asarray(wanted, np.float32), rtol=1e-2, atol=1e-6
        )


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_a_mesh_shares_a_quantised_base_out(name, tmp_path):
    save_model(tmp_path / "m", tiny_model(width=64, mlp_width=128, head_dim=32, vocab_size=32))
    whole, shared = (
        load_model(tmp_path / "m", quantization=name, mesh=m) for m in (None, make_mesh(data=2, model=2))
    )
    parts = {
        module: shared.base["layers"][module]["kernel"].codes.addressable_shards[0].data.shape
        for module in ("up_proj", "down_proj")
    }
    blocks = {"up_proj": (2, 64, 64), "down_proj": (2, 64, 64)}
    if name != "int8":
        blocks = {"up_proj": (2, 64, 1, 32), "down_proj": (2, 64, 1, 32)}
    assert parts == blocks
    tokens = np.arange(12).reshape(2, 6)
    logits = [jax.jit(m.apply)(m.base, None, tokens, np.ones_like(tokens)) for m in (whole, shared)]
    np.testing.assert_allclose(logits[1], logits[0], rtol=1e-5, atol=1e-5)


def test_checkpoints_that_are_quantised_otherwise_are_refused_by_name(tmp_path):
    content, _ = golden("nf4", tmp_path / "m")
    config, tensors = json.loads(str(content["config"])), files.tensors(content)
    key = "model.layers.1.mlp.up_proj.weight"

    def attempt(changed_tensors=None, **changes):
        changed = {**config, "quantization_config": {**config["quantization_config"], **changes}}
        load_model(write_checkpoint(tmp_path / "bad", changed, {**tensors, **(changed_tensors or {})}))

    for changes, match in [
        ({"quant_method": "gptq"}, "gptq"),
        ({"bnb_4bit_quant_type": "fp4"}, "fp4"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "bfloat16"),
    ]:
        with pytest.raises(ValueError, match=match):
            attempt(**changes)
    with pytest.raises(ValueError, match=f"{re.escape(key)} .*table of its own"):
        attempt({f"{key}.quant_map": np.linspace(-1, 1, 16, dtype=np.float32)})
    with pytest.raises(ValueError, match="finite"):
        attempt({f"{key}.absmax": np.full_like(tensors[f"{key}.absmax"], np.nan)})
    with pytest.raises(ValueError, match="bytes"):
        attempt({key: tensors[key][:-40]})
    plain = {name: value for name, value in tensors.items() if not name.startswith(key)}
    weight = np.zeros((40, 64), np.float32)
    with pytest.raises(ValueError, match="all layers have to agree"):
        load_model(write_checkpoint(tmp_path / "mixed", config, {**plain, key: weight}))
    with pytest.raises(ValueError, match="'nf8'"):
        load_model(tmp_path / "m", quantization="nf8")


def test_a_model_with_another_base_storage_is_told_apart():
    model = tiny_model()
    assert model.quantization is None
    assert dataclasses.replace(model, base=quantize_base(model.base, "int8")).quantization == "int8"
