"""Owns what fits: device memory of the package's programs by arithmetic, from shapes of model, adapter and data.

Sizes of what is stored are exact. What a micro-batch needs besides is a sum over its activations, whose
coefficients were chosen on programs of Llama-2-7B that the TPU compiler planned (512 tokens, 64 under the loss,
bfloat16; `experiments/pod` compiles such programs). `tests/test_planning.py` and `tests/experiments/test_pod.py`
state how far off it is.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from llmeraser_jax.convert import numpy_dtype
from llmeraser_jax.convert.quantization import NF4_BLOCK
from llmeraser_jax.curvature.row_sets import SKETCH_WIDTH
from llmeraser_jax.lora import LoraConfig, init_lora
from llmeraser_jax.models import ModelConfig
from llmeraser_jax.models.decoder import base_shapes
from llmeraser_jax.models.loading import checkpoint_shapes
from llmeraser_jax.parallel import AXES, spec_for

GIB = 2**30
# What JAX has for arrays: of a TPU what its compiler states, of a GPU the three quarters that JAX takes by default.
DEVICE_BYTES: Mapping[str, float] = MappingProxyType(
    {
        "v5e": 15.75 * GIB,
        "v5p": 95.74 * GIB,
        "v6e": 31.25 * GIB,
        "a100": 0.75 * 79.15 * GIB,
        "h100": 0.75 * 79.15 * GIB,
        "h200": 0.75 * 139.8 * GIB,
    }
)
CHUNK_SIZE = 16  # where nothing is planned
EVALUATION_CHUNK = 16
_USABLE = 0.9  # share of the memory that is planned with
_MOST_TOKENS = 8192  # of a device in a micro-batch; more keep it no busier, and the last micro-batch is padded
_MOST_DEVICES = 256
# Arrays alive at once, in float32, while one layer of a row is differentiated.
_WIDTH, _MLP, _PROJECTIONS, _SCORES, _LOGITS = 1.5, 5.0, 2.0, 3.0, 4.0
_CAUSAL = 5 / 8  # of all pairs of tokens, that blocks of queries compute
_TANGENTS = 2.0  # a product holds each value with its tangent
Quantization = Literal["nf4", "nf4-double", "int8"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What memory is planned for.

    Attributes:
        config: the model.
        lora: the adapter.
        mesh: size of each axis; see `parallel.mesh_sizes`.
        time: tokens of the longest rows.
        response: their tokens under the loss.
        dtype: storage of the base.
        quantization: of its kernels, see `convert.QUANTIZATIONS`.
    """

    config: ModelConfig
    lora: LoraConfig
    mesh: Mapping[str, int]
    time: int
    response: int
    dtype: str = "float32"
    quantization: str | None = None

    @property
    def devices(self) -> int:
        """All of the mesh."""
        return math.prod(self.mesh[axis] for axis in AXES)

    @property
    def shares(self) -> int:
        """Devices that share out the examples."""
        return self.mesh["data"] * self.mesh["fsdp"]

    @functools.cached_property
    def base_bytes(self) -> int:
        """Of the base on each device, a vision tower included.

        Raises:
            ValueError: the mesh does not divide a matrix.
        """
        return sum(self._leaf_bytes(path, shape) for path, shape in checkpoint_shapes(self.config).items())

    @functools.cached_property
    def tower_bytes(self) -> int:
        """Of a vision tower, which lies whole on each device and enters none of the programs that are planned."""
        shapes = checkpoint_shapes(self.config).items()
        return sum(self._leaf_bytes(path, shape) for path, shape in shapes if path.startswith("vision/"))

    def _leaf_bytes(self, path: str, shape: tuple[int, ...]) -> int:
        itemsize = numpy_dtype(self.dtype).itemsize
        if self.quantization is None or not (path.startswith("layers/") and path.endswith("/kernel")):
            return self._share(path, shape) * itemsize
        layers, inputs, outputs = shape
        if self.quantization == "int8":
            codes = self._share(f"{path}/codes", (layers, outputs, inputs))
            return codes + 4 * self._share(f"{path}/absmax", (layers, outputs))
        blocks = -(-inputs // NF4_BLOCK)
        codes = self._share(f"{path}/codes", (layers, outputs, blocks)) * NF4_BLOCK // 2
        scales = self._share(f"{path}/absmax", (layers, outputs, blocks))
        if self.quantization == "nf4":
            return codes + 4 * scales
        return codes + scales + 4 * layers * (-(-outputs * blocks // 256) + 1)

    def _share(self, path: str, shape: tuple[int, ...]) -> int:
        """Numbers of a leaf on each device."""
        count = 1
        for size, axis in itertools.zip_longest(shape, spec_for(path)):
            ways = 1 if axis is None else self.mesh[axis]
            if size % ways:
                msg = f"Mesh {words_of(self.mesh)} does not fit: {path} of shape {shape} is not split {ways} ways."
                raise ValueError(msg)
            count *= size // ways
        return count

    @functools.cached_property
    def num_parameters(self) -> int:
        """Numbers of the whole base, a vision tower included."""
        return sum(math.prod(shape) for shape in checkpoint_shapes(self.config).values())

    @functools.cached_property
    def _adapter_leaves(self) -> list[Any]:
        leaves = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in base_shapes(self.config).items()}
        base = unflatten_dict(leaves, sep="/")
        lora: Any = jax.eval_shape(lambda base: init_lora(jax.random.key(0), self.lora, self.config, base), base)
        return jax.tree.leaves(lora)

    @property
    def adapter_bytes(self) -> int:
        """Of one vector of adapter space, which every device holds whole."""
        return sum(4 * leaf.size for leaf in self._adapter_leaves)

    def sketching_bytes(self, rows: int) -> float:
        """Of random projections, and of so many rows' sketches and the parts they are put together from."""
        total = 0.0
        for leaf in self._adapter_leaves:
            longest = max(leaf.shape[1:])
            if longest > SKETCH_WIDTH:
                total += 4 * SKETCH_WIDTH * (leaf.shape[0] * longest + 2 * rows * leaf.size / longest)
            else:
                total += 4 * 2 * rows * leaf.size
        return total

    @functools.cached_property
    def gathered_bytes(self) -> int:
        """Of frozen matrices beside the stored ones: a layer or the head gathered over "fsdp", or dequantised."""
        if self.mesh["fsdp"] == 1 and self.quantization is None:
            return 0
        shapes, itemsize = base_shapes(self.config), numpy_dtype(self.dtype).itemsize
        layer = sum(math.prod(shape[1:]) for path, shape in shapes.items() if path.startswith("layers/"))
        head = max(math.prod(shape) for path, shape in shapes.items() if not path.startswith("layers/"))
        return max(layer, head) * itemsize // self.mesh["model"]

    @property
    def still_bytes(self) -> int:
        """Of frozen matrices: those stored, and those that are gathered or dequantised."""
        return self.base_bytes + self.gathered_bytes

    @property
    def _carried(self) -> float:
        """Of a row: the inputs of all layers, which rematerialisation keeps."""
        return 4.0 * self.config.num_layers * self.time * self.config.width / self.mesh["model"]

    @property
    def _inside(self) -> float:
        """Of a row: what is alive inside of one layer, or at the head."""
        config, model = self.config, self.mesh["model"]
        heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        numbers = self.time * (
            _WIDTH * config.width
            + (_MLP * config.mlp_width + _PROJECTIONS * heads + _SCORES * _CAUSAL * config.num_heads * self.time)
            / model
        )
        return 4.0 * (numbers + _LOGITS * self.response * config.vocab_size / model)

    @property
    def gradient_row_bytes(self) -> float:
        """What a row adds to a gradient's micro-batch, on its device."""
        return self._carried + self._inside

    @property
    def product_row_bytes(self) -> float:
        """What a row adds to that of a Hessian or Gauss-Newton product."""
        return _TANGENTS * self.gradient_row_bytes

    @property
    def own_row_bytes(self) -> float:
        """What a row adds where each has a gradient of its own."""
        return self.gradient_row_bytes + self.adapter_bytes

    def gradient_bytes(self, rows: int) -> float:
        """Peak of the program of a gradient: the adapter and the sum, and so many rows of each device at a time."""
        return self.still_bytes + 2 * self.adapter_bytes + rows * self.gradient_row_bytes

    def product_bytes(self, rows: int) -> float:
        """The same of a Hessian or Gauss-Newton product, with the vector that is multiplied."""
        return self.still_bytes + 3 * self.adapter_bytes + rows * self.product_row_bytes

    @property
    def forward_row_bytes(self) -> float:
        """What a row adds to evaluation: scores, and keys and values of generated text."""
        config = self.config
        cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim * self.time
        return self._inside + 4.0 * cache / self.mesh["model"]

    @property
    def cached_row_bytes(self) -> float:
        """What a row adds to a cached Gauss-Newton linearisation: the results of products with frozen matrices."""
        config = self.config
        outputs = sum(outputs for _, outputs in config.linear_shapes.values())
        return 4.0 * config.num_layers * self.time * (outputs + config.width) / self.mesh["model"]


@dataclasses.dataclass(frozen=True)
class Need:
    """What one command needs on each device.

    Attributes:
        command: of the console.
        fixed: bytes whatever the micro-batch is: base, adapter, its vectors, stored rows.
        rows: of a device in the micro-batch that is planned; 0 where none fits.
        peak: bytes with that micro-batch, or with one row.
        note: flags to set, and how the command goes about it.
    """

    command: str
    fixed: int | float
    rows: int
    peak: int | float
    note: str = ""


@dataclasses.dataclass(frozen=True)
class _Program:
    """Bytes of a program on each device: those whatever the micro-batch is, and those of each of its rows."""

    fixed: int | float
    row: int | float

    def rows(self, memory: int | float, time: int) -> int:
        """The largest power of two of rows that fits, and keeps the device busy; 0 where none fits."""
        room = (_USABLE * memory - self.fixed) / self.row
        return 0 if room < 1 else min(2 ** int(math.log2(room)), max(_MOST_TOKENS // time, 1))


def _need(command: str, programs: list[_Program], rows: int, note: str = "") -> Need:
    fixed = max(program.fixed for program in programs)
    peak = max(program.fixed + max(rows, 1) * program.row for program in programs)
    return Need(command, fixed, rows, peak, note)


def training_program(work: Workload) -> _Program:
    """Of an optimiser step: parameters, two moments, the gradient and its sum, the update."""
    return _Program(work.still_bytes + 6 * work.adapter_bytes, work.gradient_row_bytes)


def erasing_programs(work: Workload, row_bytes: int | float) -> list[_Program]:
    """Of target matching with so many bytes for its rows on each device, and of conjugate gradients."""
    matching = work.still_bytes + 3 * work.adapter_bytes + row_bytes
    solving = work.still_bytes + 8 * work.adapter_bytes
    return [_Program(matching, work.own_row_bytes), _Program(solving, work.product_row_bytes)]


def needs(work: Workload, memory: int | float, num_named: int, row_memory: int | float) -> list[Need]:
    """What finetune, erase, retrain and evaluate need on each device.

    Args:
        work: the shapes.
        memory: of a device, in bytes.
        num_named: rows that the requests name.
        row_memory: what erasing stores rows in, of each device (`curvature.row_sets.ROW_MEMORY_BYTES`).

    Raises:
        ValueError: the mesh does not divide a matrix of the base.
    """
    training = training_program(work)
    train_rows = training.rows(memory, work.time)
    flag = f"--microbatch-size {train_rows * work.shares}" if train_rows else ""
    sampled = min(max(num_named, 96), 256)
    # As many rows as target matching asks for with four steps and a sample for every two; see its `fit`.
    guarding = min(max(num_named, 128), 256)
    stored = (2 * (num_named + guarding) + 2 * sampled) * work.adapter_bytes / work.devices
    fits = stored <= row_memory
    sketched = max(num_named, guarding, sampled)
    erasing = erasing_programs(work, stored if fits else work.sketching_bytes(sketched))
    chunk = min(program.rows(memory, work.time) for program in erasing)
    room = _USABLE * memory - erasing[1].fixed - 2 * work.product_row_bytes
    cached = int(max(room, 0) / work.cached_row_bytes) * work.shares
    notes = [f"--chunk-size {chunk * work.shares}"] if chunk else []
    notes.append("rows stored" if fits else "rows computed when needed")
    notes.append("products may be cached" if cached >= sampled else f"no cache: {cached} of {sampled} rows fit")
    scoring = _Program(work.still_bytes + 4 * work.adapter_bytes, work.forward_row_bytes)
    scored = -(-EVALUATION_CHUNK // work.shares)
    evaluated = scored if scoring.fixed + scored * scoring.row <= _USABLE * memory else 0
    return [
        _need("finetune", [training], train_rows, flag),
        _need("erase", erasing, chunk, "; ".join(notes)),
        _need("retrain", [training], train_rows, flag),
        _need("evaluate", [scoring], evaluated),
    ]


def words_of(mesh: Mapping[str, int]) -> str:
    """As `--mesh` takes it, axes of one device left out."""
    return ",".join(f"{axis}={mesh[axis]}" for axis in AXES if mesh[axis] > 1) or "data=1"


def meshes(least: int = 1) -> Iterator[dict[str, int]]:
    """Meshes to try, of few devices first; of as many devices those that communicate less first."""
    count = least
    while count <= _MOST_DEVICES:
        for model in (1, 2, 4, 8):
            if count % model == 0:
                fsdp = min(count // model, 32)
                yield {"data": count // model // fsdp, "fsdp": fsdp, "model": model}
        count *= 2


def auto_microbatch(work: Workload, most: int) -> int | None:
    """Rows of a training's micro-batch; None, as many as a batch has, on CPUs and where all of them fit.

    Args:
        work: the shapes.
        most: rows of a batch.
    """
    memory = device_bytes()
    if memory is None:
        return None
    rows = max(training_program(work).rows(memory, work.time), 1) * work.shares
    return rows if rows < most else None


def auto_chunk_size(work: Workload, row_memory: int | float) -> int:
    """Rows of an erasure's micro-batch: 16 on CPUs.

    Args:
        work: the shapes.
        row_memory: see `needs`.
    """
    memory = device_bytes()
    if memory is None:
        return CHUNK_SIZE
    programs = erasing_programs(work, row_memory)
    return max(min(program.rows(memory, work.time) for program in programs), 1) * work.shares


def smallest(plan: Callable[[Mapping[str, int]], tuple[Workload, list[Need]]]) -> tuple[Workload, list[Need]]:
    """Workload and needs on the smallest mesh that all commands fit on, or on the largest that was tried.

    Args:
        plan: workload and needs on a mesh, see `needs`.
    """
    found = None
    for mesh in meshes():
        try:
            found = plan(mesh)
        except ValueError:  # it does not divide a matrix
            continue
        if all(need.rows for need in found[1]):
            break
    assert found is not None  # one device divides everything
    return found


def device_bytes() -> float | None:
    """Memory of a device here; None of CPUs, on which nothing is planned."""
    if jax.default_backend() == "cpu":
        return None
    statistics = jax.local_devices()[0].memory_stats()
    return float(statistics["bytes_limit"]) if statistics and "bytes_limit" in statistics else None


def workload_of(model: Any, lora: LoraConfig, time: int, response: int) -> Workload:
    """Of a model that is loaded (`models.Model`)."""
    sizes = {axis: 1 if model.mesh is None else model.mesh.shape[axis] for axis in AXES}
    dtype = np.dtype(model.base["embed_tokens"]["embedding"].dtype).name
    return Workload(
        config=model.config, lora=lora, mesh=sizes, time=time, response=response, dtype=dtype,
        quantization=model.quantization,
    )  # fmt: skip
