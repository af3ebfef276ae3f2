"""What a head is: the last activation of a task, its loss, and its valid labels.

Axis letters: n rows, o output units, w label columns.
"""

from __future__ import annotations

from typing import Any, ClassVar

import keras
import numpy as np

from keras_moe import _checks


class Head:
    """The output form of a task, without weights.

    A subclass sets the attributes, and defines `loss` and `valid`.

    Attributes:
        activation: the last activation, for `keras.activations.get`.
        output_units: int, the number o of units of the task's output.
        rule: the labels that are valid, for error messages.
        filler: a label that the loss can take, for rows without a valid one.
    """

    activation: ClassVar[Any] = None
    output_units: int = 1
    rule: ClassVar[str] = ""
    filler: ClassVar[float] = 0.0

    def loss(self) -> keras.losses.Loss:
        """Return a new loss, a mean over the weights of the defined rows."""
        raise NotImplementedError

    def prediction(self, outputs: Any) -> Any:
        """(n, o) -> what metrics compare with the labels: the outputs by default."""
        return outputs

    def loss_weights(self, weights: Any) -> Any:
        """Return the weights of the terms of the loss from those of the labels."""
        return weights

    def valid(self, labels: np.ndarray) -> np.ndarray:
        """Return a bool array, True where a label is valid."""
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Head:
        return cls(**config)

    def __repr__(self) -> str:
        arguments = ", ".join(f"{k}={v!r}" for k, v in self.get_config().items())
        return f"{type(self).__name__}({arguments})"


MEAN = "mean_with_sample_weight"


class HeadLoss(keras.losses.Loss):
    """A loss per row whose mean is over the sum of the sample weights.

    It is NaN for a label that is not valid, as labels of a dataset are not checked.

    Class attributes:
        labels_per_output: whether a row may have one label for each of its outputs.
    """

    labels_per_output: ClassVar[bool] = False

    def __init__(self, name: str, reduction: str = MEAN, dtype: Any = None) -> None:
        if "/" in _checks.text("name", name):  # Keras refuses it in a call.
            raise ValueError(f"`name` must not hold '/'. Received: name={name!r}")
        if reduction is not None and not isinstance(reduction, str):
            raise ValueError(
                f"`reduction` must be a string or None. Received: {reduction!r}"
            )
        if dtype is not None:
            _checks.float_dtype(dtype)
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self._dtype_is_given = dtype is not None

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Return the loss; raise ValueError for what is no tensor."""
        given = {"y_true": y_true, "y_pred": y_pred, "sample_weight": sample_weight}
        for name, value in given.items():
            if value is not None or name != "sample_weight":
                given[name] = _checks.tensor(name, value)
        self._check_shapes(**{name: _shape(value) for name, value in given.items()})
        return super().__call__(**given)

    def _check_shapes(self, y_true: Any, y_pred: Any, sample_weight: Any) -> None:
        """Raise ValueError for shapes that would be broadcast against each other."""
        if y_pred is None:
            return
        allowed = [y_pred[:-1], (*y_pred[:-1], 1)]
        if self.labels_per_output:
            allowed.append(y_pred)
        if not y_pred or (y_true is not None and not _is_one_of(y_true, allowed)):
            raise ValueError(
                f"`y_true` must have one of the shapes {allowed}. "
                f"Received: y_true of shape {y_true}, y_pred of shape {y_pred}"
            )
        shapes = [y_pred[:i] for i in range(len(y_pred) + 1)]
        shapes += [(*shape, 1) for shape in shapes[:-1]]
        if sample_weight is not None and not _is_one_of(sample_weight, shapes):
            raise ValueError(
                f"`sample_weight` must have one of the shapes {shapes}. "
                f"Received: sample_weight of shape {sample_weight}"
            )

    def get_config(self) -> dict[str, Any]:
        """Return the arguments; Keras leaves out the dtype."""
        dtype = {"dtype": self.dtype} if self._dtype_is_given else {}
        return {**super().get_config(), **dtype}


def _shape(value: Any) -> tuple[Any, ...] | None:
    """Return the static shape, or None if there is none."""
    shape = getattr(value, "shape", None)
    return None if shape is None or getattr(shape, "rank", 0) is None else tuple(shape)


def _is_one_of(shape: tuple[Any, ...], allowed: list[tuple[Any, ...]]) -> bool:
    """Whether a shape agrees with one of others; only integers are compared."""
    return any(
        len(shape) == len(other)
        and all(
            a == b or not (isinstance(a, int) and isinstance(b, int))
            for a, b in zip(shape, other, strict=True)
        )
        for other in allowed
    )


def like(labels: Any, outputs: Any) -> Any:
    """Return the labels with the rank of the outputs: (n,) -> (n, 1)."""
    if len(labels.shape) < len(outputs.shape):
        return keras.ops.expand_dims(labels, -1)
    return labels


def nan_unless(valid: Any, losses: Any) -> Any:
    """Return the losses, NaN where a label is not valid."""
    return keras.ops.where(valid, losses, float("nan"))


def is_level(labels: Any, count: int) -> Any:
    """Whether labels are integers in [0, count)."""
    inside = keras.ops.logical_and(labels >= 0, labels < count)
    return keras.ops.logical_and(
        inside, keras.ops.equal(keras.ops.floor(labels), labels)
    )
