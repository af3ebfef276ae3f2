"""The base layer: input checks, state that is not a weight, and the dtype of gates.

Without the checks an invalid input fails in an inner layer. These errors name the layer
and the argument of the user's own call.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import cache
from typing import Any, ClassVar

import keras

from keras_moe import _backend, _checks, _replicas

# Arguments of `call` that are not inputs.
_NON_INPUTS = ("mask", "training")
# Arguments of `call` that are tensors; a subclass may have others.
_TENSORS = ("scenario", "task_losses")


class Untracked:
    """A list of variables that Keras does not find: they do not become weights."""

    def __init__(self, variables: Iterable[Any] = ()) -> None:
        self.variables = list(variables)


class Layer(keras.layers.Layer):
    """A Keras layer that validates its inputs and can have state beside its weights.

    Class attributes:
        least_rank: the minimum rank of the first input.
        most_rank: the maximum rank of the first input; None if there is none.
        rank_reason: why, for the message of a wrong rank.
        feature_axes: the number of axes of the first input that a mask lacks; None if a
            mask is of something else than the rows of the first input.
        takes_dict: whether the input is a dict of tensors, which the layer checks.
    """

    least_rank: ClassVar[int] = 2
    most_rank: ClassVar[int | None] = None
    rank_reason: ClassVar[str] = ""
    takes_dict: ClassVar[bool] = False
    feature_axes: ClassVar[int | None] = 1

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**_checks.layer_options(kwargs))

    def add_state(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        initializer: Any = "zeros",
        dtype: str = "float32",
        aggregation: str = "none",
        synchronization: str = "auto",
    ) -> Any:
        """Return a variable that calls of the layer change and that is not a weight.

        It is not saved, and no dtype policy casts it. On JAX a training step can only
        change variables in `layer.variables`; the property below includes it.
        """
        with keras.name_scope(self.name):
            variable = keras.Variable(
                initializer=initializer,
                shape=shape,
                dtype=dtype,
                trainable=False,
                autocast=False,
                aggregation=aggregation,
                synchronization=synchronization,
                name=name,
            )
        if not hasattr(self, "_state"):
            self._state = Untracked()
        self._state.variables.append(variable)
        return variable

    @property
    def variables(self) -> list[Any]:
        """Weights, states of random generators, and variables made by `add_state`."""
        state = getattr(self, "_state", None)
        return [*super().variables, *(state.variables if state else [])]

    @property
    def _losses(self) -> list[Any]:
        """The losses that `add_loss` keeps, those of this replica alone.

        Keras has one list for all. Where a call waits for other replicas, they would
        clear it and add their own losses.
        """
        return self._losses_by_replica.setdefault(_replicas.current(), [])

    @_losses.setter
    def _losses(self, value: list[Any]) -> None:
        # Bypasses the tracking of Keras and TensorFlow.
        object.__setattr__(
            self, "_losses_by_replica", {_replicas.current(): list(value)}
        )

    @property
    def precise_dtype(self) -> str:
        """The dtype of gates and router logits: float32; float64 for such a layer."""
        return "float64" if self.compute_dtype == "float64" else "float32"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer; raise ValueError for an unsupported input."""
        _replicas.check_not_compiled(type(self).__name__)
        if self.takes_dict:
            return super().__call__(*args, **kwargs)
        places = _inputs_of(type(self))  # type: ignore[arg-type]
        given = {name: args[i] for name, i in places.items() if i < len(args)}
        given |= {name: kwargs[name] for name in places if name in kwargs}
        inputs = {n: v for n, v in given.items() if n not in _NON_INPUTS}
        first = next(iter(places))
        for name, value in inputs.items():
            _check_input(type(self).__name__, name, value, name == first)
        if first in inputs:
            self._check_first(first, inputs[first])
            self._check_widths(inputs)
            self._check_mask(given.get("mask"), first, inputs[first])
        _check_training(given.get("training"))
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
        if self.most_rank is not None and len(shape) > self.most_rank:
            raise ValueError(
                f"{type(self).__name__} expects `{name}` of ndim={self.most_rank}. "
                f"Received: {name} of shape {tuple(shape)}"
            )
        if len(shape) < self.least_rank:
            raise ValueError(
                f"{type(self).__name__} expects `{name}` of rank >= {self.least_rank}, "
                f"{_axes(self.least_rank)}{self.rank_reason}. "
                f"Received: {name} of shape {tuple(shape)}"
            )

    def _check_widths(self, inputs: dict[str, Any]) -> None:
        """Raise ValueError if an input has another width than at the first call."""
        built = getattr(self, "_build_shapes_dict", None) or {}
        for name, value in inputs.items():
            before = built.get(f"{name}_shape")
            if before is None and len(built) == 1 and name == next(iter(inputs)):
                before = next(iter(built.values()))
            shape = _static_shape(value)
            if before is None or shape is None or min(len(before), len(shape)) < 2:
                continue
            known = isinstance(before[-1], int) and isinstance(shape[-1], int)
            if known and before[-1] != shape[-1]:
                raise ValueError(
                    f"`{name}` of the layer {self.name!r} is incompatible with the "
                    "inputs that it was built for: expected axis -1 to have the size "
                    f"{before[-1]}. Received: {name} of shape {tuple(shape)}"
                )

    def _check_mask(self, mask: Any, first: str, value: Any) -> None:
        """Raise ValueError unless a mask has the leading axes of the first input."""
        if mask is None or self.feature_axes is None:
            return
        mask = _checks.tensor("mask", mask)
        found, shape = _static_shape(mask), _static_shape(value)
        if found is None or shape is None:
            return
        leading = tuple(shape[: len(shape) - self.feature_axes])
        if not self.feature_axes and len(leading) == len(found) + 1:
            leading = leading[:-1]  # Ids may have an axis of size 1.
        agree = len(found) == len(leading) and all(
            # Compilers use symbolic sizes, which must not be compared.
            not (isinstance(a, int) and isinstance(b, int)) or a == b
            for a, b in zip(found, leading, strict=True)
        )
        if not agree:
            raise ValueError(
                f"`mask` must have the leading axes of `{first}`, {leading}. "
                f"Received: {first} of shape {tuple(shape)}, mask of shape {found}"
            )


def given_or_attached(mask: Any, inputs: Any) -> Any:
    """Return `mask`, or the mask that Keras has attached to `inputs`, or None.

    Keras passes an attached mask only to calls with a single tensor argument.
    """
    return _backend.keras_mask(inputs) if mask is None else mask


def _axes(rank: int) -> str:
    return {1: "(n,)", 2: "(..., features)"}.get(rank, "(..., tokens, features)")


@cache
def _inputs_of(layer: type) -> dict[str, int]:
    """Return the arguments of `layer.call` and their positions, not counting `self`."""
    names = inspect.signature(layer.call).parameters  # type: ignore[attr-defined]
    return {name: i - 1 for i, name in enumerate(names) if name != "self"}


def _static_shape(value: Any) -> tuple[Any, ...] | None:
    shape = getattr(value, "shape", None)
    return None if shape is None or getattr(shape, "rank", 0) is None else tuple(shape)


def _check_training(training: Any) -> None:
    if training is not None and (_static_shape(training) or isinstance(training, str)):
        raise ValueError(
            f"`training` must be True, False or None. Received: training={training!r}"
        )


def _check_input(layer: str, name: str, value: Any, is_first: bool) -> None:
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
    is_tensor = is_first or name.endswith("inputs") or name in _TENSORS
    if value is not None and (dtype is None or not hasattr(value, "shape")):
        if is_tensor:
            raise ValueError(
                f"{layer} expects one tensor or array as `{name}`. "
                f"Received: {name}={value!r}"
            )
        return
    if dtype is not None and _is_text(dtype):
        raise ValueError(
            f"{layer} expects numbers as `{name}`: convert strings to ids with "
            "keras.layers.StringLookup, and ids to features with "
            f"keras.layers.Embedding. Received: {name} of dtype {_dtype_name(dtype)}"
        )
    if value is not None and is_tensor:
        _checks.tensor(name, value)


def _dtype_name(dtype: Any) -> str:
    return str(getattr(dtype, "name", dtype))


def _is_text(dtype: Any) -> bool:
    return _dtype_name(dtype).startswith(("string", "str", "bytes", "object"))
