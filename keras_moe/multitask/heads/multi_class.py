"""One of several classes without an order.

loss = -log p_y, p = softmax(f)
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe import _checks
from keras_moe.multitask.heads._base import (
    MEAN,
    Head,
    HeadLoss,
    is_level,
    like,
    nan_unless,
)


@keras.saving.register_keras_serializable("keras_moe")
class ClassLoss(HeadLoss):
    """Cross-entropy of class probabilities, for labels that are class numbers.

    Call arguments:
        y_true: class numbers, `(n,)` or `(n, 1)`; the loss of others is NaN.
        y_pred: probabilities, `(n, o)`.
    """

    def __init__(
        self, reduction: str = MEAN, name: str = "class_loss", dtype: Any = None
    ) -> None:
        super().__init__(name, reduction, dtype)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        labels = like(y_true, y_pred)
        valid = is_level(labels, y_pred.shape[-1])
        # Backends differ in what they take for a class that does not exist.
        classes = ops.cast(ops.where(valid, labels, 0.0), "int32")
        chosen = ops.take_along_axis(y_pred, classes, axis=-1)
        losses = -ops.log(ops.maximum(chosen, 1.1754944e-38))
        return nan_unless(valid, losses)[..., 0]


@keras.saving.register_keras_serializable("keras_moe")
class MultiClass(Head):
    """Class probabilities: softmax and cross-entropy.

    Args:
        num_classes: int >= 2, the number of classes. Labels are integers in
            [0, num_classes).
    """

    activation = "softmax"

    def __init__(self, num_classes: int) -> None:
        self.num_classes = _checks.count("num_classes", num_classes, least=2)
        self.output_units = self.num_classes

    @property
    def rule(self) -> str:  # type: ignore[override]
        return f"an integer in [0, {self.num_classes})"

    def loss(self) -> keras.losses.Loss:
        return ClassLoss()

    def valid(self, labels: np.ndarray) -> np.ndarray:
        return (labels >= 0) & (labels < self.num_classes) & (labels % 1 == 0)

    def get_config(self) -> dict[str, Any]:
        return {"num_classes": self.num_classes}
