"""A probability: click, conversion.

loss = -y log p - (1 - y) log(1 - p)
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe.multitask.heads._base import MEAN, Head, HeadLoss, like, nan_unless

# The smallest normal float32, and the largest float32 below 1.
_TINY, _BELOW_ONE = 1.1754944e-38, 1 - 2.0**-24


@keras.saving.register_keras_serializable("keras_moe")
class LogLoss(HeadLoss):
    """Binary cross-entropy of probabilities as small as 1e-37.

    `keras.losses.BinaryCrossentropy` clips probabilities at 1e-7, so a smaller one has
    gradient 0. Conversions are that rare: the product of a click and a conversion
    probability may be 1e-8. Here log(p) is exact for every normal float32. Only a
    probability of exactly 0 or 1 is clipped, to 1e-38 or 1 - 6e-8.

    Args:
        reduction: as in Keras; by default the mean over the sum of the sample weights.
        name: name of the loss.
        dtype: dtype of the computation.

    Call arguments:
        y_true: labels in [0, 1], `(n,)` or `(n, o)`; the loss of others is NaN.
        y_pred: probabilities, `(n, o)`.

    Example:

    >>> loss = keras_moe.multitask.heads.LogLoss()
    >>> round(float(loss(np.ones((1, 1)), np.full((1, 1), 1e-8))), 3)  # -log(1e-8)
    18.421
    """

    labels_per_output = True

    def __init__(
        self, reduction: str = MEAN, name: str = "log_loss", dtype: Any = None
    ) -> None:
        super().__init__(name, reduction, dtype)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        labels = like(y_true, y_pred)
        valid = ops.logical_and(labels >= 0, labels <= 1)
        return ops.mean(nan_unless(valid, log_loss(labels, y_pred)), axis=-1)


def log_loss(labels: Any, probabilities: Any) -> Any:
    """-y log p - (1 - y) log(1 - p), element by element."""
    positive = ops.log(ops.maximum(probabilities, _TINY))
    negative = ops.log1p(-ops.minimum(probabilities, _BELOW_ONE))
    return -labels * positive - (1 - labels) * negative


@keras.saving.register_keras_serializable("keras_moe")
class Binary(Head):
    """A probability: sigmoid and log loss. Labels are in [0, 1].

    Example:

    >>> keras_moe.multitask.Task("click", keras_moe.multitask.heads.Binary()).name
    'click'
    """

    activation = "sigmoid"
    rule = "in [0, 1]"

    def loss(self) -> keras.losses.Loss:
        return LogLoss()

    def valid(self, labels: np.ndarray) -> np.ndarray:
        return (labels >= 0) & (labels <= 1)
