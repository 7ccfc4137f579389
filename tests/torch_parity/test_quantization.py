"""Quantised kernels against bitsandbytes on a CPU: the same codes, scales and weights, bit by bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
functional = pytest.importorskip("bitsandbytes.functional")
pytestmark = pytest.mark.torch

from llmeraser_jax.convert.quantization import DYNAMIC_TABLE, NF4_TABLE, NF4Kernel, quantize  # noqa: E402

quantized = jax.jit(quantize, static_argnums=1)
# Whole blocks per row; blocks that reach over rows; a last block that is not full; more than one group of scales.
SHAPES = [(96, 128), (48, 40), (5, 7), (700, 64)]


def weights(out_in, dtype):
    """A weight as PyTorch has it, and the same numbers as a kernel."""
    rng = np.random.default_rng(sum(out_in))
    weight = torch.tensor(rng.normal(size=out_in) * rng.lognormal(size=(out_in[0], 1))).to(getattr(torch, dtype))
    return weight, jnp.asarray(weight.float().numpy().T).astype(dtype)


def test_the_tables_are_those_of_bitsandbytes():
    np.testing.assert_array_equal(DYNAMIC_TABLE, functional.create_dynamic_map(signed=True).numpy())
    np.testing.assert_array_equal(NF4_TABLE, functional.get_4bit_type("nf4", device="cpu").numpy())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("out_in", SHAPES)
def test_nf4_is_bit_equal(out_in, dtype):
    weight, kernel = weights(out_in, dtype)
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours = quantized(kernel, "nf4")
    np.testing.assert_array_equal(np.ravel(ours.codes)[: codes.numel()], codes.numpy().ravel())
    np.testing.assert_array_equal(np.ravel(ours.absmax), state.absmax.numpy())
    theirs = functional.dequantize_4bit(codes, state).float().numpy()
    weight = jax.jit(NF4Kernel.dequantized)(ours)
    assert weight.dtype == kernel.dtype and ours.shape == weight.shape == out_in[::-1]
    np.testing.assert_array_equal(np.asarray(weight, np.float32).T, theirs)


@pytest.mark.parametrize(
    "out_in", [shape for shape in SHAPES if shape != (5, 7)]
)  # a mean of one scale is that scale
def test_double_quantisation_is_bit_equal_from_the_mean_scale_on(out_in):
    weight, kernel = weights(out_in, "float32")
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    ours = quantized(kernel, "nf4-double")
    # The order in which PyTorch adds up the mean is its processor's.
    np.testing.assert_allclose(ours.nested_offset, state.offset.numpy(), rtol=3e-7)
    given = ours.replace(
        absmax=jnp.asarray(state.absmax.numpy().reshape(ours.absmax.shape)),
        nested_absmax=jnp.asarray(state.state2.absmax.numpy()),
        nested_offset=jnp.asarray(state.offset.numpy()),
    )
    weight = jax.jit(NF4Kernel.dequantized)(given)
    np.testing.assert_array_equal(weight.T, functional.dequantize_4bit(codes, state).numpy())
    if float(ours.nested_offset) == float(state.offset):
        np.testing.assert_array_equal(np.ravel(ours.absmax), state.absmax.numpy())
        np.testing.assert_array_equal(np.ravel(ours.nested_absmax), state.state2.absmax.numpy())


def test_int8_is_bit_equal():
    weight, kernel = weights((96, 128), "float16")  # bitsandbytes rounds to float16 before it quantises
    ours = quantized(kernel, "int8")
    codes, scales, _ = functional.int8_vectorwise_quant(weight.float())
    np.testing.assert_array_equal(ours.codes, codes.numpy())
    np.testing.assert_array_equal(ours.absmax, scales.numpy())
    theirs = functional.int8_vectorwise_dequant(codes, scales).numpy()
    got = jax.jit(lambda k: k.replace(dtype_name="float32").dequantized())(ours)
    np.testing.assert_array_equal(np.asarray(got).T, theirs)


@pytest.mark.parametrize("name", ["nf4", "nf4-double"])
def test_an_adapter_on_a_quantised_base_gives_the_logits_of_peft_on_bitsandbytes(name, tmp_path):
    from llmeraser_jax.lora import load_adapter
    from llmeraser_jax.models import load_model
    from tests.golden.cases import QUANTIZED, case_tokens
    from tests.golden.make_quantization_golden import quantize as quantize_with_bitsandbytes
    from tests.torch_parity import reference

    model = quantize_with_bitsandbytes(QUANTIZED[name], tmp_path / "plain")
    model.save_pretrained(tmp_path / "saved")
    before = reference.logits(model)
    adapted = reference.adapt(model, {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"})
    adapted.save_pretrained(tmp_path / "adapter")
    theirs = reference.logits(adapted)
    assert np.abs(theirs - before).max() > 0.1
    tokens, mask = case_tokens()
    # As bitsandbytes saved it, and quantised here from the same weights.
    for base in (load_model(tmp_path / "saved"), load_model(tmp_path / "plain", quantization=name)):
        assert base.quantization == name
        ours = jax.jit(base.apply)(base.base, load_adapter(tmp_path / "adapter", base), tokens, mask)
        np.testing.assert_allclose(np.where(mask[..., None], ours, theirs), theirs, rtol=1e-5, atol=1e-5)
