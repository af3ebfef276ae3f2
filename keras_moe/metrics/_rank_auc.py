"""AUC by ranks with a bounded error, also if positive labels are rare.

Axis letters: b bins.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_moe import _checks
from keras_moe.metrics._rows import Rows, SumMetric, ratio

# Bins divide the logits in [-LIMIT, LIMIT]; 40 is a probability of 4e-18.
LIMIT = 40.0


@keras.saving.register_keras_serializable("keras_moe")
class RankAUC(SumMetric):
    """The probability that a positive row is ranked above a negative one.

    Rows are counted in bins of equal width on the scale of logits. `keras.metrics.AUC`
    has thresholds of equal distance between probabilities: with 0.1% positive labels
    nearly all predictions lie between the first two, and it reports about 0.5.

    Args:
        from_logits: bool, whether predictions are logits instead of probabilities.
        num_bins: int >= 2, number of bins b. Two rows in one bin count as a tie.
        name: str, name of the metric.

    Returns:
        A scalar in [0, 1]. NaN without a positive or without a negative row.

    Raises:
        ValueError: if an argument is invalid or the shapes differ.

    Example:

    >>> metric = keras_moe.metrics.RankAUC()
    >>> metric.update_state([0, 0, 1, 1], [1e-6, 3e-6, 2e-6, 4e-6])
    >>> float(metric.result())  # 3 of 4 pairs are in order
    0.75

    Only ties within a bin are wrong: the difference to the exact AUC is at most
    `error_bound()`, half the share of pairs in one bin. With 65,536 bins of width
    0.0012, probabilities that differ by more than 0.12% of themselves are told apart.
    Logits beyond ±40 are in the outer bins. Counts are float32: exact up to 16.7
    million rows in a bin.

    References:
        - [Hanley and McNeil, 1982: The Meaning and Use of the Area under a ROC
          Curve](https://doi.org/10.1148/radiology.143.1.7063747)
    """

    def __init__(
        self,
        from_logits: bool = False,
        num_bins: int = 2**16,
        name: str = "rank_auc",
    ) -> None:
        self.num_bins = _checks.positive_int("num_bins", num_bins)
        if self.num_bins < 2:
            raise ValueError(f"`num_bins` must be >= 2. Received: num_bins={num_bins}")
        super().__init__(
            {"positive": (self.num_bins,), "negative": (self.num_bins,)}, name
        )
        self.from_logits = _checks.flag("from_logits", from_logits)

    def sums_of(self, batch: Rows) -> dict[str, Any]:
        bins = logit_bins(batch.predictions, self.num_bins, self.from_logits)
        positive = batch.weights * batch.labels
        return {
            "positive": sum_by_bin(positive, bins, self.num_bins),
            "negative": sum_by_bin(batch.weights - positive, bins, self.num_bins),
        }

    def result(self) -> Any:
        positive, negative, total = self._shares()
        below = running_sum(negative) - negative
        return ratio(ops.sum(positive * (below + negative / 2.0)), total)

    def error_bound(self) -> Any:
        """Return the largest possible difference of `result()` to the exact AUC."""
        positive, negative, total = self._shares()
        return ratio(ops.sum(positive * negative) / 2.0, total)

    def _shares(self) -> tuple[Any, Any, Any]:
        """Return the shares of the rows by bin, (b,), and 1; all 0 if undefined."""
        positive, negative = (self._sums[p].value for p in ("positive", "negative"))
        p, n = ops.sum(positive), ops.sum(negative)
        both = ops.cast(ops.logical_and(p != 0.0, n != 0.0), "float32")
        p, n = (ops.where(t == 0.0, ops.ones_like(t), t) for t in (p, n))
        return both * positive / p, negative / n, both

    def get_config(self) -> dict[str, Any]:
        return {
            "from_logits": self.from_logits,
            "num_bins": self.num_bins,
            "name": self.name,
        }


def logit_bins(predictions: Any, num_bins: int, from_logits: bool) -> Any:
    """(n,) -> (n,) int32: the bin of each prediction, on the scale of logits."""
    if not from_logits:
        tiny, near_one = 1e-37, 1.0 - 2.0**-24
        predictions = ops.clip(predictions, tiny, near_one)
        predictions = ops.log(predictions) - ops.log1p(-predictions)
    share = (predictions + LIMIT) / (2.0 * LIMIT)
    # Clipped before the cast: an integer of infinity is undefined.
    return ops.cast(ops.clip(share * num_bins, 0.0, num_bins - 1.0), "int32")


def sum_by_bin(values: Any, bins: Any, num_bins: int) -> Any:
    """(n,), (n,) -> (b,)."""
    return ops.segment_sum(values, bins, num_segments=num_bins)


def running_sum(values: Any) -> Any:
    """(b,) -> (b,): the cumulative sum, in two levels.

    A sum of 65,536 float32 numbers one by one would be inexact by up to 0.4%.
    """
    b = values.shape[0]
    width = int(b**0.5) + 1
    padded = ops.pad(values, ((0, width * width - b),))
    table = ops.reshape(padded, (width, width))
    within = ops.cumsum(table, axis=1)
    before = ops.cumsum(within[:, -1]) - within[:, -1]
    return ops.reshape(within + ops.expand_dims(before, 1), (-1,))[:b]
