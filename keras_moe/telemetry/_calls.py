"""What the layers of a model are called with, in one forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import keras


def call_arguments(
    model: keras.Model, x: Any, layers: Sequence[keras.layers.Layer]
) -> list[dict[str, Any] | None]:
    """Return the arguments of each layer's `call` while the model reads `x`.

    The model is called eagerly and in inference. Of a layer that is called more than
    once, the first call counts; None stands for a layer that is not called.
    """
    found: dict[int, dict[str, Any]] = {}
    try:
        for layer in layers:
            # Not by `layer.call = `: Keras tracks what is assigned.
            object.__setattr__(layer, "call", _recording(layer, found))
        # Without `training`: with False, routers would update the metrics of `fit`.
        model(x)
    finally:
        for layer in layers:
            vars(layer).pop("call", None)
    return [found.get(id(layer)) for layer in layers]


def _recording(
    layer: keras.layers.Layer, found: dict[int, dict[str, Any]]
) -> Callable[..., Any]:
    call = layer.call
    signature = inspect.signature(call)

    def recording(*args: Any, **kwargs: Any) -> Any:
        given = dict(signature.bind(*args, **kwargs).arguments)
        given.pop("training", None)
        found.setdefault(id(layer), given)
        return call(*args, **kwargs)

    return recording
