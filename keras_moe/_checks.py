"""Argument checks whose messages name the argument, the rule and the value."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from keras import backend, ops


def positive_int(name: str, value: Any) -> int:
    """Return `value` if it is an int of at least 1, else raise ValueError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(
            f"`{name}` must be an integer >= 1. Received: {name}={value!r}"
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
    sizes = (value,) if isinstance(value, numbers.Integral) else value
    if not isinstance(sizes, Iterable) or isinstance(sizes, str | bytes):
        raise ValueError(
            f"`{name}` must be an integer or a sequence of integers >= 1. "
            f"Received: {name}={value!r}"
        )
    sizes = tuple(sizes)
    if not sizes and not allow_empty:
        raise ValueError(f"`{name}` must name at least one layer. Received: {value!r}")
    return tuple(positive_int(f"{name}[{i}]", size) for i, size in enumerate(sizes))


def rate(name: str, value: Any) -> float:
    """Return `value` if it is a fraction in [0, 1), else raise ValueError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"`{name}` must be a number. Received: {name}={value!r}")
    if not 0.0 <= float(value) < 1.0:
        raise ValueError(f"`{name}` must be in [0, 1). Received: {name}={value!r}")
    return float(value)


def positive_number(name: str, value: Any) -> float:
    """Return `value` if it is a finite number above 0, else raise ValueError."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not 0.0 < float(value) < float("inf"):
        raise ValueError(
            f"`{name}` must be a finite number > 0. Received: {name}={value!r}"
        )
    return float(value)


def non_negative_number(name: str, value: Any) -> float:
    """Return `value` if it is a finite number of at least 0, else raise ValueError."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not 0.0 <= float(value) < float("inf"):
        raise ValueError(
            f"`{name}` must be a finite number >= 0. Received: {name}={value!r}"
        )
    return float(value)


def each(name: str, value: Any, check: Callable[[str, Any], Any]) -> list[Any]:
    """Return the checked elements of a sequence with at least one."""
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | dict):
        raise ValueError(
            f"`{name}` must be a sequence of numbers, one for each task. "
            f"Received: {name}={value!r}"
        )
    found = [check(f"{name}[{i}]", element) for i, element in enumerate(value)]
    if not found:
        raise ValueError(f"`{name}` must not be empty. Received: {name}={value!r}")
    return found


def one_per_task(name: str, values: list[Any], tasks: int) -> None:
    """Raise ValueError unless there is one value for each task."""
    if len(values) != tasks:
        raise ValueError(
            f"`{name}` must have one element for each of the {tasks} tasks. "
            f"Received: {name}={values!r}"
        )


def flag(name: str, value: Any) -> bool:
    """Return `value` if it is True or False, else raise ValueError."""
    if value is not True and value is not False:
        raise ValueError(f"`{name}` must be True or False. Received: {name}={value!r}")
    return value


def seed(value: Any) -> int | None:
    """Return a seed as an int, or None; raise ValueError for other values."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"`seed` must be an integer or None. Received: seed={value!r}")
    return int(value)


def path(name: str, value: Any) -> Path:
    """Return `value` as a path if it is a non-empty str or a path."""
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise ValueError(
            f"`{name}` must be a path, as str or pathlib.Path. "
            f"Received: {name}={value!r}"
        )
    return Path(value)


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


def count(name: str, value: Any, least: int = 0) -> int:
    """Return `value` if it is an int of at least `least`, else raise ValueError."""
    integral = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not integral or value < least:
        raise ValueError(
            f"`{name}` must be an integer >= {least}. Received: {name}={value!r}"
        )
    return int(value)


def one_of(name: str, value: Any, known: Iterable[str]) -> str:
    """Return `value` if it is one of the names in `known`, else raise ValueError."""
    known = list(known)
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"`{name}` must be one of {known}. Received: {name}={value!r}")
    return value


def finite_number(name: str, value: Any) -> float:
    """Return `value` if it is a finite number, else raise ValueError."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not -float("inf") < float(value) < float("inf"):
        raise ValueError(
            f"`{name}` must be a finite number. Received: {name}={value!r}"
        )
    return float(value)


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
