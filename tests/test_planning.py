"""Sizes of what is stored are exact, and peaks are near those that the TPU compiler planned."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from typing import Any

import jax
import pytest

from llmeraser_jax import cli, planning
from llmeraser_jax.convert import quantize
from llmeraser_jax.environment import keep_compiled_programs
from llmeraser_jax.lora import LoraConfig
from llmeraser_jax.models import ModelConfig, init_base, llava_1_5_7b
from llmeraser_jax.models.vision import vision_shapes
from llmeraser_jax.parallel import mesh_sizes, parse_mesh, sharding_for
from llmeraser_jax.planning import GIB, Workload
from tests.small_lm import small_config

LORA = LoraConfig(rank=8, alpha=16.0, target_modules="all-linear")
LLAMA2_7B = ModelConfig(
    vocab_size=32000, width=4096, mlp_width=11008, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128
)


def work_of(mesh: str, config=LLAMA2_7B, **changes) -> Workload:
    sizes = {"time": 512, "response": 64, "dtype": "bfloat16"}
    return Workload(config=config, lora=LORA, mesh=mesh_sizes(mesh), **{**sizes, **changes})


@pytest.mark.parametrize("text", ["data=8", "data=2,fsdp=2,model=2", "fsdp=8"])
@pytest.mark.parametrize("quantization", [None, "int8", "nf4", "nf4-double"])
def test_the_base_takes_the_bytes_that_are_planned(text, quantization):
    config, mesh = small_config(hidden_size=512, intermediate_size=512), parse_mesh(text)
    assert mesh is not None

    def make():
        base = init_base(config, jax.random.key(0), "bfloat16")
        layers = base["layers"]
        if quantization is not None:
            kernels = {
                k: {"kernel": quantize(v["kernel"], quantization)} for k, v in layers.items() if "kernel" in v
            }
            layers = {**layers, **kernels}
        return {**base, "layers": layers}

    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(make))
    here = 0
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        here += math.prod(sharding_for(name, leaf.shape, mesh).shard_shape(leaf.shape)) * leaf.dtype.itemsize
    assert work_of(text, config, quantization=quantization).base_bytes == here


# GiB of each device as the TPU compiler planned them, by rows of a device in a micro-batch.
COMPILED = [
    ("gradient", "data=4,model=4", {1: 3.5, 8: 4.4, 64: 12.6, 80: 14.2}),
    ("product", "data=4,model=4", {1: 3.7, 16: 7.9, 32: 12.4, 42: 13.7}),
    ("gradient", "fsdp=16", {1: 1.756, 4: 3.42}),
    ("gradient", "", {4: 14.8}),
    ("product", "", {4: 16.8}),
]


@pytest.mark.parametrize(("program", "mesh", "compiled"), COMPILED)
def test_peaks_are_within_seven_percent_of_what_the_compiler_planned_at_7b(program, mesh, compiled):
    work = work_of(mesh or "data=1")
    planned = work.gradient_bytes if program == "gradient" else work.product_bytes
    for rows, expected in compiled.items():
        assert planned(rows) / GIB == pytest.approx(expected, rel=0.07)


def test_sketches_take_what_their_arrays_do():
    """Projections of 14 leaves of 32 layers; of each row 8 x 64 numbers for every leaf of a layer."""
    work = work_of("fsdp=16")
    longest = 4 * (4096 + 4096) + 2 * (4096 + 11008) + (11008 + 4096)  # inputs of A and outputs of B
    assert work.sketching_bytes(0) == 4 * 32 * 64 * longest
    row = 4 * 32 * 14 * 8 * 64
    assert work.sketching_bytes(1000) - work.sketching_bytes(0) == 2 * 1000 * row


def test_target_matching_of_1000_rows_is_planned_below_10_gib():
    """On 16 small chips, and on a GPU of 80 GB; rows are not stored on either."""
    for mesh, device, most in (
        ("fsdp=16", "v5e", 10.0),
        ("data=4,model=4", "v5e", 10.0),
        ("", "h100", 0.8 * 79.15),
    ):
        needs = planning.needs(work_of(mesh or "data=1"), planning.DEVICE_BYTES[device], 1000, 2**33)
        erase = next(need for need in needs if need.command == "erase")
        assert erase.rows >= 8
        assert erase.peak < most * GIB
        assert "rows computed when needed" in erase.note


def test_gathered_layers_are_planned_from_above():
    """Two layers of that width over fsdp=8, a row on each device: 0.689 GiB as compiled."""
    work = work_of("fsdp=8", dataclasses.replace(LLAMA2_7B, num_layers=2))
    planned = work.gradient_bytes(1) / GIB
    assert 0.689 <= planned <= 1.18 * 0.689


def test_fewer_rows_are_planned_where_less_is_free():
    plans = {
        device: planning.needs(work_of("fsdp=8"), planning.DEVICE_BYTES[device], 100, 2**33)
        for device in ("v5e", "h200")
    }
    for need in (*plans["v5e"], *plans["h200"]):
        assert need.rows >= 1
    for small, large in zip(plans["v5e"], plans["h200"], strict=True):
        assert small.rows <= large.rows
        assert small.peak <= 0.9 * planning.DEVICE_BYTES["v5e"]
    alone = {need.command: need.rows for need in planning.needs(work_of("data=1"), 8.0 * GIB, 100, 2**33)}
    assert set(alone.values()) == {0}


def test_a_mesh_that_does_not_divide_the_base_is_refused():
    with pytest.raises(ValueError, match="is not split 3 ways"):
        _ = work_of("model=3").base_bytes


@pytest.fixture
def model(tmp_path):
    """A directory with the configuration alone."""
    hf = small_config().to_hf()
    (tmp_path / "config.json").write_text(json.dumps(hf))
    return str(tmp_path)


def test_a_configuration_suffices(model, capsys):
    assert cli.main(["plan", "--model", model, "--time", "64", "--response", "8", "--device", "v5e"]) == 0
    said = capsys.readouterr().out
    assert "--mesh data=1: 1 devices of 15.75 GiB" in said
    assert [line.split()[0] for line in said.splitlines()[4:8]] == ["finetune", "erase", "retrain", "evaluate"]
    assert "--chunk-size 128" in said  # 8192 tokens


def test_what_is_not_known_is_asked_for(model, capsys):
    assert cli.main(["plan", "--model", model, "--device", "v5e"]) == 1
    assert "give --data, or --time and --response" in capsys.readouterr().err
    assert cli.main(["plan", "--model", model, "--time", "64", "--response", "8"]) == 1
    assert "one of v5e" in capsys.readouterr().err


def test_too_large_a_model_says_so(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA2_7B.to_hf()))
    shape = ["plan", "--model", str(tmp_path), "--time", "512", "--response", "64", "--device", "v5e"]
    assert cli.main([*shape, "--mesh", "data=8", "--dtype", "float32"]) == 3
    assert "DOES NOT FIT" in capsys.readouterr().out
    assert cli.main(shape) == 0
    assert "--mesh fsdp=" in capsys.readouterr().out


def test_nothing_is_planned_on_a_cpu():
    work = work_of("data=1")
    assert planning.auto_chunk_size(work, 2**33) == 16
    assert planning.auto_microbatch(work, 32) is None


def test_micro_batches_are_planned_on_accelerators(monkeypatch):
    monkeypatch.setattr(planning, "device_bytes", lambda: 15.75 * GIB)
    work = work_of("fsdp=8")
    assert planning.auto_chunk_size(work, 2.0**33) % 8 == 0
    assert planning.auto_microbatch(work, 1024) == 8 * 16
    assert planning.auto_microbatch(work, 64) is None


def test_an_adapter_takes_the_bytes_of_its_trained_copies():
    work = work_of("data=1")
    with_head = dataclasses.replace(work, lora=dataclasses.replace(LORA, modules_to_save=("lm_head",)))
    assert with_head.adapter_bytes - work.adapter_bytes == 4 * LLAMA2_7B.vocab_size * LLAMA2_7B.width


def test_an_out_of_memory_error_names_what_to_change(monkeypatch, capsys):
    def run(self):
        msg = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm."
        raise RuntimeError(msg)

    monkeypatch.setattr(cli.Erase, "run", run)
    assert cli.main(["erase", "--run", "r", "--requests", "q", "--workdir", "w"]) == 1
    said = capsys.readouterr().err
    assert "--chunk-size" in said and "--mesh fsdp=8" in said and "llmeraser plan" in said


def test_compiled_programs_are_kept_by_default(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings: Any = jax.config
    given, found = settings.jax_compilation_cache_dir, {}
    try:
        settings.update("jax_compilation_cache_dir", None)
        for on in (False, True):
            settings.update("jax_enable_compilation_cache", on)
            keep_compiled_programs()
            found[on] = settings.jax_compilation_cache_dir
    finally:
        settings.update("jax_enable_compilation_cache", True)
        settings.update("jax_compilation_cache_dir", given)
    assert found == {False: None, True: str(tmp_path / "llmeraser" / "xla")}


_COMPILING = """
import dataclasses, json, sys
from llmeraser_jax import cli, compiled

def told(work, needs, make=compiled.compiled_peaks):
    print(json.dumps({"base": work.base_bytes, "adapter": work.adapter_bytes, "rows": [n.rows for n in needs]}))
    for peak in make(work, needs):
        print(json.dumps(dataclasses.asdict(peak)))
        yield peak

compiled.compiled_peaks = told
words = ["plan", "--model", sys.argv[1], "--time", "16", "--response", "4", "--device", "v5e", "--compile"]
assert cli.main([*words, "--mesh", "data=16"]) == 1
assert cli.main([*words, "--mesh", "data=2,fsdp=2", "--base-quantization", "nf4"]) == 0
"""


def test_a_plan_is_compiled_where_it_is_asked_for(tmp_path):
    """In a process whose annotations are not checked: they say arrays, and here are shapes."""
    hf = small_config(hidden_size=256, intermediate_size=256).to_hf()
    (tmp_path / "config.json").write_text(json.dumps(hf))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    command = [sys.executable, "-c", _COMPILING, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "needs 16 devices" in done.stderr
    assert "by arithmetic that was checked against the TPU compiler" in done.stdout
    assert re.search(
        r"gradient of \d+ rows: \d+\.\d\d GiB as compiled for cpu, \d+\.\d\d by arithmetic", done.stdout
    )
    _, work, gradient, product = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert [gradient["program"], product["program"]] == ["gradient", "gauss-newton"]
    assert [gradient["rows"], product["rows"]] == work["rows"][:2]
    # Of a program's arguments the compiler knows the bytes.
    assert gradient["compiled"] > work["base"] + work["adapter"]
    assert product["compiled"] > work["base"] + 2 * work["adapter"]


def test_a_vision_tower_is_counted_once_on_every_device():
    config = llava_1_5_7b()
    assert config.vision is not None
    tower = 2 * sum(math.prod(shape) for shape in vision_shapes(config.vision).values())
    text = dataclasses.replace(config, vision=None)
    for mesh in ("data=1", "fsdp=8"):
        projector = work_of(mesh, config).base_bytes - tower - work_of(mesh, text).base_bytes
        assert projector == 2 * (1024 * 4096 + 4096 + 4096 * 4096 + 4096)
