import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from llmeraser_jax.convert import BASE_TABLES, SafetensorsSource, write_safetensors
from llmeraser_jax.models import base_shapes, load_model, loading, save_model, streaming
from llmeraser_jax.parallel import make_mesh
from tests.golden import files
from tests.golden.cases import CASES, write_checkpoint
from tests.models.tiny import tiny_config, tiny_model


def _golden(name, directory):
    content = files.load(name)
    return files.checkpoint(content, directory), files.tensors(content), json.loads(str(content["config"]))


def _flat(base) -> dict[str, Any]:
    return flatten_dict(base, sep="/")


def _assert_same(left, right):
    left, right = _flat(left), _flat(right)
    assert left.keys() == right.keys()
    for path in left:
        assert left[path].dtype == right[path].dtype
        np.testing.assert_array_equal(np.asarray(left[path]), np.asarray(right[path]), err_msg=path)


def test_tensors_land_where_the_documentation_says(tmp_path):
    directory, tensors, _ = _golden("qwen3_mha_attention_bias", tmp_path / "m")
    base = load_model(directory).base
    layer = "model.layers.1.self_attn"
    np.testing.assert_array_equal(base["layers"]["k_proj"]["kernel"][1], tensors[f"{layer}.k_proj.weight"].T)
    np.testing.assert_array_equal(base["layers"]["o_proj"]["bias"][1], tensors[f"{layer}.o_proj.bias"])
    np.testing.assert_array_equal(base["layers"]["q_norm"]["scale"][1], tensors[f"{layer}.q_norm.weight"])
    np.testing.assert_array_equal(base["embed_tokens"]["embedding"], tensors["model.embed_tokens.weight"])
    assert "lm_head" not in base


@pytest.mark.parametrize("name", CASES)
def test_saving_is_the_exact_inverse_of_loading(name, tmp_path):
    directory, tensors, _ = _golden(name, tmp_path / "m")
    model = load_model(directory)
    save_model(tmp_path / "copy", model)
    again = load_model(tmp_path / "copy")
    assert again.config == model.config
    _assert_same(again.base, model.base)
    saved = load_file(tmp_path / "copy" / "model.safetensors")
    assert saved.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(saved[key], value, err_msg=key)


def test_a_sharded_checkpoint_loads_as_the_single_file_does(tmp_path):
    directory, tensors, config = _golden("llama_mha_untied", tmp_path / "one")
    shards = write_checkpoint(tmp_path / "many", config, {})
    (shards / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for index, part in enumerate((names[::3], names[1::3], names[2::3]), start=1):
        file = f"model-{index:05d}-of-00003.safetensors"
        write_safetensors(shards / file, {name: tensors[name] for name in part})
        weight_map.update(dict.fromkeys(part, file))
    (shards / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    _assert_same(load_model(shards).base, load_model(directory).base)

    wrong = next(file for file in weight_map.values() if file != weight_map["model.norm.weight"])
    misplaced = weight_map | {"model.norm.weight": wrong}
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": misplaced}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight in"):
        load_model(shards)
    (shards / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003"):
        load_model(shards)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("loaded", ["float32", "bfloat16", "float16"])
def test_every_stored_dtype_loads_as_every_other(stored, loaded, tmp_path):
    config = tiny_config()
    rng = np.random.default_rng(0)
    # Small multiples of 1/16 are exact in all three.
    values = {p: rng.integers(-8, 8, s).astype(np.float32) / 16 for p, s in base_shapes(config).items()}
    model = dataclasses.replace(
        tiny_model(), base=jax.tree.map(lambda x: jnp.asarray(x, stored), unflatten_dict(values, sep="/"))
    )
    save_model(tmp_path / "m", model)
    base = _flat(load_model(tmp_path / "m", dtype=loaded).base)
    for path, value in values.items():
        assert base[path].dtype == jnp.dtype(loaded)
        np.testing.assert_array_equal(np.asarray(base[path], np.float32), value)


def test_all_tensors_that_do_not_fit_are_listed_in_one_error(tmp_path):
    _, tensors, config = _golden("llama_mha_untied", tmp_path / "good")
    broken = dict(tensors)
    del broken["model.layers.1.mlp.up_proj.weight"], broken["model.norm.weight"]
    broken["model.layers.0.self_attn.q_proj.weight"] = np.zeros((16, 15), np.float32)
    broken["model.layers.2.input_layernorm.weight"] = np.zeros(16, np.float32)
    broken["model.extra"] = np.zeros(3, np.float32)
    broken["lm_head.weight"] = np.zeros((40, 16), np.int8)
    with pytest.raises(ValueError) as error:
        load_model(write_checkpoint(tmp_path / "bad", config, broken))
    for part in (
        "missing model.layers.1.mlp.up_proj.weight [20, 16]",
        "missing model.norm.weight [16]",
        "misshapen model.layers.0.self_attn.q_proj.weight: got [16, 15], expected [16, 16]",
        "unexpected model.layers.2.input_layernorm.weight [16]",
        "unexpected model.extra [3]",
        "lm_head.weight is stored as I8",
        "(6)",
    ):
        assert part in str(error.value)


def test_stored_rotary_frequencies_are_passed_over(tmp_path):
    directory, tensors, config = _golden("llama_mha_untied", tmp_path / "m")
    extra = {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32)}
    _assert_same(load_model(write_checkpoint(tmp_path / "x", config, extra)).base, load_model(directory).base)


def test_a_tied_checkpoint_may_hold_its_embedding_as_head_but_not_contradict_it(tmp_path):
    directory, tensors, config = _golden("qwen2_gqa_tied", tmp_path / "m")
    embedding = tensors["model.embed_tokens.weight"]
    repeated = write_checkpoint(tmp_path / "same", config, {**tensors, "lm_head.weight": embedding})
    _assert_same(load_model(repeated).base, load_model(directory).base)
    rest = {name: tensor for name, tensor in tensors.items() if name != "model.embed_tokens.weight"}
    renamed = write_checkpoint(tmp_path / "renamed", config, {**rest, "lm_head.weight": embedding})
    _assert_same(load_model(renamed).base, load_model(directory).base)
    other = write_checkpoint(tmp_path / "other", config, {**tensors, "lm_head.weight": embedding + 1})
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        load_model(other)


def test_what_is_not_a_checkpoint_is_refused_in_words(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a directory"):
        load_model(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_model(tmp_path / "empty")
    _, _, config = _golden("llama_mha_untied", tmp_path / "m")
    bare = write_checkpoint(tmp_path / "bare", config, {})
    (bare / "model.safetensors").unlink()
    (bare / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin; convert"):
        load_model(bare)
    (bare / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_model(bare)
    with pytest.raises(ValueError, match="int4"):
        load_model(bare, dtype="int4")
    with pytest.raises(ValueError, match="x64"):
        load_model(bare, dtype="float64")


def test_a_hub_id_is_fetched_without_pytorch_weights(tmp_path, monkeypatch):
    directory, _, _ = _golden("llama_mha_untied", tmp_path / "m")
    asked = {}

    def snapshot_download(name, allow_patterns):
        asked.update(name=name, allow_patterns=allow_patterns)
        return str(directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model = load_model("someone/some-model")
    assert model.path == "someone/some-model"
    assert asked["name"] == "someone/some-model"
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])
    assert load_model(directory).path == str(directory)


def test_end_of_sequence_tokens_of_generation_config_are_read_and_written(tmp_path):
    _, tensors, config = _golden("llama_mha_untied", tmp_path / "m")
    directory = write_checkpoint(tmp_path / "g", config, tensors, generation={"eos_token_id": [7, 2]})
    model = load_model(directory)
    assert model.config.eos_token_ids == (2, 7)
    save_model(tmp_path / "copy", model)
    assert load_model(tmp_path / "copy").config.eos_token_ids == (2, 7)


def test_the_tokenizer_goes_along(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    save_model(tmp_path / "m", dataclasses.replace(tiny_model(), tokenizer=fast))
    loaded = load_model(tmp_path / "m").tokenizer
    assert loaded("a b c")["input_ids"] == [3, 4, 0]
    assert loaded.eos_token_id == 2


def test_a_base_that_is_not_its_configuration_is_not_saved(tmp_path):
    model = tiny_model()
    other = dataclasses.replace(model, config=tiny_config(mlp_width=20))
    with pytest.raises(ValueError, match="layers/up_proj/kernel"):
        save_model(tmp_path / "m", other)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_save_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        msg = "disk full"
        raise OSError(msg)

    monkeypatch.setattr(loading.convert, "write_safetensors", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(tmp_path / "m", tiny_model())
    assert list(tmp_path.iterdir()) == []


def test_a_mesh_shares_the_base_out_and_keeps_its_logits(tmp_path):
    save_model(tmp_path / "m", tiny_model(vocab_size=32))
    whole = load_model(tmp_path / "m")
    shared = load_model(tmp_path / "m", mesh=make_mesh(data=2, model=2))
    kernel = shared.base["layers"]["gate_proj"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 16, 12)}
    tokens = np.arange(12).reshape(2, 6)
    mask = np.ones_like(tokens)
    np.testing.assert_allclose(
        jax.jit(shared.apply)(shared.base, None, tokens, mask),
        jax.jit(whole.apply)(whole.base, None, tokens, mask),
        rtol=1e-5,
        atol=1e-5,
    )


def test_bfloat16_on_disk_is_bit_exact(tmp_path):
    model = tiny_model(dtype="bfloat16")
    save_model(tmp_path / "m", model)
    again = load_model(tmp_path / "m", dtype="bfloat16")
    kernel = np.asarray(again.base["layers"]["q_proj"]["kernel"])
    assert kernel.dtype == ml_dtypes.bfloat16
    _assert_same(again.base, model.base)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"


def _values(dtype="float32"):
    """A checkpoint's worth of a model with sizes that devices divide."""
    return tiny_model(dtype=dtype, vocab_size=32, width=32, mlp_width=64, head_dim=8)


def test_a_number_that_is_not_finite_is_found_on_reading_and_its_tensor_named(tmp_path):
    _, tensors, config = _golden("llama_mha_untied", tmp_path / "m")
    name = "model.layers.1.mlp.down_proj.weight"
    for value in (np.nan, np.inf, 1e6):
        weight = tensors[name].copy()
        weight[7, 3] = value
        directory = write_checkpoint(tmp_path / f"with {value}", config, {**tensors, name: weight})
        for dtype in ("float16", "float32", "bfloat16") if value != 1e6 else ("float16",):
            with pytest.raises(ValueError, match=f"{name} holds NaN, Inf or a number beyond {dtype}"):
                load_model(directory, dtype=dtype)
    load_model(directory)


def test_weights_outside_of_the_directory_are_refused(tmp_path):
    directory, tensors, config = _golden("llama_mha_untied", tmp_path / "m")
    other = write_checkpoint(tmp_path / "other", config, {})
    (other / "model.safetensors").unlink()
    for outside in ("../m/model.safetensors", str(directory / "model.safetensors"), "a/../../m/model.safetensors"):
        index = {"weight_map": dict.fromkeys(tensors, outside)}
        (other / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="outside of its directory"):
            load_model(other)


def test_a_weights_file_that_is_something_else_is_named_in_one_line(tmp_path):
    _, _, config = _golden("llama_mha_untied", tmp_path / "m")
    other = write_checkpoint(tmp_path / "other", config, {})
    file = other / "model.safetensors"
    for content, match in [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "Git LFS pointer.*git lfs pull"),
        (b"", "not a safetensors file"),
        (None, "is a directory"),
    ]:
        file.unlink()
        file.mkdir() if content is None else file.write_bytes(content)
        with pytest.raises(ValueError, match=match) as error:
            load_model(other)
        assert "\n" not in str(error.value)


def test_a_tied_checkpoint_may_hold_its_head_alone(tmp_path):
    directory, tensors, config = _golden("qwen2_gqa_tied", tmp_path / "m")
    renamed = {("lm_head.weight" if "embed_tokens" in name else name): value for name, value in tensors.items()}
    _assert_same(load_model(write_checkpoint(tmp_path / "h", config, renamed)).base, load_model(directory).base)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_part_of_a_leaf_is_read_for_the_devices_that_hold_it(dtype, tmp_path, monkeypatch):
    save_model(tmp_path / "m", _values())
    read = {}
    copy = streaming.copy_finite

    def spy(tensor, out, name):
        read[name] = read.get(name, 0) + tensor.size
        copy(tensor, out, name)

    monkeypatch.setattr(streaming, "copy_finite", spy)
    mesh = make_mesh(data=2, model=4)
    base = load_model(tmp_path / "m", dtype=dtype, mesh=mesh).base
    whole = load_file(tmp_path / "m" / "model.safetensors")
    # Once each, though two devices hold every part.
    assert read == {name: tensor.size for name, tensor in whole.items()}
    _assert_same(base, load_model(tmp_path / "m", dtype=dtype).base)
    assert base["layers"]["down_proj"]["kernel"].addressable_shards[0].data.shape == (2, 16, 32)

    read.clear()
    mine = make_mesh(model=4).devices.flat[0]
    part = NamedSharding(make_mesh(model=4), PartitionSpec(None, "model"))
    monkeypatch.setattr(
        NamedSharding,
        "addressable_devices_indices_map",
        lambda self, shape: {mine: (slice(None), slice(16, 32), slice(None))},
    )
    monkeypatch.setattr(jax, "make_array_from_single_device_arrays", lambda shape, sharding, parts: parts[0])
    source = SafetensorsSource.from_checkpoint(tmp_path / "m")
    table = BASE_TABLES["llama"]
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)]
    tensors = [(name, target) for name in names if (target := table.match(name)) is not None]
    got = streaming.read_leaf(source, tensors, (2, 64, 32), np.dtype(np.float32), part)
    assert read == dict.fromkeys(names, 16 * 32)
    np.testing.assert_array_equal(got, np.stack([whole[name].T[16:32] for name in names]))
