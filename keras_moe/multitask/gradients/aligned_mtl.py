"""Aligned-MTL: gradients made orthogonal and equal in norm (Senushkin et al. 2023).

Axis letters: t tasks.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_moe.multitask.gradients._base import GradientWeighting


@keras.saving.register_keras_serializable("keras_moe")
class AlignedMTL(GradientWeighting):
    """Replaces the gradients by the nearest orthogonal ones of equal norm, and sums.

    With the eigenvectors V and eigenvalues l_k of the Gramian, the weights are
    sqrt(l_min) V diag(1 / sqrt(l_k)) V' 1 (algorithm 1): the aligned gradients have the
    condition number 1 and the norm of the smallest singular value. Eigenvalues below
    1e-6 t times the largest count as 0 and are left out, as are those of zero
    gradients.

    For orthogonal gradients of equal norm all weights are 1: the plain sum of the
    losses. The paper weights the aligned gradients by the importance of the tasks, here
    all 1.

    Args:
        **kwargs: passed on to `keras.layers.Layer`.

    Call arguments:
        gramian: float tensor of shape `(t, t)`, the entries g_i . g_j.
        task_losses: not used.
        mask: bool tensor of shape `(t,)`, False for undefined tasks.
        training: not used.

    Returns:
        Weights of shape `(t,)`, with a relative error below 1e-3 if the condition
        number of the Gramian is below 1e3.

    Raises:
        ValueError: if the shapes do not match.

    Example:

    >>> weights = keras_moe.multitask.gradients.AlignedMTL()(np.diag([1.0, 4.0]))
    >>> np.asarray(weights).round(3)
    array([1. , 0.5], dtype=float32)

    References:
        - [Senushkin et al., 2023: Independent Component Alignment for Multi-Task
          Learning](https://arxiv.org/abs/2305.19000)
    """

    def weights_of(self, gramian: Any, task_losses: Any, mask: Any, update: Any) -> Any:
        t = gramian.shape[0]
        values, vectors = ops.eigh(gramian)
        largest = ops.max(values)
        kept = values > 1e-6 * t * largest
        smallest = ops.min(ops.where(kept, values, largest))
        scales = ops.sqrt(ops.where(kept, smallest / ops.where(kept, values, 1.0), 0.0))
        inside = ops.cast(mask, gramian.dtype)
        along = ops.sum(vectors * inside[:, None], axis=0)  # V' 1
        return ops.sum(vectors * (scales * along)[None, :], axis=1)
