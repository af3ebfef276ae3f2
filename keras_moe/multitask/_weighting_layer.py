"""What weightings of losses and of gradients share: dtype, state, lookup by name.

Axis letters: t tasks.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from keras import ops

from keras_moe import _checks
from keras_moe._layer import Layer


class WeightingLayer(Layer):
    """A layer in float32 (float64 under float64) whose state training steps change.

    The state is saved with the weights, so that training resumes where it stopped.
    """

    feature_axes = None  # A mask is of the tasks.

    def __init__(self, **kwargs: Any) -> None:
        if kwargs.get("activity_regularizer") is not None:
            raise ValueError(
                "`activity_regularizer` must be None for weightings. Received: "
                f"activity_regularizer={kwargs['activity_regularizer']!r}"
            )
        # Autocast would round the losses to half precision under a mixed policy.
        super().__init__(autocast=False, **kwargs)
        self.supports_masking = True

    def add_statistic(
        self, name: str, shape: tuple[int, ...], initializer: Any = "zeros"
    ) -> Any:
        """Return a variable that training steps assign and that files keep."""
        return self.add_weight(
            name=name,
            shape=shape,
            initializer=initializer,
            dtype=self.precise_dtype,
            trainable=False,
            autocast=False,
            # All replicas compute the same value.
            aggregation="only_first_replica",
        )

    def compute_mask(self, inputs: Any, mask: Any = None) -> None:
        """Return None: the output covers all tasks."""
        return None


def value_of(variable: Any) -> Any:
    """Return the value of a variable, which a later assignment does not change."""
    return ops.copy(variable)


def assign_where(condition: Any, variable: Any, value: Any) -> None:
    """Assign `value` to the variable where the condition holds."""
    old = value_of(variable)
    variable.assign(ops.where(condition, ops.cast(value, old.dtype), old))


def all_finite(values: Any) -> Any:
    """Return whether all values are finite, a bool scalar."""
    return ops.all(ops.isfinite(values))


def task_mask(mask: Any, values: Any) -> Any:
    """Return the mask as a bool tensor of shape `(t,)`; without one, all True."""
    if mask is None:
        return ops.ones(values.shape[:1], "bool")
    return ops.cast(mask, "bool")


def find(
    identifier: Any,
    known: Mapping[str, type],
    kinds: Any,
    what: str,
    argument: str = "identifier",
) -> Any:
    """Return the layer that `identifier` specifies, or None for None."""
    if identifier is None:
        return None
    found = identifier
    if isinstance(identifier, dict):
        found = _checks.deserialized(argument, identifier)
    elif isinstance(identifier, str):
        found = known.get(identifier)
    if inspect.isclass(found) and isinstance(identifier, str):
        found = found()
    if not isinstance(found, kinds):
        raise ValueError(
            f"`{argument}` must be None, one of {list(known)}, or {what} or its "
            f"config. Received: {argument}={identifier!r}"
        )
    return found
