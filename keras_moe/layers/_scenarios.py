"""The input `scenario`: one integer id per row, and what is unknown among them.

Axis letters: n rows, p scenarios.

An id outside [0, p) is unknown. Layers give its rows what the scenarios have in common,
and count it as scenario p.
"""

from __future__ import annotations

from typing import Any

from keras import backend, ops

from keras_moe import _backend, _checks
from keras_moe.layers._parts import check_leading_axes, checked_batch


def checked_scenario(scenario: Any, inputs: Any) -> Any:
    """Return `scenario` after checking its type, and its axes against `inputs`."""
    # With several replicas Keras first traces with float64 in place of every input.
    if _backend.num_replicas() == 1:
        _checks.integers(scenario=scenario)
    scenario = ops.convert_to_tensor(scenario)
    check_leading_axes("scenario", scenario.shape, inputs.shape, features=0)
    return checked_batch("scenario", scenario, inputs)


def check_scenario_shape(
    scenario_shape: tuple[int | None, ...] | None,
    inputs_shape: tuple[int | None, ...],
) -> None:
    """Raise ValueError unless the shape is the leading axes of `inputs`."""
    check_leading_axes("scenario", scenario_shape, inputs_shape, features=0)


def scenario_index(scenario: Any, num_scenarios: int) -> Any:
    """Return the ids as a flat (n,) int32 in [0, p], where p is an unknown id."""
    ids = ops.reshape(scenario, (-1,))
    dtype = backend.standardize_dtype(ids.dtype)
    # A narrower type may not hold p, and a cast of a wider one may change the id.
    if dtype not in ("int64", "uint64"):
        ids = ops.cast(ids, "int32")
    known = ops.logical_and(ids >= 0, ids < num_scenarios)
    unknown = ops.full_like(ids, num_scenarios)
    return ops.cast(ops.where(known, ids, unknown), "int32")
