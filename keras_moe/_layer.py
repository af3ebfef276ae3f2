"""The base layer, which checks its inputs before Keras does.

A wrong input otherwise fails in a layer inside, in a message that names that one. Here
the message names the layer and the argument that the user wrote.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, ClassVar

import keras

# Arguments of a call that are no inputs.
_OTHERS = ("self", "mask", "training")


class Layer(keras.layers.Layer):
    """A Keras layer that checks its inputs first.

    Class attributes:
        least_rank: the smallest rank of its first input.
    """

    least_rank: ClassVar[int] = 2

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer, or say which input it cannot take."""
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
                f"{_axes(self.least_rank)}. Received: {name} of shape {tuple(shape)}"
            )


def _axes(rank: int) -> str:
    return {1: "(n,)", 2: "(..., features)"}.get(rank, "(..., tokens, features)")


@cache
def _inputs_of(layer: type) -> dict[str, int]:
    """Return the inputs of a layer's call, and their places behind `self`."""
    names = inspect.signature(layer.call).parameters  # type: ignore[attr-defined]
    return {name: i - 1 for i, name in enumerate(names) if name not in _OTHERS}


def _check_input(layer: str, name: str, value: Any) -> None:
    """Refuse what Keras would let through to the first operation that fails."""
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
            "`to_tensor()`, and give a mask where padding must not count. Received: "
            f"{name} is a RaggedTensor of shape {tuple(value.shape)}"
        )
    dtype = getattr(value, "dtype", None)
    if dtype is not None and _is_text(dtype):
        raise ValueError(
            f"{layer} expects numbers as `{name}`: turn strings into ids with "
            "keras.layers.StringLookup, and ids into features with "
            f"keras.layers.Embedding. Received: {name} of dtype {_dtype_name(dtype)}"
        )


def _dtype_name(dtype: Any) -> str:
    return str(getattr(dtype, "name", dtype))


def _is_text(dtype: Any) -> bool:
    return _dtype_name(dtype).startswith(("string", "str", "bytes", "object"))
