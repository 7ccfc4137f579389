"""Small random models, one per family and feature, that golden files and parity tests share."""

import json

import numpy as np

from llmeraser_jax.convert import write_safetensors

_SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# Arguments of transformers' configuration class of the family.
CASES = {
    "llama_mha_untied": {**_SIZES, "model_type": "llama", "tie_word_embeddings": False},
    "llama_gqa_tied_llama3_rope": {
        **_SIZES,
        "model_type": "llama",
        "num_key_value_heads": 2,
        "head_dim": 12,
        "tie_word_embeddings": True,
        "rope_parameters": _LLAMA3_ROPE,
    },
    "llama_mqa_biases_linear_rope": {
        **_SIZES,
        "model_type": "llama",
        "num_key_value_heads": 1,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    },
    "mistral_gqa_window": {
        **_SIZES,
        "model_type": "mistral",
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 4,
        "tie_word_embeddings": False,
    },
    "qwen2_gqa_tied": {**_SIZES, "model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3_gqa_head_dim": {
        **_SIZES,
        "model_type": "qwen3",
        "num_key_value_heads": 2,
        "head_dim": 6,
        "tie_word_embeddings": False,
    },
    "qwen3_mha_attention_bias": {
        **_SIZES,
        "model_type": "qwen3",
        "head_dim": 8,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
}

# Adapters that PEFT makes on the first case of the same key.
ADAPTERS = {
    "llama_mha_untied": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]},
    "llama_gqa_tied_llama3_rope": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": "all-linear",
        "use_rslora": True,
    },
    "qwen2_gqa_tied": {"r": 2, "lora_alpha": 8, "target_modules": r".*\.(o_proj|down_proj)"},
}

NUM_NEW_TOKENS = 8


def case_tokens():
    """Token ids [4, 11] and masks: full, right-padded, left-padded, and short with padding on the left."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, _SIZES["vocab_size"], (4, 11))
    mask = np.ones((4, 11), np.int64)
    mask[1, 7:] = 0
    mask[2, :4] = 0
    mask[3, :9] = 0
    return np.where(mask == 1, tokens, 0), mask


def prompts():
    """The same texts without padding."""
    tokens, mask = case_tokens()
    return [row[keep == 1].tolist() for row, keep in zip(tokens, mask, strict=True)]


def write_checkpoint(directory, hf_config, tensors, generation=None):
    """A checkpoint directory in Hugging Face's layout."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf_config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    write_safetensors(directory / "model.safetensors", tensors)
    return directory


def largest_relative_difference(got, expected, mask=None):
    """max |got - expected| / max |expected|, over real tokens."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    keep = slice(None) if mask is None else np.asarray(mask).astype(bool)
    return np.abs(got[keep] - expected[keep]).max() / np.abs(expected[keep]).max()


# Inputs of 64 (blocks of NF4 inside the rows of a weight) and of 40 (over rows).
QUANTIZED_CASE = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QUANTIZED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
