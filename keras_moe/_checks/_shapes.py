"""Checks of the shapes and the dtypes of tensors."""

from __future__ import annotations

import numbers
from typing import Any

from keras import backend, ops

from keras_moe._checks._values import count, positive_int


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


def scalar(name: str, value: Any, allow_zero: bool = False) -> Any:
    """Return `value` if it is an int >= 1 (or >= 0), or a scalar integer tensor."""
    if value is None or isinstance(value, numbers.Number):
        return count(name, value) if allow_zero else positive_int(name, value)
    if not hasattr(value, "shape"):
        # Compilers use symbolic integers; those of JAX have no `__index__`.
        is_symbol = hasattr(value, "__int__") and hasattr(value, "__floordiv__")
        return value if is_symbol else count(name, value)
    axes(**{name: (value, "")})
    integers(**{name: value})
    return value


def tensor(name: str, value: Any) -> Any:
    """Return `value` as a tensor or array of real numbers, or raise ValueError."""
    rule = f"`{name}` must be a tensor or array of real numbers. Received: "
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        try:
            value = ops.convert_to_tensor(value)
        except Exception as error:  # Each backend has its own.
            raise ValueError(f"{rule}{name}={value!r}") from error
    dtype = str(getattr(value.dtype, "name", value.dtype))
    if not any(kind in dtype for kind in ("int", "float", "bool")):
        raise ValueError(f"{rule}{name} of dtype {dtype}")
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
        dtype = backend.standardize_dtype(tensor(name, value).dtype)
        if "int" not in dtype:
            raise ValueError(
                f"`{name}` must hold integers. Received: {name} of dtype {dtype}"
            )


def _sizes(name: str, value: Any, letters: str) -> dict[str, Any]:
    """Return the size of every axis, or an empty dict if the rank is unknown."""
    shape = None if value is None else _static_shape(tensor(name, value))
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
    value = value if hasattr(value, "shape") else ops.convert_to_tensor(value)
    # `len` fails for a TensorFlow shape of unknown rank.
    return None if getattr(value.shape, "rank", 0) is None else tuple(value.shape)


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
