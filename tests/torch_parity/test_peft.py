"""Adapters against PEFT: what it saves loads here, what we save loads there, with the same logits."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from llmeraser_jax.lora import load_adapter, merge_lora, save_adapter
from llmeraser_jax.models import load_model
from tests.golden.cases import CASES, case_tokens, largest_relative_difference
from tests.models.tiny import random_lora

pytestmark = pytest.mark.torch

SETTINGS = {
    "two modules": {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 4, "lora_alpha": 3, "target_modules": ["o_proj", "up_proj"], "use_rslora": True},
    "regex": {"r": 2, "lora_alpha": 8, "target_modules": r".*\.(k_proj|down_proj)"},
    "all linear": {"r": 5, "lora_alpha": 5, "target_modules": "all-linear", "lora_dropout": 0.1},
    "rank and alpha patterns": {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 5},
        "alpha_pattern": {r".*\.0\..*": 9, "down_proj": 1},
    },
    "patterns and rslora": {
        "r": 4,
        "lora_alpha": 3,
        "target_modules": ["q_proj", "o_proj"],
        "use_rslora": True,
        "rank_pattern": {r"0\.self_attn\.o_proj": 1},
    },
    "one layer": {"r": 3, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "one layer by number": {"r": 3, "target_modules": ["q_proj"], "layers_to_transform": 0},
    "excluded": {"r": 3, "target_modules": "all-linear", "exclude_modules": ["o_proj", "layers.0.mlp.up_proj"]},
    "excluded by an expression": {
        "r": 2,
        "target_modules": ["q_proj", "k_proj"],
        "exclude_modules": r".*\.0\..*k_proj",
    },
    "a layer by an expression": {"r": 2, "target_modules": r".*\.1\..*(k_proj|down_proj)"},
    "embedding, head and norms": {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": "all-linear",
        "modules_to_save": ["embed_tokens", "lm_head", "norm"],
    },
    "embedding": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "head": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "a linear layer": {"r": 2, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["v_proj", "model.norm"]},
    "a module that holds others": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
    "rank one, gaussian": {"r": 1, "target_modules": ["gate_proj"], "init_lora_weights": "gaussian"},
}


@pytest.fixture(scope="module", params=["llama_gqa_tied_llama3_rope", "qwen3_mha_attention_bias"])
def base(request, tmp_path_factory):
    """A checkpoint directory and the case it was made from."""
    from tests.torch_parity import reference

    directory = tmp_path_factory.mktemp("base")
    reference.build(CASES[request.param]).save_pretrained(directory)
    return directory, CASES[request.param]


def _theirs(directory):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_what_peft_saves_loads_here_with_the_same_logits(base, settings, tmp_path):
    import peft

    from tests.torch_parity import reference

    directory, _ = base
    plain = reference.logits(_theirs(directory))
    adapted = reference.adapt(_theirs(directory), settings)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = reference.logits(adapted)

    model = load_model(directory)
    lora = load_adapter(tmp_path / "adapter", model)
    tokens, mask = case_tokens()
    apply = jax.jit(model.apply)
    assert largest_relative_difference(apply(model.base, lora, tokens, mask), expected, mask) < 1e-5
    merged = apply(merge_lora(model.base, lora), None, tokens, mask)
    assert largest_relative_difference(merged, expected, mask) < 1e-5
    assert largest_relative_difference(plain, expected, mask) > 1e-2
    # What we save is what PEFT saved, bit for bit, and PEFT reads it as the same adapter.
    save_adapter(tmp_path / "copy", lora, model)
    copied, saved = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("copy", "adapter"))
    assert copied.keys() == saved.keys()
    for key, value in saved.items():
        np.testing.assert_array_equal(copied[key], value, err_msg=key)
    again = peft.PeftModel.from_pretrained(_theirs(directory), tmp_path / "copy").eval()
    np.testing.assert_array_equal(reference.logits(again), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ("q_proj", "v_proj")},
        {"target_modules": "all-linear", "use_rslora": True, "rank": 4, "alpha": 3.0},
        {"target_modules": r".*mlp\.\w+_proj", "alpha": 2.5},
    ],
)
def test_peft_loads_what_we_save_with_the_same_logits(base, changes, tmp_path):
    import peft

    from tests.torch_parity import reference

    directory, _ = base
    model = load_model(directory)
    lora = random_lora(model, **changes)
    save_adapter(tmp_path / "adapter", lora, model)
    adapted = peft.PeftModel.from_pretrained(_theirs(directory), tmp_path / "adapter").eval()
    tokens, mask = case_tokens()
    expected = reference.logits(adapted)
    assert largest_relative_difference(jax.jit(model.apply)(model.base, lora, tokens, mask), expected, mask) < 1e-5
    assert largest_relative_difference(reference.logits(_theirs(directory)), expected, mask) > 1e-2
    names = {name.split(".")[-2] for name, _ in adapted.named_modules() if name.endswith(".lora_A")}
    assert names == set(lora.config.target_modules)


def test_a_round_trip_through_peft_is_bit_exact(base, tmp_path):
    import peft

    directory, _ = base
    model = load_model(directory)
    lora = random_lora(model)
    save_adapter(tmp_path / "ours", lora, model)
    peft.PeftModel.from_pretrained(_theirs(directory), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = load_adapter(tmp_path / "theirs", model)
    assert again.config == lora.config
    jax.tree.map(np.testing.assert_array_equal, again, lora)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"bias": "lora_only"}, "bias"),
    ],
)
def test_what_peft_saves_with_an_option_that_is_not_honoured_is_refused(base, settings, name, tmp_path):
    from tests.torch_parity import reference

    directory, _ = base
    adapted = reference.adapt(_theirs(directory), {"r": 2, "target_modules": ["q_proj"], **settings})
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=name):
        load_adapter(tmp_path / "adapter", load_model(directory))


def test_tokens_that_training_added_are_those_of_a_base_that_peft_resized(base, tmp_path):
    import torch

    from tests.torch_parity import reference

    directory, _ = base
    resized = _theirs(directory)
    size = resized.config.vocab_size + 3
    resized.resize_token_embeddings(size)
    settings = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    adapted = reference.adapt(resized, settings)
    adapted.save_pretrained(tmp_path / "adapter")
    tokens, mask = case_tokens()
    tokens = np.array(tokens)
    tokens[0, -1] = size - 1
    with torch.no_grad():
        out = adapted(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(np.asarray(mask)))
    model = load_model(directory)
    lora = load_adapter(tmp_path / "adapter", model)
    ours = jax.jit(model.apply)(model.base, lora, tokens, mask)
    assert largest_relative_difference(ours, out.logits.numpy(), mask) < 1e-5


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_changed_its_base_is_taken_as_peft_converts_it(base, init, tmp_path):
    """PEFT's conversion makes it an adapter of the base as it was, of twice the rank."""
    import torch

    from tests.torch_parity import reference

    directory, _ = base
    import peft

    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=init
    )
    adapted = peft.get_peft_model(_theirs(directory), settings)
    settings.init_lora_weights = True
    adapted.save_pretrained(tmp_path / "initial")
    settings.init_lora_weights = init
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    expected = reference.logits(adapted.eval())
    adapted.save_pretrained(tmp_path / "as trained")
    model = load_model(directory)
    with pytest.raises(ValueError, match=r"init_lora_weights.*path_initial_model_for_weight_conversion"):
        load_adapter(tmp_path / "as trained", model)
    adapted.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    lora = load_adapter(tmp_path / "converted", model)
    assert lora.config.rank == 4
    tokens, mask = case_tokens()
    assert largest_relative_difference(jax.jit(model.apply)(model.base, lora, tokens, mask), expected, mask) < 1e-5


def _mask(shape):
    """A fixed mask by shape, as different between modules as their widths and positions are."""
    return (np.arange(np.prod(shape)) * 7 % 5 != 0).reshape(shape).astype(np.float32)


def test_dropout_acts_where_peft_has_it(base, tmp_path, monkeypatch):
    """With the same masks in both, training mode gives the same logits."""
    import torch

    from tests.torch_parity import reference

    directory, _ = base
    settings = {"r": 3, "lora_alpha": 7, "target_modules": "all-linear", "lora_dropout": 0.2}
    adapted = reference.adapt(_theirs(directory), settings)
    adapted.save_pretrained(tmp_path / "adapter")
    plain = reference.logits(adapted)
    drawn = [module for module in adapted.modules() if isinstance(module, torch.nn.Dropout)]
    assert len(drawn) == 7 * adapted.config.num_hidden_layers
    for module in drawn:
        monkeypatch.setattr(module, "forward", lambda x: x * torch.tensor(_mask(x.shape)) / 0.8)
    expected = reference.logits(adapted)
    monkeypatch.setattr(jax.random, "bernoulli", lambda key, keep, shape: _mask(shape) == 1)
    model = load_model(directory)
    lora = load_adapter(tmp_path / "adapter", model)
    tokens, mask = case_tokens()
    ours = jax.jit(lambda: model.apply(model.base, lora, tokens, mask, dropout_key=jax.random.key(0)))()
    assert largest_relative_difference(ours, expected, mask) < 1e-5
    assert largest_relative_difference(plain, expected, mask) > 1e-2
