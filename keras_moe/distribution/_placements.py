"""The one rule for what a distribution splits: experts and tables of a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import keras

from keras_moe.experts import MLPExperts, StackedKernels
from keras_moe.experts._mlp import StackedMLP
from keras_moe.layers._parts import HasDispatch


class VariablePlacement(NamedTuple):
    """Where a variable is.

    Attributes:
        path: the path of the variable.
        shape: its shape.
        axes: for each of its axes, the mesh axis over which it is split, or None.
        reason: why it is split or replicated.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    reason: str


Axis = tuple[str, int]  # Its name and its size.


def placements_of(
    model: Any,
    expert_axis: Axis | None,
    table_axis: Axis | None,
    table_rows: int | None = None,
) -> Iterator[VariablePlacement]:
    """Yield the placement of each variable of `model`.

    In the order of `model.weights`. Experts or tables without an axis are replicated.
    Tables have `table_rows`, if it is given, in place of their own rows.
    """
    known: dict[int, tuple[str | None, str]] = {}
    for layer in model._flatten_layers(include_self=True):
        for part, axis, reason in _parts(layer, expert_axis, table_axis, table_rows):
            for variable in part.weights:
                known.setdefault(id(variable), (axis, reason))
    for variable in model.weights:
        other = None, "neither an expert nor a table"
        axis, reason = known.get(id(variable), other)
        axes = (axis, *[None] * (len(variable.shape) - 1))[: len(variable.shape)]
        yield VariablePlacement(variable.path, tuple(variable.shape), axes, reason)


def _parts(
    layer: Any,
    expert_axis: Axis | None,
    table_axis: Axis | None,
    table_rows: int | None,
) -> Iterator[tuple[Any, str | None, str]]:
    """Yield parts of `layer`, the axis over which they are split, and why."""
    shared = getattr(layer, "shared_experts", None)
    if isinstance(shared, keras.layers.Layer):
        yield shared, None, "every token goes to the shared experts"
    for name in ("router", "gates"):
        part = getattr(layer, name, None)
        if isinstance(part, keras.layers.Layer):
            yield part, None, "every token needs the scores of all experts"
    if isinstance(layer, keras.layers.Embedding):
        yield layer, *division(table_rows or layer.input_dim, "rows", table_axis)
    if has_experts(layer):
        yield layer, *division(layer.num_experts, "experts", expert_axis)


def division(count: int, unit: str, axis: Axis | None) -> tuple[str | None, str]:
    """Return the axis that splits `count` units, if it can, and why."""
    if axis is None:
        return None, f"{unit} are not split"
    name, size = axis
    if count % size:
        return None, f"{count} {unit} are not a multiple of {size} devices"
    return name, f"{count // size} of {count} {unit}"


def has_experts(layer: Any) -> bool:
    """Whether a layer is stacked experts, not stacked gates or towers."""
    return isinstance(layer, StackedKernels) and (
        isinstance(layer, MLPExperts) or not isinstance(layer, StackedMLP)
    )


def layers_with_experts(model: Any) -> Iterator[Any]:
    """Yield the layers that can send rows to experts, which an axis must divide."""
    for layer in model._flatten_layers(include_self=True):
        if isinstance(layer, HasDispatch) and hasattr(layer, "experts"):
            yield layer
