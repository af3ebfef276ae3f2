"""How the losses of several tasks become one: learned weights.

Axis letters: t tasks.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops


@keras.saving.register_keras_serializable("keras_moe")
class UncertaintyWeighting(keras.layers.Layer):
    """Weighs every task's loss by a learned noise variance.

    total = 1/2 sum_t (exp(-s_t) loss_t + s_t), with s_t = log sigma_t^2 learned from 0.
    A task whose loss stays high gets a large variance and so a small weight. Kendall
    et al. give classification losses twice the weight of regression losses
    (equations 7 and 10); here all have one formula, whose optimum is
    sigma_t^2 = loss_t.

    Call arguments:
        task_losses: tensor of shape `(t,)`.

    Returns:
        The total loss, a scalar.

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
            name="log_variances", shape=input_shape, initializer="zeros"
        )

    def call(self, task_losses: Any) -> Any:
        weighted = ops.exp(-self.log_variances) * task_losses
        return 0.5 * ops.sum(weighted + self.log_variances)

    def compute_output_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        return ()
