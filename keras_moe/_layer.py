"""The base layer: input checks before `keras.layers.Layer.__call__`.

Without them an invalid input fails in an inner layer. These errors name the layer and
the argument of the user's own call.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, ClassVar

import keras

# Arguments of `call` that are not inputs.
_NON_INPUTS = ("self", "mask", "training")


class Layer(keras.layers.Layer):
    """A Keras layer that validates its inputs.

    Class attributes:
        least_rank: the minimum rank of the first input.
        rank_reason: why, for the message of a wrong rank.
    """

    least_rank: ClassVar[int] = 2
    rank_reason: ClassVar[str] = ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer; raise ValueError for an unsupported input."""
        places = _inputs_of(type(self))  # type: ignore[arg-type]
        given = {name: args[i] for name, i in places.items() if i < len(args)}
        given |= {name: kwargs[name] for name in places if name in kwargs}
        for name, value in given.items():
            _check_input(type(self).__name__, name, value)
        first = next(iter(places))
        if first in given:
            self._check_first(first, given[first])
        return super().__call__(*args, **kwargs)

    def _check_first(self, name: str, value: Any) -> None:
        if value is None:
            raise ValueError(
                f"{type(self).__name__} expects one tensor or array as `{name}`. "
                f"Received: {name}=None"
            )
        shape = getattr(value, "shape", None)
        if shape is None or getattr(shape, "rank", 0) is None:
            return
        if len(shape) < self.least_rank:
            raise ValueError(
                f"{type(self).__name__} expects `{name}` of rank >= {self.least_rank}, "
                f"{_axes(self.least_rank)}{self.rank_reason}. "
                f"Received: {name} of shape {tuple(shape)}"
            )


def _axes(rank: int) -> str:
    return {1: "(n,)", 2: "(..., features)"}.get(rank, "(..., tokens, features)")


@cache
def _inputs_of(layer: type) -> dict[str, int]:
    """Return the inputs of `layer.call` and their positions, not counting `self`."""
    names = inspect.signature(layer.call).parameters  # type: ignore[attr-defined]
    return {name: i - 1 for i, name in enumerate(names) if name not in _NON_INPUTS}


def _check_input(layer: str, name: str, value: Any) -> None:
    """Raise ValueError for inputs that would fail later, in an inner operation."""
    if isinstance(value, dict | list | tuple):
        kind = type(value).__name__
        what = f"with the keys {sorted(value, key=str)}"
        if not isinstance(value, dict):
            what = f"of {len(value)}"
        raise ValueError(
            f"{layer} expects one tensor or array as `{name}`. Received: {name} is a "
            f"{kind} {what}"
        )
    if type(value).__name__ == "RaggedTensor" or getattr(value, "ragged", False):
        raise ValueError(
            f"{layer} expects a dense tensor as `{name}`: pad the rows with "
            "`to_tensor()`, and pass a mask to ignore the padding. Received: "
            f"{name} is a RaggedTensor of shape {tuple(value.shape)}"
        )
    dtype = getattr(value, "dtype", None)
    if dtype is not None and _is_text(dtype):
        raise ValueError(
            f"{layer} expects numbers as `{name}`: convert strings to ids with "
            "keras.layers.StringLookup, and ids to features with "
            f"keras.layers.Embedding. Received: {name} of dtype {_dtype_name(dtype)}"
        )


def _dtype_name(dtype: Any) -> str:
    return str(getattr(dtype, "name", dtype))


def _is_text(dtype: Any) -> bool:
    return _dtype_name(dtype).startswith(("string", "str", "bytes", "object"))
