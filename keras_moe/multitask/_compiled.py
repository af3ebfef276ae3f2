"""Per-task losses and metrics from the objects that Keras' `compile` creates.

Keras returns only the sum of its losses, and updates all metrics with the same labels.
All use of private attributes of Keras' compiled objects is in this file.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_moe import _backend
from keras_moe.multitask import _by_task


class CompiledTasks:
    """The tasks of a model whose losses and metrics are given to `compile`.

    Args:
        tasks: the names of all tasks.
        tracks: bool, whether the mean loss of every task is a metric. Keras has these
            metrics as well, except with a loss weighting.
    """

    def __init__(self, tasks: list[str], tracks: bool) -> None:
        self._tasks = tasks
        # Created with the model, to be in the scope of its distribution strategy.
        self._trackers = {
            task: keras.metrics.Mean(name=f"{task}_loss") for task in tasks if tracks
        }
        self.with_loss: list[str] = []
        self._with_metrics: set[str] = set()

    def compile(self, compiled: Any, output_names: Any, given: dict[str, Any]) -> None:
        """Set losses and metrics to the arguments of the model's `compile`.

        Args:
            compiled: Keras' unbuilt compiled loss, or None.
            output_names: output names of the model.
            given: the arguments by name.
        """
        self.with_loss = _tasks_with_value(given.get("loss"), self._tasks)
        self._with_metrics = {
            task
            for argument in ("metrics", "weighted_metrics")
            for task in _tasks_with_value(given.get(argument), self._tasks)
        }
        if compiled is not None:
            # A separate object: the model's own would report each task loss twice. Read
            # with a weighting of the losses, and to compare the tasks' gradients.
            self._compiled = type(compiled)(
                given["loss"], None, output_names=output_names
            )

    @property
    def trackers(self) -> list[keras.metrics.Mean]:
        """The mean-loss metric of every task that has a loss."""
        return [self._trackers[t] for t in self.with_loss if t in self._trackers]

    def aligned(
        self, y: Any, y_pred: dict[str, Any], sample_weight: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Return labels, weights and masks of defined rows for the losses, by task."""
        y, weights, defined = _by_task.aligned(y, y_pred, sample_weight, self.with_loss)
        y = {
            # Keras requires a label for each output, even without a loss.
            task: _by_task.replace_undefined(label, defined[task])
            if task in self.with_loss
            else y_pred[task]
            for task, label in y.items()
        }
        return y, weights, defined

    def losses(
        self, y: Any, y_pred: dict[str, Any], sample_weight: Any
    ) -> tuple[dict[str, Any], Any]:
        """Return the losses by task, not divided by the number of replicas; a mask.

        The mask is `(t,)`, True for tasks with a loss and a defined row; None if all
        are.
        """
        y, weights, defined = self.aligned(y, y_pred, sample_weight)
        if not self._compiled.built:
            self._compiled.build(y, y_pred)
        replicas = _backend.num_replicas()
        found: dict[str, Any] = {}
        for path, loss, _, _ in self._compiled._flat_losses:
            task = path[0]
            with keras.name_scope(self._compiled.name):  # For names such as "_loss".
                value = loss(y[task], y_pred[task], weights[task])
            value = ops.cast(value, self._compiled.dtype) * replicas
            found[task] = found[task] + value if task in found else value
        for task, tracker in self._trackers.items():
            if task in found:
                rows = ops.shape(y_pred[task])[0]
                tracker.update_state(found[task], sample_weight=rows)
        # `y_pred` may be in another order: JAX and torch sort it by name.
        in_order = {task: defined[task] for task in self._tasks}
        return found, _tasks_defined(in_order, self.with_loss)

    def update_metrics(
        self,
        compiled: Any,
        y: Any,
        y_pred: dict[str, Any],
        sample_weight: Any,
        features: dict[str, Any],
    ) -> None:
        """Update metrics with all rows, and weighted metrics with the defined ones."""
        y, weights, defined = _by_task.aligned(
            y, y_pred, sample_weight, self._with_metrics
        )
        known = {
            task: _by_task.replace_undefined(label, defined[task])
            for task, label in y.items()
        }
        update_metrics(compiled, (y, {}), (known, weights), y_pred, features)


def _tasks_with_value(value: Any, tasks: list[str]) -> list[str]:
    """Return the tasks that have a value in an argument of `compile`.

    As in Keras, it is None, a dict, or the values of all outputs.
    """
    if value is None:
        return []
    if isinstance(value, list | tuple) and len(value) == len(tasks) > 1:
        # One for each output, in Keras' order.
        value = keras.tree.pack_sequence_as(dict.fromkeys(tasks), list(value))
    if isinstance(value, dict):
        return [task for task in tasks if value.get(task) is not None]
    return tasks


def _tasks_defined(defined: dict[str, Any], with_loss: list[str]) -> Any:
    """Return a (t,) bool mask of tasks with a loss and a defined row; None if all."""
    if len(with_loss) == len(defined) and all(d is None for d in defined.values()):
        return None
    rows_of = [
        ops.convert_to_tensor(float(task in with_loss), "float32")
        if rows is None or task not in with_loss
        else ops.cast(ops.any(rows), "float32")
        for task, rows in defined.items()
    ]
    # A task defined on one replica is defined in the global batch.
    return _backend.sum_over_replicas(ops.stack(rows_of)) > 0


def update_metrics(
    compiled: Any,
    plain: tuple[dict[str, Any], dict[str, Any]],
    weighted: tuple[dict[str, Any], dict[str, Any]],
    y_pred: dict[str, Any],
    features: dict[str, Any],
) -> None:
    """Update the metrics of `compile`.

    A metric with an attribute `group` also gets the feature of this name.

    Args:
        compiled: Keras' compiled metrics.
        plain: dicts by task of labels and weights, for `metrics`.
        weighted: the same for `weighted_metrics`.
        y_pred: dict of predictions by task.
        features: dict of the inputs.
    """
    if not compiled.built:
        compiled.build(plain[0], y_pred)
    kinds = (
        (compiled._flat_metrics, *plain),
        (compiled._flat_weighted_metrics, *weighted),
    )
    for metrics, labels, weights in kinds:
        order = compiled._resolved_output_names or list(y_pred)
        # Not strict: Keras 3.12 has an empty list if there are no metrics.
        for metric, task in zip(metrics, order, strict=False):
            # A list of metrics for each output.
            for part in metric.metrics if metric else ():
                part.update_state(
                    labels[task],
                    y_pred[task],
                    weights.get(task),
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
