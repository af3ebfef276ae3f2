"""Weights that decay from window to window (Tang et al. 2020).

Axis letters: t tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_moe import _checks
from keras_moe.multitask._weighting_layer import assign_where, value_of
from keras_moe.multitask.weighting._base import LossWeighting
from keras_moe.multitask.weighting.fixed import check_weights


@keras.saving.register_keras_serializable("keras_moe")
class DecayingWeighting(LossWeighting):
    """Multiplies the weight of each task by its own factor after every `steps` steps.

    w_k = w_k0 * decay_k^m, with m the number of completed windows of `steps` training
    steps (Tang et al., 2020, equation 9, where m is the training epoch).

    Args:
        weights: sequence of t numbers >= 0, not all 0: the weights w_k0 at the start.
        decay: sequence of t numbers > 0, the updating ratios.
        steps: int, number of training steps of a window. A step with a loss that is not
            finite does not count.
        **kwargs: passed on to `keras.layers.Layer`.

    Call arguments:
        task_losses: tensor of shape `(t,)`.
        mask: bool tensor of shape `(t,)`, False for undefined tasks.
        training: bool, whether the call is a training step.

    Returns:
        The total loss, a scalar.

    Raises:
        ValueError: if an argument is invalid, or has not one number for each task.

    Attributes:
        step: variable, number of steps of the current window.
        windows: variable, number of completed windows.

    Example:

    >>> weighting = keras_moe.multitask.weighting.DecayingWeighting(
    ...     weights=[1.0, 2.0], decay=[1.0, 0.5], steps=1
    ... )
    >>> losses = np.array([1.0, 1.0])
    >>> [float(weighting(losses, training=True)) for step in range(3)]
    [3.0, 2.0, 1.5]

    References:
        - [Tang et al., 2020: Progressive Layered Extraction (PLE): A Novel Multi-Task
          Learning (MTL) Model for Personalized
          Recommendations](https://doi.org/10.1145/3383313.3412236)
    """

    def __init__(
        self,
        weights: Sequence[float],
        decay: Sequence[float],
        steps: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.task_weights = check_weights(weights)
        self.decay = _checks.each("decay", decay, _checks.positive_number)
        _checks.one_per_task("decay", self.decay, len(self.task_weights))
        self.steps = _checks.positive_int("steps", steps)

    def build(self, input_shape: tuple[int, ...]) -> None:
        _checks.one_per_task("weights", self.task_weights, input_shape[0])
        # Two counters, because float32 counts one by one only to 2^24.
        self.step = self.add_statistic("step", ())
        self.windows = self.add_statistic("windows", ())

    def weights_of(self, task_losses: Any, mask: Any, training: Any) -> Any:
        start = ops.convert_to_tensor(self.task_weights, task_losses.dtype)
        decay = ops.convert_to_tensor(self.decay, task_losses.dtype)
        windows = value_of(self.windows)
        if training:
            _, finite = self.observed(task_losses)
            step = value_of(self.step) + 1.0
            complete = step >= self.steps
            assign_where(finite, self.step, ops.where(complete, 0.0, step))
            assign_where(ops.logical_and(finite, complete), self.windows, windows + 1.0)
        return start * ops.power(decay, windows)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "weights": self.task_weights,
            "decay": self.decay,
            "steps": self.steps,
        }
