"""Metrics of routers and gates, and of rankers whose labels are rare.

Keras metrics: `compile(metrics=...)` or `weighted_metrics`, masks, sample weights, sums
over batches. Rows of weight 0 and padding are not counted, whatever their labels are.
"""

from keras_moe.metrics._by_group import GAUC, XAUC, ByGroup
from keras_moe.metrics._by_segment import BySegment
from keras_moe.metrics._calibration import PCOC, ExpectedCalibrationError
from keras_moe.metrics._gate_polarization import GatePolarization
from keras_moe.metrics._normalized_entropy import NormalizedEntropy
from keras_moe.metrics._rank_auc import RankAUC
from keras_moe.metrics._routing import RoutingMetrics

__all__ = [
    "GAUC",
    "PCOC",
    "XAUC",
    "ByGroup",
    "BySegment",
    "ExpectedCalibrationError",
    "GatePolarization",
    "NormalizedEntropy",
    "RankAUC",
    "RoutingMetrics",
]
