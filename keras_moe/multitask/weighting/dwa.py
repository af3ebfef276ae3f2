"""Dynamic weight average: by the rates at which losses fall (Liu et al. 2019).

Axis letters: t tasks.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_moe import _checks
from keras_moe.multitask._weighting_layer import assign_where, value_of
from keras_moe.multitask.weighting._base import LossWeighting

_LARGEST_RATE = 1e30


@keras.saving.register_keras_serializable("keras_moe")
class DWA(LossWeighting):
    """Gives more weight to tasks whose losses fall more slowly.

    w_k = t softmax(r / T)_k with r_k = L_k(m - 1) / L_k(m - 2) (equation 7), where
    L_k(m) is the mean loss of task k in window m. The weights sum to t. During the
    first two windows all are 1: the plain sum.

    A window is `steps` training steps, an epoch in the paper. L_k is the mean over the
    steps of the window in which task k was defined; a window without any does not count
    for this task. A task without two windows has r_k = 1, as has one whose loss was 0.

    Args:
        steps: int, number of training steps of a window, such as those of an epoch. A
            step with a loss that is not finite does not count.
        temperature: float >= 1.1e-19, T. Larger values make the weights more equal.
        **kwargs: passed on to `keras.layers.Layer`.

    Call arguments:
        task_losses: tensor of shape `(t,)`.
        mask: bool tensor of shape `(t,)`, False for undefined tasks. The weights of
            other tasks do not depend on it.
        training: bool, whether the call is a training step.

    Returns:
        The total loss, a scalar.

    Raises:
        ValueError: if an argument is invalid, or the shapes are not `(t,)`.

    Attributes:
        last: variable of shape `(t,)`, the L_k(m - 1).
        before_last: variable of shape `(t,)`, the L_k(m - 2).
        windows: variable of shape `(t,)`, number of windows of each task, at most 2.

    Example:

    >>> weighting = keras_moe.multitask.weighting.DWA(steps=1, temperature=1.0)
    >>> for losses in ([1.0, 1.0], [1.0, 0.5]):
    ...     total = weighting(np.array(losses), training=True)
    >>> total = float(weighting(np.array([1.0, 0.0])))
    >>> round(total, 3)  # 2 e / (e + sqrt(e))
    1.245

    References:
        - [Liu et al., 2019: End-to-End Multi-Task Learning with
          Attention](https://arxiv.org/abs/1803.10704)
    """

    def __init__(self, steps: int, temperature: float = 2.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.steps = _checks.positive_int("steps", steps)
        self.temperature = _checks.divisor("temperature", temperature)

    def build(self, input_shape: tuple[int, ...]) -> None:
        shape = (input_shape[0],)
        self.last = self.add_statistic("last", shape, "ones")
        self.before_last = self.add_statistic("before_last", shape, "ones")
        self.windows = self.add_statistic("windows", shape)
        # Of the current window.
        self._step = self.add_statistic("step", ())
        self._mean = self.add_statistic("mean", shape)
        self._count = self.add_statistic("count", shape)

    def weights_of(self, task_losses: Any, mask: Any, training: Any) -> Any:
        last = value_of(self.last)
        before = value_of(self.before_last)
        known = ops.logical_and(ops.equal(self.windows, 2.0), before > 0)
        rates = ops.where(known, last / ops.where(known, before, 1.0), 1.0)
        rates = ops.clip(rates, -_LARGEST_RATE, _LARGEST_RATE)
        weights = last.shape[0] * ops.softmax(rates / self.temperature)
        if training:
            self._observe(task_losses, mask)
        return weights

    def _observe(self, task_losses: Any, mask: Any) -> None:
        losses, finite = self.observed(task_losses)
        inside = ops.cast(mask, losses.dtype)
        count = value_of(self._count) + inside
        old = value_of(self._mean)
        # A running mean neither overflows nor loses small losses.
        mean = old + inside * (losses - old) / ops.maximum(count, 1.0)
        step = value_of(self._step) + 1.0
        complete = ops.logical_and(finite, step >= self.steps)
        shift = ops.logical_and(complete, count > 0)
        assign_where(shift, self.before_last, self.last)
        assign_where(shift, self.last, mean)
        assign_where(shift, self.windows, ops.minimum(self.windows + 1.0, 2.0))
        assign_where(finite, self._step, ops.where(complete, 0.0, step))
        assign_where(finite, self._mean, ops.where(complete, 0.0, mean))
        assign_where(finite, self._count, ops.where(complete, 0.0, count))

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "steps": self.steps,
            "temperature": self.temperature,
        }
