"""Calibration: whether predicted probabilities are the observed rates.

Axis letters: b fine bins, m bins of equal weight.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_moe import _checks
from keras_moe.metrics._rank_auc import logit_bins, running_sum, sum_by_bin
from keras_moe.metrics._rows import Rows, SumMetric, probabilities, ratio


@keras.saving.register_keras_serializable("keras_moe")
class PCOC(SumMetric):
    """Predicted over observed: the sum of predictions divided by the sum of labels.

    1 for a model that is calibrated on average, above 1 if it predicts too much. Also
    for regressions.

    Args:
        from_logits: bool, whether predictions are logits instead of probabilities.
        name: str, name of the metric.

    Returns:
        A scalar. NaN if the labels sum to 0.

    Raises:
        ValueError: if an argument is invalid or the shapes differ.

    Example:

    >>> metric = keras_moe.metrics.PCOC()
    >>> metric.update_state([0, 0, 0, 1], [0.5, 0.25, 0.5, 0.25])  # 1.5 / 1
    >>> float(metric.result())
    1.5
    """

    def __init__(self, from_logits: bool = False, name: str = "pcoc") -> None:
        super().__init__({"predicted": (), "observed": ()}, name)
        self.from_logits = _checks.flag("from_logits", from_logits)

    def sums_of(self, batch: Rows) -> dict[str, Any]:
        predicted = probabilities(batch.predictions, self.from_logits)
        return {
            "predicted": ops.sum(batch.weights * predicted),
            "observed": ops.sum(batch.weights * batch.labels),
        }

    def result(self) -> Any:
        return ratio(self._sums["predicted"].value, self._sums["observed"].value)

    def get_config(self) -> dict[str, Any]:
        return {"from_logits": self.from_logits, "name": self.name}


@keras.saving.register_keras_serializable("keras_moe")
class ExpectedCalibrationError(SumMetric):
    """The mean difference between predicted and observed rates, over bins of rows.

    `ECE = sum_m W_m / W * |observed rate_m - mean prediction_m|`, with m bins of
    consecutive predictions and equal weight W / m (adaptive bins, Nixon et al. 2019).
    Bins of equal width would leave nearly all rows in the first one if positive labels
    are rare.

    Args:
        num_bins: int, number of bins m.
        from_logits: bool, whether predictions are logits instead of probabilities.
        name: str, name of the metric.

    Returns:
        A scalar in [0, 1]. NaN without a counted row.

    Raises:
        ValueError: if an argument is invalid or the shapes differ.

    Example:

    >>> metric = keras_moe.metrics.ExpectedCalibrationError(num_bins=2)
    >>> metric.update_state([0, 1, 1, 1], [0.2, 0.4, 0.8, 0.9])
    >>> # |0.5 - 0.3| and |1 - 0.85|, half of the rows each
    >>> round(float(metric.result()), 6)
    0.175

    Over batches, rows are kept in 4,096 fine bins of width 0.02 on the scale of logits,
    of which a result makes m. A fine bin is not divided: with ties, and if many
    predictions are nearly equal, the weights of the m bins differ.

    References:
        - [Naeini et al., 2015: Obtaining Well Calibrated Probabilities Using Bayesian
          Binning](https://doi.org/10.1609/aaai.v29i1.9602)
        - [Nixon et al., 2019: Measuring Calibration in Deep Learning](
          https://arxiv.org/abs/1904.01685)
    """

    FINE_BINS = 4096

    def __init__(
        self,
        num_bins: int = 10,
        from_logits: bool = False,
        name: str = "expected_calibration_error",
    ) -> None:
        sizes = (self.FINE_BINS,)
        super().__init__({"weight": sizes, "predicted": sizes, "observed": sizes}, name)
        self.num_bins = _checks.positive_int("num_bins", num_bins)
        self.from_logits = _checks.flag("from_logits", from_logits)

    def sums_of(self, batch: Rows) -> dict[str, Any]:
        bins = logit_bins(batch.predictions, self.FINE_BINS, self.from_logits)
        predicted = probabilities(batch.predictions, self.from_logits)
        values = {
            "weight": batch.weights,
            "predicted": batch.weights * predicted,
            "observed": batch.weights * batch.labels,
        }
        return {
            part: sum_by_bin(value, bins, self.FINE_BINS)
            for part, value in values.items()
        }

    def result(self) -> Any:
        weight, predicted, observed = (
            self._sums[part].value for part in ("weight", "predicted", "observed")
        )
        total = ops.sum(weight)
        # A fine bin belongs to the bin in which the middle of its weight lies.
        middle = running_sum(weight) - weight / 2.0
        share = middle / ops.where(total == 0.0, ops.ones_like(total), total)
        bins = ops.cast(ops.floor(share * self.num_bins), "int32")
        bins = ops.clip(bins, 0, self.num_bins - 1)
        difference = sum_by_bin(observed - predicted, bins, self.num_bins)
        return ratio(ops.sum(ops.abs(difference)), total)

    def get_config(self) -> dict[str, Any]:
        return {
            "num_bins": self.num_bins,
            "from_logits": self.from_logits,
            "name": self.name,
        }
