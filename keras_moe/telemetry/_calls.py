"""What the layers of a model are called with, in one forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_moe import _backend


def call_arguments(
    model: keras.Model, x: Any, layers: Sequence[keras.layers.Layer]
) -> list[dict[str, Any] | None]:
    """Return the arguments of each layer's `call` while the model reads `x`.

    The model is called eagerly and in inference. Of a layer that is called more than
    once, the first call counts; None stands for a layer that is not called.

    Raises:
        ValueError: if a layer is called in a program that is compiled by itself.
    """
    found: dict[int, dict[str, Any]] = {}
    before = [vars(layer).get("call") for layer in layers]
    metrics = [getattr(layer, "routing_metrics", None) for layer in layers]
    active = [metric for metric in metrics if metric is not None and metric.active]
    try:
        for metric in active:
            metric.active = False  # They are those of `fit`.
        for layer in layers:
            # Not by `layer.call = `: Keras tracks what is assigned.
            object.__setattr__(layer, "call", _recording(layer, found))
        model(x)
    finally:
        for layer, own in zip(layers, before, strict=True):
            vars(layer).pop("call", None)
            if own is not None:
                object.__setattr__(layer, "call", own)
        for metric in active:
            metric.active = True
    return [found.get(id(layer)) for layer in layers]


def _recording(
    layer: keras.layers.Layer, found: dict[int, dict[str, Any]]
) -> Callable[..., Any]:
    call = layer.call
    signature = inspect.signature(call)

    def recording(*args: Any, **kwargs: Any) -> Any:
        given = dict(signature.bind(*args, **kwargs).arguments)
        given.pop("training", None)
        if any(_backend.is_traced(part) for part in keras.tree.flatten(given)):
            raise ValueError(
                f"{layer.path} cannot be observed: it is called in a program that is "
                "compiled by itself, such as `tf.function`, or on JAX `keras.remat` or "
                "`keras.RematScope`. "
                f"Received: layer {layer.name!r} of {type(layer).__name__}"
            )
        found.setdefault(id(layer), given)
        return call(*args, **kwargs)

    return recording
