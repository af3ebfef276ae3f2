"""Per-task losses and metrics from the objects that Keras' `compile` creates.

Keras returns only the sum of its losses, and updates all metrics with the same labels.
All use of private attributes of Keras' compiled objects is in this file.
"""

from __future__ import annotations

from typing import Any

import keras


class TaskLosses:
    """The loss of each task, with the semantics of Keras' `compile`.

    Args:
        tasks: the names of all tasks.
    """

    def __init__(self, tasks: list[str]) -> None:
        # Created with the model, to be in the scope of its distribution strategy.
        self._trackers = {
            task: keras.metrics.Mean(name=f"{task}_loss") for task in tasks
        }
        self._with_loss: list[str] = []

    def compile(
        self, compiled: Any, loss: Any, output_names: Any, with_loss: list[str]
    ) -> None:
        """Set the losses to the argument `loss` of the model's `compile`.

        Args:
            compiled: Keras' unbuilt compiled loss.
            loss: the argument of `compile`.
            output_names: output names of the model.
            with_loss: the tasks that have a loss.
        """
        # A separate object: the model's own would report each task loss twice.
        self._compiled = type(compiled)(loss, None, output_names=output_names)
        self._with_loss = with_loss

    @property
    def trackers(self) -> list[keras.metrics.Mean]:
        """The mean-loss metric of every task that has a loss."""
        return [self._trackers[task] for task in self._with_loss]

    def __call__(
        self,
        y: dict[str, Any],
        y_pred: dict[str, Any],
        weights: dict[str, Any],
        replicas: int,
    ) -> dict[str, Any]:
        """Return the losses by task, without division by the number of replicas."""
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
    features: dict[str, Any],
) -> None:
    """Update metrics with labels `y`, and weighted metrics with `y_defined`.

    A metric with an attribute `group` also gets the feature of this name.
    """
    if not compiled.built:
        compiled.build(y, y_pred)
    kinds = (
        (compiled._flat_metrics, y, None),
        (compiled._flat_weighted_metrics, y_defined, weights),
    )
    for metrics, labels, weight in kinds:
        order = compiled._resolved_output_names or list(y_pred)
        # Not strict: Keras 3.12 has an empty list if there are no metrics.
        for metric, task in zip(metrics, order, strict=False):
            # A list of metrics for each output.
            for part in metric.metrics if metric else ():
                part.update_state(
                    labels[task],
                    y_pred[task],
                    weight[task] if weight else None,
                    **_groups(part, features),
                )


def _groups(metric: Any, features: dict[str, Any]) -> dict[str, Any]:
    """Return the argument `groups` of metrics by group."""
    group = getattr(metric, "group", None)
    if group is None:
        return {}
    if group not in features:
        raise ValueError(
            f"`group` of the metric {metric.name!r} must be the name of a feature in "
            f"`x`. Received: group={group!r}; the features are {sorted(features)}"
        )
    return {"groups": features[group]}
