import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from llmeraser_jax.convert import write_safetensors
from llmeraser_jax.lora import LoraConfig, load_adapter, peft_io, save_adapter
from llmeraser_jax.models import load_model
from tests.golden import files
from tests.golden.cases import ADAPTERS, case_tokens, largest_relative_difference
from tests.models.tiny import random_lora, tiny_model

PEFT_CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 3,
    "lora_alpha": 16,
    "target_modules": ["q_proj", "down_proj"],
    "bias": "none",
    "init_lora_weights": True,
}


def _read(directory):
    return json.loads((directory / "adapter_config.json").read_text())


def _rewrite(directory, **changes):
    (directory / "adapter_config.json").write_text(json.dumps({**_read(directory), **changes}))


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_peft_saved_gives_the_logits_that_peft_gave(name, tmp_path):
    content = files.load(name)
    model = load_model(files.checkpoint(content, tmp_path / "model"))
    lora = load_adapter(files.adapter(content, tmp_path / "adapter"), model)
    tokens, mask = case_tokens()
    logits = jax.jit(model.apply)(model.base, lora, tokens, mask)
    assert largest_relative_difference(logits, content["adapter_logits"], mask) < 1e-5
    assert largest_relative_difference(content["logits"], content["adapter_logits"], mask) > 1e-2


@pytest.mark.parametrize("name", ADAPTERS)
def test_saving_returns_the_tensors_that_peft_saved_bit_for_bit(name, tmp_path):
    content = files.load(name)
    model = load_model(files.checkpoint(content, tmp_path / "model"))
    lora = load_adapter(files.adapter(content, tmp_path / "adapter"), model)
    save_adapter(tmp_path / "copy", lora, model)
    saved, expected = load_file(tmp_path / "copy" / "adapter_model.safetensors"), files.adapter_tensors(content)
    assert saved.keys() == expected.keys()
    for key, value in expected.items():
        assert saved[key].dtype == np.float32
        np.testing.assert_array_equal(saved[key], value, err_msg=key)
    ours, theirs = _read(tmp_path / "copy"), _read(tmp_path / "adapter")
    for field in ("r", "lora_alpha", "use_rslora", "lora_dropout", "bias", "peft_type", "task_type", "use_dora"):
        assert ours[field] == theirs[field], field


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True, "rank": 5, "alpha": 2.5},
        {"target_modules": ("k_proj", "gate_proj"), "dropout": 0.1},
    ],
)
def test_the_round_trip_is_bit_exact(changes, tmp_path):
    model = tiny_model()
    lora = random_lora(model, **changes)
    save_adapter(tmp_path / "adapter", lora, model)
    again = load_adapter(tmp_path / "adapter", model)
    assert again.config == lora.config
    assert jax.tree.structure(again) == jax.tree.structure(lora)
    jax.tree.map(np.testing.assert_array_equal, again, lora)


def test_adapters_are_saved_in_float32_and_read_from_narrower_files(tmp_path):
    model = tiny_model()
    lora = jax.tree.map(lambda x: x.astype("bfloat16"), random_lora(model))
    save_adapter(tmp_path / "adapter", lora, model)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    saved = load_file(path)
    assert {tensor.dtype for tensor in saved.values()} == {np.dtype("float32")}
    write_safetensors(path, {name: tensor.astype(np.float16) for name, tensor in saved.items()})
    again = load_adapter(tmp_path / "adapter", model)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(again)} == {"float32"}


def test_the_base_model_is_recorded(tmp_path):
    content = files.load("llama_mha_untied")
    model = load_model(files.checkpoint(content, tmp_path / "model"))
    save_adapter(tmp_path / "adapter", random_lora(model), model)
    recorded = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert recorded["base_model_name_or_path"] == str((tmp_path / "model").resolve())


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": [4]}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": -4}}, "alpha_pattern"),
        ({"layers_to_transform": [5]}, "layers_to_transform"),
        ({"layers_to_transform": [0], "layers_pattern": "h"}, "layers_pattern"),
        ({"modules_to_save": "lm_head"}, "modules_to_save = 'lm_head'.*expected a list of names"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"exclude_modules": ["q_proj", "down_proj"]}, "exclude_modules"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"use_qalora": True}, "use_qalora"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"something_of_a_later_version": 1}, "something_of_a_later_version"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"r": None}, "r is missing"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
    ],
)
def test_an_option_that_is_not_honoured_is_named(change, name):
    with pytest.raises(ValueError, match=name):
        peft_io.adapter_config_from_peft({**PEFT_CONFIG, **change}, tiny_model().config)


def test_fields_of_newer_versions_are_accepted_where_they_are_off():
    off = {
        "use_dora": False,
        "rank_pattern": {},
        "velora_config": None,
        "use_bdlora": None,
        "later": [],
        "x": False,
    }
    inert = {
        "peft_version": "0.21.2",
        "megatron_core": "megatron.core",
        "qalora_group_size": 16,
        "revision": "main",
    }
    config = peft_io.adapter_config_from_peft({**PEFT_CONFIG, **off, **inert}, tiny_model().config)
    assert config == LoraConfig(rank=3, alpha=16.0, target_modules=("q_proj", "down_proj"))


def test_tensors_that_do_not_fit_are_all_listed(tmp_path):
    model = tiny_model()
    save_adapter(tmp_path / "adapter", random_lora(model, target_modules=("q_proj", "v_proj")), model)
    _rewrite(tmp_path / "adapter", target_modules=["q_proj", "k_proj"], r=4)
    with pytest.raises(ValueError) as error:
        load_adapter(tmp_path / "adapter", model)
    prefix = "base_model.model.model.layers.1.self_attn"
    assert f"misshapen {prefix}.q_proj.lora_A.weight: got [3, 16], expected [4, 16]" in str(error.value)
    assert f"missing {prefix}.k_proj.lora_B.weight [12, 4]" in str(error.value)
    assert f"unexpected {prefix}.v_proj.lora_B.weight [12, 3]" in str(error.value)


def test_what_is_not_an_adapter_is_refused_in_words(tmp_path):
    model = tiny_model()
    with pytest.raises(FileNotFoundError, match="adapter_config"):
        load_adapter(tmp_path, model)
    save_adapter(tmp_path / "adapter", random_lora(model), model)
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.bin; convert"):
        load_adapter(tmp_path / "adapter", model)


def test_nothing_is_written_for_an_adapter_that_is_not_finite_or_does_not_fit(tmp_path):
    model = tiny_model()
    lora = random_lora(model)
    broken = jax.tree.map(lambda x: x.at[0].set(np.nan), lora)
    with pytest.raises(ValueError, match="nan"):
        save_adapter(tmp_path / "adapter", broken, model)
    with pytest.raises(ValueError, match="layers/"):
        save_adapter(tmp_path / "adapter", lora, tiny_model(num_layers=3))
    assert list(tmp_path.iterdir()) == []


def test_a_directory_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    model = tiny_model()
    lora = random_lora(model)
    save_adapter(tmp_path / "adapter", lora, model)
    with pytest.raises(FileExistsError):
        save_adapter(tmp_path / "adapter", lora, model)

    def fail(*_):
        msg = "disk full"
        raise OSError(msg)

    monkeypatch.setattr(peft_io.convert, "write_safetensors", fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(tmp_path / "other", lora, model)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
