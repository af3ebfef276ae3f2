"""Argument checks whose messages name the argument, the rule and the value."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import Any


def positive_int(name: str, value: Any) -> int:
    """Return `value` if it is an int of at least 1, else raise ValueError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(
            f"`{name}` must be an integer >= 1. Received: {name}={value!r}"
        )
    return int(value)


def top_k(top_k: Any, num_experts: int) -> int:
    """Return `top_k` if there are so many experts."""
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


def flag(name: str, value: Any) -> bool:
    """Return `value` if it is True or False, else raise ValueError."""
    if value is not True and value is not False:
        raise ValueError(f"`{name}` must be True or False. Received: {name}={value!r}")
    return value


def last_dimension(layer: str, shape: Any) -> int:
    """Return the size of the last axis, which a layer's weights are built from."""
    if isinstance(shape, dict):
        raise ValueError(
            f"{layer} expects one tensor as its inputs, of one task say. "
            f"Received a dict of {sorted(shape)}"
        )
    if len(shape) < 2:
        raise ValueError(
            f"{layer} expects inputs of rank >= 2, (..., features). "
            f"Received an input of shape {shape}"
        )
    if shape[-1] is None:
        raise ValueError(
            f"{layer} needs the last axis of its inputs to be known. "
            f"Received an input of shape {shape}"
        )
    return shape[-1]


def count(name: str, value: Any) -> int:
    """Return `value` if it is an int of at least 0, else raise ValueError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 0:
        raise ValueError(
            f"`{name}` must be an integer >= 0. Received: {name}={value!r}"
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
