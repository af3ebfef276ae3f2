"""Normalized entropy: the log loss relative to that of the average rate.

NE = mean log loss / H(r), where r is the rate of positive labels and H the entropy of a
coin with this probability (He et al. 2014, equation 3).
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_moe import _checks
from keras_moe.metrics._rows import Rows, SumMetric, ratio


@keras.saving.register_keras_serializable("keras_moe")
class NormalizedEntropy(SumMetric):
    """Log loss divided by the log loss of predicting the average rate for every row.

    Below 1 a model is better than the constant. Unlike the log loss, it can be compared
    between data sets with different rates of positive labels.

    Args:
        from_logits: bool, whether predictions are logits instead of probabilities.
        name: str, name of the metric.

    Returns:
        A scalar. NaN without a counted row, and if all labels are equal: the average
        rate then has no log loss.

    Raises:
        ValueError: if an argument is invalid or the shapes differ.

    Example:

    >>> metric = keras_moe.metrics.NormalizedEntropy()
    >>> metric.update_state([0, 0, 0, 1], [0.25, 0.25, 0.25, 0.25])
    >>> round(float(metric.result()), 6)
    1.0

    Probabilities are limited to [1e-37, 1 - 6e-8], the resolution of float32. State is
    float32 and takes the sum of a batch at a time: exact to about 1e-6.

    References:
        - [He et al., 2014: Practical Lessons from Predicting Clicks on Ads at
          Facebook](https://doi.org/10.1145/2648584.2648589)
    """

    def __init__(
        self, from_logits: bool = False, name: str = "normalized_entropy"
    ) -> None:
        super().__init__({"log_loss": (), "positive": (), "weight": ()}, name)
        self.from_logits = _checks.flag("from_logits", from_logits)

    def sums_of(self, batch: Rows) -> dict[str, Any]:
        labels, weights = batch.labels, batch.weights
        log_loss = _log_loss(labels, batch.predictions, self.from_logits)
        counted = ops.not_equal(weights, 0.0)
        log_loss = ops.where(counted, weights * log_loss, ops.zeros_like(weights))
        return {
            "log_loss": ops.sum(log_loss),
            "positive": ops.sum(weights * labels),
            "weight": ops.sum(weights),
        }

    def result(self) -> Any:
        sums = self._sums
        rate = ratio(sums["positive"].value, sums["weight"].value)
        entropy = _log_loss(rate, rate, from_logits=False)
        # The limits of `_log_loss` give a small loss for rates of 0 and 1.
        certain = ops.logical_or(rate <= 0.0, rate >= 1.0)
        entropy = ops.where(certain, ops.zeros_like(entropy), entropy)
        return ratio(ratio(sums["log_loss"].value, sums["weight"].value), entropy)

    def get_config(self) -> dict[str, Any]:
        return {"from_logits": self.from_logits, "name": self.name}


def _log_loss(labels: Any, predictions: Any, from_logits: bool) -> Any:
    if from_logits:  # -y log s(x) - (1 - y) log(1 - s(x)) = softplus(x) - x y
        return ops.softplus(predictions) - predictions * labels
    log_p = ops.log(ops.maximum(predictions, 1e-37))
    log_q = ops.log1p(-ops.minimum(predictions, 1.0 - 2.0**-24))
    return -(labels * log_p + (1.0 - labels) * log_q)
