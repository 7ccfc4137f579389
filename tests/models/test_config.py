import json

import pytest

from llmeraser_jax.models import ModelConfig, RopeConfig, hf_module_names
from tests.golden.cases import CASES
from tests.models.tiny import tiny_config

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def test_what_config_json_leaves_out_is_what_transformers_assumes():
    assert ModelConfig.from_hf(LLAMA) == ModelConfig(
        model_type="llama",
        vocab_size=100,
        width=32,
        mlp_width=48,
        num_layers=3,
        num_heads=4,
        num_kv_heads=4,
        head_dim=8,
        norm_eps=1e-6,
        rope=RopeConfig(theta=10000.0),
        max_position=2048,
    )
    mistral = ModelConfig.from_hf(
        {**LLAMA, "model_type": "mistral", "architectures": None, "num_attention_heads": 8}
    )
    assert (mistral.sliding_window, mistral.num_kv_heads) == (4096, 8)
    qwen3 = ModelConfig.from_hf({**LLAMA, "model_type": "qwen3", "architectures": None, "num_key_value_heads": 2})
    assert (qwen3.head_dim, qwen3.qk_norm, qwen3.max_position) == (128, True, 32768)


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ({"rope_theta": 5e5}, RopeConfig(theta=5e5)),
        ({"rope_theta": 5e5, "rope_scaling": None}, RopeConfig(theta=5e5)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, RopeConfig(theta=5e5)),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            RopeConfig(theta=5e5, scaling="linear", factor=2.0),
        ),
        (
            {
                "rope_theta": 5e5,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 32.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            RopeConfig(
                theta=5e5,
                scaling="llama3",
                factor=32.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position=8192,
            ),
        ),
    ],
)
def test_rope_is_read_in_both_spellings(spelling, expected):
    assert ModelConfig.from_hf({**LLAMA, **spelling}).rope == expected


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"some_new_field": 3}, "some_new_field"),
        ({"sliding_window": 16}, "sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}}, "beta_fast"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}, "rope_theta"),
        ({"model_type": "qwen2", "architectures": None, "use_sliding_window": True}, "use_sliding_window"),
        ({"model_type": "qwen2", "architectures": None, "attention_bias": True}, "attention_bias"),
        ({"model_type": "mistral", "architectures": None, "mlp_bias": True}, "mlp_bias"),
        ({"model_type": "gpt2"}, "gpt2"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"num_key_value_heads": 3}, "num_kv_heads"),
        ({"head_dim": 7}, "head_dim"),
    ],
)
def test_a_field_that_is_not_honoured_is_named(change, names):
    with pytest.raises(ValueError, match=names):
        ModelConfig.from_hf({**LLAMA, **change})


def test_all_refused_fields_are_listed_at_once():
    with pytest.raises(ValueError, match=r"hidden_act.*quantization_config.*intermediate_size is missing"):
        ModelConfig.from_hf(
            {**LLAMA, "hidden_act": "gelu", "quantization_config": {"bits": 4}, "intermediate_size": None}
        )


def test_bookkeeping_and_null_fields_are_accepted():
    extra = {"transformers_version": "4.30", "torch_dtype": "float16", "use_cache": True, "_name_or_path": "x"}
    assert ModelConfig.from_hf({**LLAMA, **extra, "some_new_field": None}) == ModelConfig.from_hf(LLAMA)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 2}, None, (2,)),
        ({"eos_token_id": [5, 7]}, None, (5, 7)),
        ({"eos_token_id": 5}, {"eos_token_id": [7, 5, 9]}, (5, 7, 9)),
        ({}, {"eos_token_id": 9}, (9,)),
        ({}, {}, ()),
    ],
)
def test_end_of_sequence_tokens_come_from_both_files(config, generation, expected):
    assert ModelConfig.from_hf({**LLAMA, **config}, generation).eos_token_ids == expected


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_writing_config_json_is_the_inverse_of_reading_it(case):
    config = ModelConfig.from_hf(case)
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_a_configuration_that_its_family_cannot_have_is_refused():
    with pytest.raises(ValueError, match="qk_norm"):
        tiny_config(qk_norm=True)
    with pytest.raises(ValueError, match="qkv_bias"):
        tiny_config(model_type="qwen2")
    with pytest.raises(ValueError, match="sliding_window"):
        tiny_config(sliding_window=4)


def test_module_names_are_those_of_the_pytorch_model():
    names = hf_module_names(tiny_config())
    assert "model.layers.1.self_attn.q_proj" in names
    assert "model.layers.0.mlp.down_proj" in names
    assert names[-1] == "lm_head"
    assert not any(name.startswith("model.layers.2") for name in names)
