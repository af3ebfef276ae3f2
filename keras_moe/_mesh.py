"""The active `keras.distribution` on JAX, and functions of rows that it splits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np


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


def collected(value: Any, keeps: bool = True) -> np.ndarray | None:
    """Return the whole of a `jax.Array` on the host; None if not `keeps`.

    All processes of its devices must call it. The parts are sent one by one, so that a
    device needs memory for one of them and not for the whole.

    Args:
        value: `jax.Array` with a `NamedSharding`.
        keeps: bool, whether this process needs the result.
    """
    import jax
    from jax import numpy as jnp
    from jax.sharding import PartitionSpec

    mesh, spec = value.sharding.mesh, value.sharding.spec
    entries = [e if isinstance(e, tuple) else (e,) for e in spec if e is not None]
    axes = tuple(axis for entry in entries for axis in entry)
    if not axes:
        return np.asarray(value) if keeps else None

    @jax.jit
    def part(value: Any, number: Any) -> Any:
        def local(here: Any, number: Any) -> Any:
            own = jax.lax.axis_index(axes) == number
            return jax.lax.psum(jnp.where(own, here, jnp.zeros_like(here)), axes)

        everywhere = PartitionSpec()
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(spec, everywhere),
            out_specs=everywhere,
            check_vma=False,
        )(value, number)

    slices = value.sharding.devices_indices_map(value.shape)
    whole = np.empty(value.shape, value.dtype) if keeps else None
    sizes = [mesh.shape[axis] for axis in axes]
    done = set()
    for place in np.ndindex(mesh.devices.shape):
        along = dict(zip(mesh.axis_names, place, strict=True))
        number = int(np.ravel_multi_index([along[axis] for axis in axes], sizes))
        if number in done:
            continue
        done.add(number)
        found = part(value, number)
        if whole is not None:
            whole[slices[mesh.devices[place]]] = np.asarray(found.addressable_data(0))
    return whole
