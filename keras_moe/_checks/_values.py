"""Checks of numbers, widths, flags, seeds and names."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np


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
        return (positive_int(f"{name}[0]", value),)
    sizes = items(name, value, "an integer or a sequence of integers >= 1")
    if not sizes and not allow_empty:
        raise ValueError(f"`{name}` must name at least one layer. Received: {value!r}")
    return tuple(positive_int(f"{name}[{i}]", size) for i, size in enumerate(sizes))


def items(name: str, value: Any, rule: str) -> tuple[Any, ...]:
    """Return the elements of `value`, which must have an order: no set, no dict."""
    unordered = isinstance(value, str | bytes | bytearray | Set | Mapping)
    try:
        if not isinstance(value, Iterable) or unordered:
            raise TypeError
        return tuple(value)  # Arrays of rank 0 have `__iter__`, too, and raise here.
    except (TypeError, NotImplementedError) as error:
        raise ValueError(
            f"`{name}` must be {rule}. Received: {name}={value!r}"
        ) from error


def rate(name: str, value: Any) -> float:
    """Return `value` if it is a fraction in [0, 1), else raise ValueError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"`{name}` must be a number. Received: {name}={value!r}")
    if not 0.0 <= float(value) < 1.0:
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


def divisor(name: str, value: Any, dtype: str = "float32", power: int = 1) -> float:
    """Return `value` if numbers of `dtype` can be divided by it, else raise ValueError.

    Its bound, the root of the smallest normal number, is about 1e-19 for float32: the
    quotient is finite if its numerator is below 1e19. `power` is that of the divisor.
    """
    least = float(np.finfo(dtype).tiny) ** (1 / (power + 1))
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
            "`seed` must be an integer or None, at least 0 and below 2**32. "
            f"Received: seed={value!r}"
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


def path(name: str, value: Any) -> Path:
    """Return `value` as a path if it is a non-empty str or a path."""
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise ValueError(
            f"`{name}` must be a path, as str or pathlib.Path. "
            f"Received: {name}={value!r}"
        )
    return Path(value)


def optional_text(name: str, value: Any) -> str | None:
    """Return `value` if it is None or as `text` wants it."""
    return None if value is None else text(name, value)


def names_from(name: str, value: Any, known: Iterable[str]) -> tuple[str, ...]:
    """Return the elements of a sequence if all are in `known`, or raise ValueError."""
    listed = ", ".join(repr(one) for one in known)
    names = items(name, value, f"a sequence of names from {listed}")
    for one in names:
        if not isinstance(one, str) or one not in known:
            raise ValueError(
                f"`{name}` must hold names from {listed}. "
                f"Received: {one!r} in {name}={value!r}"
            )
    return names


def one_of(name: str, value: Any, known: Iterable[str]) -> str:
    """Return `value` if it is one of the names in `known`, else raise ValueError."""
    known = list(known)
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"`{name}` must be one of {known}. Received: {name}={value!r}")
    return value


def choices(name: str, value: Any, num_experts: int | None) -> int:
    """Return `value` if it is an int in [1, num_experts], else raise ValueError."""
    checked = positive_int(name, value)
    if num_experts is not None and checked > num_experts:
        raise ValueError(
            f"`{name}` must not exceed the number of experts e. "
            f"Received: {name}={value}, e={num_experts}"
        )
    return checked
