"""The mixtures of a model: who computes what on a sample of rows.

Axis letters: n rows (or tokens), d input features, g gates, e experts.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_moe import routing as routing_lib
from keras_moe.layers import HoME, MoE, OMoE, SoftMoE
from keras_moe.metrics import RoutingMetrics
from keras_moe.telemetry._calls import call_arguments
from keras_moe.telemetry._experts import array
from keras_moe.telemetry._layouts import on_all_experts


class Mixture(NamedTuple):
    """One mixture of a model (of a layer with several levels, one level) on a sample.

    Attributes:
        name: str, the path of the layer, with `/level_1` and so on for its levels. If
            several layers have the same path, their number follows: `moe`, `moe_1`.
        gates: the g names: those of the tasks, or "router".
        weights: float32 `(n, g, e)`, the weight of each expert for each row.
        usage: float32 `(g, e)`, the share of each expert: of a router's choices, or of
            a gate's weight.
        readable: bool `(g, e)`, whether a gate can choose the expert.
        top_k: int, the number of experts a row has; None for gates that weight all, and
            if experts choose rows.
        routing: dict of the figures of a router that `RoutingMetrics` has; empty for
            gates.
        experts: the layer of the experts; None if it has no such attribute.
        rows: tensor `(n, d)`, what each of these experts reads; None if they read
            different streams.
        layer: the layer.
    """

    name: str
    gates: tuple[str, ...]
    weights: np.ndarray
    usage: np.ndarray
    readable: np.ndarray
    top_k: int | None
    routing: dict[str, float]
    experts: Any
    rows: Any
    layer: Any


def find_mixtures(model: keras.Model) -> list[keras.layers.Layer]:
    """Return the layers of a model that are mixtures: those that expose their gates.

    Raises:
        TypeError: if `model` is not a Keras model.
        ValueError: if it is not built, or has no mixture.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"`model` must be a keras.Model. Received: model={model!r} of type "
            f"{type(model).__name__}"
        )
    if not model.built:
        raise ValueError(
            "`model` must be built: give it an `Input`, or call it on a batch. "
            f"Received: model {model.name!r}, which is not built"
        )
    found = [
        layer
        for layer in model._flatten_layers(include_self=False)
        if callable(getattr(layer, "gate_weights", None)) or isinstance(layer, MoE)
    ]
    if not found:
        raise ValueError(
            "`model` must have a mixture: a layer of keras_moe such as MoE, MMoE, PLE "
            f"or SoftMoE. Received: model {model.name!r}, whose layers are "
            f"{[type(layer).__name__ for layer in model.layers]}"
        )
    return found


def observe(model: keras.Model, x: Any) -> list[Mixture]:
    """Return what each mixture of a model does with `x`, in inference.

    The model is called once, without XLA, on all of `x`: pass a sample. Of a layer that
    a model calls several times, the first call counts.

    Args:
        model: a built Keras model on any backend, compiled or not.
        x: what the model is called with: an array, or a list or dict of arrays.

    Returns:
        A list of `Mixture`, in the order of the layers.

    Raises:
        TypeError: if `model` is not a Keras model.
        ValueError: if it is not built, has no mixture or calls none, or if a mixture is
            in a part that is compiled by itself: `tf.function`, on JAX `keras.remat`.

    Example:

    >>> inputs = keras.Input((4,))
    >>> outputs = keras_moe.layers.MoE(num_experts=3, expert_units=2)(inputs)
    >>> model = keras.Model(inputs, outputs)
    >>> mixture, = keras_moe.telemetry.observe(model, np.ones((8, 4), "float32"))
    >>> mixture.gates, mixture.weights.shape
    (('router',), (8, 1, 3))
    """
    layers = find_mixtures(model)
    found: list[Mixture] = []
    for layer, given in zip(layers, call_arguments(model, x, layers), strict=True):
        if given is not None:
            read = _of_router if isinstance(layer, MoE) else _of_gates
            found += read(layer, given)
    if not found:
        raise ValueError(
            "`model` must call a mixture when it reads `x`, and not in a program that "
            "is compiled by itself, such as `tf.function`. Received: model "
            f"{model.name!r}, which calls none of {[layer.path for layer in layers]}"
        )
    counts: dict[str, int] = {}
    named = []
    for mixture in found:
        count = counts[mixture.name] = counts.get(mixture.name, -1) + 1
        name = f"{mixture.name}_{count}" if count else mixture.name
        named.append(mixture._replace(name=name))
    return named


def _of_router(layer: MoE, given: dict[str, Any]) -> list[Mixture]:
    record, kept = layer.route(**given)
    rows = ops.reshape(given["inputs"], (-1, given["inputs"].shape[-1]))
    e = layer.num_experts
    has_probs = record.router_probs is not None
    needs_probs = RoutingMetrics.NEEDS_PROBS
    shown = [
        name for name in RoutingMetrics.KNOWN if has_probs or name not in needs_probs
    ]
    metric = RoutingMetrics(e, shown, prefix="router")
    metric.update_state(record, kept)
    figures = {name: float(value) for name, value in metric.result().items()}
    load = [figures.pop(f"router_expert_load_{k}") for k in range(e)]
    weights = array(routing_lib.gates(record, e, rows.shape[0]))[:, None]
    if record.mask is not None:
        kept_rows = np.asarray(ops.convert_to_numpy(record.mask))
        weights, rows = weights[kept_rows], array(rows)[kept_rows]
    return [
        Mixture(
            layer.path,
            ("router",),
            weights,
            np.array([load], "float32"),
            np.ones((1, e), bool),
            layer.top_k if layer.router.choice == "token" else None,
            {name.removeprefix("router_"): value for name, value in figures.items()},
            layer.experts,
            rows,
            layer,
        )
    ]


def _of_gates(layer: Any, given: dict[str, Any]) -> list[Mixture]:
    taken = inspect.signature(layer.gate_weights).parameters
    found = layer.gate_weights(**{k: v for k, v in given.items() if k in taken})
    levels = found if isinstance(found, list | tuple) else [found]
    experts = getattr(layer, "experts", None)
    of_level = experts if isinstance(experts, list | tuple) else [experts]
    inputs = next(iter(given.values()))
    # The experts of `HoME` read the inputs times their feature gates.
    apart = isinstance(layer, SoftMoE | HoME) or "task_inputs" in given
    mixtures = []
    for i, gates in enumerate(levels):
        weights, readable = on_all_experts(layer, i, _by_row(array(gates), layer))
        rows = None
        if i == 0 and not apart:
            rows = ops.reshape(inputs, (-1, inputs.shape[-1]))
        mixtures.append(
            Mixture(
                f"{layer.path}/level_{i}" if len(levels) > 1 else layer.path,
                _gate_names(layer, i, weights.shape[1]),
                weights,
                _mean_of_finite(weights),
                readable,
                getattr(layer, "top_k", None),
                {},
                _experts_of_gates(of_level, i, weights.shape[-1]),
                rows,
                layer,
            )
        )
    return mixtures


def _experts_of_gates(of_level: Any, level: int, number: int) -> Any:
    """Return the experts that the gates weight; None if there are others beside."""
    experts = of_level[level] if level < len(of_level) else None
    # `M3oE` has further experts, without a gate.
    return experts if getattr(experts, "num_experts", number) == number else None


def _mean_of_finite(weights: np.ndarray) -> np.ndarray:
    finite = weights[np.isfinite(weights).all(axis=(1, 2))]
    return finite.mean(axis=0) if len(finite) else np.zeros(weights.shape[1:])


def _by_row(gates: np.ndarray, layer: keras.layers.Layer) -> np.ndarray:
    """(..., g, e) -> (n, g, e). A `SoftMoE` has one gate."""
    if isinstance(layer, SoftMoE):
        return gates.reshape(-1, 1, gates.shape[-1])
    return gates.reshape(-1, *gates.shape[-2:])


def _gate_names(layer: Any, level: int, gates: int) -> tuple[str, ...]:
    names = tuple(map(str, getattr(layer, "tasks", None) or ()))
    if isinstance(layer, SoftMoE):
        return ("slots",)
    if isinstance(layer, HoME) and level == 0:
        return tuple(f"group_{i}" for i in range(gates))
    if isinstance(layer, OMoE):
        return ("all tasks",)
    return names if len(names) == gates else (*names, "shared")
