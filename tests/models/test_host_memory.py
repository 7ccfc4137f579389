"""The memory that loading takes on a host: its devices' share of the base, and one tensor."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from llmeraser_jax.convert import SafetensorsSource, base_table, write_safetensors
from llmeraser_jax.models import ModelConfig, base_shapes, load_model
from llmeraser_jax.parallel import make_mesh, start_processes

MIB = 2**20
SMALL = {"width": 512, "mlp_width": 1536, "num_layers": 16, "vocab_size": 16384}  # 132 MiB as bfloat16
LARGE = {"width": 2048, "mlp_width": 5632, "num_layers": 20, "vocab_size": 32000}  # 2.2 GiB
HEADS = {"num_heads": 16, "num_kv_heads": 16}
CASES = [  # storage, quantisation, devices on "fsdp", processes that they belong to
    ("bfloat16", "", 1, 1), ("bfloat16", "", 8, 1), ("bfloat16", "", 2, 2), ("float32", "", 8, 1),
    ("bfloat16", "nf4", 1, 1), ("bfloat16", "nf4", 8, 1), ("bfloat16", "nf4", 2, 2),
]  # fmt: skip
needs_peaks = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel states no peak of a process's memory"
)


def write_checkpoints(directory: Path, sizes: dict[str, int], shard_bytes: int) -> Path:
    """The model that is measured, and a little one that is loaded before."""
    from tests.models.tiny import tiny_config  # computes when it is imported, before processes are connected

    config = tiny_config(**sizes, **HEADS, head_dim=sizes["width"] // HEADS["num_heads"])
    write_shards(directory / "model", config, shard_bytes)
    write_shards(directory / "warm", tiny_config(vocab_size=64, width=64, mlp_width=64, head_dim=16), MIB)
    return directory


def write_shards(directory: Path, config: ModelConfig, shard_bytes: int) -> Path:
    """A checkpoint of random bfloat16 numbers in shards of about `shard_bytes`, written one after the other."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config.to_hf()))
    rng = np.random.default_rng(0)
    weight_map: dict[str, str] = {}
    shard: dict[str, np.ndarray] = {}

    def write():
        count = len(set(weight_map.values()))
        file = f"model-{count:05d}.safetensors"
        write_safetensors(directory / file, shard)
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, _, shape in base_table(config).entries(base_shapes(config)):
        # Without the highest bit of the exponent every number is below 2.
        bits = np.frombuffer(rng.bytes(2 * int(np.prod(shape))), np.uint16) & np.uint16(0xBFFF)
        shard[name] = bits.view(jax.numpy.bfloat16).reshape(shape)
        if sum(tensor.nbytes for tensor in shard.values()) > shard_bytes:
            write()
    write()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def _status(field: str) -> int:
    """A number of bytes that the kernel states of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measured(directory: str, dtype: str, quantization: str, fsdp: int) -> dict[str, int]:
    """Loads the model; bytes: the peak above what was there before, this process's share, the largest tensor."""
    load_model(os.path.join(directory, "warm"), dtype, quantization=quantization or None)  # imports and compiles
    mesh = make_mesh(fsdp=fsdp) if fsdp > 1 else None
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    model = load_model(os.path.join(directory, "model"), dtype, mesh, quantization=quantization or None)
    peak = _status("VmHWM") - before
    shards = [shard.data.nbytes for leaf in jax.tree.leaves(model.base) for shard in leaf.addressable_shards]
    tensors = SafetensorsSource.from_checkpoint(os.path.join(directory, "model")).shapes().values()
    return {"peak": peak, "share": sum(shards), "largest": max(2 * int(np.prod(shape)) for shape, _ in tensors)}


def in_processes(directory: Path, dtype: str, quantization: str, fsdp: int, count: int) -> list[dict[str, int]]:
    """What each of `count` processes measures, which share out `fsdp` devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(fsdp // count),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.models.test_host_memory", str(directory), dtype, quantization, str(fsdp)]
            + ([f"{address},{count},{index}"] if count > 1 else []),
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for index in range(count)
    ]
    try:
        answers = [process.communicate(timeout=600)[0] for process in started]
        assert [process.returncode for process in started] == [0] * count
    finally:
        for process in started:
            process.kill()
    return [json.loads(answer.splitlines()[-1]) for answer in answers]


@needs_peaks
def test_a_process_holds_its_devices_share_and_less_than_one_tensor_more(tmp_path):
    write_checkpoints(tmp_path, SMALL, 40 * MIB)
    for found in in_processes(tmp_path, "bfloat16", "", 8, 2):
        assert found["share"] < 70 * MIB
        assert found["share"] < found["peak"] < found["share"] + found["largest"]


@needs_peaks
@pytest.mark.slow
def test_host_memory_of_a_large_checkpoint(tmp_path, capsys):
    """Prints the numbers that it checks: `pytest -m slow -n 0 tests/models/test_host_memory.py`."""
    write_checkpoints(tmp_path, LARGE, 500 * MIB)
    for case in CASES:
        found = max(in_processes(tmp_path, *case), key=lambda found: found["peak"])
        peak, share, largest = (f"{found[name] / MIB:.0f}" for name in ("peak", "share", "largest"))
        dtype, quantization, fsdp, count = case
        with capsys.disabled():
            sys.stdout.write(
                f"\n{quantization or dtype}, fsdp={fsdp}, {count} process(es): peak {peak} MiB, "
                f"local share {share}, largest tensor {largest}"
            )
        assert found["peak"] < found["share"] + found["largest"], case


def main(directory: str, dtype: str, quantization: str, fsdp: str, processes: str = "") -> None:
    start_processes(processes)
    sys.stdout.write("\n" + json.dumps(measured(directory, dtype, quantization, int(fsdp))) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
