"""Checks of Keras objects: Keras takes any callable, for example as an initializer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import keras

from keras_moe._checks._values import flag, optional_text


def initializer(name: str, value: Any) -> Any:
    """Return an initializer of Keras or a function; raise ValueError for others.

    None is "glorot_uniform", as for a weight of Keras.
    """
    rule = "an initializer, its name or config, or a function of (shape, dtype)"
    if hasattr(value, "shape"):  # Keras makes a function of it that no file can hold.
        raise ValueError(f"`{name}` must be {rule}. Received: {name}={value!r}")
    value = "glorot_uniform" if value is None else value
    known = keras.initializers
    return keras_object(name, value, rule, known.get, known.Initializer)


def regularizer(name: str, value: Any) -> Any:
    """Return a regularizer of Keras, a function or None, else raise ValueError."""
    rule = "None, a regularizer, its name or config, or a function of a tensor"
    known = keras.regularizers
    return keras_object(name, value, rule, known.get, known.Regularizer)


def activation(name: str, value: Any, allow_layer: bool = False) -> Any:
    """Return an activation function, else raise ValueError.

    A layer is an activation only where no other layer would share its weights.
    """
    rule = "the name of an activation, a function or None"
    if not allow_layer:
        rule += ", not a layer"
    layer = keras.layers.Layer if allow_layer else None
    return keras_object(name, value, rule, keras.activations.get, layer)


_KINDS = (
    keras.layers.Layer,
    keras.initializers.Initializer,
    keras.regularizers.Regularizer,
    keras.constraints.Constraint,
    keras.losses.Loss,
    keras.metrics.Metric,
    keras.optimizers.Optimizer,
    keras.optimizers.schedules.LearningRateSchedule,
    keras.random.SeedGenerator,
)


def keras_object(
    name: str, value: Any, rule: str, get: Callable[[Any], Any], kind: type | None
) -> Any:
    """Return what `get` finds if it is a `kind` or a function, else raise ValueError.

    Keras takes every callable, for example a layer as an initializer.
    """
    message = f"`{name}` must be {rule}. Received: {name}={value!r}"
    try:
        found = get(value)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(message) from error
    if found is None or (kind is not None and isinstance(found, kind)):
        return found
    if not callable(found) or isinstance(found, (type, *_KINDS)):
        raise ValueError(message)
    return found


def metric(name: str, value: Any) -> Any:
    """Return `value` if it is a metric of labels and predictions."""
    known = isinstance(value, keras.metrics.Metric)
    if not known or "y_pred" not in inspect.signature(value.update_state).parameters:
        raise ValueError(
            f"`{name}` must be a Keras metric of labels and predictions. "
            f"Received: {name}={value!r}"
        )
    return value


def deserialized(name: str, config: dict[str, Any]) -> Any:
    """Return the object of a config, in Keras' safe mode, or raise ValueError."""
    try:
        return keras.saving.deserialize_keras_object(config)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"`{name}` must be a config of serialize_keras_object. {error} "
            f"Received: {name}={config!r}"
        ) from error


def layer_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of `keras.layers.Layer` after checks that Keras leaves out."""
    optional_text("name", options.get("name"))
    if options.get("dtype") is not None:
        float_dtype(options["dtype"])
    if "autocast" in options:
        options["autocast"] = flag("autocast", options["autocast"])
    if "activity_regularizer" in options:
        options["activity_regularizer"] = regularizer(
            "activity_regularizer", options["activity_regularizer"]
        )
    return options


def float_dtype(dtype: Any) -> None:
    """Raise ValueError unless `dtype` is a policy that computes with floats."""
    reason: Exception | None = None
    try:
        policy = keras.dtype_policies.get(dtype)
        floats = keras.backend.is_float_dtype(policy.compute_dtype)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        floats, reason = False, error
    if not floats:
        raise ValueError(
            "`dtype` must be a float dtype, a mixed policy or its config. "
            f"Received: dtype={dtype!r}"
        ) from reason
