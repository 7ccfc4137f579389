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

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
}
# Of one family each that needs more of the decoder. The rows of `case_tokens` are longer than the windows.
CASES |= {
    "gemma2_alternating": {
        **_SIZES,
        "model_type": "gemma2",
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 4,
        "query_pre_attn_scalar": 6,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_local_rope": {
        **_SIZES,
        "model_type": "gemma3_text",
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": 3,
        "query_pre_attn_scalar": 12,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "phi3_longrope_partial": {
        **_SIZES,
        "model_type": "phi3",
        "num_key_value_heads": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "sliding_window": 6,
        "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.2, 1.5],
            "long_factor": [1.0, 2.0, 5.0],
        },
    },
    "olmo2_gqa": {**_SIZES, "model_type": "olmo2", "num_key_value_heads": 2, "tie_word_embeddings": False},
    "smollm3_nope_yarn": {
        **_SIZES,
        "model_type": "smollm3",
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rope_parameters": _YARN,
    },
    "granite_multipliers": {
        **_SIZES,
        "model_type": "granite",
        "num_key_value_heads": 2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.3,
        "logits_scaling": 2.0,
        "tie_word_embeddings": True,
    },
    "mixtral_experts": {
        **_SIZES,
        "model_type": "mixtral",
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 12,
    },
    "qwen3_moe_experts": {
        **_SIZES,
        "model_type": "qwen3_moe",
        "num_key_value_heads": 2,
        "head_dim": 6,
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 8,
        "norm_topk_prob": True,
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
    "gemma2_alternating": {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"},
    "phi3_longrope_partial": {"r": 2, "lora_alpha": 4, "target_modules": ["qkv_proj", "gate_up_proj"]},
    "mixtral_experts": {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
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
