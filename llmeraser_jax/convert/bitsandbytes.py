"""Checkpoints that bitsandbytes quantised, as transformers saves them: reading and writing."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from llmeraser_jax.convert.files import SafetensorsSource
from llmeraser_jax.convert.quantization import (
    DYNAMIC_TABLE,
    NF4_TABLE,
    Int8Kernel,
    NF4Kernel,
    QuantizedKernel,
    nf4_layout,
)
from llmeraser_jax.convert.table import READABLE, Shape

_STATE = ".quant_state.bitsandbytes__nf4"
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", _STATE)


def check_quantization_config(config: Any) -> None:
    """Refuses a `quantization_config` of config.json that `QuantizedSource` cannot read.

    Raises:
        ValueError: another method than bitsandbytes, FP4, or a storage that is not bytes.
    """
    given = config if isinstance(config, dict) else {"quant_method": config}
    method, kind = given.get("quant_method"), given.get("bnb_4bit_quant_type", "fp4")
    four, eight = bool(given.get("load_in_4bit")), bool(given.get("load_in_8bit"))
    problems = []
    if method != "bitsandbytes" or four == eight:
        problems.append(f"quant_method = {method!r}, load_in_4bit = {four}, load_in_8bit = {eight}")
    if four and kind != "nf4":
        problems.append(f"bnb_4bit_quant_type = {kind!r}")
    if four and given.get("bnb_4bit_quant_storage", "uint8") != "uint8":
        problems.append(f"bnb_4bit_quant_storage = {given['bnb_4bit_quant_storage']!r}")
    if problems:
        msg = (
            f"quantization_config has {'; '.join(problems)}; readable are bitsandbytes' NF4 (stored as uint8) and "
            "int8. Save the model unquantised (in transformers: model.dequantize()) and name --base-quantization "
            "instead."
        )
        raise ValueError(msg)


class QuantizedSource:
    """Tensors of a checkpoint, the quantised ones described as the weights that they stand for."""

    def __init__(self, source: SafetensorsSource, dtype: str) -> None:
        """Reads the descriptions of the quantised tensors.

        Args:
            source: the files.
            dtype: of dequantised int8 weights; NF4 states its own.

        Raises:
            ValueError: a tensor's description is damaged, or its table is not bitsandbytes' own.
        """
        self._source, self._dtype = source, dtype
        self._shapes = dict(source.shapes())
        self._states: dict[str, dict[str, Any]] = {}
        for name in list(self._shapes):
            if name.endswith(_STATE):
                self._read_state(name.removesuffix(_STATE))
            elif name.endswith(".SCB"):
                weight = name.removesuffix("SCB") + "weight"
                if self._shapes.get(weight, (None, None))[1] == "I8":
                    self._states[weight] = {"scales": name}
                    self._shapes[weight] = (self._shapes[weight][0], dtype)
                    del self._shapes[name]
                    if self._shapes.pop(f"{weight}_format", None) and np.any(source.read(f"{weight}_format")):
                        msg = f"{weight} is stored in a layout of rows and columns that only its GPU reads."
                        raise ValueError(msg)

    def _read_state(self, name: str) -> None:
        try:
            state = json.loads(self._source.read(name + _STATE).tobytes())
            shape, dtype = tuple(map(int, state["shape"])), str(state["dtype"])
            tables = [(".quant_map", NF4_TABLE)]
            if "nested_offset" in state:
                tables.append((".nested_quant_map", DYNAMIC_TABLE))
            known = all(np.array_equal(self._source.read(name + part), table) for part, table in tables)
            inner = str(state.get("nested_dtype", "float32"))
            if not known or len(shape) != 2 or {dtype, inner} - set(READABLE) or int(state["blocksize"]) % 2:
                msg = f"{state} with a table of its own" if not known else str(state)
                raise ValueError(msg)
        except (KeyError, TypeError, ValueError) as error:
            msg = f"{name} is quantised in a way that cannot be read: {type(error).__name__}: {str(error)[:200]}."
            raise ValueError(msg) from error
        self._states[name] = state
        self._shapes[name] = (shape, dtype)
        for part in _PARTS:
            self._shapes.pop(name + part, None)

    def shapes(self) -> dict[str, tuple[Shape, str]]:
        """Shape and dtype name of every weight, as it was before it was quantised."""
        return dict(self._shapes)

    def read(self, name: str) -> np.ndarray:
        """One tensor that is not quantised.

        Raises:
            ValueError: it is quantised.
        """
        if name in self._states:
            msg = f"{name} is quantised; only kernels of the decoder layers may be."
            raise ValueError(msg)
        return self._source.read(name)

    def kernel(self, name: str) -> QuantizedKernel | None:
        """One weight as a quantised kernel of host arrays; None where it is not quantised.

        Raises:
            ValueError: its parts do not fit together, or a scale is not finite.
        """
        state = self._states.get(name)
        if state is None:
            return None
        stored = self._source.read(name)
        if "scales" in state:
            absmax = self._scales(state["scales"], len(stored))
            return Int8Kernel(np.array(stored), absmax, dtype_name=self._dtype)
        outputs, inputs = map(int, state["shape"])
        out_in, block = (outputs, inputs), int(state["blocksize"])
        rows, blocks = nf4_layout(out_in, block)
        codes = np.zeros(rows * blocks * block // 2, np.uint8)
        if not 0 <= len(codes) - stored.size < block // 2:
            msg = f"{name} holds {stored.size} bytes; {out_in} in blocks of {block} needs {len(codes)}."
            raise ValueError(msg)
        codes[: stored.size] = stored.reshape(-1)
        nested: dict[str, Any] = {}
        if "nested_offset" in state:
            group = int(state["nested_blocksize"])
            nested = {
                "nested_absmax": self._scales(f"{name}.nested_absmax", -(-rows * blocks // group)),
                "nested_offset": np.float32(state["nested_offset"]),
                "nested_block": group,
            }
        return NF4Kernel(
            codes.reshape(rows, blocks, block // 2),
            self._scales(f"{name}.absmax", rows * blocks).reshape(rows, blocks),
            **nested,
            out_in=out_in,
            dtype_name=str(state["dtype"]),
        )

    def _scales(self, name: str, count: int) -> np.ndarray:
        scales = np.array(self._source.read(name)).reshape(-1)
        if len(scales) != count or not np.isfinite(scales).all():
            msg = f"{name} holds {len(scales)} scales, expected {count} finite ones."
            raise ValueError(msg)
        return scales


def quantization_config(quantization: str, dtype: str) -> dict[str, Any]:
    """The `quantization_config` of config.json that transformers needs to read `quantized_tensors`.

    Args:
        quantization: one of `quantization.QUANTIZATIONS`.
        dtype: what transformers computes 4-bit products in.
    """
    common = {"quant_method": "bitsandbytes", "load_in_4bit": quantization != "int8"}
    common["load_in_8bit"] = not common["load_in_4bit"]
    if quantization == "int8":
        return {**common, "llm_int8_threshold": 6.0, "llm_int8_has_fp16_weight": False}
    return {
        **common,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": quantization == "nf4-double",
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
    }


def quantized_tensors(name: str, kernel: QuantizedKernel) -> dict[str, np.ndarray]:
    """One layer's quantised kernel as the tensors that transformers saves; `QuantizedSource` reads them back.

    Args:
        name: of the weight.
        kernel: host arrays, no axis of layers.
    """
    if isinstance(kernel, Int8Kernel):
        scales = name.removesuffix("weight") + "SCB"
        codes, absmax = np.asarray(kernel.codes), np.asarray(kernel.absmax)
        return {name: codes, scales: absmax, f"{name}_format": np.zeros((), np.uint8)}
    assert isinstance(kernel, NF4Kernel)
    *_, half = kernel.codes.shape
    size = -(-kernel.out_in[0] * kernel.out_in[1] // 2)  # the last block need not be full
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": 2 * half,
        "dtype": kernel.dtype_name,
        "shape": list(kernel.out_in),
    }
    tensors = {
        name: np.asarray(kernel.codes).reshape(-1, 1)[:size],
        f"{name}.absmax": np.asarray(kernel.absmax).reshape(-1),
        f"{name}.quant_map": NF4_TABLE,
    }
    if kernel.nested_absmax is not None:
        state |= {
            "nested_blocksize": kernel.nested_block,
            "nested_dtype": "float32",
            "nested_offset": float(np.asarray(kernel.nested_offset)),
        }
        tensors[f"{name}.nested_absmax"] = np.asarray(kernel.nested_absmax).reshape(-1)
        tensors[f"{name}.nested_quant_map"] = DYNAMIC_TABLE
    tensors[name + _STATE] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return tensors
