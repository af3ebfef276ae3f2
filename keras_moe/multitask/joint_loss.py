"""A loss of one task that depends on the outputs and labels of others.

Axis letters: n rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from keras import ops


class Rows(NamedTuple):
    """The labels of one task.

    Attributes:
        labels: `(n, ...)`; in undefined rows a number that means nothing.
        weights: `(n, ...)` float32, 0 in undefined rows; None if all are 1.
    """

    labels: Any
    weights: Any


class JointLoss:
    """The base class of losses that see all tasks of a batch.

    A subclass defines `call`, and `get_config` if it has arguments; register it as any
    Keras object.

    Example:

    >>> @keras.saving.register_keras_serializable("example")
    ... class Agree(keras_moe.multitask.JointLoss):
    ...     def call(self, rows, outputs):
    ...         excess = outputs["buy"] - outputs["click"]
    ...         return keras.ops.mean(keras.ops.maximum(excess, 0.0))
    >>> outputs = {"click": np.array([[0.25]]), "buy": np.array([[0.5]])}
    >>> float(Agree()({}, outputs))
    0.25
    """

    def __call__(self, rows: dict[str, Rows], outputs: dict[str, Any]) -> Any:
        """Return the loss, a scalar.

        Args:
            rows: dict by task name of the rows of every declared task.
            outputs: dict by name of the model's outputs, each `(n, ..., o)`.
        """
        return self.call(rows, outputs)

    def call(self, rows: dict[str, Rows], outputs: dict[str, Any]) -> Any:
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> JointLoss:
        return cls(**config)


def weights_or_ones(rows: Rows) -> Any:
    """Return the weights, ones if there are none."""
    if rows.weights is not None:
        return rows.weights
    return ops.ones_like(rows.labels, dtype="float32")
