"""A model with one named output for each task."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_moe.layers._tasks import Tasks


@keras.saving.register_keras_serializable("keras_moe")
class MultiTaskModel(keras.Model):
    """A functional Keras model whose outputs are tasks.

    Compile, fit, evaluate, predict, save and export it as any Keras model: losses and
    metrics are dicts by task name.

    A task that is not defined on some rows (a rating exists only where the movie was
    watched) is masked by sample weights: 0 for such a row. For the row to add exactly
    nothing, give the loss `reduction="mean_with_sample_weight"`, which divides by the
    sum of the weights, and list the task's metrics under `weighted_metrics`.

    `keras.models.clone_model` makes a plain functional model of it, without
    `loss_weighting`; `MultiTaskModel.from_config(model.get_config())` keeps both.

    Args:
        inputs: the input tensors, in any structure that `keras.Model` takes.
        outputs: dict of output tensors by task name.
        loss_weighting: None for the sum of the losses (times `loss_weights` of
            `compile`), or a layer that turns the task losses, shape `(t,)` in the
            order of `outputs`, into the total, such as
            `keras_moe.multitask.UncertaintyWeighting()`.
        **kwargs: passed on to `keras.Model`.

    Raises:
        ValueError: if `outputs` is not a dict by valid task names, if
            `loss_weighting` is not a layer, or, in `compile` with a
            `loss_weighting`, if `loss` is not a dict by task or `loss_weights` are
            given as well.

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
        if loss_weighting is not None:
            if not loss_weighting.built:
                loss_weighting.build((tasks.count,))
            self._task_loss_trackers = [
                keras.metrics.Mean(name=f"{name}_loss") for name in outputs
            ]

    def compile(
        self,
        optimizer: Any = "rmsprop",
        loss: Any = None,
        loss_weights: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if self.loss_weighting is not None:
            self._losses_by_task = self._checked_losses(loss, loss_weights)
        super().compile(optimizer, loss, loss_weights, *args, **kwargs)

    def _checked_losses(
        self, loss: Any, loss_weights: Any
    ) -> dict[str, keras.losses.Loss]:
        names = self.tasks.names or ()
        if not isinstance(loss, dict) or set(loss) != set(names):
            raise ValueError(
                "with a `loss_weighting`, `loss` must be a dict with one loss for each "
                f"task of {list(names)}. Received: loss={loss!r}"
            )
        if loss_weights is not None:
            raise ValueError(
                "`loss_weights` must be None with a `loss_weighting`, which learns "
                f"them. Received: loss_weights={loss_weights!r}"
            )
        return {name: _as_loss(loss[name]) for name in names}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        # Keras skips this step for a model with a `compile` of its own.
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        if self.loss_weighting is None:
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        task_losses = self._task_losses(y, y_pred, sample_weight)
        for tracker, task_loss in zip(
            self._task_loss_trackers, task_losses, strict=True
        ):
            tracker.update_state(task_loss)
        total = self.loss_weighting(ops.stack(task_losses))
        return total + sum(self.losses)

    def _task_losses(self, y: Any, y_pred: Any, sample_weight: Any) -> list[Any]:
        names = list(self._losses_by_task)
        if not isinstance(y, dict) or not set(names) <= set(y):
            found = sorted(y) if isinstance(y, dict) else type(y).__name__
            raise ValueError(
                "with a `loss_weighting`, the labels must be a dict with one entry for "
                f"each task of {names}. Received: {found}"
            )
        by_task = isinstance(sample_weight, dict)
        return [
            loss(
                y[name],
                y_pred[name],
                sample_weight.get(name) if by_task else sample_weight,
            )
            for name, loss in self._losses_by_task.items()
        ]

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


class _FunctionLoss(keras.losses.Loss):
    """A loss given as a function, with Keras' default reduction."""

    def __init__(self, function: Any) -> None:
        super().__init__(name="function_loss")
        self.function = function

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return self.function(y_true, y_pred)


def _as_loss(loss: Any) -> keras.losses.Loss:
    loss = keras.losses.get(loss)
    return loss if isinstance(loss, keras.losses.Loss) else _FunctionLoss(loss)
