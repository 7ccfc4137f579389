"""Adapters: a float32 pytree, its configuration, and PEFT's format."""

from llmeraser_jax.lora.config import LoraConfig, adapted_modules, resolve_config, resolve_target_modules
from llmeraser_jax.lora.params import (
    Lora,
    add_delta,
    check_lora,
    init_lora,
    low_rank_updates,
    merge_lora,
    product_norms,
)
from llmeraser_jax.lora.peft_io import (
    adapter_config_from_peft,
    adapter_config_to_peft,
    load_adapter,
    read_adapter_base,
    save_adapter,
)

__all__ = [
    "Lora",
    "LoraConfig",
    "adapted_modules",
    "adapter_config_from_peft",
    "adapter_config_to_peft",
    "add_delta",
    "check_lora",
    "init_lora",
    "load_adapter",
    "low_rank_updates",
    "merge_lora",
    "product_norms",
    "read_adapter_base",
    "resolve_config",
    "resolve_target_modules",
    "save_adapter",
]
