"""What is exported, in the libraries that serve it: transformers on the merged model, PEFT on the adapter."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from llmeraser_jax.convert import dequantize_base, quantize_base  # noqa: E402
from llmeraser_jax.export import write_merged  # noqa: E402
from llmeraser_jax.lora import load_adapter, merge_lora, save_adapter  # noqa: E402
from llmeraser_jax.models import load_model  # noqa: E402
from tests.golden.cases import CASES, QUANTIZED_CASE, case_tokens, largest_relative_difference  # noqa: E402
from tests.models.tiny import random_lora  # noqa: E402


@pytest.fixture(
    scope="module", params=["llama_gqa_tied_llama3_rope", "gemma2_alternating", "phi3_longrope_partial"]
)
def model(request, tmp_path_factory):
    from tests.torch_parity import reference

    directory = tmp_path_factory.mktemp("base")
    reference.build(CASES[request.param]).save_pretrained(directory)
    return load_model(directory)


def causal_lm(directory, **kwargs):
    import transformers

    kwargs = {"attn_implementation": "eager", "dtype": torch.float32, **kwargs}
    return transformers.AutoModelForCausalLM.from_pretrained(directory, **kwargs).eval()


def losses(model):
    """Mean next-token losses of the shared rows."""
    tokens, mask = (torch.tensor(np.asarray(x)) for x in case_tokens())
    labels = torch.where(mask.bool(), tokens, -100)
    with torch.no_grad():
        return float(model(input_ids=tokens, attention_mask=mask, labels=labels).loss)


def test_transformers_and_peft_give_the_same_losses_and_logits(model, tmp_path):
    import jax
    import peft

    from tests.torch_parity import reference

    lora = random_lora(model)
    (tmp_path / "merged").mkdir()
    write_merged(tmp_path / "merged", model, lora, dtype="float32", shard_bytes=20_000)
    assert (tmp_path / "merged" / "model.safetensors.index.json").exists()
    save_adapter(tmp_path / "adapter", lora, model)
    merged = causal_lm(tmp_path / "merged")
    adapted = peft.PeftModel.from_pretrained(causal_lm(model.path), tmp_path / "adapter").eval()
    assert losses(merged) == pytest.approx(losses(adapted), rel=1e-5)
    assert abs(losses(causal_lm(model.path)) - losses(adapted)) > 0.01
    tokens, mask = case_tokens()
    ours = jax.jit(model.apply)(model.base, load_adapter(tmp_path / "adapter", model), tokens, mask)
    assert largest_relative_difference(reference.logits(merged), ours, mask) < 1e-5


def test_a_bfloat16_export_is_the_merged_model_rounded(model, tmp_path):
    import jax

    from tests.torch_parity import reference

    lora = random_lora(model)
    write_merged(tmp_path, model, lora, dtype="bfloat16")
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    rounded = jax.tree.map(
        lambda x: x.astype("bfloat16").astype("float32"), merge_lora(dequantize_base(model.base), lora)
    )
    tokens, mask = case_tokens()
    ours = jax.jit(model.apply)(rounded, None, tokens, mask)
    assert largest_relative_difference(reference.logits(causal_lm(tmp_path)), ours, mask) < 1e-4


@pytest.mark.parametrize("quantization", ["nf4", "nf4-double", "int8"])
def test_transformers_reads_a_quantised_export_through_bitsandbytes(quantization, tmp_path):
    pytest.importorskip("bitsandbytes")
    import jax

    from tests.golden.make_quantization_golden import dequantized
    from tests.torch_parity import reference

    reference.build(QUANTIZED_CASE).save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base")
    lora = random_lora(model)
    (tmp_path / "merged").mkdir()
    write_merged(tmp_path / "merged", model, lora, dtype="float32", quantization=quantization)
    theirs = causal_lm(tmp_path / "merged", device_map="cpu")
    again = load_model(tmp_path / "merged")
    assert again.quantization == quantization
    layers = dequantize_base(again.base)["layers"]
    found = 0
    for name, module in theirs.named_modules():
        if "bitsandbytes" in type(module).__module__:
            layer, kernel = int(name.split(".")[2]), layers[name.split(".")[-1]]["kernel"]
            np.testing.assert_allclose(dequantized(module).detach().numpy().T, kernel[layer], rtol=0, atol=1e-6)
            vars(module).update({"support_avx512bf16_for_cpu": False})  # inference in bfloat16 else
            found += 1
    assert found == 14
    if quantization == "int8":  # whose products bitsandbytes quantises too
        return
    tokens, mask = case_tokens()
    merged = quantize_base(merge_lora(model.base, lora), quantization)
    ours = jax.jit(model.apply)(merged, None, tokens, mask)
    assert largest_relative_difference(reference.logits(theirs), ours, mask) < 1e-5
