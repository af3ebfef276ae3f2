"""A metric that keeps its rows until the end of an epoch, for exact results.

Axis letters: n rows of a batch, r rows that are kept.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_moe import _backend, _checks
from keras_moe.metrics._rows import flat_groups, is_traced, not_a_number, rows


class Kept(NamedTuple):
    """The rows of an epoch as arrays of shape (r,); groups are integers."""

    groups: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    weights: np.ndarray


class BufferedMetric(keras.metrics.Metric):
    """Keeps up to `max_rows` rows; a subclass computes `value_of(rows)` in NumPy.

    A result is computed where no compiler is at work: at the end of an epoch, of
    `evaluate`, or in your own loop. Within a compiled step it is NaN.
    """

    def __init__(self, max_rows: int, group: str | None, name: str) -> None:
        super().__init__(name=_checks.text("name", name), dtype="float32")
        self.max_rows = _checks.positive_int("max_rows", max_rows)
        self.group = _checks.optional_text("group", group)
        # One more row takes all that does not fit.
        size = self.max_rows + 1
        kinds = {
            "groups": "int32",
            "labels": "float32",
            "predictions": "float32",
            "weights": "float32",
        }
        # Every replica of a strategy keeps the rows of all: one is read.
        first = "only_first_replica"
        self._kept = {
            part: self.add_variable((size,), "zeros", dtype, first, part)
            for part, dtype in kinds.items()
        }
        self._count = self.add_variable((), "zeros", "int32", first, "count")

    needs_groups = True

    def update_state(
        self,
        y_true: Any,
        y_pred: Any,
        sample_weight: Any = None,
        groups: Any = None,
    ) -> None:
        batch = rows(y_true, y_pred, sample_weight)
        if groups is None and not self.needs_groups:
            groups = ops.zeros_like(batch.weights, dtype="int32")
        else:
            groups = flat_groups(groups, y_pred)
        values = {"groups": ops.cast(groups, "int32"), **batch._asdict()}
        values = {
            part: _backend.gather_over_replicas(value) for part, value in values.items()
        }
        n = ops.shape(values["weights"])[0]
        # On torch Keras traces with a count of any value.
        places = ops.clip(self._count + ops.arange(n, dtype="int32"), 0, self.max_rows)
        for part, variable in self._kept.items():
            variable.assign(ops.scatter_update(variable, places[:, None], values[part]))
        self._count.assign(self._count + n)

    def result(self) -> Any:
        if is_traced(self._count):
            return not_a_number()
        count = int(ops.convert_to_numpy(self._count))
        if count > self.max_rows:
            warnings.warn(
                f"{type(self).__name__} {self.name!r} is NaN: it has seen {count} rows "
                f"and keeps max_rows={self.max_rows}. Give it a larger `max_rows`, or "
                "evaluate on fewer rows.",
                stacklevel=2,
            )
            return not_a_number()
        arrays = [
            ops.convert_to_numpy(variable)[:count] for variable in self._kept.values()
        ]
        counted = arrays[3] != 0.0
        value = self.value_of(Kept(*(array[counted] for array in arrays)))
        return ops.convert_to_tensor(value, "float32")

    def value_of(self, kept: Kept) -> float:
        """Return the value of the metric, NaN if it is not defined."""
        raise NotImplementedError

    def merge_state(self, metrics: Any) -> None:
        """Add the rows of metrics of the same kind, such as those of other workers."""
        for other in metrics:
            count = int(ops.convert_to_numpy(other._count))
            parts = {
                part: ops.convert_to_numpy(variable)[:count]
                for part, variable in other._kept.items()
            }
            self.update_state(
                parts["labels"],
                parts["predictions"],
                parts["weights"],
                groups=parts["groups"],
            )

    def get_config(self) -> dict[str, Any]:
        return {"max_rows": self.max_rows, "group": self.group, "name": self.name}
