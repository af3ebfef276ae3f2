"""The ids that the inputs of a functional model look up in embeddings.

TensorFlow's gather says "indices[0,0] = 9 is not in [0, 9)", without the feature, and a
negative id reads a row from the end. The ids of each `keras.layers.Embedding` are found
in the graph of the model, also in nested models and behind operations without weights,
such as a reshape, a slice or a lookup.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import keras


@dataclass(frozen=True, eq=False)
class Source:
    """A tensor of the model, from the features.

    Attributes:
        features: the names of the features that it is computed from.
        compute: function of a dict of the features to the tensor.
        size: the number of values, from 0 on, that a lookup gives; None if unknown.
    """

    features: tuple[str, ...]
    compute: Callable[[Mapping[str, Any]], Any]
    size: int | None = None


def looked_up(inputs: Mapping[str, Any], model: keras.Model) -> dict[Source, int]:
    """Return the ids that can be outside of their embedding, and its number of rows.

    Args:
        inputs: the inputs of `model` by name of the feature.
        model: a functional model.
    """
    sources = {
        id(tensor): Source((name,), operator.itemgetter(name), _size(tensor))
        for name, tensor in inputs.items()
    }
    found: dict[Source, int] = {}
    for source, rows in _lookups(model, sources):
        found[source] = min(rows, found.get(source, rows))
    return found


def check_ids(features: Mapping[str, Any], ids: Mapping[Source, int]) -> dict[str, Any]:
    """Return `features`, with assertions in the graph that their ids are in range."""
    import tensorflow as tf

    checks = []
    for source, rows in ids.items():
        values = source.compute(features)
        for part in ("flat_values", "values"):  # of a ragged or sparse tensor
            values = getattr(values, part, values)
        values = tf.cast(values, tf.int32) if values.dtype.is_bool else values
        lowest, highest = tf.reduce_min(values), tf.reduce_max(values)
        # Exact: integers have values below 2^53, or both sides stay beyond it.
        not_low = tf.cast(lowest, tf.float64) > -1.0
        not_high = tf.cast(highest, tf.float64) < float(rows)
        names = " and ".join(f"`{name}`" for name in source.features)
        plural = "s" if len(source.features) > 1 else ""
        rule = f"feature{plural} {names} must hold ids with 0 <= id < {rows}. Received:"
        value = tf.where(not_low, highest, lowest)
        # `tf.debugging.Assert` adds a condition for values other than int32.
        check = tf.raw_ops.Assert(condition=not_low & not_high, data=[rule, value])
        checks.append(check)
    with tf.control_dependencies(checks):
        return {name: tf.identity(value) for name, value in features.items()}


def _lookups(
    model: keras.Model, inputs: Mapping[int, Source]
) -> Iterator[tuple[Source, int]]:
    """Yield the ids of all embeddings, from the inputs whose source is known."""
    paths = _Paths(inputs)
    for node in itertools.chain.from_iterable(model._nodes_by_depth.values()):
        layer, arguments = node.operation, node.arguments
        if isinstance(layer, keras.layers.Embedding):
            source = paths.source(arguments.keras_tensors[0])
            rows = layer.input_dim
            if source is not None and (source.size is None or source.size > rows):
                yield source, rows
            continue
        nested = getattr(layer, "_functional", layer)  # of a Sequential
        if isinstance(nested, keras.Model) and hasattr(nested, "_nodes_by_depth"):
            given = arguments.args[0] if arguments.args else None
            pairs = _pairs(nested, given)
            inner = {id(tensor): paths.source(outer) for tensor, outer in pairs}
            yield from _lookups(nested, {k: v for k, v in inner.items() if v})


def _pairs(model: keras.Model, given: Any) -> list[tuple[Any, Any]]:
    """Return the inputs of a nested model, each with the tensor that it is given."""
    structure = model._inputs_struct
    if isinstance(structure, dict) and isinstance(given, Mapping):
        return [(structure[name], given[name]) for name in structure if name in given]
    inputs, given = keras.tree.flatten(structure), keras.tree.flatten(given)
    return list(zip(inputs, given, strict=True)) if len(inputs) == len(given) else []


class _Paths:
    """How tensors of a model come from its inputs, by operations without weights."""

    def __init__(self, inputs: Mapping[int, Source]) -> None:
        self._inputs = inputs
        self._sources: dict[int, Source | None] = {}

    def source(self, tensor: Any) -> Source | None:
        """Return the source of `tensor`, or None if it is not known."""
        if id(tensor) in self._inputs:
            return self._inputs[id(tensor)]
        if not isinstance(tensor, keras.KerasTensor):
            return None
        if id(tensor) not in self._sources:
            self._sources[id(tensor)] = self._traced(tensor)
        return self._sources[id(tensor)]

    def _traced(self, tensor: Any) -> Source | None:
        inputs = self._inputs_of(tensor)
        if not inputs:
            return None
        model = keras.Model(inputs, tensor)
        parts = [self._inputs[id(each)] for each in inputs]
        names = tuple(sorted({name for part in parts for name in part.features}))
        return Source(
            *(names, lambda f: model([part.compute(f) for part in parts])),
            _size(tensor),
        )

    def _inputs_of(self, tensor: Any) -> list[Any] | None:
        """Return the inputs of the computation, or None if a part of it has weights."""
        found, waiting, seen = [], [tensor], set()
        while waiting:
            each = waiting.pop()
            if id(each) in seen:
                continue
            seen.add(id(each))
            if id(each) in self._inputs:
                found.append(each)
                continue
            history = each._keras_history
            node = history.operation._inbound_nodes[history.node_index]
            if node.is_input or getattr(history.operation, "weights", None):
                return None
            waiting.extend(node.input_tensors)
        return found


def _size(tensor: Any) -> int | None:
    """Return the number of values of a bool or of the result of a lookup, or None."""
    if tensor.dtype == "bool":
        return 2
    layer = tensor._keras_history.operation
    if getattr(layer, "output_mode", None) != "int":
        return None
    if isinstance(layer, keras.layers.Hashing):
        return layer.num_bins
    if isinstance(layer, keras.layers.Discretization):
        return len(layer.bin_boundaries) + 1
    if isinstance(layer, keras.layers.IntegerLookup | keras.layers.StringLookup):
        # Without a row for unknown values they are -1.
        known = layer.num_oov_indices > 0 and not layer.invert
        return layer.vocabulary_size() if known else None
    return None
