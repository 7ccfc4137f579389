"""Makes `quantized_*.npz`, with PyTorch and bitsandbytes: `python -m tests.golden.make_quantization_golden`.

Each holds a checkpoint that transformers saved after bitsandbytes had quantised it: "config" and "w:*"; "d:*", its
quantised weights as bitsandbytes dequantises them; and "logits" of the shared token rows, which for int8 are those
of the dequantised weights: bitsandbytes itself quantises activations too there.
"""

import json
import pathlib
import tempfile
from typing import Any

import numpy as np
import torch
import transformers
from bitsandbytes import functional
from safetensors.numpy import load_file

from tests.golden.cases import QUANTIZED, QUANTIZED_CASE
from tests.torch_parity import reference

HERE = pathlib.Path(__file__).parent


def dequantized(module):
    """The weight of a linear layer of bitsandbytes."""
    weight = module.weight
    if hasattr(weight, "quant_state"):
        return functional.dequantize_4bit(weight.data, weight.quant_state)
    return functional.int8_vectorwise_dequant(weight.data, weight.SCB)


def quantize(settings, directory):
    """The case's model as bitsandbytes quantises it on loading."""
    reference.build(QUANTIZED_CASE).save_pretrained(directory)
    config = transformers.BitsAndBytesConfig(**settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=config, dtype=torch.float32, device_map="cpu", attn_implementation="eager"
    )
    for module in model.modules():
        # Inference in bfloat16 else.
        vars(module).update({"support_avx512bf16_for_cpu": False})
    return model.eval()


def main():
    """Writes one file per quantisation."""
    for name, settings in QUANTIZED.items():
        with tempfile.TemporaryDirectory() as directory:
            model = quantize(settings, directory)
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            config = json.loads((pathlib.Path(directory) / "config.json").read_text())
            stored = load_file(pathlib.Path(directory) / "model.safetensors")
        content: dict[str, Any] = {
            "config": np.array(json.dumps(config)),
            **{f"w:{key}": value for key, value in stored.items()},
        }
        weights = {
            key: module for key, module in model.named_modules() if "bitsandbytes" in type(module).__module__
        }
        plain = reference.build(QUANTIZED_CASE)
        with torch.no_grad():
            for key, module in weights.items():
                weight = dequantized(module)
                content[f"d:{key}"] = weight.numpy()
                plain.get_submodule(key).weight.copy_(weight)
        content["logits"] = reference.logits(plain if name == "int8" else model)
        np.savez_compressed(HERE / f"quantized_{name}.npz", **content)


if __name__ == "__main__":
    main()
