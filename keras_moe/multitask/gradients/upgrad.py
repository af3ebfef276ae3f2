"""UPGrad: the mean of projections that conflict with no gradient (Quinton & Rey 2024).

Axis letters: t tasks.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_moe.multitask.gradients._base import GradientWeighting
from keras_moe.multitask.gradients._gramian import correlations, mean_over, times
from keras_moe.multitask.gradients._interior_point import minimize


@keras.saving.register_keras_serializable("keras_moe")
class UPGrad(GradientWeighting):
    """Projects each gradient so that it increases no loss, and takes the mean.

    Each g_i is projected on the dual cone of all gradients, the vectors d with
    g_j . d >= 0 for all j; the update is the mean of the projections.
    By proposition 1, the projection of g_i is sum_j v_j g_j, where v minimises v.G v
    with v_i >= 1 and all other v_j >= 0. The update increases no loss to first order,
    and is linear in the scale of each gradient.

    Without conflicts all weights are 1/t: the mean of the losses, as in the paper,
    which is 1/t of their sum. All t problems are solved together, without
    regularization of the Gramian. The error of the combined gradient is below 1e-3 of
    the root mean square of the norms. A gradient of 0 has the weight 1/t and no
    influence on the other projections.

    Args:
        **kwargs: passed on to `keras.layers.Layer`.

    Call arguments:
        gramian: float tensor of shape `(t, t)`, the entries g_i . g_j.
        task_losses: not used.
        mask: bool tensor of shape `(t,)`, False for undefined tasks.
        training: not used.

    Returns:
        Weights of shape `(t,)`, of which none is below 1/t.

    Raises:
        ValueError: if the shapes do not match.

    Example:

    >>> gradients = np.array([[1.0, 0.0], [-1.0, 1.0]])
    >>> weights = keras_moe.multitask.gradients.UPGrad()(gradients @ gradients.T)
    >>> np.asarray(weights).round(3)  # (1 + 1) / 2, (1 + 1/2) / 2
    array([1.  , 0.75], dtype=float32)

    References:
        - [Quinton & Rey, 2024: Jacobian Descent for Multi-Objective
          Optimization](https://arxiv.org/abs/2406.16232)
    """

    def weights_of(self, gramian: Any, task_losses: Any, mask: Any, update: Any) -> Any:
        unit, norms, active = correlations(gramian)
        # Zero gradients must not enter the projection of another.
        linear = unit + 1.0 - ops.cast(active, unit.dtype)

        # Row i of x: for the projection of u_i, v = x + (1 in place i).
        def derivatives(x: Any) -> tuple[Any, Any]:
            return times(unit, x) + linear, unit

        x = minimize(derivatives, ops.ones_like(unit), on_simplex=False)
        both = ops.logical_and(active[:, None], active[None, :])
        further = ops.where(both, x * norms[:, None] / norms[None, :], 0.0)
        share = mean_over(mask, gramian.dtype)
        return share + ops.sum(share[:, None] * further, axis=0)
