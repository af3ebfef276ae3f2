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
    """A functional Keras model with one output per task.

    Compile, fit, evaluate, predict, save and export it like any Keras model; losses
    and metrics are dicts by task name. An output whose loss is missing or None in
    `loss` is only predicted and needs no labels.

    If a task is not defined on some rows (a rating exists only for watched movies),
    give these rows a sample weight of 0; their labels may be NaN or infinite. To
    exclude them exactly, use a loss with `reduction="mean_with_sample_weight"`, which
    divides by the sum of the weights, and list the task's metrics under
    `weighted_metrics`: those under `metrics` count every row, as in Keras, and a NaN
    label makes them NaN. Tasks missing in a dict of sample weights have weights of 1.

    `keras.models.clone_model` returns a plain functional model without
    `loss_weighting`; `MultiTaskModel.from_config(model.get_config())` keeps both.

    Args:
        inputs: the input tensors, in any structure that `keras.Model` accepts.
        outputs: dict of output tensors by task name.
        loss_weighting: None for the sum of the losses (times `loss_weights` of
            `compile`), or a layer that maps the task losses, shape `(t,)` in the order
            of `outputs`, to the total loss, such as
            `keras_moe.multitask.UncertaintyWeighting()`. If its call has an argument
            `mask`, that is True for tasks with a loss and a defined row in the batch;
            the loss of other tasks is 0. With learned weights the total (`loss` and
            `val_loss` in the logs) is not comparable between epochs and may be
            negative: evaluate models by the loss or metric of a task, such as
            `val_click_loss`.
        **kwargs: passed on to `keras.Model`.

    Raises:
        ValueError: if `outputs` is not a dict by valid task names, or
            `loss_weighting` is not a layer; in `compile`, if a dict has a key that is
            not a task, or if `loss_weighting` is combined with `loss_weights` or with
            no loss; in training, if labels or weights do not match the tasks.

    Example:

    >>> inputs = keras.Input((8,))
    >>> mmoe = keras_moe.layers.MMoE(
    ...     num_experts=4, expert_units=16, tasks=["click", "stars"]
    ... )
    >>> shared = mmoe(inputs)
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
                "`loss_weighting` must be None or a layer that maps the task losses "
                f"to the total loss. Received: {loss_weighting!r}"
            )
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)
        self._tasks = tasks
        self.loss_weighting = loss_weighting
        self._weighting_takes_mask = loss_weighting is not None and (
            "mask" in inspect.signature(loss_weighting.call).parameters
        )
        if loss_weighting is not None:
            if not loss_weighting.built:
                loss_weighting.build((tasks.count,))
            # Keras 3.12 does not track layers added to a functional model later.
            if all(layer is not loss_weighting for layer in self.layers):
                self._layers.append(loss_weighting)
            self._task_losses = TaskLosses(self.task_names)

    @property
    def tasks(self) -> tuple[Any, ...]:
        """The names of the tasks, in the order of `outputs`."""
        return self._tasks.keys

    @property
    def task_names(self) -> list[str]:
        """The same as a list."""
        return list(self.tasks)

    @property
    def metrics(self) -> list[Any]:
        """The metrics of Keras, and the loss of every task."""
        if self.loss_weighting is None or not self.compiled:
            return super().metrics
        return [*super().metrics, *self._task_losses.trackers]

    def call(
        self, inputs: Any, training: bool | None = None, mask: Any = None, **kwargs: Any
    ) -> Any:
        """Call the model on its inputs; further features are for metrics alone."""
        expected = self.input
        if isinstance(inputs, dict) and isinstance(expected, dict):
            inputs = {name: inputs[name] for name in inputs if name in expected}
            if isinstance(mask, dict):
                mask = {name: mask[name] for name in mask if name in expected}
        return super().call(inputs, training=training, mask=mask, **kwargs)

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
                "`loss_weights` must be None with a `loss_weighting`. "
                f"Received: loss_weights={loss_weights!r}"
            )
        super().compile(optimizer, loss, loss_weights, *args, **kwargs)
        # As in Keras, `loss` is None, a dict, or the losses of all outputs.
        self._with_loss = _tasks_with_value(loss, self.task_names)
        if self.loss_weighting is not None:
            if not self._with_loss:
                raise ValueError(
                    "`loss` must give at least one task a loss if `loss_weighting` is "
                    f"set. Received: loss={loss!r}"
                )
            self._task_losses.compile(
                self._compile_loss, loss, self.output_names, self._with_loss
            )
        self._with_metrics = {
            task
            for argument in ("metrics", "weighted_metrics")
            for task in _tasks_with_value(given.get(argument), self.task_names)
        }

    def compile_from_config(self, config: dict[str, Any]) -> None:
        # Keras skips this step for models that override `compile`.
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        return super().fit(**self._fill_sample_weight(super().fit, args, kwargs))

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        return super().evaluate(
            **self._fill_sample_weight(super().evaluate, args, kwargs)
        )

    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        return super().train_on_batch(
            **self._fill_sample_weight(super().train_on_batch, args, kwargs)
        )

    def test_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        return super().test_on_batch(
            **self._fill_sample_weight(super().test_on_batch, args, kwargs)
        )

    def _fill_sample_weight(
        self, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the arguments by name, with missing sample weights set to 1.

        Keras requires a weight for every label before it calls `compute_loss`.
        """
        arguments = dict(inspect.signature(method).bind(*args, **kwargs).arguments)
        arguments |= arguments.pop("kwargs", {})
        if arguments.get("sample_weight") is not None:
            arguments["sample_weight"] = _by_task.fill_sample_weight(
                arguments["sample_weight"], arguments.get("y"), self.output
            )
        held_out = arguments.get("validation_data")
        if isinstance(held_out, list | tuple) and len(held_out) == 3:
            x, y, weight = held_out
            weight = _by_task.fill_sample_weight(weight, y, self.output)
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
        # Before any sync with other replicas, whose calls clear these losses.
        further = [self._aggregate_additional_loss(loss) for loss in self.losses]
        y, weights, defined = _by_task.aligned(
            y, y_pred, sample_weight, self._with_loss
        )
        y = {
            # Keras requires a label for each output, even without a loss.
            task: _by_task.replace_undefined(label, defined[task])
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
        """Return the weighted loss of a replica's batch, scaled as in Keras.

        Keras divides losses by the number of replicas, since the optimizer sums their
        gradients. The weighting gets undivided losses, and its total is divided.
        """
        replicas = _backend.num_replicas()
        found = self._task_losses(y, y_pred, weights, replicas)
        zero = ops.zeros_like(found[self._with_loss[0]])
        # `y_pred` may be in another order: JAX and torch sort it by name.
        task_losses = [found.get(task, zero) for task in self.task_names]
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
                task: _by_task.replace_undefined(label, defined[task])
                for task, label in y.items()
            }
            features = self._features(x)
            update_metrics(self._compile_metrics, y, known, y_pred, weights, features)
        return self.get_metrics_result()

    def _features(self, x: Any) -> dict[str, Any]:
        """Return the inputs by name, those of a dict as they are."""
        if isinstance(x, dict):
            return x
        names = [tensor.name for tensor in keras.tree.flatten(self.input)]
        return dict(zip(names, keras.tree.flatten(x), strict=False))

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


def _tasks_with_value(value: Any, tasks: list[str]) -> list[str]:
    """Return the tasks that have a value in an argument of `compile`."""
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
