"""Weights that stay as they are given.

Axis letters: t tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_moe import _checks
from keras_moe.multitask.weighting._base import LossWeighting


@keras.saving.register_keras_serializable("keras_moe")
class FixedWeighting(LossWeighting):
    """Multiplies the loss of each task by a given number.

    The same as `loss_weights` of `compile`, as a layer.

    Args:
        weights: sequence of t numbers >= 0, not all 0, in the order of the tasks.
        **kwargs: passed on to `keras.layers.Layer`.

    Call arguments:
        task_losses: tensor of shape `(t,)`.
        mask: bool tensor of shape `(t,)`, False for undefined tasks.
        training: not used.

    Returns:
        The total loss, a scalar.

    Raises:
        ValueError: if `weights` is invalid, or has not one number for each task.

    Example:

    >>> weighting = keras_moe.multitask.weighting.FixedWeighting([1.0, 0.5])
    >>> float(weighting(np.array([1.0, 4.0])))
    3.0
    """

    def __init__(self, weights: Sequence[float], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.task_weights = check_weights(weights)

    def build(self, input_shape: tuple[int, ...]) -> None:
        _checks.one_per_task("weights", self.task_weights, input_shape[0])

    def weights_of(self, task_losses: Any, mask: Any, training: Any) -> Any:
        return ops.convert_to_tensor(self.task_weights, task_losses.dtype)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "weights": self.task_weights}


def check_weights(weights: Any) -> list[float]:
    """Return weights of the tasks as a list: numbers >= 0, not all 0."""
    found = _checks.each("weights", weights, _checks.non_negative_number)
    if not any(found):
        raise ValueError(f"`weights` must not be all 0. Received: weights={weights!r}")
    return found
