"""Devices and processes: the base sharded by rules, examples shared out, the adapter replicated."""

from llmeraser_jax.parallel.mesh import (
    AXES,
    example_axes,
    example_shares,
    make_mesh,
    mesh_sizes,
    parse_mesh,
    whole_shares,
)
from llmeraser_jax.parallel.processes import is_primary, on_primary, start_processes, to_host
from llmeraser_jax.parallel.sharding import (
    EXAMPLES,
    gathered,
    looked_up,
    place_batch,
    place_stack,
    replicate,
    replicated,
    shard_base,
    sharding_for,
    shares_base,
    spec_for,
    spread_sharding,
)
from llmeraser_jax.parallel.sums import Kept, keep_on_devices, map_over_devices, rows_over_devices, sum_over_devices

__all__ = [
    "AXES",
    "EXAMPLES",
    "Kept",
    "example_axes",
    "example_shares",
    "gathered",
    "is_primary",
    "keep_on_devices",
    "looked_up",
    "make_mesh",
    "map_over_devices",
    "mesh_sizes",
    "on_primary",
    "parse_mesh",
    "place_batch",
    "place_stack",
    "replicate",
    "replicated",
    "rows_over_devices",
    "shard_base",
    "sharding_for",
    "shares_base",
    "spec_for",
    "spread_sharding",
    "start_processes",
    "sum_over_devices",
    "to_host",
    "whole_shares",
]
