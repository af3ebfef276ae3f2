"""The active `keras.distribution` on JAX, and functions of rows that it splits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras


def active() -> Any:
    """Return the active distribution over several devices of JAX, or None."""
    if keras.backend.backend() != "jax":
        return None
    distribution = keras.distribution.distribution()
    if distribution is None or distribution.device_mesh.devices.size == 1:
        return None
    return distribution


def by_rows(function: Callable[[Any], Any], rows: Any) -> Any:
    """Return `function(rows)`, computed by each device for its part of the first axis.

    The function must treat each row by itself. XLA's partitioner divides most functions
    by itself, but gathers all rows for a top k.
    """
    distribution = active()
    has_rows = distribution is not None and len(rows.shape) > 1
    if not has_rows or not isinstance(rows.shape[0], int):
        return function(rows)
    import jax
    from jax.sharding import PartitionSpec

    mesh, axis = distribution.device_mesh.backend_mesh, distribution.batch_dim_name
    if rows.shape[0] % mesh.shape[axis]:
        return function(rows)
    spec = PartitionSpec(axis)
    return jax.shard_map(
        function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )(rows)
