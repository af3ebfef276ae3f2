"""The declaration of one task: its head, labels, rows, loss and metrics.

Axis letters: n rows, and in `(n, ...)` the further axes of a sequence or list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe import _backend, _checks
from keras_moe.layers import Tower
from keras_moe.layers._tasks import Tasks
from keras_moe.multitask import heads
from keras_moe.multitask.heads._base import MEAN, HeadLoss
from keras_moe.multitask.joint_loss import JointLoss, Rows

# Metrics that Keras chooses by the shape of the output.
_BY_SHAPE = ("accuracy", "acc")


@keras.saving.register_keras_serializable("keras_moe")
class Task:
    """A task of a `MultiTaskModel`, declared once.

    The model derives from it what `compile` needs. A row on which the task is not
    defined adds exactly nothing to its loss, metrics and gradients, whatever its label
    is, NaN included. If no row of a batch is defined, the loss is 0; the metric
    `<name>_defined`, the share of defined rows, is then 0 as well.

    Args:
        name: str, the key of the model's output.
        head: "binary", "regression", "ziln", "ranking", or a head of
            `keras_moe.multitask.heads`, such as `Ordinal(5)`: the form of the output.
        label: the key of the labels in `y`. Several keys give the product of these
            labels, which is 0 if one is 0, even if another is NaN: with
            ("click", "conversion"), a row without a click is a row without a
            conversion. Sample weights are those of the first key. Default: `name`.
        defined: the rows on which the task is defined: None for all; the key of a label
            that must be above 0 (a rating exists where `"watched"` is 1), or several
            keys of labels that must all be; or a registered function from the dict of
            labels to a bool tensor. Rows of sample weight 0 are never defined.
        skip_missing: bool, whether a NaN label also makes a row undefined. By default
            it makes the loss NaN, as a defined row must have a label.
        loss: "head" for the loss of the head; None if the task is only predicted and
            measured; the name of a loss of Keras or a registered function, whose mean
            is over the weights of the defined rows; a loss of Keras, with the reduction
            that it has ("mean_with_sample_weight" excludes undefined rows exactly;
            others divide by their number too); or a `JointLoss`. Losses of Keras
            compare the labels with the head's `prediction`, as metrics do.
        metrics: Keras metrics or their names. They get the defined rows, the sample
            weights, and the head's `prediction` (for `ZILN` the expected amount).

    Raises:
        ValueError: if an argument is invalid.

    Example:

    >>> inputs = keras.Input((8,))
    >>> tasks = [
    ...     keras_moe.multitask.Task("watched", metrics=["auc"]),
    ...     keras_moe.multitask.Task(
    ...         "stars", keras_moe.multitask.heads.Ordinal(5), defined="watched"
    ...     ),
    ... ]
    >>> shared = keras_moe.layers.SharedBottom(16, [t.name for t in tasks])(inputs)
    >>> outputs = {t.name: t.tower((8,))(shared[t.name]) for t in tasks}
    >>> model = keras_moe.multitask.MultiTaskModel(inputs, outputs, tasks=tasks)
    >>> model.compile("adam")
    >>> labels = {"watched": np.array([1, 0]), "stars": np.array([4, np.nan])}
    >>> history = model.fit(np.ones((2, 8)), labels, verbose=0)
    """

    def __init__(
        self,
        name: str,
        head: Any = "binary",
        *,
        label: str | Sequence[str] | None = None,
        defined: str | Sequence[str] | Callable[[dict[str, Any]], Any] | None = None,
        skip_missing: bool = False,
        loss: Any = "head",
        metrics: Sequence[Any] = (),
    ) -> None:
        self.name = Tasks([name], "name").keys[0]
        self.head = heads.get(head, "head")
        self.label_keys = _keys(self.name if label is None else label)
        self.defined = _defined(defined, self.name)
        self.skip_missing = _checks.flag("skip_missing", skip_missing)
        self.loss = _loss(loss, self)
        self._default_loss = loss == "head" if isinstance(loss, str) else False
        if isinstance(metrics, str) or not isinstance(metrics, Sequence):
            raise ValueError(
                "`metrics` must be a sequence of metrics. "
                f"Received: metrics={metrics!r} for the task {name!r}"
            )
        self.metrics = [_metric(metric, name) for metric in metrics]

    def tower(self, units: int | Sequence[int] = (), **kwargs: Any) -> Tower:
        """Return a `Tower` whose output has the form of the head.

        Args:
            units: widths of the hidden layers.
            **kwargs: further arguments of `keras_moe.layers.Tower`.
        """
        kwargs.setdefault("name", f"{self.name}_tower")
        return Tower(
            units,
            self.head.activation,
            output_units=self.head.output_units,
            **kwargs,
        )

    @property
    def sometimes_undefined(self) -> bool:
        """Whether the labels decide on which rows the task is defined."""
        return self.defined is not None or self.skip_missing

    @property
    def keys(self) -> set[str]:
        """The keys of `y` that the task needs."""
        return {*self.label_keys, *self._defined_keys}

    @property
    def _defined_keys(self) -> tuple[str, ...]:
        """The keys of the labels that must be above 0."""
        if isinstance(self.defined, str):
            return (self.defined,)
        return self.defined if isinstance(self.defined, tuple) else ()

    def rows(self, labels: dict[str, Any], outputs: Any, weights: Any = None) -> Rows:
        """Return the labels and weights of the task, undefined rows replaced.

        Args:
            labels: dict of labels by key.
            outputs: the output of the task, `(n, ..., o)`.
            weights: None, or the sample weights, `(n,)` or `(n, ...)`.
        """
        label = _product([_per_row(labels[key], outputs) for key in self.label_keys])
        self._check_shape(label, outputs)
        rank = len(outputs.shape) - 1
        mask = _backend.keras_mask(outputs)
        conditions = [] if mask is None else [ops.cast(mask, "bool")]
        flags = [self.defined(labels)] if callable(self.defined) else []
        flags += [_positive(labels[key]) for key in self._defined_keys]
        conditions += [_per_row(flag, outputs) for flag in flags]
        if self.skip_missing:
            present = ops.logical_not(ops.isnan(label))
            axes = tuple(range(rank, len(label.shape)))
            conditions.append(ops.all(present, axis=axes) if axes else present)
        if weights is not None:
            weights = ops.cast(_per_row(weights, outputs), "float32")
            conditions.append(ops.not_equal(weights, 0))
        if not conditions:
            return Rows(label, None)
        # Of the rank of the label, so that they broadcast against each other.
        shape = ops.shape(label)[:rank]
        defined = ops.ones(shape, "bool")
        for condition in conditions:
            defined = ops.logical_and(defined, _with_rank(condition, rank))
        weight = ops.cast(defined, "float32")
        if weights is not None:
            weight = ops.where(defined, _with_rank(weights, rank) * weight, 0.0)
        filler = ops.cast(self.head.filler, label.dtype)
        return Rows(
            ops.where(_with_rank(defined, len(label.shape)), label, filler), weight
        )

    def check_output(self, output: Any) -> None:
        """Raise ValueError if an output does not have the units of the head."""
        units = self.head.output_units
        if units > 1 and output.shape[-1] != units:
            raise ValueError(
                f"the output of the task {self.name!r} must have {units} units for "
                f"{self.head}. Received: an output of shape {tuple(output.shape)}"
            )

    def _check_shape(self, label: Any, outputs: Any) -> None:
        """Raise ValueError if labels would be broadcast against the outputs."""
        if not self._default_loss or len(label.shape) < len(outputs.shape):
            return
        single = self.head.output_units > 1
        if single or label.shape[-1] not in (None, outputs.shape[-1]):
            raise ValueError(
                f"the labels of the task {self.name!r} must have one value per row. "
                f"Received: labels of shape {tuple(label.shape)} for outputs of shape "
                f"{tuple(outputs.shape)}"
            )

    def check(self, rows: Rows) -> None:
        """Raise ValueError if a label of a defined row is not valid."""
        if not self._default_loss:
            return
        labels = np.asarray(ops.convert_to_numpy(rows.labels), "float64")
        wrong = ~self.head.valid(labels)
        if rows.weights is not None:
            defined = np.asarray(ops.convert_to_numpy(rows.weights)) != 0
            wrong &= defined.reshape(defined.shape + (1,) * (wrong.ndim - defined.ndim))
        if wrong.any():
            row = tuple(int(i[0]) for i in np.nonzero(wrong))
            raise ValueError(
                f"the labels of the task {self.name!r} must be {self.head.rule} on "
                f"rows where it is defined. Received: {labels[row]} in row {row[0]}"
            )

    def get_config(self) -> dict[str, Any]:
        serialize = keras.saving.serialize_keras_object
        defined = self.defined
        return {
            "name": self.name,
            "head": serialize(self.head),
            "label": list(self.label_keys),
            "defined": serialize(defined) if callable(defined) else defined,
            "skip_missing": self.skip_missing,
            "loss": "head" if self._default_loss else serialize(self.loss),
            "metrics": [serialize(metric) for metric in self.metrics],
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Task:
        deserialize = keras.saving.deserialize_keras_object
        config = dict(config)
        for key in ("head", "defined", "loss"):
            if isinstance(config[key], dict):
                config[key] = deserialize(config[key])
        config["metrics"] = [deserialize(metric) for metric in config["metrics"]]
        return cls(**config)

    def __repr__(self) -> str:
        return f"Task({self.name!r}, {self.head!r})"


def _keys(label: Any) -> tuple[str, ...]:
    sequence = isinstance(label, Sequence) and not isinstance(label, str)
    keys = tuple(label) if sequence else (label,)
    if not keys or not all(isinstance(key, str) for key in keys):
        raise ValueError(
            "`label` must be the key of a label or a sequence of keys. "
            f"Received: label={label!r}"
        )
    return keys


def _defined(defined: Any, task: str) -> Any:
    if callable(defined) and getattr(defined, "__name__", "") == "<lambda>":
        raise ValueError(
            "`defined` must be a registered function, so that the model can be loaded "
            f"from a file. Received: a lambda for the task {task!r}"
        )
    if callable(defined):
        rule = f"a function of the labels for the task {task!r}"
        return _checks.keras_object("defined", defined, rule, lambda given: given, None)
    if defined is None or isinstance(defined, str):
        return defined
    several = isinstance(defined, Sequence) and len(defined) > 0
    if not several or not all(isinstance(key, str) for key in defined):
        raise ValueError(
            "`defined` must be None, keys of labels, or a function of the labels. "
            f"Received: defined={defined!r} for the task {task!r}"
        )
    return tuple(defined)


def _loss(loss: Any, task: Task) -> Any:
    if isinstance(loss, str) and loss == "head":
        return task.head.loss()
    if loss is None or isinstance(loss, JointLoss):
        return loss
    rule = (
        '"head", None, a loss of Keras, its name, a function of (y_true, y_pred) or a '
        "JointLoss"
    )
    kind = keras.losses.Loss
    try:
        found = _checks.keras_object("loss", loss, rule, keras.losses.get, kind)
    except ValueError as error:
        raise ValueError(f"{error} for the task {task.name!r}") from error
    if isinstance(found, keras.losses.Loss):
        return found
    return FunctionLoss(found)


@keras.saving.register_keras_serializable("keras_moe")
class FunctionLoss(HeadLoss):
    """The mean of a function over the sum of the sample weights."""

    labels_per_output = True

    def __init__(
        self, function: Any, reduction: str = MEAN, name: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(name or function.__name__, reduction, dtype)
        self.function = function

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return self.function(y_true, y_pred)

    def get_config(self) -> dict[str, Any]:
        function = keras.saving.serialize_keras_object(self.function)
        return {**super().get_config(), "function": function}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FunctionLoss:
        function = keras.losses.get(config["function"])
        return cls(**{**config, "function": function})


def _metric(metric: Any, task: str) -> Any:
    known = isinstance(metric, keras.metrics.Metric) or callable(metric)
    if known or (isinstance(metric, str) and metric in _BY_SHAPE):
        return metric
    try:
        found = keras.metrics.get(metric)
    except ValueError as error:
        raise ValueError(
            "`metrics` must be metrics of Keras or their names. "
            f"Received: {metric!r} for the task {task!r}"
        ) from error
    if isinstance(found, keras.metrics.Metric):
        found.name = metric  # Keras numbers the names: "auc_1".
    return found


def _per_row(values: Any, outputs: Any) -> Any:
    """(n, ..., 1) -> (n, ...) for outputs (n, ..., o)."""
    values = ops.convert_to_tensor(values)
    if len(values.shape) == len(outputs.shape) and values.shape[-1] == 1:
        return ops.squeeze(values, axis=-1)
    return values


def _positive(values: Any) -> Any:
    values = ops.convert_to_tensor(values)
    if keras.backend.standardize_dtype(values.dtype) == "bool":
        return values
    return values > 0


def _product(labels: list[Any]) -> Any:
    """Return the product; 0 where a label is 0, even if another one is NaN."""
    if len(labels) == 1:
        return labels[0]
    labels = [ops.cast(label, "float32") for label in labels]
    zero = ops.zeros_like(labels[0])
    product, any_zero = labels[0], ops.equal(labels[0], 0)
    for label in labels[1:]:
        product = product * label
        any_zero = ops.logical_or(any_zero, ops.equal(label, 0))
    return ops.where(any_zero, zero, product)


def _with_rank(values: Any, rank: int) -> Any:
    while len(values.shape) < rank:
        values = ops.expand_dims(values, -1)
    return values
