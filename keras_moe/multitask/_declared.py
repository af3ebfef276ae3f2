"""Losses and metrics of declared tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe import _backend
from keras_moe.multitask._compiled import update_metrics
from keras_moe.multitask.heads._base import MEAN, HeadLoss, like
from keras_moe.multitask.heads.ranking import RankingLoss, scores
from keras_moe.multitask.joint_loss import JointLoss, Rows
from keras_moe.multitask.task import FunctionLoss, Task


class DeclaredTasks:
    """The tasks of a model that were given as `Task` objects.

    Attributes:
        compile_arguments: the arguments of the last `compile`. Keras would count the
            metrics in a dict of the model itself a second time.

    Args:
        tasks: the declarations.
        outputs: dict of the model's outputs.
    """

    def __init__(self, tasks: Sequence[Task], outputs: dict[str, Any]) -> None:
        self.tasks = _checked(tasks, list(outputs))
        for task in self.tasks:
            task.check_output(outputs[task.name])
        self.compile_arguments: dict[str, Any] = {}
        self._outputs = list(outputs)
        self.keys = sorted(set().union(*(task.keys for task in self.tasks)))
        # Created with the model, to be in the scope of its distribution strategy.
        self._losses = {
            task.name: keras.metrics.Mean(name=f"{task.name}_loss")
            for task in self.tasks
            if task.loss is not None
        }
        self._defined = {
            task.name: keras.metrics.Mean(name=f"{task.name}_defined")
            for task in self.tasks
            if task.sometimes_undefined
        }

    @property
    def trackers(self) -> list[keras.metrics.Mean]:
        """The metrics of the mean loss and of the share of defined rows."""
        return [*self._losses.values(), *self._defined.values()]

    def metrics_and(self, given: dict[str, Any] | None) -> dict[str, list[Any]]:
        """Return the metrics by task and those given to `compile`.

        Args:
            given: None, or a dict of a metric or a list of metrics by output name.
        """
        found = {task.name: list(task.metrics) for task in self.tasks if task.metrics}
        for name, metrics in (given or {}).items():
            more = metrics if isinstance(metrics, list | tuple) else [metrics]
            found[name] = [*found.get(name, []), *more]
        return found

    def rows(
        self, y: Any, outputs: dict[str, Any], sample_weight: Any = None
    ) -> dict[str, Rows]:
        """Return the labels and weights of every task.

        Args:
            y: dict of labels by key; a tensor if there is one key.
            outputs: dict of the model's outputs.
            sample_weight: None, dict of weights by key, or the weights of all.
        """
        y = self._by_key("y", y)
        missing = [key for key in self.keys if y.get(key) is None]
        if missing:
            raise ValueError(
                f"`y` must have the labels {self.keys}. Received: y with the keys "
                f"{list(y)}, without {missing[0]!r}"
            )
        weights: Any = {}
        if sample_weight is not None:
            weights = (
                self._by_key("sample_weight", sample_weight)
                if isinstance(sample_weight, dict | list | tuple)
                else dict.fromkeys(self.keys, sample_weight)
            )
        found = {}
        for task in self.tasks:
            # Of several labels, the first: Keras repeats the weights of all rows for
            # every label, and their product would be the square.
            weight = weights.get(task.label_keys[0])
            found[task.name] = task.rows(y, outputs[task.name], weight)
        return found

    def _by_key(self, argument: str, value: Any) -> dict[str, Any]:
        if isinstance(value, dict):
            return value
        if len(self.keys) == 1 and value is not None:
            return {self.keys[0]: keras.tree.flatten(value)[0]}
        raise ValueError(
            f"`{argument}` must be a dict with the keys {self.keys}. "
            f"Received: {argument} of the type {type(value).__name__}"
        )

    def losses(
        self, y: Any, outputs: dict[str, Any], sample_weight: Any
    ) -> tuple[dict[str, Any], Any]:
        """Return the losses by task, not divided by the number of replicas; a mask.

        The mask is `(t,)` for t outputs, True for tasks with a loss and a defined row.
        """
        rows = self.rows(y, outputs, sample_weight)
        found = {}
        for task in self.tasks:
            mine, output = rows[task.name], outputs[task.name]
            if task.name in self._defined:
                defined = ops.cast(ops.not_equal(mine.weights, 0), "float32")
                self._defined[task.name].update_state(defined)
            if task.loss is None:
                continue
            if isinstance(task.loss, JointLoss):
                value = task.loss(rows, outputs)
                counted = ops.cast(ops.shape(output)[0], "float32")
            else:
                value, counted = _mean_loss(task, mine, output)
            found[task.name] = value = ops.cast(value, "float32")
            self._losses[task.name].update_state(value, sample_weight=counted)
        return found, self._tasks_defined(rows)

    def _tasks_defined(self, rows: dict[str, Rows]) -> Any:
        losses = {task.name: task.loss for task in self.tasks}
        some = {
            name: ops.ones(())
            if weights is None
            else ops.cast(ops.any(ops.not_equal(weights, 0)), "float32")
            for name, (_, weights) in rows.items()
        }
        # A joint loss may count rows on which another task is defined.
        any_task = ops.max(ops.stack(list(some.values())))
        flags = [
            ops.zeros(())
            if losses.get(name) is None
            else any_task
            if isinstance(losses[name], JointLoss)
            else some[name]
            for name in self._outputs
        ]
        # A task defined on one replica is defined in the global batch.
        return _backend.sum_over_replicas(ops.stack(flags)) > 0

    def update_metrics(
        self,
        compiled: Any,
        y: Any,
        outputs: dict[str, Any],
        sample_weight: Any,
        features: dict[str, Any],
    ) -> None:
        """Update the metrics with the heads' predictions on defined rows."""
        rows = self.rows(y, outputs, sample_weight)
        heads = {task.name: task.head for task in self.tasks}
        labels, weights, predictions = {}, {}, {}
        for name, output in outputs.items():
            # Keras requires a label for each output, even without a metric.
            labels[name], weights[name] = rows.get(name, (output, None))
            head = heads.get(name)
            predictions[name] = output if head is None else head.prediction(output)
            # Metrics that average the last axis would otherwise average a sequence.
            labels[name] = like(labels[name], predictions[name])
        # Metrics without weights count the defined rows, too.
        flags = {
            name: None
            if weight is None
            else ops.cast(ops.not_equal(weight, 0), "float32")
            for name, weight in weights.items()
        }
        update_metrics(
            compiled, (labels, flags), (labels, weights), predictions, features
        )

    def complete_weights(self, y: Any, weights: Any, outputs: dict[str, Any]) -> Any:
        """Return the sample weights with ones for labels without; check the labels."""
        if isinstance(weights, dict):
            unknown = [key for key in weights if key not in self.keys]
            if unknown:
                raise ValueError(
                    f"the keys of `sample_weight` must be labels of the tasks, "
                    f"{self.keys}. Received: {unknown[0]!r}"
                )
            if isinstance(y, dict):
                # Keras requires a weight for every label.
                weights = {
                    key: np.ones(len(labels), "float32")
                    if weights.get(key) is None
                    else weights[key]
                    for key, labels in y.items()
                }
        self.check_labels(y, weights, outputs)
        return weights

    def check_labels(self, y: Any, weights: Any, outputs: dict[str, Any]) -> None:
        """Raise ValueError for an invalid label, if `y` are arrays."""
        if isinstance(y, dict):
            # Columns of a data frame.
            y = {k: v.to_numpy() if hasattr(v, "to_numpy") else v for k, v in y.items()}
        arrays = keras.tree.flatten((y, weights))
        if y is None or not all(a is None or isinstance(a, np.ndarray) for a in arrays):
            return
        for key, labels in y.items() if isinstance(y, dict) else ():
            if labels is not None and labels.dtype.kind not in "biuf":
                raise ValueError(
                    f"labels must be numbers; encode categories as integers. Received: "
                    f"{key!r} of dtype {labels.dtype}"
                )
        if len({len(a) for a in arrays if a is not None}) > 1:
            return  # Keras has an error for this.
        # Symbolic masks would make everything symbolic.
        plain = {k: keras.KerasTensor(v.shape, v.dtype) for k, v in outputs.items()}
        rows = self.rows(y, plain, weights)
        for task in self.tasks:
            # Where an output has a mask, only a call knows which steps are defined.
            if _backend.keras_mask(outputs[task.name]) is None:
                task.check(rows[task.name])


def _checked(tasks: Sequence[Task], outputs: Sequence[str]) -> list[Task]:
    if not isinstance(tasks, list | tuple) or not all(
        isinstance(task, Task) for task in tasks
    ):
        raise ValueError(
            "`tasks` must be a sequence of keras_moe.multitask.Task. "
            f"Received: tasks={tasks!r}"
        )
    tasks = list(tasks)
    names = [task.name for task in tasks]
    for name in names:
        if name not in outputs or names.count(name) > 1:
            raise ValueError(
                "`tasks` must have one Task for each name, and its name must be an "
                f"output of the model, {list(outputs)}. Received: {names}"
            )
    metrics = [m for task in tasks for m in task.metrics if not isinstance(m, str)]
    for i, metric in enumerate(metrics):
        if any(metric is other for other in metrics[:i]):
            raise ValueError(
                "`tasks` must have metrics of their own: one object in two tasks would "
                f"count the rows of both. Received twice: {metric!r}"
            )
    if not any(task.loss is not None for task in tasks):
        raise ValueError(
            f"`tasks` must have at least one task with a loss. Received: {tasks}"
        )
    return tasks


def _mean_loss(task: Task, rows: Rows, output: Any) -> tuple[Any, Any]:
    """Return the loss of a task on this replica's rows, and their total weight."""
    replicas = _backend.num_replicas()
    weights = rows.weights
    if weights is not None:
        weights = task.head.loss_weights(weights)
    if isinstance(task.loss, RankingLoss):
        # Weights are of lists, and a mask of candidates is already in the labels.
        output = scores(output)
    elif not isinstance(task.loss, HeadLoss) or isinstance(task.loss, FunctionLoss):
        # A loss of Keras compares with what the head predicts, as metrics do.
        output = task.head.prediction(output)
    # Losses that average the last axis would otherwise average a sequence.
    value = task.loss(like(rows.labels, output), output, weights) * replicas
    if weights is None:
        return value, ops.cast(ops.size(rows.labels), "float32")
    total = ops.sum(weights)
    exact = getattr(task.loss, "reduction", None) == MEAN
    if replicas > 1 and exact:
        # The mean over the global batch: replicas have different total weights.
        every = _backend.sum_over_replicas(total)
        value = value * ops.divide_no_nan(total * replicas, every)
        total = every / replicas  # So that the mean of these values counts every row.
    return value, total if exact else ops.cast(ops.shape(output)[0], "float32")
