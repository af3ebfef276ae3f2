"""Callbacks: one figure for several tasks, to stop and to choose by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import keras

from keras_moe import _checks

_RULES = ("sum", "product", "worst_relative_change")


class CombinedMonitor(keras.callbacks.Callback):
    """Adds a figure to the logs of an epoch, computed from those of several tasks.

    Callbacks after it in the list see the figure: `EarlyStopping`, `ModelCheckpoint`,
    `CSVLogger`. It is in `history`, and keras-tuner can have it as its objective.
    Higher is better: use `mode="max"`.

    Args:
        weights: dict from the name of a log entry to its weight: above 0 if more is
            better (an AUC), below 0 if less is better (a loss).
        rule: how the entries v_i are combined with their weights w_i:

            - "sum": `sum_i w_i v_i`.
            - "product": `prod_i v_i ^ w_i`; the entries must be above 0.
            - "worst_relative_change": `min_i w_i (v_i - b_i) / |b_i|`, the change of
              the worst task since the first epoch, b_i.
        name: str, name of the figure in the logs.

    Raises:
        ValueError: if an argument is invalid; at the end of an epoch, if the logs lack
            an entry or an entry cannot be combined.

    Example:

    >>> monitor = keras_moe.callbacks.CombinedMonitor(
    ...     {"val_click_gauc": 1.0, "val_stars_loss": -0.5}, name="val_combined"
    ... )
    >>> stop = keras.callbacks.EarlyStopping("val_combined", mode="max", patience=3)
    >>> logs = {"val_click_gauc": 0.7, "val_stars_loss": 0.4}
    >>> monitor.on_epoch_end(0, logs)
    >>> round(logs["val_combined"], 6)
    0.5
    """

    def __init__(
        self, weights: Mapping[str, float], rule: str = "sum", name: str = "combined"
    ) -> None:
        super().__init__()
        if not isinstance(weights, Mapping) or not weights:
            raise ValueError(
                "`weights` must be a dict from names of log entries to weights. "
                f"Received: weights={weights!r}"
            )
        self.weights = {
            entry: _checks.finite_number(f"weights[{entry!r}]", weight)
            for entry, weight in weights.items()
        }
        self.rule = _checks.one_of("rule", rule, _RULES)
        self.name = _checks.text("name", name)
        self._first: dict[str, float] | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        self._first = None

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        logs = {} if logs is None else logs
        missing = [entry for entry in self.weights if entry not in logs]
        if missing:
            raise ValueError(
                "`weights` must name entries of the logs. Received: "
                f"{missing[0]!r}; the logs have {sorted(logs)}"
            )
        values = {entry: float(logs[entry]) for entry in self.weights}
        if self._first is None:
            self._first = values
        logs[self.name] = self._combined(values, self._first)

    def _combined(self, values: dict[str, float], first: dict[str, float]) -> float:
        if self.rule == "sum":
            return sum(self.weights[entry] * value for entry, value in values.items())
        if self.rule == "product":
            for entry, value in values.items():
                if value <= 0.0:
                    raise ValueError(
                        'entries must be > 0 for rule="product". Received: '
                        f"{entry}={value}"
                    )
            return math.prod(value ** self.weights[e] for e, value in values.items())
        changes = []
        for entry, value in values.items():
            if first[entry] == 0.0:
                raise ValueError(
                    "entries must not be 0 after the first epoch for rule="
                    f'"worst_relative_change". Received: {entry}=0.0'
                )
            change = (value - first[entry]) / abs(first[entry])
            changes.append(self.weights[entry] * change)
        # `min` would pass over a NaN.
        return min(changes) if all(map(math.isfinite, changes)) else float("nan")
