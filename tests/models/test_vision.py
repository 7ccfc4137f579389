"""Models that see pictures: logits against files of transformers' LLaVA, checkpoints, features kept in files."""

import dataclasses
import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file

from llmeraser_jax.convert import base_table, dequantize_base, write_safetensors
from llmeraser_jax.lora import LoraConfig, init_lora, load_adapter, merge_lora, save_adapter
from llmeraser_jax.models import (
    ApplyDecoder,
    ModelConfig,
    generate,
    image_features,
    llava_1_5_7b,
    load_model,
    load_or_compute_features,
    save_model,
)
from llmeraser_jax.models.loading import checkpoint_shapes
from llmeraser_jax.models.vision import vision_features
from llmeraser_jax.parallel import make_mesh, shard_base
from tests.golden import files
from tests.golden.cases import largest_relative_difference
from tests.golden.llava_cases import (
    LLAVA_ADAPTERS,
    LLAVA_CASES,
    NUM_NEW_TOKENS,
    PICTURES,
    images_of,
    llava_case,
    padded,
    pixels,
    texts,
)


@pytest.fixture(scope="module", params=LLAVA_CASES)
def golden(request, tmp_path_factory):
    """The content of a golden file, its checkpoint, and the model read from that."""
    content = files.load(request.param)
    directory = files.checkpoint(content, tmp_path_factory.mktemp(request.param) / "model")
    return content, directory, load_model(directory)


def _inputs(model, features):
    tokens, mask = padded(texts(model.config.vision.num_features))
    return tokens, mask, None, images_of(features)


def test_features_logits_and_continuations_match_the_golden_file(golden):
    content, _, model = golden
    features = image_features(model, pixels(), batch_size=3)
    assert features.dtype == np.float32
    assert largest_relative_difference(features, content["features"]) < 1e-5
    inputs = _inputs(model, features)
    logits = jax.jit(model.apply)(model.base, None, *inputs)
    assert largest_relative_difference(logits, content["logits"], inputs[1]) < 1e-5
    # One array with an entry for every place, or each prompt's own pictures.
    rows, own = texts(model.config.vision.num_features), [features[list(numbers)] for numbers in PICTURES]
    for images in (inputs[3], own):
        new = generate(model, None, rows, NUM_NEW_TOKENS, stop_ids=(), images=images, batch_size=3)
        np.testing.assert_array_equal(new, content["greedy"])


def test_a_picture_changes_the_logits_after_it_alone(golden):
    content, _, model = golden
    tokens, mask, _, images = _inputs(model, content["features"])
    apply = jax.jit(model.apply)
    plain = np.asarray(apply(model.base, None, tokens, mask, None, images.copy()))  # before `images` changes
    images[0, 0] += 1
    images[0, 1] += 1  # a place that row 0 does not use
    images[2] += 1  # of a row without pictures
    moved = np.abs(np.asarray(apply(model.base, None, tokens, mask, None, images) - plain)).max(-1)
    start = int(np.argmax(tokens[0] == model.config.vision.image_token))
    assert (
        np.all(moved[1:] == 0)
        and np.all(moved[0, :start] == 0)
        and np.all(moved[0, start:][mask[0, start:] == 1] > 0)
    )


def test_saving_is_the_exact_inverse_of_loading_in_every_layout(golden, tmp_path):
    content, directory, model = golden
    saved_names = set()
    layouts = {
        "as published": {},
        "inside one model": {
            "language_model.model.": "model.language_model.",
            "language_model.lm_head.": "lm_head.",
            "vision_tower.": "model.vision_tower.",
            "multi_modal_projector.": "model.multi_modal_projector.",
        },
        "a tower in its own model": {"vision_tower.": "vision_tower.vision_model."},
    }
    for number, changes in enumerate(layouts.values()):
        tensors = {}
        for name, value in files.tensors(content).items():
            old = next((prefix for prefix in changes if name.startswith(prefix)), "")
            tensors[changes.get(old, "") + name.removeprefix(old)] = value
        tensors["vision_tower.embeddings.position_ids"] = np.zeros((1, 5), np.float32)  # of older versions
        copy = tmp_path / f"layout-{number}"
        copy.mkdir()
        (copy / "config.json").write_text((directory / "config.json").read_text())
        write_safetensors(copy / "model.safetensors", tensors)
        again = load_model(copy)
        assert again.config == model.config
        jax.tree.map(np.testing.assert_array_equal, (again.base, again.vision), (model.base, model.vision))
        save_model(tmp_path / f"saved-{number}", again)
        saved_names.add(frozenset(load_file(tmp_path / f"saved-{number}" / "model.safetensors")))
    assert len(saved_names) == 1
    again = load_model(tmp_path / "saved-0")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, (again.base, again.vision), (model.base, model.vision))
    table = base_table(model.config)
    for name, target, _ in table.entries(checkpoint_shapes(model.config)):
        assert table.match(name) == target


def test_an_adapter_of_peft_is_read_merged_and_written_back(tmp_path):
    content = files.load("llava_llama")
    model = load_model(files.checkpoint(content, tmp_path / "model"))
    lora = load_adapter(files.adapter(content, tmp_path / "adapter"), model)
    assert set(lora.params) == {"layers", "projector"}
    inputs, apply = _inputs(model, content["features"]), jax.jit(model.apply)
    logits = apply(model.base, lora, *inputs)
    assert largest_relative_difference(logits, content["adapter_logits"], inputs[1]) < 1e-5
    assert largest_relative_difference(content["logits"], content["adapter_logits"], inputs[1]) > 1e-2
    merged = apply(merge_lora(model.base, lora), None, *inputs)
    assert largest_relative_difference(merged, content["adapter_logits"], inputs[1]) < 1e-5
    save_adapter(tmp_path / "copy", lora, model)
    copied, saved = load_file(tmp_path / "copy" / "adapter_model.safetensors"), files.adapter_tensors(content)
    assert copied.keys() == saved.keys()
    for name, value in saved.items():
        np.testing.assert_array_equal(copied[name], value, err_msg=name)
    assert load_adapter(tmp_path / "copy", model).config == lora.config
    config = json.loads((tmp_path / "copy" / "adapter_config.json").read_text())
    assert config["exclude_modules"] == LLAVA_ADAPTERS["llava_llama"]["exclude_modules"]
    # Before transformers named the parts anew.
    old = {
        name.replace("model.model.language_model.", "model.language_model.model."): v for name, v in saved.items()
    }
    old = {name.replace("model.model.multi", "model.multi"): value for name, value in old.items()}
    write_safetensors(tmp_path / "adapter" / "adapter_model.safetensors", old)
    jax.tree.map(np.testing.assert_array_equal, load_adapter(tmp_path / "adapter", model), lora)


def test_the_text_part_can_be_quantised_and_tower_and_projector_are_not(golden):
    content, directory, model = golden
    quantized = load_model(directory, quantization="nf4")
    assert quantized.quantization == "nf4"
    for part in ("vision", "projector"):
        left, right = ({"vision": m.vision, **m.base}[part] for m in (quantized, model))
        jax.tree.map(np.testing.assert_array_equal, left, right)
    inputs = _inputs(model, content["features"])
    apply = jax.jit(model.apply)
    logits = apply(quantized.base, None, *inputs)
    expected = apply(dequantize_base(quantized.base), None, *inputs)
    assert largest_relative_difference(logits, expected, inputs[1]) < 1e-5
    assert largest_relative_difference(logits, content["logits"], inputs[1]) > 1e-2


def test_a_base_shared_out_over_devices_gives_the_same_logits(golden):
    content, directory, model = golden
    mesh = make_mesh(model=2)
    placed = load_model(directory, mesh=mesh)
    assert jax.tree.map(lambda x: x.sharding, placed.base) == jax.tree.map(
        lambda x: x.sharding, shard_base(model.base, mesh)
    )
    inputs = _inputs(model, content["features"])
    logits = jax.jit(model.apply)(placed.base, None, *inputs)
    assert largest_relative_difference(logits, content["logits"], inputs[1]) < 1e-5
    assert largest_relative_difference(image_features(placed, pixels()), content["features"]) < 1e-5


# --- features in files -------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    """A model of the first golden file."""
    return load_model(files.checkpoint(files.load("llava_llama"), tmp_path / "model"))


def test_features_are_computed_once_and_only_those_that_are_missing(model, tmp_path, monkeypatch):
    asked = []

    def load_pixels(key):
        asked.append(key)
        if key == "broken":
            raise OSError(key)
        return pixels()[int(key)]

    monkeypatch.setattr("llmeraser_jax.models.features._BATCHES_PER_FILE", 1)
    store = tmp_path / "features"
    with pytest.raises(OSError, match="broken"):
        load_or_compute_features(model, ["2", "0", "2", "broken"], load_pixels, store, batch_size=2)
    assert asked == ["2", "0", "broken"]
    (store / ".000007.safetensors.17").write_bytes(b"of a process that was killed")
    found = load_or_compute_features(model, ["3", "0", "2", "1"], load_pixels, store, batch_size=2)
    assert asked == ["2", "0", "broken", "3", "1"]
    assert sorted(path.name for path in store.iterdir()) == [
        "000000.safetensors",
        "000001.safetensors",
        "tower.json",
    ]
    again = load_or_compute_features(model, ["0", "1", "2", "3"], load_pixels, store)
    assert len(asked) == 5
    expected = image_features(model, pixels())
    for key in "0123":
        assert isinstance(found[key], np.memmap)
        np.testing.assert_array_equal(found[key], again[key])
        np.testing.assert_allclose(found[key], expected[int(key)], rtol=1e-5, atol=1e-6)


def test_features_of_another_tower_are_refused(model, tmp_path):
    load_or_compute_features(model, ["0"], lambda _: pixels()[0], tmp_path / "f")
    other = jax.tree.map(lambda x: x, model.vision)
    other["layers"]["fc1"]["bias"] = other["layers"]["fc1"]["bias"].at[0, 0].add(1e-3)
    shown = dataclasses.replace(model.config.vision, feature_layers=(-1,))
    for changed in (
        dataclasses.replace(model, vision=other),
        dataclasses.replace(model, config=dataclasses.replace(model.config, vision=shown)),
    ):
        with pytest.raises(ValueError, match="another vision tower"):
            load_or_compute_features(changed, ["0"], lambda _: pixels()[0], tmp_path / "f")
    projector = dataclasses.replace(model.config.vision, projector_activation="quick_gelu")
    same = dataclasses.replace(model, config=dataclasses.replace(model.config, vision=projector))
    assert list(load_or_compute_features(same, ["0"], lambda _: pixels()[0], tmp_path / "f")) == ["0"]


def test_features_of_a_narrow_tower_are_rounded_once(model, tmp_path):
    narrow = load_model(tmp_path / "model", dtype="bfloat16")  # whose weights are exact in bfloat16
    features = image_features(narrow, pixels())
    assert features.dtype == jnp.bfloat16
    np.testing.assert_array_equal(features, image_features(model, pixels()).astype(jnp.bfloat16))
    found = load_or_compute_features(narrow, ["1"], lambda key: pixels()[int(key)], tmp_path / "f")
    np.testing.assert_array_equal(found["1"], features[1])


def test_pictures_that_do_not_fit_are_refused(model):
    with pytest.raises(ValueError, match=r"\[3, 8, 9\]; this model's vision tower reads \[3, 8, 8\]"):
        image_features(model, np.zeros((1, 3, 8, 9), np.float32))
    broken = pixels()
    broken[2, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="Picture 2 of 4"):
        image_features(model, broken)
    with pytest.raises(ValueError, match="no vision tower"):
        image_features(dataclasses.replace(model, vision=None), pixels())
    rows, features = texts(4), image_features(model, pixels())
    good = [features[list(numbers)] for numbers in PICTURES]
    with pytest.raises(ValueError, match="Prompt 1 has 8 image tokens and pictures of shape"):
        generate(model, None, rows, 2, images=[good[0], good[0], good[2], good[3]])
    with pytest.raises(ValueError, match="Prompt 0 has 4 image tokens"):
        generate(model, None, rows, 2)
    with pytest.raises(ValueError, match="Prompt 0 has 3 image tokens"):
        generate(model, None, [rows[0][:6]], 2, images=good[:1])
    text = dataclasses.replace(model, config=dataclasses.replace(model.config, vision=None))
    with pytest.raises(ValueError, match="text model"):
        generate(text, None, rows, 2, images=good)
    inputs = _inputs(model, features)
    base = {name: leaves for name, leaves in model.base.items() if name != "projector"}
    with pytest.raises(ValueError, match="sees no pictures"):
        text.apply(base, None, *inputs)


# --- configuration -----------------------------------------------------------------------------------------------


def test_the_configuration_of_a_published_checkpoint_is_read_as_transformers_completes_it():
    """llava-1.5-7b-hf states only what differs from the defaults of its parts."""
    config = ModelConfig.from_hf(
        {
            "architectures": ["LlavaForConditionalGeneration"],
            "ignore_index": -100,
            "image_token_index": 32000,
            "model_type": "llava",
            "pad_token_id": 32001,
            "projector_hidden_act": "gelu",
            "text_config": {
                "_name_or_path": "lmsys/vicuna-7b-v1.5",
                "architectures": ["LlamaForCausalLM"],
                "max_position_embeddings": 4096,
                "model_type": "llama",
                "rms_norm_eps": 1e-05,
                "torch_dtype": "float16",
                "vocab_size": 32064,
            },
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "transformers_version": "4.36.0.dev0",
            "vision_config": {
                "hidden_size": 1024,
                "image_size": 336,
                "intermediate_size": 4096,
                "model_type": "clip_vision_model",
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "patch_size": 14,
                "projection_dim": 768,
                "vocab_size": 32000,
            },
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "vocab_size": 32064,
        }
    )
    assert (config.width, config.mlp_width, config.num_layers, config.num_kv_heads) == (4096, 11008, 32, 32)
    assert (config.pad_token_id, config.eos_token_ids, config.norm_eps) == (32001, (2,), 1e-5)
    assert config.vision is not None
    assert (config.vision.num_features, config.vision.feature_width) == (576, 1024)
    assert ModelConfig.from_hf(config.to_hf()) == config == llava_1_5_7b()
    sizes = {path: int(np.prod(shape)) for path, shape in checkpoint_shapes(config).items()}
    assert sum(sizes.values()) == 7_063_427_072  # as transformers counts llava-1.5-7b-hf
    assert sum(size for path, size in sizes.items() if path.startswith("vision/")) == 303_507_456


def test_shapes_of_the_full_size_model():
    config = llava_1_5_7b()
    assert config.vision is not None

    def struct(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    leaves = {path: struct(*shape) for path, shape in checkpoint_shapes(config).items()}
    base: Any = unflatten_dict(leaves, sep="/")
    vision = base.pop("vision")
    lora = jax.eval_shape(lambda: init_lora(jax.random.key(0), LoraConfig(target_modules="all-linear"), config))
    tokens = struct(2, 640, dtype=jnp.int32)
    features = jax.eval_shape(partial(vision_features, config.vision), vision, struct(2, 3, 336, 336))
    assert (features.shape, features.dtype) == ((2, 576, 1024), jnp.bfloat16)
    batch = (tokens, tokens, struct(2, 8, dtype=jnp.int32), struct(2, 1, *features.shape[1:]))

    def loss(lora, base):
        return jnp.sum(ApplyDecoder(config)(base, lora, *batch_of(batch)))

    def batch_of(structs):
        return [jnp.zeros(x.shape, x.dtype) for x in structs]

    gradient = jax.eval_shape(jax.grad(loss), lora, base)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), gradient) == jax.tree.map(lambda x: (x.shape, x.dtype), lora)
    assert gradient.params["projector"]["linear_1"]["a"].shape == (1, 8, 1024)


@pytest.mark.parametrize("case", LLAVA_CASES.values(), ids=LLAVA_CASES)
def test_a_configuration_survives_writing_and_reading(case):
    config = ModelConfig.from_hf(case)
    assert ModelConfig.from_hf(config.to_hf()) == config
    renamed = {**case, "image_token_id": case["image_token_index"]}
    del renamed["image_token_index"]
    assert ModelConfig.from_hf(renamed) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_layer": -5}, "feature_layers is"),
        ({"vision_feature_layer": []}, "vision_feature_layer"),
        ({"vision_feature_select_strategy": "cls"}, "'default' or 'full'"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act"),
        ({"image_token_index": 40}, "outside the vocabulary"),
        ({"image_newline": 3}, "image_newline = 3 is unknown"),
        ({"architectures": ["LlavaNextForConditionalGeneration"]}, "LlavaNextFor"),
        ({"vision_config": None}, "vision_config = None"),
        ({"text_config": {"model_type": "gemma2"}}, "text_config.model_type = 'gemma2'"),
    ],
)
def test_a_field_that_is_not_honoured_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf({**LLAVA_CASES["llava_llama"], **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "siglip_vision_model"}, "siglip"),
        ({"hidden_act": "relu"}, "vision_config.hidden_act"),
        ({"patch_size": 3}, "patch_size 3 has to divide"),
        ({"attention_dropout": 0.1}, "vision_config.attention_dropout"),
        ({"window_size": 4}, "vision_config.window_size = 4 is unknown"),
        ({"image_size": [8, 9]}, "vision_config.image_size"),
    ],
)
def test_a_field_of_the_tower_that_is_not_honoured_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(llava_case({"model_type": "llama"}, changes))


def test_a_tower_is_a_part_of_what_is_saved(model, tmp_path):
    with pytest.raises(ValueError, match="vision/class_embedding: got None"):
        save_model(tmp_path / "copy", dataclasses.replace(model, vision=None))
    assert "projector/linear_1/kernel" in flatten_dict(model.base, sep="/")
    assert "vision" not in model.base
