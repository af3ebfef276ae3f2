"""MGDA: the shortest convex combination (Désidéri 2012; Sener & Koltun 2018).

Axis letters: t tasks.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_moe.multitask.gradients._base import GradientWeighting
from keras_moe.multitask.gradients._gramian import mean_over, times
from keras_moe.multitask.gradients._interior_point import minimize


@keras.saving.register_keras_serializable("keras_moe")
class MGDA(GradientWeighting):
    """Weights of the shortest vector in the convex hull of the gradients.

    w = argmin norm(sum_i w_i g_i)^2 with w_i >= 0 and sum_i w_i = 1. No loss increases
    to first order, and small gradients get large weights. If a gradient is 0, its task
    has all the weight, and the shared parameters stay as they are.

    The weights sum to 1. For orthogonal gradients of equal norm all are 1/t: the mean
    of the losses, 1/t of their sum. Sener and Koltun solve the problem by the
    Frank-Wolfe algorithm and recommend gradients by the shared representation instead
    of the shared parameters; here an interior-point method solves it. The error of the
    combined gradient is below 1e-3 of the root mean square of the norms.

    Args:
        **kwargs: passed on to `keras.layers.Layer`.

    Call arguments:
        gramian: float tensor of shape `(t, t)`, the entries g_i . g_j.
        task_losses: not used.
        mask: bool tensor of shape `(t,)`, False for undefined tasks.
        training: not used.

    Returns:
        Weights of shape `(t,)`.

    Raises:
        ValueError: if the shapes do not match.

    Example:

    >>> weights = keras_moe.multitask.gradients.MGDA()(np.diag([1.0, 3.0]))
    >>> np.asarray(weights).round(3)
    array([0.75, 0.25], dtype=float32)

    References:
        - [Désidéri, 2012: Multiple-gradient descent algorithm (MGDA) for multiobjective
          optimization](https://doi.org/10.1016/j.crma.2012.03.014)
        - [Sener & Koltun, 2018: Multi-Task Learning as Multi-Objective
          Optimization](https://arxiv.org/abs/1810.04650)
    """

    def weights_of(self, gramian: Any, task_losses: Any, mask: Any, update: Any) -> Any:
        t = gramian.shape[0]
        # More than any gradient of the objective within the mask: no weight outside.
        outside = 2.0 * t * (1.0 - ops.cast(mask, gramian.dtype))

        def derivatives(w: Any) -> tuple[Any, Any]:
            return times(gramian, w) + outside, gramian

        start = ops.full((t,), 1.0 / t, dtype=gramian.dtype)
        weights = ops.where(mask, minimize(derivatives, start, on_simplex=True), 0.0)
        total = ops.sum(weights)
        return ops.where(
            total > 0,
            weights / ops.where(total > 0, total, 1.0),
            mean_over(mask, gramian.dtype),
        )
