"""What `compile` has made of losses and metrics, task by task.

Keras hands out the sum of its losses alone, and updates all metrics with one set of
labels. What is read of its compiled objects for more than that is read in this file.
"""

from __future__ import annotations

from typing import Any

import keras


class TaskLosses:
    """The loss of each task, by the same rules as in Keras' `compile`.

    Args:
        tasks: the names of all tasks.
    """

    def __init__(self, tasks: list[str]) -> None:
        # Made with the model, so that they belong to its distribution strategy.
        self._trackers = {
            task: keras.metrics.Mean(name=f"{task}_loss") for task in tasks
        }
        self._with_loss: list[str] = []

    def compile(
        self, compiled: Any, loss: Any, output_names: Any, with_loss: list[str]
    ) -> None:
        """Take over the argument `loss` of the model's `compile`.

        Args:
            compiled: what Keras has made of it, unbuilt.
            loss: the argument.
            output_names: those of the model.
            with_loss: the tasks that have a loss.
        """
        # One of its own: that of the model would show a second loss for every task.
        self._compiled = type(compiled)(loss, None, output_names=output_names)
        self._with_loss = with_loss

    @property
    def trackers(self) -> list[keras.metrics.Mean]:
        """The mean loss of every task that has one."""
        return [self._trackers[task] for task in self._with_loss]

    def __call__(
        self,
        y: dict[str, Any],
        y_pred: dict[str, Any],
        weights: dict[str, Any],
        replicas: int,
    ) -> dict[str, Any]:
        """Return the losses by task, as they would be on a single device."""
        if not self._compiled.built:
            self._compiled.build(y, y_pred)
        found: dict[str, Any] = {}
        for path, loss, _, _ in self._compiled._flat_losses:
            task = path[0]
            with keras.name_scope(self._compiled.name):  # For names such as "_loss".
                value = loss(y[task], y_pred[task], weights[task])
            value = keras.ops.cast(value, self._compiled.dtype) * replicas
            found[task] = found[task] + value if task in found else value
        for task, value in found.items():
            rows = keras.ops.shape(y_pred[task])[0]
            self._trackers[task].update_state(value, sample_weight=rows)
        return found


def update_metrics(
    compiled: Any,
    y: dict[str, Any],
    y_defined: dict[str, Any],
    y_pred: dict[str, Any],
    weights: dict[str, Any],
) -> None:
    """Update metrics with the labels `y`, and weighted ones with `y_defined`."""
    if not compiled.built:
        compiled.build(y, y_pred)
    kinds = (
        (compiled._flat_metrics, y, None),
        (compiled._flat_weighted_metrics, y_defined, weights),
    )
    for metrics, labels, weight in kinds:
        order = compiled._resolved_output_names or list(y_pred)
        # Not strictly: Keras 3.12 has an empty list where there are no metrics.
        for metric, task in zip(metrics, order, strict=False):
            if metric:
                metric.update_state(
                    labels[task], y_pred[task], weight[task] if weight else None
                )
