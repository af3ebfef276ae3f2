"""Polarization of gates: how often one expert has nearly all of a gate's weight.

Axis letters: n rows, t gates, e experts.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_moe import _checks
from keras_moe.metrics._rows import ratio


@keras.saving.register_keras_serializable("keras_moe")
class GatePolarization(keras.metrics.Metric):
    """Share of rows and gates where one expert has nearly all of the weight.

    A gate that is polarized on few experts gives the others no gradient. An expert's
    share of a gate is its weight over the sum of the gate's weights. A gate counts
    as polarized for a row if its largest share is above `threshold`.

    Args:
        threshold: float in [0, 1), a share of a gate's weight.
        name: str, name of the metric.

    Call arguments:
        gate_weights: tensor of shape `(..., t, e)`, such as from `MMoE.gate_weights`.
        mask: bool tensor of the leading axes, False for rows that do not count.
            Default: all count.

    Returns:
        A dict of scalars: `{name}`, the share of counted rows and gates that are
        polarized, and `{name}_largest_share`, the mean of their largest shares: 1 if
        every gate uses one expert alone, `1 / e` for even gates. NaN without a counted
        row.

    Raises:
        ValueError: if an argument is invalid or the shapes differ.

    Example:

    >>> metric = keras_moe.metrics.GatePolarization(threshold=0.9)
    >>> metric.update_state(np.array([[[0.95, 0.05], [0.5, 0.5]]]))
    >>> {name: round(float(value), 3) for name, value in metric.result().items()}
    {'gate_polarization': 0.5, 'gate_polarization_largest_share': 0.725}

    Zhao et al. describe polarization without an equation; this measure is ours. A gate
    with a single choice (`top_k=1`) is always polarized. Rows whose weights are not
    finite, or are all 0, do not count.

    References:
        - [Zhao et al., 2019: Recommending What Video to Watch Next: A Multitask
          Ranking System, section 4.4](https://doi.org/10.1145/3298689.3346997)
    """

    def __init__(self, threshold: float = 0.9, name: str = "gate_polarization") -> None:
        super().__init__(name=_checks.text("name", name), dtype="float32")
        self.threshold = _checks.rate("threshold", threshold)
        self._sums = {
            part: self.add_variable(shape=(), initializer="zeros", name=part)
            for part in ("polarized", "largest", "gates")
        }

    def update_state(self, gate_weights: Any, mask: Any = None) -> None:
        _checks.axes(gate_weights=(gate_weights, "...te"), mask=(mask, "...?"))
        weights = ops.cast(ops.convert_to_tensor(gate_weights), "float32")
        total = ops.sum(weights, axis=-1, keepdims=True)
        counted = ops.logical_and(ops.isfinite(total), total > 0.0)[..., 0]
        if mask is not None:
            mask = ops.cast(ops.convert_to_tensor(mask), "bool")
            counted = ops.logical_and(counted, ops.expand_dims(mask, -1))
        safe = ops.where(ops.expand_dims(counted, -1), total, ops.ones_like(total))
        # Without `initial`, TensorFlow cannot take the maximum of an empty batch.
        largest = ops.max(weights / safe, axis=-1, initial=0.0)
        largest = ops.where(counted, largest, ops.zeros_like(largest))
        batch = {
            "polarized": largest > self.threshold,
            "largest": largest,
            "gates": counted,
        }
        for part, values in batch.items():
            total = self._sums[part]
            total.assign(total + ops.sum(ops.cast(values, "float32")))

    def result(self) -> dict[str, Any]:
        gates = self._sums["gates"].value
        return {
            self.name: ratio(self._sums["polarized"].value, gates),
            f"{self.name}_largest_share": ratio(self._sums["largest"].value, gates),
        }

    def get_config(self) -> dict[str, Any]:
        return {"threshold": self.threshold, "name": self.name}
