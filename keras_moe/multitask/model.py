"""A model with one named output for each task."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_moe import _backend, _checks, _replicas
from keras_moe.layers._tasks import Tasks
from keras_moe.multitask import _by_task, gradients, weighting
from keras_moe.multitask._compiled import CompiledTasks
from keras_moe.multitask._declared import DeclaredTasks
from keras_moe.multitask._per_task import PerTaskTraining
from keras_moe.multitask._train_steps import LossParts
from keras_moe.multitask._weighting_layer import find
from keras_moe.multitask.task import Task


@keras.saving.register_keras_serializable("keras_moe")
class MultiTaskModel(PerTaskTraining):
    """A functional Keras model with one output per task.

    Fit, evaluate, predict, save and export it like any Keras model. Losses and metrics
    are either declared with `tasks`, and `compile` needs only an optimizer, or given to
    `compile` as dicts by task name. An output without a loss is only predicted.

    With `tasks`, a `Task` says on which rows it is defined. Without, if a task is not
    defined on some rows (a rating exists only for watched movies), give these rows a
    sample weight of 0; their labels may be NaN or infinite. To exclude them exactly,
    use a loss with `reduction="mean_with_sample_weight"`, which divides by the sum of
    the weights, and list the task's metrics under `weighted_metrics`: those under
    `metrics` count every row, as in Keras, and a NaN label makes them NaN. Tasks
    missing in a dict of sample weights have weights of 1.

    `keras.models.clone_model` returns a plain functional model without
    `loss_weighting`; `MultiTaskModel.from_config(model.get_config())` keeps both.

    Args:
        inputs: the input tensors, in any structure that `keras.Model` accepts.
        outputs: dict of output tensors by task name.
        loss_weighting: how the tasks are combined. None: the sum of the losses (times
            `loss_weights` of `compile`). A name or layer of
            `keras_moe.multitask.weighting`, or another layer that maps the losses,
            shape `(t,)` in the order of `outputs`, to the total loss: if its call has
            an argument `mask`, that is True for tasks with a loss and a defined row in
            the batch; the loss of other tasks is 0. A name or layer of
            `keras_moe.multitask.gradients`: a gradient is computed for every task, and
            they are combined on the shared variables; `loss` in the logs is then the
            sum of the losses. With learned weights the total (`loss` and `val_loss`) is
            not comparable between epochs and may be negative: evaluate models by the
            loss or metric of a task, such as `val_click_loss`.
        tasks: None, or a sequence of `keras_moe.multitask.Task`, one for each output
            with a loss or metrics. Labels in `y` are a dict by the tasks' keys.
        shared_layers: None, or the names of the layers whose variables are shared, for
            `keras_moe.multitask.gradients`. None: in each batch, the variables that the
            gradients of at least two tasks reach.
        **kwargs: passed on to `keras.Model`.

    Raises:
        ValueError: if an argument is invalid; in `compile`, if a dict has a key that is
            not a task, if `loss_weighting` is combined with `loss_weights` or with no
            loss, or `tasks` with `loss`, or under a `tf.distribute` strategy that
            Keras 3 cannot train with; in training, if labels or weights do not match
            the tasks, or, in arrays, labels are not valid for the head of their task.

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
        loss_weighting: Any = None,
        *,
        tasks: Sequence[Task] | None = None,
        shared_layers: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(outputs, dict):
            raise ValueError(
                "`outputs` must be a dict of output tensors by task name. "
                f"Received: {outputs!r}"
            )
        names = Tasks(list(outputs), "outputs")
        loss_weighting = find(
            loss_weighting,
            {**weighting.KNOWN, **gradients.KNOWN},
            keras.layers.Layer,
            "a layer that maps the task losses to the total loss, such as "
            "keras_moe.multitask.weighting.DWA(steps=100)",
            argument="loss_weighting",
        )
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)
        self._tasks = names
        self.loss_weighting = loss_weighting
        self.shared_layers = _shared_layers(shared_layers, self)
        if loss_weighting is not None:
            self._weighting_takes = set(
                inspect.signature(loss_weighting.call).parameters
            ) & {"mask", "training"}
            if not loss_weighting.built:
                # A Gramian is (t, t).
                axes = 2 if self.per_task_gradients else 1
                loss_weighting.build((names.count,) * axes)
            # Keras 3.12 does not track layers added to a functional model later.
            if all(layer is not loss_weighting for layer in self.layers):
                self._layers.append(loss_weighting)
        self._declared = None if tasks is None else DeclaredTasks(tasks, outputs)
        self._compiled_tasks = CompiledTasks(
            self.task_names, tracks=loss_weighting is not None
        )

    @property
    def tasks(self) -> tuple[Any, ...]:
        """The names of the tasks, in the order of `outputs`."""
        return self._tasks.keys

    @property
    def task_names(self) -> list[str]:
        """The same as a list."""
        return list(self.tasks)

    @property
    def declared_tasks(self) -> list[Task]:
        """The argument `tasks`; empty if it was None."""
        return [] if self._declared is None else list(self._declared.tasks)

    @property
    def _source(self) -> DeclaredTasks | CompiledTasks:
        """Where losses and metrics come from."""
        return self._compiled_tasks if self._declared is None else self._declared

    @property
    def metrics(self) -> list[Any]:
        """The metrics of Keras, and the loss of every task."""
        if not self.compiled:
            return super().metrics
        return [*super().metrics, *self._source.trackers]

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
        given = (
            inspect.signature(super().compile)
            .bind(optimizer, loss, loss_weights, *args, **kwargs)
            .arguments
        )
        given |= given.pop("kwargs", {})
        _replicas.check_trains(self, given.get("jit_compile"))
        self._check_compile(given)
        derived = dict(given)
        if self._declared is not None:
            more = given.get("weighted_metrics")
            derived["weighted_metrics"] = self._declared.metrics_and(more)
            self._declared.compile_arguments = given
            # Keras would look for an output of each weight in its own losses.
            derived["loss_weights"] = None
        super().compile(**derived)
        self._loss_weights = [
            (loss_weights or {}).get(name, 1.0) if self._declared else 1.0
            for name in self.tasks
        ]
        if self._declared is None:
            separate = self.loss_weighting is not None
            self._compiled_tasks.compile(self._compile_loss, self.output_names, given)
            if separate and not self._compiled_tasks.with_loss:
                raise ValueError(
                    "`loss` must give at least one task a loss if `loss_weighting` is "
                    f"set. Received: loss={loss!r}"
                )

    def _check_compile(self, given: dict[str, Any]) -> None:
        for argument in ("loss", "loss_weights", "metrics", "weighted_metrics"):
            _by_task.check_keys(argument, given.get(argument), self.task_names)
        weights = given.get("loss_weights")
        if self.loss_weighting is not None and weights is not None:
            raise ValueError(
                "`loss_weights` must be None with a `loss_weighting`. "
                f"Received: loss_weights={weights!r}"
            )
        if self._declared is None:
            return
        if given.get("loss") is not None:
            raise ValueError(
                "`loss` must be None for a model with `tasks`, which have their "
                f"losses. Received: loss={given['loss']!r}"
            )
        for argument in ("loss_weights", "metrics", "weighted_metrics"):
            value = given.get(argument)
            if value is not None and not isinstance(value, dict):
                raise ValueError(
                    f"`{argument}` must be a dict by task name for a model with "
                    f"`tasks`. Received: {argument}={value!r}"
                )

    def get_compile_config(self) -> dict[str, Any]:
        if not self.compiled:
            return super().get_compile_config()
        serialize = keras.saving.serialize_keras_object
        if self._declared is None:
            config = super().get_compile_config()
        else:
            # What the tasks declare is derived again.
            given = self._declared.compile_arguments
            config = {key: serialize(value) for key, value in given.items()}
        # With the loss scaling that `compile` may have added: a process with another
        # dtype policy would not add it, and could not load the optimizer's variables.
        return {**config, "optimizer": serialize(self.optimizer)}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        # Keras skips this step for models that override `compile`.
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def complete_weights(self, y: Any, sample_weight: Any) -> Any:
        if self._declared is not None:
            return self._declared.complete_weights(y, sample_weight, self.output)
        if sample_weight is None:
            return None
        return _by_task.fill_sample_weight(sample_weight, y, self.output)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        if self._declared is None and self.loss_weighting is None:
            if self._compile_loss is not None:
                y, weights, _ = self._compiled_tasks.aligned(y, y_pred, sample_weight)
                sample_weight = None if sample_weight is None else weights
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        if not self.compiled or (self._declared is None and self._compile_loss is None):
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        total, parts = self.loss_and_parts(x, y, y_pred, sample_weight, training)
        # Only the step on JAX reads them. Elsewhere tensors of a graph would stay here.
        own_step = self.per_task_gradients or self.needs_new_losses
        self.last_parts = parts if training and own_step else None
        return total

    def loss_and_parts(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any, training: bool
    ) -> tuple[Any, LossParts]:
        """Return the total loss of a replica's batch and its parts.

        Keras divides losses by the number of replicas, since the optimizer sums their
        gradients. The weighting gets undivided losses, and its total is divided.
        """
        # Before any sync with other replicas, whose calls clear these losses.
        rest = [self._aggregate_additional_loss(loss) for loss in self.losses]
        found, mask = self._source.losses(y, y_pred, sample_weight)
        zero = ops.zeros_like(next(iter(found.values())))
        # `y_pred` may be in another order: JAX and torch sort it by name.
        losses = ops.stack([found.get(task, zero) for task in self.tasks])
        parts = LossParts(losses, mask, sum(rest, start=ops.zeros_like(zero)))
        total = self._total(parts, training) / _backend.num_replicas()
        return total + parts.rest, parts

    def _total(self, parts: LossParts, training: bool) -> Any:
        if self.loss_weighting is None or self.per_task_gradients:
            return ops.sum(parts.losses * ops.convert_to_tensor(self._loss_weights))
        known: dict[str, Any] = {"mask": parts.mask, "training": training}
        arguments = {name: known[name] for name in self._weighting_takes}
        return self.loss_weighting(parts.losses, **arguments)

    def compute_metrics(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None
    ) -> dict[str, Any]:
        y_pred = self.with_masks(y_pred)
        if self._compile_metrics is not None:
            self._source.update_metrics(
                self._compile_metrics, y, y_pred, sample_weight, self._features(x)
            )
        return self.get_metrics_result()

    def _features(self, x: Any) -> dict[str, Any]:
        """Return the inputs by name, those of a dict as they are."""
        if isinstance(x, dict):
            return x
        names = [tensor.name for tensor in keras.tree.flatten(self.input)]
        return dict(zip(names, keras.tree.flatten(x), strict=False))

    def get_config(self) -> dict[str, Any]:
        functional = keras.Model(self.input, self.output, name=self.name)
        serialize = keras.saving.serialize_keras_object
        return {
            "functional": functional.get_config(),
            "loss_weighting": serialize(self.loss_weighting),
            "tasks": None
            if self._declared is None
            else [serialize(task) for task in self._declared.tasks],
            "shared_layers": self.shared_layers,
            "trainable": self.trainable,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> MultiTaskModel:
        functional = keras.Model.from_config(config["functional"], custom_objects)
        deserialize = keras.saving.deserialize_keras_object
        tasks = config.get("tasks")
        return cls(
            functional.input,
            functional.output,
            loss_weighting=deserialize(config["loss_weighting"]),
            tasks=None if tasks is None else [deserialize(task) for task in tasks],
            shared_layers=config.get("shared_layers"),
            name=functional.name,
            trainable=config["trainable"],
        )


def _shared_layers(names: Any, model: keras.Model) -> list[str] | None:
    if names is None:
        return None
    known = [layer.name for layer in model.layers]
    rule = "a sequence of names of layers"
    names = _checks.items("shared_layers", names, rule)
    if not all(isinstance(name, str) and name in known for name in names):
        raise ValueError(
            f"`shared_layers` must be names of layers of the model, {known}. "
            f"Received: shared_layers={names!r}"
        )
    return list(names)
