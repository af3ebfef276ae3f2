"""A model with one named output for each task."""

from __future__ import annotations

import inspect
from typing import Any

import keras
from keras import ops

from keras_moe import _backend
from keras_moe.layers._tasks import Tasks
from keras_moe.multitask import _by_task
from keras_moe.multitask._compiled import TaskLosses, update_metrics


@keras.saving.register_keras_serializable("keras_moe")
class MultiTaskModel(keras.Model):
    """A functional Keras model whose outputs are tasks.

    Compile, fit, evaluate, predict, save and export it as any Keras model: losses and
    metrics are dicts by task name. An output without a loss is only predicted, and
    needs no labels: leave it out of `loss`, or give it None there.

    A task that is not defined on some rows (a rating exists only where the movie was
    watched) is masked by sample weights: 0 for such a row, whose label may then be NaN
    or infinite. For the row to add exactly nothing, give the loss
    `reduction="mean_with_sample_weight"`, which divides by the sum of the weights, and
    list the task's metrics under `weighted_metrics`: those under `metrics` count every
    row with the label it has, as Keras has it, so that a NaN there gives NaN. Tasks
    missing in a dict of sample weights have weights of 1.

    `keras.models.clone_model` makes a plain functional model of it, without
    `loss_weighting`; `MultiTaskModel.from_config(model.get_config())` keeps both.

    Args:
        inputs: the input tensors, in any structure that `keras.Model` takes.
        outputs: dict of output tensors by task name.
        loss_weighting: None for the sum of the losses (times `loss_weights` of
            `compile`), or a layer that turns the task losses, shape `(t,)` in the
            order of `outputs`, into the total, such as
            `keras_moe.multitask.UncertaintyWeighting()`. If its call has an argument
            `mask`, it is told which tasks have a loss and a defined row in the batch;
            the loss of the others is 0. The total, `loss` and `val_loss` in the logs,
            then is not comparable between epochs and may be negative: judge a model by
            the loss or metric of a task, such as `val_click_loss`.
        **kwargs: passed on to `keras.Model`.

    Raises:
        ValueError: if `outputs` is not a dict by valid task names, if
            `loss_weighting` is not a layer; in `compile`, if a dict has a key that is
            no task, or if there are `loss_weights` or no loss at all beside a
            `loss_weighting`; in training, if labels or weights do not fit the tasks.

    Example:

    >>> inputs = keras.Input((8,))
    >>> shared = keras_moe.layers.MMoE(4, 16, tasks=["click", "stars"])(inputs)
    >>> model = keras_moe.multitask.MultiTaskModel(
    ...     inputs,
    ...     {
    ...         "click": keras_moe.layers.Tower((8,), "sigmoid")(shared["click"]),
    ...         "stars": keras_moe.layers.Tower((8,))(shared["stars"]),
    ...     },
    ... )
    >>> mean = "mean_with_sample_weight"
    >>> model.compile(
    ...     loss={
    ...         "click": keras.losses.BinaryCrossentropy(reduction=mean),
    ...         "stars": keras.losses.MeanSquaredError(reduction=mean),
    ...     },
    ... )
    >>> x, clicked = np.ones((4, 8)), np.array([[1.0], [0.0], [1.0], [0.0]])
    >>> y = {"click": clicked, "stars": np.array([[4.0], [0.0], [5.0], [0.0]])}
    >>> weights = {"click": np.ones(4), "stars": clicked[:, 0]}
    >>> history = model.fit(x, y, sample_weight=weights, verbose=0)
    """

    def __init__(
        self,
        inputs: Any,
        outputs: dict[str, Any],
        loss_weighting: keras.layers.Layer | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(outputs, dict):
            raise ValueError(
                "`outputs` must be a dict of output tensors by task name. "
                f"Received: {outputs!r}"
            )
        tasks = Tasks(list(outputs))
        if loss_weighting is not None and not isinstance(
            loss_weighting, keras.layers.Layer
        ):
            raise ValueError(
                "`loss_weighting` must be None or a layer that turns the task losses "
                f"into the total. Received: {loss_weighting!r}"
            )
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)
        self.tasks = tasks
        self.loss_weighting = loss_weighting
        self._weighting_takes_mask = loss_weighting is not None and (
            "mask" in inspect.signature(loss_weighting.call).parameters
        )
        if loss_weighting is not None:
            if not loss_weighting.built:
                loss_weighting.build((tasks.count,))
            # Keras 3.12 tracks no layer that a functional model is given later.
            if all(layer is not loss_weighting for layer in self.layers):
                self._layers.append(loss_weighting)
            self._task_losses = TaskLosses(self.task_names)

    @property
    def task_names(self) -> list[str]:
        """The names of the tasks, in the order of `outputs`."""
        return list(self.tasks.names or ())

    @property
    def metrics(self) -> list[Any]:
        """The metrics that Keras shows, and the loss of every task."""
        if self.loss_weighting is None or not self.compiled:
            return super().metrics
        return [*super().metrics, *self._task_losses.trackers]

    def compile(
        self,
        optimizer: Any = "rmsprop",
        loss: Any = None,
        loss_weights: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        bound = inspect.signature(super().compile).bind(
            optimizer, loss, loss_weights, *args, **kwargs
        )
        given = bound.arguments
        for argument in ("loss", "loss_weights", "metrics", "weighted_metrics"):
            _by_task.check_keys(argument, given.get(argument), self.task_names)
        if self.loss_weighting is not None and loss_weights is not None:
            raise ValueError(
                "`loss_weights` must be None with a `loss_weighting`, which learns "
                f"them. Received: loss_weights={loss_weights!r}"
            )
        super().compile(optimizer, loss, loss_weights, *args, **kwargs)
        # By Keras' rules for `loss`: None, a dict, or the losses of all outputs.
        self._with_loss = _with_entry(loss, self.task_names)
        if self.loss_weighting is not None:
            if not self._with_loss:
                raise ValueError(
                    "`loss` must give at least one task a loss with a "
                    f"`loss_weighting`. Received: loss={loss!r}"
                )
            self._task_losses.compile(
                self._compile_loss, loss, self.output_names, self._with_loss
            )
        self._with_metrics = {
            task
            for argument in ("metrics", "weighted_metrics")
            for task in _with_entry(given.get(argument), self.task_names)
        }

    def compile_from_config(self, config: dict[str, Any]) -> None:
        # Keras skips this step for a model with a `compile` of its own.
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        return super().fit(**self._with_all_weights(super().fit, args, kwargs))

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        return super().evaluate(
            **self._with_all_weights(super().evaluate, args, kwargs)
        )

    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        return super().train_on_batch(
            **self._with_all_weights(super().train_on_batch, args, kwargs)
        )

    def test_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        return super().test_on_batch(
            **self._with_all_weights(super().test_on_batch, args, kwargs)
        )

    def _with_all_weights(
        self, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the arguments by name, with weights of 1 where a dict leaves them out.

        Keras wants a weight for every label before `compute_loss` sees any.
        """
        arguments = dict(inspect.signature(method).bind(*args, **kwargs).arguments)
        arguments |= arguments.pop("kwargs", {})
        if arguments.get("sample_weight") is not None:
            arguments["sample_weight"] = _by_task.completed(
                arguments["sample_weight"], arguments.get("y"), self.output
            )
        held_out = arguments.get("validation_data")
        if isinstance(held_out, list | tuple) and len(held_out) == 3:
            x, y, weight = held_out
            weight = _by_task.completed(weight, y, self.output)
            arguments["validation_data"] = x, y, weight
        return arguments

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        if self._compile_loss is None:
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        # Before anything waits for other replicas, whose calls clear these.
        further = [self._aggregate_additional_loss(loss) for loss in self.losses]
        y, weights, defined = _by_task.aligned(
            y, y_pred, sample_weight, self._with_loss
        )
        y = {
            # Keras wants a label for each output, of whatever value without a loss.
            task: _by_task.without_undefined(label, defined[task])
            if task in self._with_loss
            else y_pred[task]
            for task, label in y.items()
        }
        if self.loss_weighting is None:
            given = sample_weight is not None
            return super().compute_loss(
                x, y, y_pred, weights if given else None, training
            )
        total = self._weighted_loss(y, y_pred, weights, defined)
        return sum(further, start=total)

    def _weighted_loss(
        self,
        y: dict[str, Any],
        y_pred: dict[str, Any],
        weights: dict[str, Any],
        defined: dict[str, Any],
    ) -> Any:
        """Return the weighed loss of a replica's batch, scaled as Keras scales it.

        Keras' losses are divided by the number of replicas, since the optimizer adds
        up their gradients. A weighting is given the losses as they are without, and
        its total is divided.
        """
        replicas = _backend.num_replicas()
        found = self._task_losses(y, y_pred, weights, replicas)
        nothing = ops.zeros_like(found[self._with_loss[0]])
        # Not in the order of `y_pred`, which JAX and torch sort by name.
        task_losses = [found.get(task, nothing) for task in self.task_names]
        weighting: Any = self.loss_weighting
        arguments = {}
        if self._weighting_takes_mask:
            rows = {task: defined[task] for task in self.task_names}
            arguments["mask"] = _tasks_defined(rows, self._with_loss)
        return weighting(ops.stack(task_losses), **arguments) / replicas

    def compute_metrics(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None
    ) -> dict[str, Any]:
        if self._compile_metrics is not None:
            y, weights, defined = _by_task.aligned(
                y, y_pred, sample_weight, self._with_metrics
            )
            known = {
                task: _by_task.without_undefined(label, defined[task])
                for task, label in y.items()
            }
            update_metrics(self._compile_metrics, y, known, y_pred, weights)
        return self.get_metrics_result()

    def get_config(self) -> dict[str, Any]:
        functional = keras.Model(self.input, self.output, name=self.name)
        return {
            "functional": functional.get_config(),
            "loss_weighting": keras.saving.serialize_keras_object(self.loss_weighting),
            "trainable": self.trainable,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> MultiTaskModel:
        functional = keras.Model.from_config(config["functional"], custom_objects)
        weighting = keras.saving.deserialize_keras_object(config["loss_weighting"])
        return cls(
            functional.input,
            functional.output,
            loss_weighting=weighting,
            name=functional.name,
            trainable=config["trainable"],
        )


def _with_entry(value: Any, tasks: list[str]) -> list[str]:
    """Return the tasks to which an argument of `compile` gives something."""
    if value is None:
        return []
    if isinstance(value, list | tuple) and len(value) == len(tasks) > 1:
        # One for each output, in the order of Keras.
        value = keras.tree.pack_sequence_as(dict.fromkeys(tasks), list(value))
    if isinstance(value, dict):
        return [task for task in tasks if value.get(task) is not None]
    return tasks


def _tasks_defined(defined: dict[str, Any], with_loss: list[str]) -> Any:
    """Return (t,) bool: the tasks that have a loss and a defined row; None if all."""
    if len(with_loss) == len(defined) and all(d is None for d in defined.values()):
        return None
    rows_of = [
        ops.convert_to_tensor(float(task in with_loss), "float32")
        if rows is None or task not in with_loss
        else ops.cast(ops.any(rows), "float32")
        for task, rows in defined.items()
    ]
    # A task that is defined on one replica is defined in the batch of all.
    return _backend.sum_over_replicas(ops.stack(rows_of)) > 0
