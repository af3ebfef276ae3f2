"""A number: watch time, a rating.

loss = (y - f)^2, or another loss of Keras given to the task.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe.multitask.heads._base import MEAN, Head, HeadLoss, like


@keras.saving.register_keras_serializable("keras_moe")
class SquaredError(HeadLoss):
    """Mean squared error over the sum of the sample weights."""

    labels_per_output = True

    def __init__(
        self, reduction: str = MEAN, name: str = "squared_error", dtype: Any = None
    ) -> None:
        super().__init__(name, reduction, dtype)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return ops.mean(ops.square(like(y_true, y_pred) - y_pred), axis=-1)


@keras.saving.register_keras_serializable("keras_moe")
class Regression(Head):
    """A number: linear output and squared error. Labels are finite."""

    activation = "linear"
    rule = "finite"

    def loss(self) -> keras.losses.Loss:
        return SquaredError()

    def valid(self, labels: np.ndarray) -> np.ndarray:
        return np.isfinite(labels)
