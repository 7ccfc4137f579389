"""Quantised kernels of the frozen base: NF4 and int8 as bitsandbytes defines them, dequantised layer by layer.

A quantised kernel takes the place of the array at `layers/{name}/kernel`. It is a pytree whose leaves keep the axis
of layers in front, so that the scan over layers hands each layer its own, and only that one is dequantised, in the
backward pass again. Embedding, head, norms and biases stay as they are, which is bitsandbytes' choice too.

NF4: the weight [out, in], row after row, is cut into blocks of 64; a block is its largest absolute value times
entries of a table of 16 quantiles of the normal distribution (Dettmers et al. 2023, QLoRA). With double
quantisation the blocks' scales, less their mean, are quantised to 8 bits in blocks of 256. int8: each row of the
weight, which is an output channel, is its largest absolute value times integers over 127 (Dettmers et al. 2022,
LLM.int8()).
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from llmeraser_jax.types import BaseParams

QUANTIZATIONS = ("nf4", "nf4-double", "int8")
NF4_BLOCK = 64
NESTED_BLOCK = 256
NF4_TABLE = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip


def _dynamic_table() -> np.ndarray:
    """The 256 numbers of bitsandbytes' signed dynamic type, ascending: finer towards zero, seven decades."""
    values = [0.0, 1.0]
    for exponent in range(7):
        count = 2**exponent + 1
        step, index = np.float32(np.float32(0.9) / np.float32(count - 1)), np.arange(count)
        # As PyTorch's linspace: from both ends, each product and sum rounded once.
        low = (np.float64(np.float32(0.1)) + np.float64(step) * index).astype(np.float32)
        high = (1.0 - np.float64(step) * (count - 1 - index)).astype(np.float32)
        edges = np.where(index < count // 2, low, high)
        means = np.float32(10.0 ** (exponent - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [*means, *-means]
    return np.sort(np.array(values, np.float32))


DYNAMIC_TABLE = _dynamic_table()


class QuantizedKernel:
    """Shared by `NF4Kernel` and `Int8Kernel`; `shape` and `dtype` are those of the dequantised kernel."""

    shape: Any
    dtype: Any

    def dequantized(self) -> Float[Array, "*layers inputs outputs"]:
        """The kernel."""
        raise NotImplementedError


@flax.struct.dataclass
class NF4Kernel(QuantizedKernel):
    """Weights in 4 bits, in blocks with a scale each.

    Attributes:
        codes: two entries of the table per byte, the first in the upper half. Where a block does not reach over
            rows of the weight, `rows` are the outputs, so that devices can share them out; else there is one row.
        absmax: scale of each block; with double quantisation its entry in the dynamic table.
        nested_absmax: with double quantisation, scale of each group of `nested_block` scales; else None.
        nested_offset: with double quantisation, the mean scale; else None.
        out_in: outputs and inputs.
        dtype_name: of the dequantised weights.
        nested_block: scales in a group.
    """

    codes: Any  # [*layers, rows, blocks, half], uint8
    absmax: Any  # [*layers, rows, blocks], float32 or uint8
    nested_absmax: Any = None  # [*layers, groups], float32
    nested_offset: Any = None  # [*layers], float32
    out_in: tuple[int, int] = flax.struct.field(pytree_node=False, default=(0, 0))
    dtype_name: str = flax.struct.field(pytree_node=False, default="float32")
    nested_block: int = flax.struct.field(pytree_node=False, default=NESTED_BLOCK)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-3], *self.out_in[::-1])

    @property
    def dtype(self) -> np.dtype:
        return jnp.dtype(self.dtype_name)

    def dequantized(self) -> Float[Array, "*layers inputs outputs"]:
        """The kernel, each number as bitsandbytes computes it."""
        *lead, rows, blocks, half = self.codes.shape
        codes = jnp.stack([self.codes >> 4, self.codes & 15], axis=-1).reshape(*lead, rows, blocks, 2 * half)
        scaled = _nf4_entries(codes) * self._scales()[..., None]
        outputs, inputs = self.out_in
        if rows == outputs:
            weight = scaled.reshape(*lead, outputs, inputs)
        else:
            weight = scaled.reshape(*lead, -1)[..., : outputs * inputs].reshape(*lead, outputs, inputs)
        return jnp.swapaxes(weight.astype(self.dtype), -1, -2)

    def _scales(self):
        if self.nested_absmax is None or self.nested_offset is None:
            return self.absmax
        *lead, rows, blocks = self.absmax.shape
        groups = jnp.repeat(self.nested_absmax, self.nested_block, axis=-1)[..., : rows * blocks]
        scaled = jnp.asarray(DYNAMIC_TABLE)[self.absmax] * groups.reshape(*lead, rows, blocks)
        # Kept apart from the sum: fused into one operation it would be rounded once, in bitsandbytes it is twice.
        return jax.lax.optimization_barrier(scaled) + self.nested_offset[..., None, None]


@flax.struct.dataclass
class Int8Kernel(QuantizedKernel):
    """Weights in 8 bits with one scale per output.

    Attributes:
        codes: -127 to 127.
        absmax: largest absolute weight of each output.
        dtype_name: of the dequantised weights.
    """

    codes: Any  # [*layers, outputs, inputs], int8
    absmax: Any  # [*layers, outputs], float32
    dtype_name: str = flax.struct.field(pytree_node=False, default="float32")

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, outputs, inputs = self.codes.shape
        return (*lead, inputs, outputs)

    @property
    def dtype(self) -> np.dtype:
        return jnp.dtype(self.dtype_name)

    def dequantized(self) -> Float[Array, "*layers inputs outputs"]:
        """The kernel, each number as bitsandbytes computes it."""
        weight = self.codes.astype(jnp.float32) * self.absmax[..., None]
        return jnp.swapaxes((jax.lax.optimization_barrier(weight) * _ONE_127TH).astype(self.dtype), -1, -2)


_ONE_127TH = np.float32(7.874015718698502e-3)  # bitsandbytes' constant


def dequantized(kernel: Any) -> Any:
    """The kernel as an array, whether quantised or not."""
    return kernel.dequantized() if isinstance(kernel, QuantizedKernel) else kernel


def quantize(kernel: Float[Array, "*layers inputs outputs"], quantization: str) -> QuantizedKernel:
    """A kernel, quantised; with an axis of layers each layer by itself.

    Args:
        kernel: in the dtype that it is to be dequantised to.
        quantization: one of `QUANTIZATIONS`.

    Raises:
        ValueError: an unknown quantisation.
    """
    check_quantization(quantization)
    if kernel.ndim > 2:
        return jax.vmap(lambda one: quantize(one, quantization))(kernel)
    weight = jnp.swapaxes(kernel, -1, -2).astype(jnp.float32)
    name = str(kernel.dtype)
    if quantization == "int8":
        absmax = jnp.max(jnp.abs(weight), axis=-1)
        # A reciprocal, rounded, times 127, as PyTorch divides a number by a tensor.
        scale = 127 * jax.lax.optimization_barrier(1 / jnp.maximum(absmax, _TINY))
        return Int8Kernel(jnp.round(weight * scale[:, None]).astype(jnp.int8), absmax, dtype_name=name)
    outputs, inputs = weight.shape
    rows, blocks = nf4_layout(weight.shape, NF4_BLOCK)
    flat = jnp.pad(weight.reshape(rows, -1), ((0, 0), (0, blocks * NF4_BLOCK - weight.size // rows)))
    scaled, absmax = _normalized(flat.reshape(rows, blocks, NF4_BLOCK))
    codes = jnp.zeros(scaled.shape, jnp.uint8)
    for edge in _edges(NF4_TABLE):
        codes += scaled > edge
    codes = (codes[..., ::2] << 4) | codes[..., 1::2]
    if quantization == "nf4":
        return NF4Kernel(codes, absmax, out_in=(outputs, inputs), dtype_name=name)
    offset = jnp.mean(absmax)
    groups = -(-absmax.size // NESTED_BLOCK)
    centred = jnp.pad((absmax - offset).reshape(-1), (0, groups * NESTED_BLOCK - absmax.size))
    scaled, nested = _normalized(centred.reshape(groups, NESTED_BLOCK))
    # bitsandbytes on a CPU looks entries up by the nearest of 65,536 evenly spaced numbers.
    even = jnp.floor((scaled + 1) * np.float32(32767.5) + np.float32(0.5)) * 2 / 65535 - 1
    entries = jnp.searchsorted(jnp.asarray(_edges(DYNAMIC_TABLE)), even).astype(jnp.uint8)
    entries = entries.reshape(-1)[: absmax.size].reshape(absmax.shape)
    return NF4Kernel(codes, entries, nested, offset, out_in=(outputs, inputs), dtype_name=name)


_TINY = np.float32(1e-38)  # bitsandbytes' least divisor; a block of zeros has no scale


def _normalized(blocks):
    """Blocks divided by their largest absolute value, as bitsandbytes rounds it, and that value."""
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    inverse = jax.lax.optimization_barrier(1 / jnp.maximum(absmax, _TINY))
    return jnp.clip(blocks * inverse[..., None], -1, 1), absmax


def _edges(table: np.ndarray) -> np.ndarray:
    """Where the nearest entry changes."""
    return (table[:-1] + table[1:]) / np.float32(2)


def _nf4_entries(codes):
    """Table entries by a tree of choices: elementwise, so that XLA fuses it into its consumer."""
    entries: list[Any] = [jnp.float32(entry) for entry in NF4_TABLE]
    for bit in range(4):
        is_set = (codes >> bit) & 1 == 1
        entries = [jnp.where(is_set, high, low) for low, high in zip(entries[::2], entries[1::2], strict=True)]
    return entries[0]


def nf4_layout(out_in: tuple[int, ...], block: int) -> tuple[int, int]:
    """`rows` and `blocks` of an `NF4Kernel` for a weight of these outputs and inputs."""
    outputs, inputs = out_in
    return (outputs, inputs // block) if inputs % block == 0 else (1, -(-outputs * inputs // block))


def check_quantization(quantization: str) -> None:
    """Refuses a name that is not one of `QUANTIZATIONS`.

    Raises:
        ValueError: it is not.
    """
    if quantization not in QUANTIZATIONS:
        msg = f"The base's quantisation is {quantization!r}; choose one of {', '.join(QUANTIZATIONS)}."
        raise ValueError(msg)


def quantize_base(base: BaseParams, quantization: str) -> BaseParams:
    """The base with the kernels of its layers quantised; a pure function.

    Raises:
        ValueError: an unknown quantisation.
    """
    return _map_kernels(base, lambda kernel: quantize(kernel, quantization))


def dequantize_base(base: BaseParams) -> BaseParams:
    """The base with arrays for all its kernels."""
    return _map_kernels(base, dequantized)


def _map_kernels(base: BaseParams, fn) -> BaseParams:
    layers = {
        name: {**leaves, "kernel": fn(leaves["kernel"])} if "kernel" in leaves else leaves
        for name, leaves in base["layers"].items()
    }
    return {**base, "layers": layers}


def base_quantization(base: BaseParams) -> str | None:
    """How the base is quantised: one of `QUANTIZATIONS`, or None."""
    for leaves in base["layers"].values():
        kernel = leaves.get("kernel")
        if isinstance(kernel, Int8Kernel):
            return "int8"
        if isinstance(kernel, NF4Kernel):
            return "nf4" if kernel.nested_absmax is None else "nf4-double"
    return None
