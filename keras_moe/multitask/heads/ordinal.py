"""One of several ordered levels: stars.

Axis letters: n rows, k levels - 1.

P(y > j) = sigmoid(f_0 - sum_{i=1..j} softplus(f_i)), j = 0..k-1, falls with j.
loss = -sum_j log-likelihood of [y > j] (Cao et al. 2020, equation 4).
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
from keras_moe.multitask.heads.binary import log_loss


@keras.saving.register_keras_serializable("keras_moe")
def ordered_sigmoid(outputs: Any) -> Any:
    """(n, k) -> (n, k): probabilities that do not rise along the last axis."""
    steps = ops.concatenate(
        [outputs[..., :1], -keras.activations.softplus(outputs[..., 1:])], axis=-1
    )
    return keras.activations.sigmoid(ops.cumsum(steps, axis=-1))


@keras.saving.register_keras_serializable("keras_moe")
class OrdinalLoss(HeadLoss):
    """Sum of the log losses of "the level is above j" over j.

    Call arguments:
        y_true: levels from 0 to k, `(n,)` or `(n, 1)`; the loss of others is NaN.
        y_pred: P(y > j), `(n, k)`.

    Example: the level is 1 of 0, 1, 2; -log(0.8) - log(1 - 0.5).

    >>> loss = keras_moe.multitask.heads.OrdinalLoss()
    >>> round(float(loss(np.array([1]), np.array([[0.8, 0.5]]))), 4)
    0.9163

    References:
        - [Cao et al., 2020: Rank Consistent Ordinal Regression for Neural Networks
          with Application to Age Estimation](https://arxiv.org/abs/1901.07884)
    """

    def __init__(
        self, reduction: str = MEAN, name: str = "ordinal_loss", dtype: Any = None
    ) -> None:
        super().__init__(name, reduction, dtype)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        labels, k = like(y_true, y_pred), y_pred.shape[-1]
        above = labels > ops.arange(k, dtype=y_pred.dtype)
        losses = log_loss(ops.cast(above, y_pred.dtype), y_pred)
        return ops.sum(nan_unless(is_level(labels, k + 1), losses), axis=-1)


@keras.saving.register_keras_serializable("keras_moe")
class Ordinal(Head):
    """Ordered levels, such as 1 to 5 stars given as 0 to 4.

    The output is P(y > j) for every level j but the last; `prediction` is the expected
    level, their sum. Cao et al. share one slope over all levels; here every threshold
    depends on the row, and their order holds by construction.

    Args:
        num_levels: int >= 2. Labels are integers in [0, num_levels).
    """

    activation = staticmethod(ordered_sigmoid)

    def __init__(self, num_levels: int) -> None:
        self.num_levels = _checks.count("num_levels", num_levels, least=2)
        self.output_units = self.num_levels - 1

    @property
    def rule(self) -> str:  # type: ignore[override]
        return f"an integer in [0, {self.num_levels})"

    def loss(self) -> keras.losses.Loss:
        return OrdinalLoss()

    def prediction(self, outputs: Any) -> Any:
        """(n, k) -> (n, 1): the expected level, sum_j P(y > j)."""
        return ops.sum(outputs, axis=-1, keepdims=True)

    def valid(self, labels: np.ndarray) -> np.ndarray:
        return (labels >= 0) & (labels < self.num_levels) & (labels % 1 == 0)

    def get_config(self) -> dict[str, Any]:
        return {"num_levels": self.num_levels}
