"""Argument checks whose messages name the argument, the rule and the value."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

import keras
import numpy as np
from keras import backend, ops


def positive_int(name: str, value: Any) -> int:
    """Return `value` if it is an int of at least 1, else raise ValueError."""
    return count(name, value, least=1)


def count(name: str, value: Any, least: int = 0) -> int:
    """Return `value` if it is an int of at least `least`, else raise ValueError."""
    integral = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not integral or int(value) < least:
        raise ValueError(
            f"`{name}` must be an integer >= {least}. Received: {name}={value!r}"
        )
    if int(value) >= 2**31:  # No axis of a tensor is longer.
        raise ValueError(
            f"`{name}` must be an integer < 2**31. Received: {name}={value!r}"
        )
    return int(value)


def top_k(top_k: Any, num_experts: int) -> int:
    """Return `top_k` if it is in [1, num_experts], else raise ValueError."""
    checked = positive_int("top_k", top_k)
    if checked > num_experts:
        raise ValueError(
            "`top_k` must not exceed `num_experts`. "
            f"Received: top_k={top_k}, num_experts={num_experts}"
        )
    return checked


def unit_sizes(name: str, value: Any, allow_empty: bool = False) -> tuple[int, ...]:
    """Return the layer widths in `value` (an int or a sequence) as a tuple."""
    if isinstance(value, numbers.Integral):
        return (positive_int(name, value),)
    sizes = items(name, value, "an integer or a sequence of integers >= 1")
    if not sizes and not allow_empty:
        raise ValueError(f"`{name}` must name at least one layer. Received: {value!r}")
    return tuple(positive_int(f"{name}[{i}]", size) for i, size in enumerate(sizes))


def items(name: str, value: Any, rule: str) -> tuple[Any, ...]:
    """Return the elements of `value`, which must have an order: no set, no dict."""
    unordered = isinstance(value, str | bytes | bytearray | Set | Mapping)
    # Arrays of rank 0 have the method `__iter__`, too.
    if not isinstance(value, Iterable) or unordered or _static_rank(value) == 0:
        raise ValueError(f"`{name}` must be {rule}. Received: {name}={value!r}")
    return tuple(value)


def rate(name: str, value: Any) -> float:
    """Return `value` if it is a fraction in [0, 1), else raise ValueError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"`{name}` must be a number. Received: {name}={value!r}")
    if not 0.0 <= value < 1.0 or float(value) == 1.0:  # A fraction, rounded.
        raise ValueError(f"`{name}` must be in [0, 1). Received: {name}={value!r}")
    return float(value)


def positive_number(name: str, value: Any) -> float:
    """Return `value` if it is a finite number above 0, else raise ValueError."""
    if not _is_finite(value) or float(value) <= 0.0:
        raise ValueError(
            f"`{name}` must be a finite number > 0. Received: {name}={value!r}"
        )
    return float(value)


def non_negative_number(name: str, value: Any) -> float:
    """Return `value` if it is a finite number of at least 0, else raise ValueError."""
    if not _is_finite(value) or value < 0.0:
        raise ValueError(
            f"`{name}` must be a finite number >= 0. Received: {name}={value!r}"
        )
    return float(value)


def finite_number(name: str, value: Any) -> float:
    """Return `value` if it is a finite number, else raise ValueError."""
    if not _is_finite(value):
        raise ValueError(
            f"`{name}` must be a finite number. Received: {name}={value!r}"
        )
    return float(value)


def divisor(name: str, value: Any, dtype: str = "float32") -> float:
    """Return `value` if numbers of `dtype` can be divided by it, else raise ValueError.

    Its bound, the root of the smallest normal number, is about 1e-19 for float32: the
    quotient is finite if its numerator is below 1e19.
    """
    least = float(np.finfo(dtype).tiny) ** 0.5
    checked = positive_number(name, value)
    if checked < least:
        raise ValueError(
            f"`{name}` must be a finite number >= {least:.3g}, for quotients that are "
            f"finite in {dtype}. Received: {name}={value!r}"
        )
    return checked


def _is_finite(value: Any) -> bool:
    """Whether `value` is a number that float32 can hold."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return abs(float(value)) <= _LARGEST
    except OverflowError:  # An integer.
        return False


_LARGEST = float(np.finfo("float32").max)


def each(name: str, value: Any, check: Callable[[str, Any], Any]) -> list[Any]:
    """Return the checked elements of a sequence with at least one."""
    elements = items(name, value, "a sequence of numbers, one for each task")
    if not elements:
        raise ValueError(f"`{name}` must not be empty. Received: {name}={value!r}")
    return [check(f"{name}[{i}]", element) for i, element in enumerate(elements)]


def one_per_task(name: str, values: list[Any], tasks: int) -> None:
    """Raise ValueError unless there is one value for each task."""
    if len(values) != tasks:
        raise ValueError(
            f"`{name}` must have one element for each of the {tasks} tasks. "
            f"Received: {name}={values!r}"
        )


def flag(name: str, value: Any) -> bool:
    """Return `value` if it is True or False, else raise ValueError."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"`{name}` must be True or False. Received: {name}={value!r}")
    return bool(value)


def seed(value: Any) -> int | None:
    """Return a seed as an int, or None; raise ValueError for other values."""
    if value is None:
        return None
    integral = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    # Seeds of random generators are uint32 on JAX.
    if not integral or not 0 <= int(value) < 2**32:
        raise ValueError(
            f"`seed` must be an integer in [0, 2**32) or None. Received: seed={value!r}"
        )
    return int(value)


def next_seed(seed: int | None, step: int) -> int | None:
    """Return the seed of a further random generator, made from a checked seed."""
    return None if seed is None else (seed + step) % 2**32


def text(name: str, value: Any, rule: str = "a string of printable characters") -> str:
    """Return `value` if it is a string that can name something, or raise ValueError."""
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ValueError(f"`{name}` must be {rule}. Received: {name}={value!r}")
    return str(value)


def optional_text(name: str, value: Any) -> str | None:
    """Return `value` if it is None or as `text` wants it."""
    return None if value is None else text(name, value)


def initializer(name: str, value: Any) -> Any:
    """Return an initializer of Keras or a function; raise ValueError for others.

    None is "glorot_uniform", as for a weight of Keras.
    """
    rule = "an initializer, its name or config, or a function of (shape, dtype)"
    if hasattr(value, "shape"):  # Keras makes a function of it that no file can hold.
        raise ValueError(f"`{name}` must be {rule}. Received: {name}={value!r}")
    value = "glorot_uniform" if value is None else value
    known = keras.initializers
    return _keras_object(name, value, rule, known.get, known.Initializer)


def regularizer(name: str, value: Any) -> Any:
    """Return a regularizer of Keras, a function or None, else raise ValueError."""
    rule = "None, a regularizer, its name or config, or a function of a tensor"
    known = keras.regularizers
    return _keras_object(name, value, rule, known.get, known.Regularizer)


def activation(name: str, value: Any, allow_layer: bool = False) -> Any:
    """Return an activation function, else raise ValueError.

    A layer is an activation only where no other layer would share its weights.
    """
    rule = "None, the name of an activation or a function"
    if not allow_layer:
        rule += ", not a layer"
    layer = keras.layers.Layer if allow_layer else None
    return _keras_object(name, value, rule, keras.activations.get, layer)


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


def _keras_object(
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
    try:
        policy = keras.dtype_policies.get(dtype)
        floats = keras.backend.is_float_dtype(policy.compute_dtype)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        floats, reason = False, error
    else:
        reason = None
    if not floats:
        raise ValueError(
            "`dtype` must be a float dtype, a mixed policy or its config. "
            f"Received: dtype={dtype!r}"
        ) from reason


def last_dimension(layer: str, shape: Any) -> int:
    """Return the size of the last axis, which determines the weight shapes."""
    if isinstance(shape, dict):
        raise ValueError(
            f"{layer} expects one tensor as its input (for example, of one task). "
            f"Received a dict of {sorted(shape)}"
        )
    if len(shape) < 2:
        raise ValueError(
            f"{layer} expects inputs of rank >= 2, (..., features). "
            f"Received an input of shape {shape}"
        )
    if shape[-1] is None:
        raise ValueError(
            f"{layer} needs inputs whose last axis has a static size. "
            f"Received an input of shape {shape}"
        )
    return shape[-1]


def one_of(name: str, value: Any, known: Iterable[str]) -> str:
    """Return `value` if it is one of the names in `known`, else raise ValueError."""
    known = list(known)
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"`{name}` must be one of {known}. Received: {name}={value!r}")
    return value


def scalar(name: str, value: Any, allow_zero: bool = False) -> Any:
    """Return `value` if it is an int >= 1 (or >= 0), or a scalar integer tensor."""
    if value is None or isinstance(value, numbers.Real):
        return count(name, value) if allow_zero else positive_int(name, value)
    if hasattr(value, "shape"):
        axes(**{name: (value, "")})
        integers(**{name: value})
    return value


def axes(**arguments: tuple[Any, str]) -> None:
    """Raise ValueError unless the shapes of the arguments are consistent.

    Each argument is a pair of its value and its axes, one letter per axis:
    `probs=(probs, "ne")`. A leading "..." stands for any further axes, the same in all
    arguments. "?" at the end allows None. "=e" marks a value that is the size of the
    axis e instead of a tensor.

    Only static shapes are checked. Unknown ranks and sizes always pass.
    """
    known: dict[str, tuple[Any, str]] = {}
    for name, (value, spec) in arguments.items():
        letters = spec.removesuffix("?")
        if value is None and letters != spec:
            continue
        if spec.startswith("="):
            sizes = {spec[1:]: value}
        else:
            sizes = _sizes(name, value, letters)
        for axis, size in sizes.items():
            if not _is_known(size):
                continue
            first, where = known.setdefault(axis, (size, name))
            if not _agree(first, size):
                rule = f"{axis}={first} as in"
                if axis == "...":
                    rule = f"the leading axes {first} of"
                raise ValueError(
                    f"`{name}` must have the shape {_format_axes(letters)} with {rule} "
                    f"`{where}`. {_received(name, value)}"
                )


def integers(**arguments: Any) -> None:
    """Raise ValueError unless the tensors hold integers."""
    for name, value in arguments.items():
        tensor = value if hasattr(value, "dtype") else ops.convert_to_tensor(value)
        dtype = backend.standardize_dtype(tensor.dtype)
        if "int" not in dtype:
            raise ValueError(
                f"`{name}` must hold integers. Received: {name} of dtype {dtype}"
            )


def choices(name: str, value: Any, num_experts: int | None) -> int:
    """Return `value` if it is an int in [1, num_experts], else raise ValueError."""
    checked = positive_int(name, value)
    if num_experts is not None and checked > num_experts:
        raise ValueError(
            f"`{name}` must not exceed the number of experts e. "
            f"Received: {name}={value}, e={num_experts}"
        )
    return checked


def _sizes(name: str, value: Any, letters: str) -> dict[str, Any]:
    """Return the size of every axis, or an empty dict if the rank is unknown."""
    shape = None if value is None else _static_shape(value)
    if value is not None and shape is None:
        return {}
    tail = letters.removeprefix("...")
    free = tail != letters
    if shape is None or len(shape) < len(tail) or (len(shape) > len(tail) and not free):
        raise ValueError(
            f"`{name}` must have the shape {_format_axes(letters)}. "
            f"{_received(name, value)}"
        )
    split = len(shape) - len(tail)
    sizes: dict[str, Any] = dict(zip(tail, shape[split:], strict=True))
    return {"...": shape[:split], **sizes} if free else sizes


def _static_shape(value: Any) -> tuple[Any, ...] | None:
    tensor = value if hasattr(value, "shape") else ops.convert_to_tensor(value)
    # `len` fails for a TensorFlow shape of unknown rank.
    return None if getattr(tensor.shape, "rank", 0) is None else tuple(tensor.shape)


def _static_rank(value: Any) -> int | None:
    """Return the rank of an array or tensor; None if there is none, or an unknown."""
    shape = _static_shape(value) if hasattr(value, "shape") else None
    return None if shape is None else len(shape)


def _is_known(size: Any) -> bool:
    # Compilers use symbolic sizes, which must not be compared.
    return isinstance(size, int | tuple)


def _agree(first: Any, second: Any) -> bool:
    if isinstance(first, tuple):
        return len(first) == len(second) and all(map(_agree, first, second))
    return not (_is_known(first) and _is_known(second)) or first == second


def _format_axes(letters: str) -> str:
    tail = letters.removeprefix("...")
    names = [*(["..."] if tail != letters else []), *tail]
    return f"({', '.join(names)}{',' if letters in tail and len(tail) == 1 else ''})"


def _received(name: str, value: Any) -> str:
    if value is None:
        return f"Received: {name}=None"
    return f"Received: {name} of shape {_static_shape(value)}"
