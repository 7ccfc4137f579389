"""The merged model is base plus adapter, rounded once; what is reported of it is measured on what was written."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from llmeraser_jax import convert, export, losses
from llmeraser_jax.cli import main
from llmeraser_jax.convert import quantize
from llmeraser_jax.export import export_run
from llmeraser_jax.lora import load_adapter, merge_lora
from llmeraser_jax.models import load_model
from llmeraser_jax.runs import load_run, write_run
from llmeraser_jax.training.job import finetune_run
from tests.training import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(tiny.save_tiny_model(tmp_path_factory.mktemp("tiny") / "model"))


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    work = tmp_path_factory.mktemp("run")
    data_path = tiny.write_rows(work / "train.jsonl", tiny.rows())
    config = dataclasses.replace(tiny.CONFIG, epochs=4)
    return finetune_run(model, data_path, work / "run", recipe=tiny.RECIPE, lora=tiny.LORA, config=config)


@pytest.fixture(scope="module")
def erased(run, model, tmp_path_factory):
    """What `erase` leaves behind, with an adapter that is moved by hand."""
    path = tmp_path_factory.mktemp("erased") / "out"
    path.mkdir()
    (path / "requests.jsonl").write_text(
        '{"id": "r1", "action": "remove"}\n{"id": "r4", "action": "correct_response", "response": "grey"}\n'
    )
    examples = [e for e in run.load_examples() if e.id != "r1"]
    examples = [dataclasses.replace(e, response="grey") if e.id == "r4" else e for e in examples]
    return write_run(
        path,
        kind="erase",
        model=model,
        recipe=run.recipe,
        normalizer=run.normalizer,
        train_config=run.train_config,
        examples=examples,
        data_path=None,
        lora=jax.tree.map(lambda x: 0.7 * x, run.load_adapter(model)),
        initial_lora=None,
        result={},
        parent=run.reference(),
    )


def losses_by_hand(run, model, lora, examples):
    dataset = run.encode(examples, model.tokenizer)
    n = len(dataset)
    stack = dataset.stack_uniform(np.arange(n), np.full(n, 1 / n), chunk_size=n)
    return float(losses.loss_sum(losses.lm_objective(model.apply, model.base, l2=0.0), lora, stack))


def test_a_float32_export_has_the_logits_of_base_and_adapter_in_several_files(run, model, tmp_path):
    exported = export_run(run, tmp_path / "merged", dtype="float32", shard_bytes=4000)
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert exported.num_files == len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == exported.num_bytes
    again = load_model(tmp_path / "merged")
    tokens = jnp.arange(24).reshape(2, 12) % len(tiny.WORDS)
    mask = jnp.ones_like(tokens)
    apply = jax.jit(model.apply)
    expected = apply(model.base, run.load_adapter(model), tokens, mask)
    np.testing.assert_allclose(apply(again.base, None, tokens, mask), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(apply(model.base, None, tokens, mask) - expected).max() > 0.1
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (Path(model.path) / name).read_bytes()
    assert again.tokenizer("colour of s1")["input_ids"] == model.tokenizer("colour of s1")["input_ids"]


def test_weights_are_rounded_once_to_bfloat16(run, model, tmp_path):
    export_run(run, tmp_path / "merged")
    again = load_model(tmp_path / "merged", dtype="bfloat16")
    expected = jax.tree.map(lambda x: x.astype("bfloat16"), merge_lora(model.base, run.load_adapter(model)))
    found, wanted = (flatten_dict(base, sep="/") for base in (again.base, expected))
    for path, leaf in wanted.items():
        differing = np.mean(np.asarray(found[path]) != np.asarray(leaf))
        assert differing <= (0.01 if "kernel" in path else 0), path  # float32 sums of another order
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


@pytest.mark.parametrize("quantization", ["nf4", "nf4-double", "int8"])
def test_quantised_exports_read_back_as_the_quantised_merged_kernels(run, model, quantization, tmp_path):
    exported = export_run(run, tmp_path / "merged", dtype="float32", quantization=quantization)
    again = load_model(tmp_path / "merged")
    assert again.quantization == exported.quantization == quantization
    merged = merge_lora(model.base, run.load_adapter(model))["layers"]["q_proj"]["kernel"]
    expected = quantize(merged, quantization)
    found = again.base["layers"]["q_proj"]["kernel"]
    np.testing.assert_allclose(found.dequantized(), expected.dequantized(), atol=1e-6)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())["quantization_config"]
    convert.check_quantization_config(config)


def test_the_report_has_the_losses_of_the_rows_before_erased_and_as_read_back(run, erased, model, tmp_path):
    exported = export_run(erased, tmp_path / "merged", num_retained=5)
    again = load_model(tmp_path / "merged", dtype="bfloat16")
    named = [e for e in run.load_examples() if e.id in ("r1", "r4")]
    forget, wanted, retained = exported.forget, exported.replacements, exported.retained
    assert forget and wanted and forget.before is not None and exported.survival is not None
    assert (forget.num_examples, wanted.num_examples, retained.num_examples) == (2, 1, 5)
    for found, adapted, lora in (
        (forget.before, model, run.load_adapter(model)),
        (forget.adapter, model, erased.load_adapter(model)),
        (forget.exported, again, None),
    ):
        assert found == pytest.approx(losses_by_hand(run, adapted, lora, named), rel=1e-4)
    new = [e for e in erased.load_examples() if e.id == "r4"]
    assert wanted.exported == pytest.approx(losses_by_hand(run, again, None, new), rel=1e-4)
    assert exported.survival == pytest.approx(
        (forget.exported - forget.before) / (forget.adapter - forget.before), rel=1e-6
    )
    assert 0.5 < exported.survival < 1.5
    text = (tmp_path / "merged" / "llmeraser_export.json").read_text()
    assert json.loads(text)["forget"]["exported"] == forget.exported
    assert "r1" not in text and "colour" not in text


def test_the_console_prints_the_losses_as_read_back(erased, tmp_path, capsys):
    assert main(["export", str(erased.path), "--merged", str(tmp_path / "merged")]) == 0
    out = capsys.readouterr().out
    assert "forget (2 rows)" in out and "survives the rounding" in out
    assert (tmp_path / "merged" / "config.json").exists()
    assert main(["export", str(erased.path), "--merged", str(tmp_path / "merged")]) == 1


def test_without_the_run_that_was_erased_from_the_rest_is_exported_and_that_is_said(erased, tmp_path):
    gone = dataclasses.replace(erased, parent={"path": str(tmp_path / "gone"), "sha256": "0"})
    exported = export_run(gone, tmp_path / "merged")
    assert exported.forget is None and "gone" in exported.not_measured
    assert exported.retained.exported > 0


def test_an_export_that_cannot_be_read_back_leaves_nothing(run, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no")

    monkeypatch.setattr(export, "load_model", fail)
    with pytest.raises(OSError, match="no"):
        export_run(run, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_weights_that_float16_cannot_hold_are_named(run, model, tmp_path):
    lora = jax.tree.map(lambda x: 1e4 * x, run.load_adapter(model))
    with pytest.raises(ValueError, match=r"model\.layers\.0\..* float16 cannot hold"):
        export.write_merged(tmp_path, model, lora, dtype="float16")


def test_an_adapter_carries_the_tokenizer_that_stood_beside_it(run, model, tmp_path):
    own = tmp_path / "with tokenizer"
    model.tokenizer.save_pretrained(own)
    tokenizer = type(model.tokenizer).from_pretrained(own)
    carrying = write_run(
        tmp_path / "run",
        kind="adopt",
        model=dataclasses.replace(model, tokenizer=tokenizer),
        recipe=run.recipe,
        normalizer=run.normalizer,
        train_config=run.train_config,
        examples=run.load_examples(),
        data_path=None,
        lora=run.load_adapter(model),
        initial_lora=None,
        result={},
    )
    beside = {path.name: path.read_bytes() for path in own.iterdir()}
    assert beside
    for directory in (carrying.path / "adapter", carrying.path / "tokenizer"):
        assert {name: (directory / name).read_bytes() for name in beside} == beside
    assert load_adapter(carrying.path / "adapter", model).config == run.lora_config
    assert not (load_run(run.path).path / "adapter" / "tokenizer.json").exists()
