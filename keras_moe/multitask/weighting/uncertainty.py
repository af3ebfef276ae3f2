"""Learned weights for the total of several task losses.

Axis letters: t tasks.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_moe import _checks
from keras_moe.multitask.weighting._base import LossWeighting


@keras.saving.register_keras_serializable("keras_moe")
class UncertaintyWeighting(LossWeighting):
    """Weights each task's loss by a learned noise variance.

    total = 1/2 sum_t (exp(-s_t) loss_t + s_t), with s_t = log sigma_t^2 learned from 0.
    A task with a large loss gets a large variance and hence a small weight. Kendall et
    al. give classification losses twice the weight of regression losses (equations 7
    and 10); here all losses use one formula, with the optimum sigma_t^2 = loss_t.

    The total is negative if losses are well below 1, and it can fall while the task
    losses do not. It does not measure model quality: use the loss or metric of a task
    (`val_click_loss`) for early stopping and model selection, not `loss` or
    `val_loss`.

    Call arguments:
        task_losses: tensor of shape `(t,)`.
        mask: bool tensor of shape `(t,)`, False for a task that is not defined on any
            row of the batch: its term is 0, and its s_t gets no gradient.
        training: not used.

    Returns:
        The total loss, a scalar.

    Raises:
        ValueError: if the shapes of the losses and the mask are not `(t,)`.

    Attributes:
        log_variances: variable of shape `(t,)`, the s_t.

    Example:

    >>> weighting = keras_moe.multitask.UncertaintyWeighting()
    >>> float(weighting(np.array([1.0, 3.0])))
    2.0

    References:
        - [Kendall et al., 2018: Multi-Task Learning Using Uncertainty to Weigh Losses
          for Scene Geometry and Semantics](https://arxiv.org/abs/1705.07115)
    """

    def build(self, input_shape: tuple[int, ...]) -> None:
        self.log_variances = self.add_weight(
            name="log_variances",
            shape=input_shape,
            initializer="zeros",
            autocast=False,
        )

    def call(self, task_losses: Any, mask: Any = None, training: Any = None) -> Any:
        s = ops.convert_to_tensor(self.log_variances)
        task_losses = ops.cast(task_losses, s.dtype)
        _checks.axes(task_losses=(task_losses, "t"), mask=(mask, "t?"))
        if mask is not None:
            # Before the product, to keep NaN out of the gradient.
            task_losses = ops.where(mask, task_losses, ops.zeros_like(s))
        terms = ops.exp(-s) * task_losses + s
        if mask is not None:
            terms = ops.where(mask, terms, ops.zeros_like(terms))
        return 0.5 * ops.sum(terms)
