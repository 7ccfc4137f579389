import pytest

from llmeraser_jax.lora import LoraConfig, resolve_target_modules
from llmeraser_jax.models import LINEAR_NAMES
from tests.models.tiny import tiny_config

CONFIG = tiny_config(num_layers=12)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("v_proj", "q_proj"), ("q_proj", "v_proj")),
        (("self_attn.o_proj", "mlp.up_proj"), ("o_proj", "up_proj")),
        ("all-linear", LINEAR_NAMES),
        (r".*\.(gate|down)_proj", ("gate_proj", "down_proj")),
        (r"model\.layers\.\d+\.self_attn\.[qk]_proj", ("q_proj", "k_proj")),
        (r".*\.(1|3)\..*q_proj", ("model.layers.1.self_attn.q_proj", "model.layers.3.self_attn.q_proj")),
        (("layers.0.self_attn.q_proj", "k_proj"), ("k_proj", "model.layers.0.self_attn.q_proj")),
    ],
)
def test_targets_are_selected_as_peft_selects_them(targets, expected):
    assert resolve_target_modules(targets, CONFIG) == expected


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_proj", "w_pack"), "'w_pack' selects no module"),
        (("proj",), "'proj' selects no module"),
        ("q_proj", "'q_proj' selects no module"),  # an expression has to match the whole name
        (("lm_head",), "'lm_head'"),
        (("q_proj", "embed_tokens"), "embed_tokens"),
        (r".*mlp", "mlp"),
        (r".*norm.*", "norm"),
    ],
)
def test_a_selection_that_cannot_be_honoured_is_named(targets, message):
    with pytest.raises(ValueError, match=message):
        resolve_target_modules(targets, CONFIG)


def test_a_name_that_selects_nothing_may_be_passed_over_beside_one_that_does():
    assert resolve_target_modules(("w_pack", "q_proj"), CONFIG, allow_unmatched=True) == ("q_proj",)
    with pytest.raises(ValueError, match="w_pack"):
        resolve_target_modules(("w_pack",), CONFIG, allow_unmatched=True)


def test_scaling_is_alpha_over_rank_or_over_its_root():
    assert LoraConfig(rank=16, alpha=8.0).scaling == 0.5
    assert LoraConfig(rank=16, alpha=8.0, use_rslora=True).scaling == 2.0


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"rank": 0}, "rank"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": float("inf")}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"target_modules": ()}, "target_modules"),
        ({"target_modules": "(q_proj"}, "target_modules"),
    ],
)
def test_a_bad_value_is_named(changes, name):
    with pytest.raises(ValueError, match=name):
        LoraConfig(**changes)
