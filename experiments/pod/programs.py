"""Compiles one program of the package for a TPU topology, without a TPU, and keeps what the compiler made of it.

    python -m experiments.pod.programs SETTINGS.json RESULT.json

A process of its own: libtpu is loaded once per process, and its compilations hold gigabytes. Beside RESULT.json is
the compiled program's text, RESULT.hlo.gz.
"""

from __future__ import annotations

import gzip
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
from jax.experimental import topologies

from experiments.pod.costs import traced_flops
from llmeraser_jax import compiled, files, trees
from llmeraser_jax.compiled import Shapes
from llmeraser_jax.curvature import Damped
from llmeraser_jax.curvature.row_sets import SKETCH_WIDTH, RowSet
from llmeraser_jax.lora import LoraConfig
from llmeraser_jax.models import ModelConfig, llava_1_5_7b
from llmeraser_jax.models.decoder import base_shapes
from llmeraser_jax.parallel import make_mesh
from llmeraser_jax.planning import Workload
from llmeraser_jax.solvers import ConjugateGradients

_SHAPES = {
    # vocabulary, width, mlp_width, layers, heads, kv_heads
    "tiny": (1024, 256, 512, 2, 4, 4),
    "llama2-7b": (32000, 4096, 11008, 32, 32, 32),
    "llama3-8b": (128256, 4096, 14336, 32, 32, 8),
}
_LLAVA = "llava-1.5-7b"
MODELS = (*_SHAPES, _LLAVA)
_RANK = 8
# Any host of the topology will do: nothing is run.
ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
)


def model_config(model: str, layers: int | None = None) -> ModelConfig:
    """A preset's shapes, with matrix products as on an accelerator with a bfloat16 base."""
    if model == _LLAVA:
        return llava_1_5_7b("bfloat16", **({} if layers is None else {"num_layers": layers}))
    vocab, width, mlp_width, depth, heads, kv_heads = _SHAPES[model]
    return ModelConfig(
        vocab_size=vocab, width=width, mlp_width=mlp_width, num_layers=layers or depth, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=width // heads, matmul_precision="bfloat16",
    )  # fmt: skip


def workload(settings: Mapping[str, Any]) -> Workload:
    """Of settings as `main.PodConfig` has them, the mesh as sizes."""
    return Workload(
        config=model_config(settings["model"], settings["layers"]),
        lora=LoraConfig(rank=_RANK, alpha=2.0 * _RANK, target_modules="all-linear"),
        mesh=settings["mesh"],
        time=settings["tokens"],
        response=settings["response"],
        dtype="bfloat16",
        quantization=settings["quantization"],
    )


_solve = jax.jit(ConjugateGradients(rtol=0.05, max_steps=20).solve)
_sketch = jax.jit(RowSet.sketch, static_argnames="width")

# What each program is, traced for shapes.
PROGRAMS: Mapping[str, Callable[[Shapes], Any]] = MappingProxyType(
    {
        **compiled.PROGRAMS,
        "cg": lambda s: _solve.trace(Damped(s.operator("gauss-newton"), 1e-2), s.lora),
        "gram": lambda s: jax.jit(trees.rows_gram).trace(s.stored_rows(), s.stored_rows()),
        "combine": lambda s: jax.jit(RowSet.combine).trace(s.row_set(), s.coefficients()),
        "products": lambda s: jax.jit(RowSet.products).trace(s.row_set(), s.lora),
        "sketch": lambda s: _sketch.trace(s.row_set(), s.key, width=SKETCH_WIDTH),
        "sketched-roots": lambda s: _sketch.trace(s.row_set("roots"), s.key, width=SKETCH_WIDTH),
    }
)


def compile_program(settings: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Traces and compiles `settings["program"]`; operations and bytes on each device, and the text."""
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=settings["topology"], num_slices=settings["slices"]
    )
    mesh = make_mesh(**settings["mesh"], devices=topology.devices)
    work = workload(settings)
    shapes = Shapes(work, mesh, microbatch=settings["microbatch"], examples=settings["examples"])
    traced = PROGRAMS[settings["program"]](shapes)
    # The axis "model" is the compiler's, which shares products out evenly.
    counted = {"settings": dict(settings), "traced_flops": traced_flops(traced.jaxpr.jaxpr) / mesh.shape["model"]}
    if not settings["compile"]:
        return counted, ""
    started = time.monotonic()
    program = traced.lower().compile()
    seconds, memory = time.monotonic() - started, program.memory_analysis()
    outputs = zip(jax.tree.leaves(program.out_info), jax.tree.leaves(program.output_shardings), strict=True)
    result = {
        **counted,
        "compile_seconds": seconds,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "outputs": [[out.shape, sharding.shard_shape(out.shape)] for out, sharding in outputs],
        "adapter_bytes": work.adapter_bytes,
        "kernels": sorted({shape[1:] for shape in base_shapes(work.config).values() if len(shape) == 3}),
    }
    return result, program.as_text()


def main(asked: str, wanted: str) -> None:
    """Writes the text first: where the result is, so is the text."""
    result, text = compile_program(files.read_json(asked))
    if text:
        Path(wanted).with_suffix(".hlo.gz").write_bytes(gzip.compress(text.encode()))
    files.atomic_write_json(wanted, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
