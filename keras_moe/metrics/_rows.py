"""The rows of a batch that a metric counts: flat, weighted, defined.

Axis letters: n rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
from keras import ops

from keras_moe import _backend, _checks


class Rows(NamedTuple):
    """Labels, predictions and weights of shape (n,), in float32.

    Where the weight is 0, label and prediction are 0 too.
    """

    labels: Any
    predictions: Any
    weights: Any


def rows(y_true: Any, y_pred: Any, sample_weight: Any = None) -> Rows:
    """Return the rows of `y_pred`, whose shape `y_true` and the weights have too.

    An axis of size 1 at the end may be missing in each of them. Weights may also lack
    the last axes of a sequence. The mask that Keras has attached to `y_pred` sets the
    weights of padding to 0.
    """
    mask = _backend.keras_mask(y_pred)
    predictions = ops.cast(_checks.tensor("y_pred", y_pred), "float32")
    shape = ops.shape(predictions)
    labels = ops.cast(_checks.tensor("y_true", y_true), "float32")
    labels = ops.reshape(_same_rank("y_true", labels, predictions), (-1,))
    weights = ops.ones_like(predictions)
    for name, given in (("sample_weight", sample_weight), ("mask", mask)):
        if given is not None:
            given = ops.cast(_checks.tensor(name, given), "float32")
            given = _same_rank(name, given, predictions)
            weights = weights * ops.broadcast_to(given, shape)
    weights = ops.reshape(weights, (-1,))
    defined = ops.not_equal(weights, 0.0)
    zeros = ops.zeros_like(weights)
    return Rows(
        ops.where(defined, labels, zeros),
        ops.where(defined, ops.reshape(predictions, (-1,)), zeros),
        ops.where(defined, weights, zeros),
    )


def flat_groups(groups: Any, y_pred: Any) -> Any:
    """Return the integer group ids of the rows, (n,); one id may serve a sequence."""
    if groups is None:
        raise ValueError(
            "`groups` must be given: one integer id per row. In a MultiTaskModel name "
            "the feature in `x` that holds it: metric(..., group='user_id')."
        )
    groups = ops.convert_to_tensor(_checks.tensor("groups", groups))
    # With several replicas Keras first traces with float64 in place of every input.
    if _backend.num_replicas() == 1:
        _checks.integers(groups=groups)
    predictions = ops.convert_to_tensor(_checks.tensor("y_pred", y_pred))
    groups = _same_rank("groups", groups, predictions)
    return ops.reshape(ops.broadcast_to(groups, ops.shape(predictions)), (-1,))


def probabilities(predictions: Any, from_logits: bool) -> Any:
    """Return the probabilities of predictions that may be logits."""
    return ops.sigmoid(predictions) if from_logits else predictions


def _same_rank(name: str, tensor: Any, like: Any) -> Any:
    """Return `tensor` with axes of size 1 added at, or removed from, its end."""
    shape, rank = tensor.shape, len(like.shape)
    if len(shape) == rank + 1 and shape[-1] == 1:
        tensor = ops.squeeze(tensor, axis=-1)
    while len(tensor.shape) < rank:
        tensor = ops.expand_dims(tensor, -1)
    sizes = zip(tensor.shape, like.shape, strict=False)
    may_be_one = name != "y_true"
    agree = len(tensor.shape) == rank and all(
        a is None or b is None or a == b or (a == 1 and may_be_one) for a, b in sizes
    )
    if not agree:
        raise ValueError(
            f"`{name}` must have the shape of `y_pred`. Received: {name} of shape "
            f"{tuple(shape)}, y_pred of shape {tuple(like.shape)}"
        )
    return tensor


def is_traced(variable: Any) -> bool:
    """Whether a compiler is tracing, which has no value of `variable` yet."""
    if _backend.name() == "tensorflow":
        import tensorflow as tf

        return not tf.executing_eagerly()
    if _backend.name() == "jax":
        import jax

        return isinstance(variable.value, jax.core.Tracer)
    # Keras runs a model on torch once with variables of any value, to know its shapes.
    from keras.src.backend.common.stateless_scope import in_stateless_scope

    return in_stateless_scope()


def not_a_number() -> Any:
    """The value of a metric that is not defined."""
    return ops.convert_to_tensor(float("nan"), "float32")


def ratio(part: Any, whole: Any) -> Any:
    """Return part / whole, NaN where the whole is 0."""
    safe = ops.where(whole == 0.0, ops.ones_like(whole), whole)
    return ops.where(whole == 0.0, not_a_number(), part / safe)


class SumMetric(keras.metrics.Metric):
    """A metric whose state is named sums over the rows.

    Subclasses define `sums_of(rows) -> dict` of what a batch adds, and `result`.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], name: str) -> None:
        super().__init__(name=_checks.text("name", name), dtype="float32")
        self._sums = {
            part: self.add_variable(shape=shape, initializer="zeros", name=part)
            for part, shape in shapes.items()
        }

    def sums_of(self, batch: Rows) -> dict[str, Any]:
        """Return what the rows of a batch add to each sum."""
        raise NotImplementedError

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        batch = rows(y_true, y_pred, sample_weight)
        for part, value in self.sums_of(batch).items():
            total = self._sums[part]
            total.assign(total + ops.cast(value, "float32"))

    def merge_state(self, metrics: Any) -> None:
        """Add the state of metrics of the same kind, such as those of other workers."""
        for other in metrics:
            if other.get_config() != {**self.get_config(), "name": other.name}:
                raise ValueError(
                    "`metrics` must have the same settings as this metric. Received: "
                    f"{other.get_config()} instead of {self.get_config()}"
                )
            for part, total in self._sums.items():
                total.assign(total + other._sums[part])
