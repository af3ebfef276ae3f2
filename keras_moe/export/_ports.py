"""Checks of a model's signature: names, shapes and dtypes of inputs and outputs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import keras

from keras_moe import _backend

# Dtypes that requests support, in JSON and in NumPy.
_DTYPES = (
    *("bool", "string", "float16", "float32", "float64"),
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
)
# The default names of Keras tensors; the number differs between runs.
_UNNAMED = re.compile(r"(keras_tensor|input|input_layer|output)(_\d+)?")
_RESERVED = ("serve", "serving_default", "variables", "signatures")


def check_backend() -> None:
    """Raise ValueError on backends other than TensorFlow."""
    if _backend.name() != "tensorflow":
        raise ValueError(
            "export needs the TensorFlow backend. Save the model as a .keras file and "
            'load it with KERAS_BACKEND="tensorflow". Received: '
            f"the backend {_backend.name()!r}"
        )


def check_functional(argument: str, model: Any) -> None:
    """Raise ValueError unless `model` is functional."""
    # A built `Sequential` has `inputs`, but no `input`.
    ports = ("inputs", "outputs", "input", "output")
    if not isinstance(model, keras.Model) or not all(
        getattr(model, port, None) is not None for port in ports
    ):
        raise ValueError(
            f"`{argument}` must be a functional model, keras.Model(inputs, outputs), "
            "which defines the signature. "
            f"Received: {argument}={model!r}"
        )


def checked_ports(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the inputs and outputs by name, after checking names and dtypes."""
    check_functional("model", model)
    inputs, outputs = model.input, model.output
    if not isinstance(outputs, dict):
        raise ValueError(
            "the outputs of `model` must be a dict by task name, which become the "
            "output names: keras.Model(inputs, {'click': output}). "
            f"Received: outputs of type {type(outputs).__name__}"
        )
    if not isinstance(inputs, dict):
        inputs = inputs if isinstance(inputs, list | tuple) else [inputs]
        inputs = {getattr(tensor, "name", ""): tensor for tensor in inputs}
    for kind, ports in (("input", inputs), ("output", outputs)):
        for name, tensor in ports.items():
            _check_port(kind, name, tensor)
    if len(inputs) != len(model.inputs) or len(outputs) != len(model.outputs):
        raise ValueError(
            "the inputs and outputs of `model` must have unique names. Received: "
            f"{len(model.inputs)} inputs {list(inputs)} and {len(model.outputs)} "
            f"outputs {list(outputs)}"
        )
    reserved = [name for name in _RESERVED if name in outputs]
    if reserved:
        raise ValueError(
            f"an output of `model` must not be named {reserved[0]!r}, which is "
            "reserved in a SavedModel."
        )
    return inputs, outputs


def _check_port(kind: str, name: Any, tensor: Any) -> None:
    # TensorFlow replaces "." and "-" in an input's name by "_".
    more = "._-" if kind == "output" else "_"
    if not isinstance(name, str) or not re.fullmatch(
        rf"[A-Za-z][A-Za-z0-9{more}]*", name
    ):
        raise ValueError(
            f"the name of every {kind} of `model` must start with a letter, followed "
            f"by letters, digits and {list(more)}. Received: {name!r}"
        )
    if _UNNAMED.fullmatch(name):
        raise ValueError(
            f"every {kind} of `model` must have an explicit name: "
            "keras.Input(shape, name='age'), keras.Model(inputs, {'click': output}). "
            f"Received: {name!r}"
        )
    if not isinstance(tensor, keras.KerasTensor) or tensor.dtype not in _DTYPES:
        raise ValueError(
            f"every {kind} of `model` must be a tensor with a dtype in "
            f"{list(_DTYPES)}. Received: {name!r} = {tensor!r}"
        )


def tensor_specs(features: Mapping[str, Any]) -> dict[str, Any]:
    """Return the signature of the inputs, for any batch size."""
    import tensorflow as tf

    return {
        name: tf.TensorSpec((None, *tensor.shape[1:]), tensor.dtype, name)
        for name, tensor in features.items()
    }


def as_inputs(model: keras.Model, features: Mapping[str, Any]) -> Any:
    """Return `features` in the structure of the model's inputs."""
    if isinstance(model.input, dict):
        return {name: features[name] for name in model.input}
    if isinstance(model.input, list | tuple):
        return [features[tensor.name] for tensor in model.input]
    return features[model.input.name]
