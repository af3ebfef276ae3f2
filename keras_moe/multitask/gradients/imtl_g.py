"""IMTL-G: equal projections on all gradients (Liu et al. 2021).

Axis letters: t tasks.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_moe.multitask.gradients._base import GradientWeighting
from keras_moe.multitask.gradients._gramian import correlations, mean_over, times

_RIDGE = 1e-6


@keras.saving.register_keras_serializable("keras_moe")
class IMTLG(GradientWeighting):
    """Weights for which the update has equal projections on all gradients.

    With d = sum_i w_i g_i and unit gradients u_i, d . u_i is the same for all i, and
    sum_i w_i = 1. The weights solve C y = 1, w_i = y_i / norm(g_i), with C the Gramian
    of the unit gradients; then they are divided by their sum. They can be negative. If
    their sum is 0 to rounding, all weights are 1/t.

    The weights sum to 1. Orthogonal gradients get w_i proportional to 1 / norm(g_i);
    with equal norms all are 1/t: the mean of the losses, 1/t of their sum. A gradient
    of 0 has the weight 0 and sets no condition. IMTL-L, which the paper combines with
    it, is a weighting of the losses and not included.

    Args:
        **kwargs: passed on to `keras.layers.Layer`.

    Call arguments:
        gramian: float tensor of shape `(t, t)`, the entries g_i . g_j.
        task_losses: not used.
        mask: bool tensor of shape `(t,)`, False for undefined tasks.
        training: not used.

    Returns:
        Weights of shape `(t,)`, with a relative error below 1e-3 if the condition
        number of C is below 1e3.

    Raises:
        ValueError: if the shapes do not match.

    Example:

    >>> weights = keras_moe.multitask.gradients.IMTLG()(np.diag([1.0, 9.0]))
    >>> np.asarray(weights).round(3)
    array([0.75, 0.25], dtype=float32)

    References:
        - [Liu et al., 2021: Towards Impartial Multi-task
          Learning](https://openreview.net/forum?id=IMPnRXEWpvr)
    """

    def weights_of(self, gramian: Any, task_losses: Any, mask: Any, update: Any) -> Any:
        unit, norms, active = correlations(gramian)
        matrix = unit + _RIDGE * ops.eye(gramian.shape[0], dtype=gramian.dtype)
        ones = ops.ones_like(norms)
        y = ops.solve(matrix, ones)
        # One step of refinement removes the error of the ridge.
        y = y + ops.solve(matrix, ones - times(unit, y))
        weights = ops.where(active, y / norms, 0.0)
        total = ops.sum(weights)
        valid = ops.abs(total) > 1e-5 * ops.sum(ops.abs(weights))
        return ops.where(
            valid,
            weights / ops.where(valid, total, 1.0),
            mean_over(mask, gramian.dtype),
        )
