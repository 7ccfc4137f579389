"""Random LLaVA models against transformers and PEFT, both directions."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from llmeraser_jax.lora import load_adapter, merge_lora, save_adapter
from llmeraser_jax.models import generate, image_features, load_model, save_model
from tests.golden.cases import largest_relative_difference
from tests.golden.llava_cases import (
    LLAVA_CASES,
    NUM_NEW_TOKENS,
    PICTURES,
    images_of,
    llava_case,
    padded,
    pixels,
    texts,
)
from tests.models.tiny import random_lora

pytestmark = pytest.mark.torch

LAYERS = {"-1": -1, "-2": -2, "1": 1, "list": [-2, 0, 3]}


def random_case(text, layers, select):
    """Arguments of `LlavaConfig`."""
    rng = np.random.default_rng([len(text), len(str(layers)), len(select)])

    def flag():
        return bool(rng.integers(2))

    family = {
        "llama": {"attention_bias": flag(), "mlp_bias": flag()},
        "mistral": {"sliding_window": 5, "head_dim": 6},
    }
    sizes = {"num_key_value_heads": [1, 2, 4][rng.integers(3)], "num_hidden_layers": [2, 3][rng.integers(2)]}
    vision = {"hidden_act": ["quick_gelu", "gelu"][rng.integers(2)], "num_attention_heads": [1, 4][rng.integers(2)]}
    vision |= {"patch_size": [2, 4][rng.integers(2)]}
    return llava_case(
        {"model_type": text, **family[text], **sizes},
        vision,
        vision_feature_layer=layers,
        vision_feature_select_strategy=select,
        multimodal_projector_bias=flag(),
        projector_hidden_act=["gelu", "quick_gelu"][rng.integers(2)],
        tie_word_embeddings=flag(),
    )


CASES = {
    f"{text}, layer {name}, {select}": random_case(text, layers, select)
    for text in ("llama", "mistral")
    for name, layers in LAYERS.items()
    for select in ("default", "full")
}


def _inputs(model):
    features = image_features(model, pixels())
    tokens, mask = padded(texts(model.config.vision.num_features))
    return features, (tokens, mask, None, images_of(features))


def _differ(left, right, inputs):
    return largest_relative_difference(left, right, inputs[1])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_features_logits_and_continuations_are_those_of_pytorch(case, tmp_path):
    from tests.torch_parity import llava_reference

    theirs = llava_reference.build(case, seed=3)
    theirs.save_pretrained(tmp_path / "hf")
    model = load_model(tmp_path / "hf")
    assert set(model.config.module_names) == {name for name, _ in theirs.named_modules()} - {""}
    features, inputs = _inputs(model)
    assert largest_relative_difference(features, llava_reference.features(theirs)) < 1e-5
    plain = llava_reference.logits(theirs)
    assert _differ(jax.jit(model.apply)(model.base, None, *inputs), plain, inputs) < 1e-5
    own = [features[list(numbers)] for numbers in PICTURES]
    assert model.config.vision is not None
    rows = texts(model.config.vision.num_features)
    new = generate(model, None, rows, NUM_NEW_TOKENS, stop_ids=(), images=own)
    np.testing.assert_array_equal(new, llava_reference.greedy(theirs))
    save_model(tmp_path / "ours", model)
    np.testing.assert_array_equal(llava_reference.logits(llava_reference.load(tmp_path / "ours")), plain)
    assert load_model(tmp_path / "ours").config == model.config


@pytest.fixture(scope="module", params=LLAVA_CASES)
def base(request, tmp_path_factory):
    """A checkpoint directory."""
    from tests.torch_parity import llava_reference

    directory = tmp_path_factory.mktemp("base")
    llava_reference.build(LLAVA_CASES[request.param]).save_pretrained(directory)
    return directory


_OUT = ".*vision_tower.*"
SETTINGS = {
    "text model by an expression": {
        "r": 3,
        "lora_alpha": 7,
        "target_modules": r".*language_model.*(q_proj|up_proj)",
    },
    "names, projector": {"r": 2, "target_modules": ["q_proj", "linear_1"], "exclude_modules": _OUT},
    "all linear": {"r": 2, "lora_alpha": 3, "target_modules": "all-linear", "exclude_modules": _OUT},
    "projector alone": {"r": 4, "target_modules": ["linear_1", "linear_2"], "use_rslora": True},
    "one layer": {
        "r": 3,
        "target_modules": ["k_proj", "linear_2"],
        "layers_to_transform": [1],
        "exclude_modules": _OUT,
    },
    "projector whole": {
        "r": 2,
        "target_modules": ["q_proj"],
        "exclude_modules": _OUT,
        "modules_to_save": ["multi_modal_projector"],
    },
    "patterns": {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": "all-linear",
        "exclude_modules": _OUT + r"|.*language_model\.layers\.0\.mlp\.up_proj",
        "rank_pattern": {"q_proj": 2, r"language_model\.layers\.1\.mlp\.up_proj": 5, "linear_2": 1},
        "alpha_pattern": {r".*\.0\..*": 9, "linear_1": 1},
    },
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_what_peft_saves_loads_here_with_the_same_logits(base, settings, tmp_path):
    import peft

    from tests.torch_parity import llava_reference, reference

    plain = llava_reference.logits(llava_reference.load(base))
    adapted = reference.adapt(llava_reference.load(base), settings)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = llava_reference.logits(adapted)
    model = load_model(base)
    lora = load_adapter(tmp_path / "adapter", model)
    _, inputs = _inputs(model)
    apply = jax.jit(model.apply)
    assert _differ(apply(model.base, lora, *inputs), expected, inputs) < 1e-5
    assert _differ(apply(merge_lora(model.base, lora), None, *inputs), expected, inputs) < 1e-5
    assert _differ(plain, expected, inputs) > 1e-2
    save_adapter(tmp_path / "copy", lora, model)
    copied, saved = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("copy", "adapter"))
    assert copied.keys() == saved.keys()
    for key, value in saved.items():
        np.testing.assert_array_equal(copied[key], value, err_msg=key)
    again = peft.PeftModel.from_pretrained(llava_reference.load(base), tmp_path / "copy").eval()
    assert _differ(llava_reference.logits(again), expected, inputs) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [{"target_modules": ("q_proj", "v_proj")}, {"target_modules": "all-linear", "use_rslora": True, "rank": 4}],
)
def test_peft_loads_what_we_save_with_the_same_logits(base, changes, tmp_path):
    import peft

    from tests.torch_parity import llava_reference

    model = load_model(base)
    lora = random_lora(model, **changes)
    save_adapter(tmp_path / "adapter", lora, model)
    adapted = peft.PeftModel.from_pretrained(llava_reference.load(base), tmp_path / "adapter").eval()
    names = {name.split(".")[-2] for name, _ in adapted.named_modules() if name.endswith(".lora_A")}
    assert names == set(lora.config.target_modules)
    assert not [name for name, _ in adapted.named_modules() if "vision_tower" in name and name.endswith("lora_A")]
    _, inputs = _inputs(model)
    ours, theirs = jax.jit(model.apply)(model.base, lora, *inputs), llava_reference.logits(adapted)
    assert _differ(ours, theirs, inputs) < 1e-5
    assert _differ(llava_reference.logits(llava_reference.load(base)), theirs, inputs) > 1e-2
    adapted.save_pretrained(tmp_path / "theirs")
    again = load_adapter(tmp_path / "theirs", model)
    assert again.config == lora.config
    jax.tree.map(np.testing.assert_array_equal, again, lora)


def test_a_merged_export_is_read_by_transformers(base, tmp_path):
    from llmeraser_jax.export import write_merged
    from tests.torch_parity import llava_reference

    model = load_model(base)
    lora = random_lora(model, alpha_pattern={"layers.0.*": 5.0, "linear_1": 3.0})
    (tmp_path / "merged").mkdir()
    write_merged(tmp_path / "merged", model, lora, dtype="float32")
    _, inputs = _inputs(model)
    ours = jax.jit(model.apply)(model.base, lora, *inputs)
    assert _differ(ours, llava_reference.logits(llava_reference.load(tmp_path / "merged")), inputs) < 1e-5
    with pytest.raises(ValueError, match="exported unquantised only"):
        write_merged(tmp_path / "merged", model, lora, dtype="float32", quantization="nf4")


def test_what_peft_trains_in_the_tower_is_refused(base, tmp_path):
    from tests.torch_parity import llava_reference, reference

    settings = {"r": 2, "target_modules": ["q_proj"]}
    reference.adapt(llava_reference.load(base), settings).save_pretrained(tmp_path / "tower")
    with pytest.raises(ValueError, match="vision tower is frozen"):
        load_adapter(tmp_path / "tower", load_model(base))
    # Names that the configuration hides, tensors do not.
    config = json.loads((tmp_path / "tower" / "adapter_config.json").read_text())
    config["exclude_modules"] = _OUT
    (tmp_path / "tower" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"unexpected .*vision_tower"):
        load_adapter(tmp_path / "tower", load_model(base))


def test_a_configuration_written_here_is_transformers_own(base, tmp_path):
    """What transformers reads from a configuration of ours describes vision as its own does."""
    from tests.torch_parity import llava_reference

    save_model(tmp_path / "ours", load_model(base))
    ours, theirs = (llava_reference.load(directory).config for directory in (tmp_path / "ours", base))
    for name in (
        "vision_feature_layer", "vision_feature_select_strategy", "image_token_index", "projector_hidden_act",
        "multimodal_projector_bias",
    ):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name)
    for part in ("vision_config", "text_config"):
        left, right = getattr(ours, part).to_dict(), getattr(theirs, part).to_dict()
        assert {key: left[key] for key in right if left[key] != right[key]} == {}
