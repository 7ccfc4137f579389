"""Compiles one program of the package for a TPU topology, without a TPU, and reads what the compiler made of it.

    python -m experiments.pod.programs SETTINGS.json RESULT.json

A process of its own: libtpu is loaded once per process, and its compilations hold gigabytes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.pod.collectives import collectives
from llmeraser_jax import files, trees
from llmeraser_jax.curvature import CURVATURES, Damped, DatasetCurvature, example_rows
from llmeraser_jax.curvature.row_sets import RowSet
from llmeraser_jax.lora import LoraConfig, init_lora
from llmeraser_jax.losses import gradient_sum, lm_objective
from llmeraser_jax.models import ApplyDecoder, ModelConfig, llava_1_5_7b
from llmeraser_jax.models.decoder import base_shapes
from llmeraser_jax.parallel import EXAMPLES, example_shares, make_mesh, sharding_for, spread_sharding
from llmeraser_jax.solvers import ConjugateGradients
from llmeraser_jax.types import ExampleStack, PyTree, TokenBatch

_SHAPES = {
    # vocabulary, width, mlp_width, layers, heads, kv_heads
    "tiny": (1024, 256, 512, 2, 4, 4),
    "llama2-7b": (32000, 4096, 11008, 32, 32, 32),
    "llama3-8b": (128256, 4096, 14336, 32, 32, 8),
}
_LLAVA = "llava-1.5-7b"
MODELS = (*_SHAPES, _LLAVA)
_RANK, _SKETCH_WIDTH = 8, 64
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


class Shapes:
    """The arguments of the programs as shapes that know their places; nothing is allocated.

    Args:
        mesh: of the topology's devices.
        settings: `model`, `layers`, `tokens`, `response`, `examples`, `microbatch` (rows of each share).
    """

    def __init__(self, mesh: Mesh, settings: Mapping[str, Any]):
        config, self.mesh = model_config(settings["model"], settings["layers"]), mesh
        base = {
            path: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding_for(path, shape, mesh))
            for path, shape in base_shapes(config).items()
        }
        self.objective = lm_objective(ApplyDecoder(config), unflatten_dict(base, sep="/"), l2=1e-3)
        adapter = LoraConfig(rank=_RANK, alpha=2.0 * _RANK, target_modules="all-linear")
        self.lora = self._placed(jax.eval_shape(lambda: init_lora(jax.random.key(0), adapter, config)))
        self.key = self._placed(jax.eval_shape(lambda: jax.random.key(0)))
        batch = settings["microbatch"] * example_shares(mesh)
        self.examples = settings["examples"]
        lead = (-(-self.examples // batch), batch)

        def of(dtype: Any, *shape: int) -> Any:
            return jax.ShapeDtypeStruct((*lead, *shape), dtype, sharding=NamedSharding(mesh, P(None, *EXAMPLES)))

        whole, end, vision = settings["tokens"], settings["response"], config.vision
        picture = () if vision is None else (1, vision.num_features, vision.feature_width)
        tokens = TokenBatch(
            tokens=of(jnp.int32, whole),
            attention_mask=of(jnp.int32, whole),
            positions=of(jnp.int32, end),
            targets=of(jnp.int32, end),
            target_weights=of(jnp.float32, end),
            images=of(jnp.bfloat16, *picture) if picture else None,
        )
        self.stack = ExampleStack((tokens,), (of(jnp.float32),), mesh=mesh)

    def _placed(self, tree: PyTree) -> PyTree:
        everywhere = NamedSharding(self.mesh, P())
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), tree)

    def operator(self, kind: str) -> DatasetCurvature:
        """The curvature of all examples."""
        return DatasetCurvature(self.objective, self.lora, self.stack, CURVATURES[kind])

    def stored_rows(self) -> PyTree:
        """A row of adapter space for each example, as `example_rows` leaves them."""

        def of(leaf):
            shape = (self.examples, *leaf.shape)
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=spread_sharding(shape, self.mesh))

        return jax.tree.map(of, self.lora)

    def row_set(self) -> RowSet:
        """The same rows, not stored."""
        return RowSet(self.objective, self.lora, self.stack, self.key, "log-odds")

    def coefficients(self) -> PyTree:
        """One number for each row."""
        return self._placed(jax.ShapeDtypeStruct((self.row_set().num_rows,), jnp.float32))


_product = jax.jit(lambda operator, v: operator.mv(v))
_solve = jax.jit(ConjugateGradients(rtol=0.05, max_steps=20).solve)
_rows = jax.jit(partial(example_rows, kind="log-odds"))
_sketch = jax.jit(RowSet.sketch, static_argnames="width")

# What each program is, lowered for shapes.
PROGRAMS: Mapping[str, Callable[[Shapes], Any]] = MappingProxyType(
    {
        "gradient": lambda s: gradient_sum.lower(s.objective, s.lora, s.stack),
        "gauss-newton": lambda s: _product.lower(s.operator("gauss-newton"), s.lora),
        "hessian": lambda s: _product.lower(s.operator("hessian"), s.lora),
        "cg": lambda s: _solve.lower(Damped(s.operator("gauss-newton"), 1e-2), s.lora),
        "rows": lambda s: _rows.lower(s.objective, s.lora, s.stack, s.key),
        "gram": lambda s: jax.jit(trees.rows_gram).lower(s.stored_rows(), s.stored_rows()),
        "combine": lambda s: jax.jit(RowSet.combine).lower(s.row_set(), s.coefficients()),
        "products": lambda s: jax.jit(RowSet.products).lower(s.row_set(), s.lora),
        "sketch": lambda s: _sketch.lower(s.row_set(), s.key, width=_SKETCH_WIDTH),
    }
)


def compile_program(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Compiles `settings["program"]` and describes it; sizes in bytes on each device."""
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=settings["topology"], num_slices=settings["slices"]
    )
    mesh = make_mesh(**settings["mesh"], devices=topology.devices)
    shapes = Shapes(mesh, settings)
    started = time.monotonic()
    compiled = PROGRAMS[settings["program"]](shapes).compile()
    seconds, memory = time.monotonic() - started, compiled.memory_analysis()
    costs = compiled.cost_analysis() or {}
    outputs = zip(jax.tree.leaves(compiled.out_info), jax.tree.leaves(compiled.output_shardings), strict=True)
    return {
        "settings": dict(settings),
        "compile_seconds": seconds,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "flops": costs.get("flops"),
        "accessed_bytes": costs.get("bytes accessed"),
        "collectives": collectives(compiled.as_text(), dict(mesh.shape)),
        "outputs": [[out.shape, sharding.shard_shape(out.shape)] for out, sharding in outputs],
        "adapter_bytes": sum(4 * leaf.size for leaf in jax.tree.leaves(shapes.lora)),
        "kernels": sorted({leaf.shape[-2:] for leaf in jax.tree.leaves(shapes.objective.frozen) if leaf.ndim == 3}),
    }


if __name__ == "__main__":
    files.atomic_write_json(sys.argv[2], compile_program(files.read_json(sys.argv[1])))
