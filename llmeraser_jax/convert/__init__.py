"""Conversion between checkpoints on disk and pytrees: tables read in both directions, quantised kernels."""

from llmeraser_jax.convert.bitsandbytes import QuantizedSource, check_quantization_config
from llmeraser_jax.convert.files import SafetensorsSource, write_safetensors
from llmeraser_jax.convert.huggingface import BASE_TABLES, PEFT_TABLE
from llmeraser_jax.convert.quantization import (
    QUANTIZATIONS,
    Int8Kernel,
    NF4Kernel,
    QuantizedKernel,
    base_quantization,
    check_quantization,
    dequantize_base,
    dequantized,
    quantize,
    quantize_base,
)
from llmeraser_jax.convert.table import (
    KEEP,
    TRANSPOSE,
    Index,
    Rule,
    Shape,
    Table,
    Target,
    TensorSource,
    Transform,
    check_tensors,
    export_tensors,
    import_tensors,
    numpy_dtype,
)

__all__ = [
    "BASE_TABLES",
    "KEEP",
    "PEFT_TABLE",
    "QUANTIZATIONS",
    "TRANSPOSE",
    "Index",
    "Int8Kernel",
    "NF4Kernel",
    "QuantizedKernel",
    "QuantizedSource",
    "Rule",
    "SafetensorsSource",
    "Shape",
    "Table",
    "Target",
    "TensorSource",
    "Transform",
    "base_quantization",
    "check_quantization",
    "check_quantization_config",
    "check_tensors",
    "dequantize_base",
    "dequantized",
    "export_tensors",
    "import_tensors",
    "numpy_dtype",
    "quantize",
    "quantize_base",
    "write_safetensors",
]
