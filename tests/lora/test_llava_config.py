"""Which modules of a model that sees pictures carry an adapter: as PEFT matches names, without the frozen tower."""

import jax
import pytest

from llmeraser_jax.lora import (
    LoraConfig,
    adapter_config_from_peft,
    adapter_config_to_peft,
    init_lora,
    resolve_config,
)
from llmeraser_jax.lora.config import adapted_modules
from llmeraser_jax.models import ModelConfig
from tests.golden.llava_cases import LLAVA_CASES

CONFIG = ModelConfig.from_hf(LLAVA_CASES["llava_llama"])
TEXT = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROJECTOR = ("linear_1", "linear_2")
OUT = r".*vision_tower\..*"


@pytest.mark.parametrize(
    ("targets", "modules", "excluded"),
    [
        (("q_proj", "v_proj"), ("q_proj", "v_proj"), OUT),
        (("o_proj", "linear_2"), ("o_proj", "linear_2"), None),  # the tower has no module of these names
        ("all-linear", TEXT + PROJECTOR, OUT),
        (r".*language_model.*\.(up|k)_proj", ("k_proj", "up_proj"), OUT),  # written out as names
        (r".*multi_modal_projector\.linear_\d", PROJECTOR, None),
        (r".*layers\.\d\.self_attn\.v_proj", ("v_proj",), OUT),
    ],
)
def test_names_select_modules_of_text_model_and_projector(targets, modules, excluded):
    config = resolve_config(LoraConfig(target_modules=targets), CONFIG)
    assert (config.target_modules, adapted_modules(config, CONFIG)) == (modules, modules)
    assert config.exclude_modules == excluded
    assert resolve_config(config, CONFIG) == config
    assert resolve_config(LoraConfig.from_mapping(vars(config)), CONFIG) == config
    written = adapter_config_to_peft(config, None)
    assert adapter_config_from_peft(written, CONFIG) == config


def test_layers_patterns_and_exclusions_mean_modules_of_the_text_model():
    def ranks(**settings):
        config = resolve_config(LoraConfig(rank=4, **settings), CONFIG)
        return {
            (name, layer): config.rank_of(name, layer)
            for name in ("q_proj", "linear_1")
            for layer in range(1 if name in PROJECTOR else 2)
        }

    everywhere = {("q_proj", 0): 4, ("q_proj", 1): 4, ("linear_1", 0): 4}
    targets = ("q_proj", "linear_1")
    assert ranks(target_modules=targets) == everywhere
    # As in PEFT: the projector has no number.
    assert ranks(target_modules=targets, layers_to_transform=(1,)) == {
        ("q_proj", 0): 0,
        ("q_proj", 1): 4,
        ("linear_1", 0): 0,
    }
    pattern = {"language_model.layers.1.self_attn.q_proj": 2, "linear_1": 7}
    assert ranks(target_modules=targets, rank_pattern=pattern) == everywhere | {
        ("q_proj", 1): 2,
        ("linear_1", 0): 7,
    }
    assert ranks(
        target_modules=targets, exclude_modules=("layers.0.self_attn.q_proj", "linear_1")
    ) == everywhere | {
        ("q_proj", 0): 0,
        ("linear_1", 0): 0,
    }
    assert ranks(target_modules=targets, exclude_modules=r".*linear_1") == everywhere | {("linear_1", 0): 0}
    one = resolve_config(LoraConfig(target_modules=r".*language_model\.layers\.1\..*q_proj"), CONFIG)
    assert one.target_modules == ("model.language_model.layers.1.self_attn.q_proj",)
    assert [one.rank_of("q_proj", layer) for layer in (0, 1)] == [0, 8]


@pytest.mark.parametrize("targets", [["q_proj"], "all-linear", r".*\.q_proj"])
def test_an_adapter_that_peft_trained_in_the_tower_is_refused(targets):
    peft = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": targets}
    with pytest.raises(ValueError, match="vision tower is frozen; train with exclude_modules"):
        adapter_config_from_peft(peft, CONFIG)
    config = adapter_config_from_peft({**peft, "exclude_modules": ".*vision_tower.*"}, CONFIG)
    assert "q_proj" in adapted_modules(config, CONFIG)


def test_what_selects_modules_of_the_tower_alone_is_refused():
    with pytest.raises(ValueError, match="vision tower is frozen"):
        resolve_config(LoraConfig(target_modules=("q_proj", "fc1")), CONFIG)


def test_a_fresh_adapter_has_one_layer_for_the_projector():
    lora = init_lora(jax.random.key(0), LoraConfig(rank=3, target_modules="all-linear"), CONFIG)
    assert lora.params["projector"]["linear_1"]["a"].shape == (1, 3, 8)
    assert lora.params["projector"]["linear_1"]["b"].shape == (1, 16, 3)
    plain = init_lora(jax.random.key(0), LoraConfig(), CONFIG)
    assert set(plain.params) == {"layers"}
