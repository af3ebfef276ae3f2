"""Requests to an exported model: validation, and warm-up records.

A request is a dict of one array per feature, with the batch as the first axis.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def check_finite(features: dict[str, Any]) -> dict[str, Any]:
    """Return `features`, with assertions in the graph that they are finite."""
    import tensorflow as tf

    checks = [
        tf.debugging.Assert(
            tf.reduce_all(tf.math.is_finite(value)),
            [f"feature `{name}` must hold no NaN and no infinity"],
        )
        for name, value in features.items()
        if value.dtype.is_floating
    ]
    with tf.control_dependencies(checks):
        return {name: tf.identity(value) for name, value in features.items()}


def feature_message(error: Exception) -> str | None:
    """Return the message of a check of features in an error of the graph, or None."""
    # The value that a message ends with is apart: "[... Received:] [12]".
    value = r"(?:(?<=Received:)\] \[([^\]]*)\])?"
    text = r"(features? `\w+`[^\[\]'\n]* must [^\[\]'\n]*)" + value
    found = re.search(text, str(error))
    return found and " ".join(filter(None, found.groups())).strip()


def call(
    function: Callable[[dict[str, Any]], dict[str, Any]], request: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Call `function`; raise ValueError that names a feature that the graph refuses."""
    import tensorflow as tf

    try:
        return function({name: tf.constant(value) for name, value in request.items()})
    except tf.errors.InvalidArgumentError as error:
        message = feature_message(error)
        if message is None:
            raise
        raise ValueError(message) from error


def checked(specs: Mapping[str, Any], request: Any) -> dict[str, np.ndarray]:
    """Return `request` as arrays that match `specs`, or raise ValueError."""
    if not isinstance(request, Mapping):
        raise ValueError(
            f"a request must be a dict of the features {sorted(specs)}. "
            f"Received: {type(request).__name__}"
        )
    for name in specs:
        if name not in request:
            raise ValueError(
                f"feature `{name}` is missing. Received: {sorted(map(str, request))}"
            )
    for name in request:
        if name not in specs:
            raise ValueError(
                f"feature `{name}` is unknown. The features are {sorted(specs)}"
            )
    arrays = {name: _as_array(name, specs[name], request[name]) for name in specs}
    sizes = {name: len(arrays[name]) for name in sorted(arrays) if arrays[name].ndim}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"all features must have the same batch size. Received: {sizes}"
        )
    return arrays


# NumPy dtype kinds: allowed kinds of list items, by the kind of the feature.
_OF_LISTS = {"f": "fiu", "i": "iu", "u": "iu", "b": "b", "O": "OSU"}


def _as_array(name: str, spec: Any, value: Any) -> np.ndarray:
    """Return `value` as an array of the dtype and shape of the feature."""
    dtype = np.dtype(spec.dtype.as_numpy_dtype)
    try:
        array = np.asarray(value)
        is_list = not hasattr(value, "dtype")
        kinds = _OF_LISTS.get(dtype.kind, "") if is_list or dtype.kind == "O" else ""
        if array.dtype != dtype and array.dtype.kind not in kinds:
            raise TypeError(array.dtype)
        if dtype.kind == "O":
            wrong = [x for x in array.ravel() if not isinstance(x, str | bytes)]
            if wrong:
                raise TypeError(f"{wrong[0]!r}")
        # From the list itself: NumPy then raises OverflowError for large integers.
        array = np.asarray(value if is_list else array, dtype)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"feature `{name}` must be of dtype {spec.dtype.name}. Received: {error}"
        ) from error
    if not spec.shape.is_compatible_with(array.shape):
        raise ValueError(
            f"feature `{name}` must be of shape {tuple(spec.shape)}, batch axis first. "
            f"Received: {array.shape}"
        )
    return array


def write_warmup(folder: Path, requests: Sequence[dict[str, np.ndarray]]) -> None:
    """Write `PredictionLog`s of TensorFlow Serving, in the protobuf wire format."""
    import tensorflow as tf

    def field(number: int, value: bytes) -> bytes:
        return bytes([number << 3 | 2]) + _varint(len(value)) + value

    extra = folder / "assets.extra"
    extra.mkdir()
    with tf.io.TFRecordWriter(str(extra / "tf_serving_warmup_requests")) as records:
        for request in requests:
            # PredictRequest: model_spec = 1 (signature_name = 3), inputs = 2 (a map).
            predict = field(1, field(3, b"serving_default"))
            for name, array in request.items():
                tensor = tf.make_tensor_proto(array).SerializeToString()
                predict += field(2, field(1, name.encode()) + field(2, tensor))
            # PredictionLog: predict_log = 6, whose request = 1.
            records.write(field(6, field(1, predict)))


def _varint(number: int) -> bytes:
    """Return `number` as a protobuf varint: groups of seven bits, lowest first."""
    groups = []
    while number > 127:
        groups.append(number & 127 | 128)
        number >>= 7
    return bytes([*groups, number])
