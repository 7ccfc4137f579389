import json

import pytest

from llmeraser_jax.models import ModelConfig, RopeConfig
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
        (
            {"rope_scaling": {"rope_type": "proportional", "factor": 2.0}},
            r"rope_scaling\.rope_type = 'proportional'",
        ),
        ({"rope_scaling": {"rope_type": "yarn"}}, r"rope_scaling\.factor is missing"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, r"rope_scaling\.rope_type = \['yarn'\]"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": "2"}},
            r"rope_scaling\.factor = '2' \(expected a number",
        ),
        ({"rope_scaling": [1]}, r"rope_scaling = \[1\]"),
        ({"rope_scaling": 3}, "rope_scaling = 3"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}}, "beta_fast"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}, "rope_theta"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"model_type": "qwen2", "architectures": None, "attention_bias": True}, "attention_bias"),
        ({"model_type": "mistral", "architectures": None, "mlp_bias": True}, "mlp_bias"),
        ({"model_type": "gpt2"}, "gpt2"),
        ({"model_type": ["llama"]}, "model_type is \\['llama'\\]"),
        ({"model_type": "gemma3"}, "gemma3_text"),
        ({"model_type": "llama4_text"}, "llama4_text"),
        ({"use_mrope": True}, "use_mrope = True"),
        ({"rope_interleaved": True}, "rope_interleaved = True"),
        ({"rms_norm_eps": None}, "rms_norm_eps = None"),
        ({"rms_norm_eps": [1e-5]}, r"rms_norm_eps = \[1e-05\] \(expected a number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan"),
        ({"hidden_size": 32.5}, r"hidden_size = 32\.5 \(expected a whole number"),
        ({"hidden_size": True}, "hidden_size = True"),
        ({"vocab_size": 10**400}, r"vocab_size = a whole number of 1329 bits \(expected"),
        ({"num_hidden_layers": 1e6}, r"num_hidden_layers = 1000000\.0"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers = 1000000 .*to 10000"),
        ({"num_hidden_layers": {"a": 1}}, "num_hidden_layers = {'a': 1}"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes'"),
        ({"eos_token_id": {}}, "eos_token_id = {}"),
        ({"eos_token_id": [[2]]}, "eos_token_id"),
        ({"rope_theta": "1e4"}, "rope_theta = '1e4'"),
        ({"rope_theta": -1}, "rope_theta = -1"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"num_key_value_heads": 3}, "num_kv_heads"),
        ({"head_dim": 7}, "head_dim"),
    ],
)
def test_a_field_that_is_not_honoured_is_named(change, names):
    with pytest.raises(ValueError, match=names):
        ModelConfig.from_hf({**LLAMA, **change})


@pytest.mark.parametrize(("content", "shown"), [([1], r"\[1\]"), (3, "3"), (None, "None"), ("llama", "'llama'")])
def test_a_file_that_holds_no_object_is_named(content, shown):
    with pytest.raises(ValueError, match=rf"^config\.json holds {shown}; expected an object"):
        ModelConfig.from_hf(content)
    if content is not None:
        with pytest.raises(ValueError, match=rf"^generation_config\.json holds {shown}"):
            ModelConfig.from_hf(LLAMA, content)
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id = 'x'"):
        ModelConfig.from_hf(LLAMA, {"eos_token_id": "x"})


def test_a_long_value_is_cut_and_the_message_has_one_line():
    with pytest.raises(ValueError) as error:
        ModelConfig.from_hf({**LLAMA, "rms_norm_eps": "x\n" * 10_000, "unknown\n" * 10_000: 1})
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "extra",
    [
        {"use_mrope": False},
        {"is_llama_config": True, "rope_interleaved": False},
        {"transformers.js_config": {"dtype": "q4"}},
        {"max_sequence_length": 8192},
        {"rope_scaling": {}},
        {"sliding_window": None, "use_sliding_window": False, "max_window_layers": 1},
        {"partial_rotary_factor": 1.0},
    ],
)
def test_a_field_that_changes_nothing_at_its_value_is_no_reason_to_refuse(extra):
    assert ModelConfig.from_hf({**LLAMA, **extra}) == ModelConfig.from_hf(LLAMA)


def test_rope_scaling_takes_the_place_of_rope_parameters_with_its_base_frequency():
    parameters = {"rope_type": "default", "rope_theta": 5e5}
    scaling = {"rope_type": "linear", "factor": 3.0}
    both = ModelConfig.from_hf({**LLAMA, "rope_parameters": parameters, "rope_scaling": scaling}).rope
    assert both == RopeConfig(theta=10000.0, scaling="linear", factor=3.0)
    both = {"rope_parameters": parameters, "rope_scaling": scaling, "rope_theta": 7e5}
    assert ModelConfig.from_hf({**LLAMA, **both}).rope.theta == 7e5


QWEN = {**LLAMA, "model_type": "qwen2", "architectures": None, "num_key_value_heads": 2}


def test_layers_have_the_windows_and_rotary_positions_that_config_json_gives_them():
    window = {"sliding_window": 5, "max_window_layers": 1}
    plain = ModelConfig.from_hf({**QWEN, **window})
    assert plain.layer_windows == (None, None, None)
    windowed = ModelConfig.from_hf(
        {**QWEN, "sliding_window": 5, "max_window_layers": 1, "use_sliding_window": True}
    )
    assert windowed.layer_windows == (None, 5, 5)
    with pytest.raises(ValueError, match="layer_types"):
        ModelConfig.from_hf({**QWEN, "layer_types": ["full_attention"]})
    with pytest.raises(ValueError, match=r"sliding_window = .*layer_types"):
        ModelConfig.from_hf({**QWEN, "layer_types": ["sliding_attention"] * 3})
    gemma = {**LLAMA, "architectures": None, "num_hidden_layers": 7, "sliding_window": 9, "head_dim": 8}
    second = ModelConfig.from_hf({**gemma, "model_type": "gemma2"})
    assert second.layer_windows == (9, None) * 3 + (9,)
    third = ModelConfig.from_hf({**gemma, "model_type": "gemma3_text", "rope_local_base_freq": 50.0})
    assert third.layer_windows == (9,) * 5 + (None, 9)
    assert third.layer_ropes == (1,) * 5 + (0, 1)
    assert [rope and rope.theta for rope in third.ropes] == [1e6, 50.0]
    smol = ModelConfig.from_hf(
        {**LLAMA, "architectures": None, "model_type": "smollm3", "no_rope_layers": [1, 0, 1]}
    )
    assert smol.layer_ropes == (0, 1, 0)
    assert smol.ropes[1] is None


def test_published_fields_of_phi_3_and_4_are_read():
    published = {
        **LLAMA,
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        "head_dim": 8,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "sliding_window": 262144,
        "rope_scaling": {"type": "su", "short_factor": [1.0, 1.1, 1.2], "long_factor": [1.0, 2.0, 4.0]},
        "partial_rotary_factor": 0.75,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "mlp_bias": False,
        "attention_bias": False,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    }
    config = ModelConfig.from_hf(published)
    assert config.rope.scaling == "longrope"
    assert (config.rope.original_max_position, config.rope.rotated_share) == (4096, 0.75)
    assert config.rope.attention_factor == pytest.approx((1 + 5 / 12) ** 0.5)  # of 2^17 to 2^12 positions
    assert list(config.linear_shapes) == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    with pytest.raises(ValueError, match="short_factor has 3 entries; 4 frequencies"):
        ModelConfig.from_hf({**published, "partial_rotary_factor": 1.0})
    with pytest.raises(ValueError, match="lm_head_bias = True"):
        ModelConfig.from_hf({**published, "lm_head_bias": True})


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
    names = tiny_config().module_names
    assert "model.layers.1.self_attn.q_proj" in names
    assert "model.layers.0.mlp.down_proj" in names
    assert names[-1] == "lm_head"
    assert not any(name.startswith("model.layers.2") for name in names)
