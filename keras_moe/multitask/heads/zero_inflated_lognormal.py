"""An amount that is often 0: spending, lifetime value.

With p = P(y > 0), and log y ~ Normal(mu, sigma^2) where y > 0 (Wang et al. 2019):
loss = log loss of [y > 0] with p
       + [y > 0] (log(y sigma sqrt(2 pi)) + (log y - mu)^2 / (2 sigma^2))
E[y] = p exp(mu + sigma^2 / 2)
"""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe.multitask.heads._base import MEAN, Head, HeadLoss, like, nan_unless
from keras_moe.multitask.heads.binary import log_loss

# Keeps the density bounded.
_LEAST_SIGMA = 1e-3


@keras.saving.register_keras_serializable("keras_moe")
def zero_inflated_lognormal(outputs: Any) -> Any:
    """(n, 3) -> (n, 3): p by a sigmoid, mu, and sigma by a softplus."""
    return ops.concatenate(
        [
            keras.activations.sigmoid(outputs[..., :1]),
            outputs[..., 1:2],
            keras.activations.softplus(outputs[..., 2:]) + _LEAST_SIGMA,
        ],
        axis=-1,
    )


@keras.saving.register_keras_serializable("keras_moe")
class ZILNLoss(HeadLoss):
    """Negative log-likelihood of a zero-inflated lognormal distribution.

    It may be negative: it is a density where y > 0. It depends on the unit of the
    amount only by a constant.

    Call arguments:
        y_true: amounts >= 0, `(n,)` or `(n, 1)`; the loss of others is NaN.
        y_pred: p, mu and sigma, `(n, 3)`.

    Example: -log(0.5), and for y = 1 the density of Normal(0, 1) at 0.

    >>> loss = keras_moe.multitask.heads.ZILNLoss()
    >>> round(float(loss(np.array([1.0]), np.array([[0.5, 0.0, 1.0]]))), 4)
    1.6121

    References:
        - [Wang et al., 2019: A Deep Probabilistic Model for Customer Lifetime Value
          Prediction](https://arxiv.org/abs/1912.07753)
    """

    def __init__(
        self, reduction: str = MEAN, name: str = "ziln_loss", dtype: Any = None
    ) -> None:
        super().__init__(name, reduction, dtype)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        amounts = like(y_true, y_pred)[..., 0]
        p, mu, sigma = y_pred[..., 0], y_pred[..., 1], y_pred[..., 2]
        positive = amounts > 0
        # Replaced before the logarithm, as its gradient at 0 is NaN times 0.
        log_amount = ops.log(ops.where(positive, amounts, ops.ones_like(amounts)))
        density = (
            log_amount
            + ops.log(sigma)
            + 0.5 * math.log(2 * math.pi)
            + 0.5 * ops.square((log_amount - mu) / sigma)
        )
        spent = ops.cast(positive, p.dtype)
        losses = log_loss(spent, p) + ops.where(positive, density, 0.0)
        valid = ops.logical_and(amounts >= 0, ops.isfinite(amounts))
        return nan_unless(valid, losses)


@keras.saving.register_keras_serializable("keras_moe")
class ZILN(Head):
    """An amount >= 0 with many zeros: zero-inflated lognormal.

    The output is p = P(y > 0), mu and sigma of log y where y > 0. `prediction` is the
    expected amount p exp(mu + sigma^2 / 2), which a large sigma makes very large: scale
    amounts so that log y is of order 1, and look at `PCOC` of the predictions.

    Example:

    >>> head = keras_moe.multitask.heads.ZILN()
    >>> float(head.prediction(np.array([[0.5, 0.0, 0.0]]))[0, 0])  # half of exp(0)
    0.5
    """

    activation = staticmethod(zero_inflated_lognormal)
    output_units = 3
    rule = "a finite number >= 0"

    def loss(self) -> keras.losses.Loss:
        return ZILNLoss()

    def prediction(self, outputs: Any) -> Any:
        """(n, 3) -> (n, 1): the expected amount."""
        mean = ops.exp(outputs[..., 1:2] + 0.5 * ops.square(outputs[..., 2:]))
        return outputs[..., :1] * mean

    def valid(self, labels: np.ndarray) -> np.ndarray:
        return np.isfinite(labels) & (labels >= 0)
