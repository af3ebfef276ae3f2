"""FAMO: equal relative decrease of all losses, in constant cost (Liu et al. 2023).

Axis letters: t tasks.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any, ClassVar

import keras
from keras import ops

from keras_moe import _checks
from keras_moe.multitask._weighting_layer import (
    all_finite,
    assign_where,
    task_mask,
    value_of,
)
from keras_moe.multitask.weighting._base import LossWeighting

_EPSILON = 1e-8
_BETA_1, _BETA_2 = 0.9, 0.999


@keras.saving.register_keras_serializable("keras_moe")
class FAMO(LossWeighting):
    """Learns weights by which the logarithms of all losses fall at the same rate.

    total = c sum_i z_i log(loss_i - b_i + 1e-8), with z = softmax(xi), b the minimal
    losses and c = 1 / sum_i z_i / (loss_i - b_i + 1e-8) a constant of the gradient: the
    gradients of the losses have the weights c z_i / (loss_i - b_i), which sum to 1
    (algorithm 1). The total can be negative and is no measure of quality.

    After the optimizer step the train step calls `update` with the losses of the same
    batch before and after it. The gradient for xi is the Jacobian of softmax(xi) times
    the decreases of log(loss_i - b_i), plus `weight_decay` * xi. As in the paper's
    code, Adam (beta 0.9 and 0.999, epsilon 1e-8) applies it; algorithm 1 in the paper
    has plain gradient steps. Moments and step numbers are kept for each task.

    Among the tasks in the mask, z is the softmax without the others.

    Args:
        learning_rate: float > 0, step size of xi.
        weight_decay: float >= 0, of xi, added to the gradient.
        min_losses: number, or a sequence of t numbers: lower bounds b of the losses.
            A loss below its bound makes the total NaN.
        **kwargs: passed on to `keras.layers.Layer`.

    Call arguments:
        task_losses: tensor of shape `(t,)`.
        mask: bool tensor of shape `(t,)`, False for undefined tasks.
        training: not used; only `update` changes the state.

    Returns:
        The total loss, a scalar.

    Raises:
        ValueError: if an argument is invalid, or the shapes are not `(t,)`.

    Attributes:
        logits: variable of shape `(t,)`, xi, 0 at the start.

    Example:

    >>> weighting = keras_moe.multitask.weighting.FAMO()
    >>> old, new = np.array([1.0, 1.0]), np.array([1.0, 0.5])
    >>> total = weighting(old, training=True)
    >>> weighting.update(old, new)  # The first task fell less: more weight.
    >>> np.asarray(weighting.logits).round(3)
    array([ 0.025, -0.025], dtype=float32)

    References:
        - [Liu et al., 2023: FAMO: Fast Adaptive Multitask
          Optimization](https://arxiv.org/abs/2306.03792)
    """

    needs_new_losses: ClassVar[bool] = True

    def __init__(
        self,
        learning_rate: float = 0.025,
        weight_decay: float = 0.001,
        min_losses: float | Sequence[float] = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.learning_rate = _checks.positive_number("learning_rate", learning_rate)
        self.weight_decay = _checks.non_negative_number("weight_decay", weight_decay)
        self.min_losses: float | list[float] = (
            _checks.finite_number("min_losses", min_losses)
            if isinstance(min_losses, numbers.Real)
            else _checks.each("min_losses", min_losses, _checks.finite_number)
        )

    def build(self, input_shape: tuple[int, ...]) -> None:
        shape = (input_shape[0],)
        if isinstance(self.min_losses, list):
            _checks.one_per_task("min_losses", self.min_losses, input_shape[0])
        self.logits = self.add_statistic("logits", shape)
        self._first_moment = self.add_statistic("first_moment", shape)
        self._second_moment = self.add_statistic("second_moment", shape)
        self._steps = self.add_statistic("steps", shape)

    def total_of(self, task_losses: Any, mask: Any, training: Any) -> Any:
        excess = self._excess(task_losses, mask)
        shares = self._shares(mask)
        weights = shares / ops.maximum(ops.sum(shares / excess), _EPSILON)
        terms = ops.stop_gradient(weights) * ops.log(excess)
        total = ops.sum(ops.where(mask, terms, 0.0))
        # Below its minimum a loss would get a gradient of the wrong sign.
        valid = ops.all(excess > 0)
        return total * ops.cast(ops.where(valid, 1.0, float("nan")), total.dtype)

    def update(self, old_losses: Any, new_losses: Any, mask: Any = None) -> None:
        """Update xi after an optimizer step.

        Nothing changes for tasks outside the mask, and nothing at all if a loss within
        it is not finite or below its minimum.

        Args:
            old_losses: tensor of shape `(t,)`, the losses before the step.
            new_losses: tensor of shape `(t,)`, the losses of the same batch after it.
            mask: bool tensor of shape `(t,)`, False for undefined tasks.
        """
        dtype = self.precise_dtype
        old_losses = ops.stop_gradient(ops.cast(old_losses, dtype))
        new_losses = ops.stop_gradient(ops.cast(new_losses, dtype))
        _checks.axes(
            old_losses=(old_losses, "t"),
            new_losses=(new_losses, "t"),
            mask=(mask, "t?"),
        )
        mask = task_mask(mask, old_losses)
        both = ops.where(mask, ops.stack([old_losses, new_losses]), 0.0)
        both, finite = self.observed(both)
        logs = ops.log(self._excess(both, mask))
        decrease = logs[0] - logs[1]
        valid = ops.logical_and(finite, all_finite(decrease))
        shares = self._shares(mask)
        gradient = shares * (decrease - ops.sum(shares * decrease))
        self._apply(gradient, ops.logical_and(mask, valid))

    def _apply(self, gradient: Any, condition: Any) -> None:
        """Apply one step of Adam (Kingma & Ba, 2015) where the condition holds."""
        logits = value_of(self.logits)
        gradient = gradient + self.weight_decay * logits
        steps = value_of(self._steps) + 1.0
        first = _BETA_1 * value_of(self._first_moment) + (1 - _BETA_1) * gradient
        second = _BETA_2 * value_of(self._second_moment) + (1 - _BETA_2) * ops.square(
            gradient
        )
        mean = first / (1.0 - ops.power(_BETA_1, steps))
        deviation = ops.sqrt(second / (1.0 - ops.power(_BETA_2, steps)))
        change = self.learning_rate * mean / (deviation + _EPSILON)
        assign_where(condition, self._steps, steps)
        assign_where(condition, self._first_moment, first)
        assign_where(condition, self._second_moment, second)
        assign_where(condition, self.logits, logits - change)

    def _excess(self, task_losses: Any, mask: Any) -> Any:
        """Return loss_i - b_i + 1e-8; 1 outside the mask."""
        least = ops.convert_to_tensor(self.min_losses, task_losses.dtype)
        return ops.where(mask, task_losses - least + _EPSILON, 1.0)

    def _shares(self, mask: Any) -> Any:
        """Return z, the softmax of xi over the tasks in the mask, 0 for the others."""
        logits = ops.where(mask, value_of(self.logits), -1e9)
        shares = ops.softmax(logits)
        return ops.where(mask, shares, 0.0)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "min_losses": self.min_losses,
        }
