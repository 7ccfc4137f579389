"""Owns programs that are compiled and not run: their arguments as shapes, and the memory that they need."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llmeraser_jax.convert import numpy_dtype
from llmeraser_jax.convert.quantization import quantize_base
from llmeraser_jax.curvature import CURVATURES, DatasetCurvature, example_rows
from llmeraser_jax.curvature.row_sets import RowKind, RowSet
from llmeraser_jax.lora import init_lora
from llmeraser_jax.losses import gradient_sum, lm_objective
from llmeraser_jax.models import ApplyDecoder
from llmeraser_jax.models.decoder import base_shapes
from llmeraser_jax.parallel import EXAMPLES, example_shares, make_mesh, sharding_for, spread_sharding
from llmeraser_jax.planning import Need, Workload
from llmeraser_jax.types import BaseParams, ExampleStack, PyTree, TokenBatch


class Shapes:
    """The arguments of the package's programs as shapes that know their places; nothing is allocated.

    Args:
        work: model, adapter, data and storage.
        mesh: the devices, of the sizes that `work` states; they need not be here.
        microbatch: rows of each share of the examples in a micro-batch.
        examples: rows that each program computes with.
    """

    def __init__(self, work: Workload, mesh: Mesh, *, microbatch: int, examples: int):
        config, self.mesh, self.examples = work.config, mesh, examples
        self.objective = lm_objective(ApplyDecoder(config), abstract_base(work, mesh), l2=1e-3)
        self.lora = self._placed(jax.eval_shape(lambda: init_lora(jax.random.key(0), work.lora, config)))
        self.key = self._placed(jax.eval_shape(lambda: jax.random.key(0)))
        batch = microbatch * example_shares(mesh)
        stack = jax.eval_shape(partial(_stack, work, -(-examples // batch), batch))
        over = NamedSharding(mesh, P(None, *EXAMPLES))
        stack = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=over), stack)
        self.stack = stack.replace(mesh=mesh)

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

    def row_set(self, kind: RowKind = "log-odds") -> RowSet:
        """The same rows, not stored."""
        return RowSet(self.objective, self.lora, self.stack, self.key, kind)

    def coefficients(self) -> PyTree:
        """One number for each row."""
        return self._placed(jax.ShapeDtypeStruct((self.row_set().num_rows,), jnp.float32))


def _stack(work: Workload, chunks: int, batch: int) -> ExampleStack:
    """Micro-batches of rows of the workload's sizes, with one picture each where the model sees pictures."""

    def of(dtype: Any, *shape: int) -> Any:
        return jnp.zeros((chunks, batch, *shape), dtype)

    vision = work.config.vision
    picture = () if vision is None else (1, vision.num_features, vision.feature_width)
    tokens = TokenBatch(
        tokens=of(jnp.int32, work.time),
        attention_mask=of(jnp.int32, work.time),
        positions=of(jnp.int32, work.response),
        targets=of(jnp.int32, work.response),
        target_weights=of(jnp.float32, work.response),
        images=of(numpy_dtype(work.dtype), *picture) if picture else None,
    )
    return ExampleStack((tokens,), (of(jnp.float32),))


def abstract_base(work: Workload, mesh: Mesh) -> BaseParams:
    """The base as `models.load_model` leaves it, as shapes with their places.

    Raises:
        ValueError: the mesh does not divide a matrix.
    """
    dtype = numpy_dtype(work.dtype)
    leaves = {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in base_shapes(work.config).items()}
    base: Any = unflatten_dict(leaves, sep="/")
    if work.quantization is not None:
        base = jax.eval_shape(partial(quantize_base, quantization=work.quantization), base)

    def placed(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_for(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(placed, base)


_product = jax.jit(lambda operator, v: operator.mv(v))
_rows = jax.jit(partial(example_rows, kind="log-odds"))

# What an optimiser step, a Krylov solver and target matching with stored rows spend their memory on, traced.
PROGRAMS: Mapping[str, Callable[[Shapes], Any]] = MappingProxyType(
    {
        "gradient": lambda s: gradient_sum.trace(s.objective, s.lora, s.stack),
        "gauss-newton": lambda s: _product.trace(s.operator("gauss-newton"), s.lora),
        "hessian": lambda s: _product.trace(s.operator("hessian"), s.lora),
        "rows": lambda s: _rows.trace(s.objective, s.lora, s.stack, s.key),
    }
)


@dataclasses.dataclass(frozen=True)
class Peak:
    """What a program needs on each device.

    Attributes:
        program: one of `PROGRAMS`.
        rows: of each share of the examples in a micro-batch.
        arithmetic: bytes as `planning` counts them.
        compiled: bytes as the compiler plans them, and those of a vision tower that lies beside them.
    """

    program: str
    rows: int
    arithmetic: float
    compiled: int


def compiled_peaks(work: Workload, needs: Sequence[Need]) -> Iterator[Peak]:
    """Peaks of a training's gradient and an erasure's product, in the micro-batches that are planned for them.

    Args:
        work: what they compute with; as many devices as its mesh has have to be here.
        needs: as planned; a command that does not fit is compiled with one row.

    Raises:
        ValueError: too few devices, or a mesh that does not divide a matrix.
    """
    rows = {need.command: max(need.rows, 1) for need in needs}
    mesh = make_mesh(data=work.mesh["data"], fsdp=work.mesh["fsdp"], model=work.mesh["model"])
    for program, count, arithmetic in (
        ("gradient", rows["finetune"], work.gradient_bytes),
        ("gauss-newton", rows["erase"], work.product_bytes),
    ):
        shapes = Shapes(work, mesh, microbatch=count, examples=2 * count * work.shares)
        memory = PROGRAMS[program](shapes).lower().compile().memory_analysis()
        compiled = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        yield Peak(program, count, arithmetic(count), compiled + work.tower_bytes)
