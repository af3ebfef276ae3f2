"""A metric for each segment of the rows, such as a scenario, a country or a page.

Axis letters: n rows, s segments.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_moe import _checks
from keras_moe.metrics._rows import flat_groups, rows


@keras.saving.register_keras_serializable("keras_moe")
class BySegment(keras.metrics.Metric):
    """Any metric, for each of a few segments of the rows.

    Args:
        metric: a metric with `update_state(y_true, y_pred, sample_weight)` and a scalar
            result. It is copied for every segment by its config.
        segments: int, the number of segments s, or a sequence of s names. The segment
            of a row is an integer in [0, s).
        group: str, name of the feature in `x` that holds the segments; it need not be
            an input of the model. A `MultiTaskModel` passes it; elsewhere call
            `update_state` with `groups`.
        name: str, name of the metric.

    Call arguments:
        y_true, y_pred, sample_weight: as in the metric.
        groups: integers of shape `(n,)`, the segment of each row. Rows of other
            segments are in none.

    Returns:
        A dict of scalars by `{metric.name}_{segment}`.

    Raises:
        ValueError: if an argument is invalid.

    Example:

    >>> metric = keras_moe.metrics.BySegment(keras_moe.metrics.PCOC(), ["ios", "web"])
    >>> metric.update_state([1, 0, 1], [0.5, 0.25, 0.5], groups=[0, 0, 1])
    >>> {name: float(value) for name, value in metric.result().items()}
    {'pcoc_ios': 0.75, 'pcoc_web': 0.5}
    """

    def __init__(
        self,
        metric: keras.metrics.Metric,
        segments: int | Sequence[str],
        group: str | None = None,
        name: str = "by_segment",
    ) -> None:
        super().__init__(name=_checks.text("name", name), dtype="float32")
        self.segments = _checked_segments(segments)
        self.group = _checks.optional_text("group", group)
        self.metric = _checks.metric("metric", metric)
        self._metrics_of_segments = [
            type(metric).from_config(
                {**metric.get_config(), "name": f"{metric.name}_{segment}"}
            )
            for segment in self.segments
        ]

    def update_state(
        self,
        y_true: Any,
        y_pred: Any,
        sample_weight: Any = None,
        groups: Any = None,
    ) -> None:
        groups = flat_groups(groups, y_pred)
        batch = rows(y_true, y_pred, sample_weight)
        for k, metric in enumerate(self._metrics_of_segments):
            inside = ops.cast(ops.equal(groups, k), "float32")
            weights = batch.weights * inside
            metric.update_state(batch.labels, batch.predictions, weights)

    def reset_state(self) -> None:
        for metric in self._metrics_of_segments:
            metric.reset_state()

    def result(self) -> dict[str, Any]:
        return {metric.name: metric.result() for metric in self._metrics_of_segments}

    def get_config(self) -> dict[str, Any]:
        return {
            "metric": keras.saving.serialize_keras_object(self.metric),
            "segments": self.segments,
            "group": self.group,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BySegment:
        metric = config["metric"]
        if isinstance(metric, dict):
            metric = keras.saving.deserialize_keras_object(metric)
        return cls(**{**config, "metric": metric})


def _checked_segments(segments: Any) -> list[str]:
    if isinstance(segments, numbers.Integral):
        return [str(k) for k in range(_checks.positive_int("segments", segments))]
    rule = "a number or a sequence of different names"
    names = [str(name) for name in _checks.items("segments", segments, rule)]
    names = [_checks.text("segments", name) for name in names]
    if not names or len({*names}) < len(names):
        raise ValueError(f"`segments` must be {rule}. Received: segments={segments!r}")
    return names
