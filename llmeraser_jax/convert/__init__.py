"""Conversion between checkpoints on disk and pytrees: declarative tables, read in both directions."""

from llmeraser_jax.convert.bitsandbytes import (
    QuantizedSource,
    check_quantization_config,
    quantization_config,
    quantized_tensors,
)
from llmeraser_jax.convert.files import SafetensorsSource, write_safetensors
from llmeraser_jax.convert.huggingface import BASE_TABLES, PEFT_TABLE
from llmeraser_jax.convert.table import (
    KEEP,
    TRANSPOSE,
    Rule,
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
    "TRANSPOSE",
    "QuantizedSource",
    "Rule",
    "SafetensorsSource",
    "Table",
    "Target",
    "TensorSource",
    "Transform",
    "check_quantization_config",
    "check_tensors",
    "export_tensors",
    "import_tensors",
    "numpy_dtype",
    "quantization_config",
    "quantized_tensors",
    "write_safetensors",
]
