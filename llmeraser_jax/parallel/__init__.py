"""Devices and processes: the base sharded by rules, batches over the data axis, the adapter replicated."""

from llmeraser_jax.parallel.mesh import make_mesh, parse_mesh
from llmeraser_jax.parallel.processes import is_primary, on_primary, start_processes, to_host
from llmeraser_jax.parallel.sharding import (
    place_batch,
    place_stack,
    replicate,
    shard_base,
    sharding_for,
    spec_for,
    spread,
    spread_sharding,
)
from llmeraser_jax.parallel.sums import Kept, keep_on_devices, sum_over_devices

__all__ = [
    "Kept",
    "is_primary",
    "keep_on_devices",
    "make_mesh",
    "on_primary",
    "parse_mesh",
    "place_batch",
    "place_stack",
    "replicate",
    "shard_base",
    "sharding_for",
    "spec_for",
    "spread",
    "spread_sharding",
    "start_processes",
    "sum_over_devices",
    "to_host",
]
