"""A step of Keras models, the same for this library and for its peers on Keras.

A training step is `model.train_function`, which `fit` compiles and calls, on an
iterator that repeats one batch: forward pass, losses, backward pass and optimizer,
without the reading of data and the callbacks of `fit`. A serving step is
`model.predict_on_batch`, which calls what `predict` compiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def training(model: Any, x: Any, y: Any, batches: int = 1) -> Callable[[int], None]:
    """Return `run` of a training step of a compiled model.

    Args:
        model: the model.
        x: arrays of one batch, or of several, one after the other.
        y: the labels, likewise.
        batches: number of batches in them, which take turns.
    """
    import tensorflow as tf

    def by_batch(rows: Any) -> Any:
        return rows.reshape(batches, -1, *rows.shape[1:])

    parts = tf.nest.map_structure(by_batch, (x, y))
    iterator = iter(tf.data.Dataset.from_tensor_slices(parts).repeat())
    model.make_train_function()

    def run(steps: int) -> None:
        logs: dict[str, Any] = {}
        for _ in range(steps):
            logs = model.train_function(iterator)
        float(logs["loss"])

    return run


def serving(model: Any, x: Any) -> Callable[[int], None]:
    """Return `run` of a prediction for a batch."""

    def run(steps: int) -> None:
        for _ in range(steps):
            model.predict_on_batch(x)

    return run


def count_parameters(model: Any) -> int:
    """Return the number of trainable parameters."""
    import math

    return sum(math.prod(weight.shape) for weight in model.trainable_weights)
