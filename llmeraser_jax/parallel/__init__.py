"""Meshes and sharding: the base sharded by rules, batches over the data axis, the adapter replicated."""

from llmeraser_jax.parallel.mesh import make_mesh, parse_mesh
from llmeraser_jax.parallel.sharding import (
    DEFAULT_RULES,
    place_batch,
    place_stack,
    replicate,
    shard_base,
    spec_for,
)
from llmeraser_jax.parallel.sums import Kept, keep_on_devices, sum_over_devices

__all__ = [
    "DEFAULT_RULES",
    "Kept",
    "keep_on_devices",
    "make_mesh",
    "parse_mesh",
    "place_batch",
    "place_stack",
    "replicate",
    "shard_base",
    "spec_for",
    "sum_over_devices",
]
