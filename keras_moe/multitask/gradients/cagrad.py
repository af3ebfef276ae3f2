"""CAGrad: near the mean gradient, for the worst task (Liu et al. 2021).

Axis letters: t tasks.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_moe import _checks
from keras_moe.multitask.gradients._base import GradientWeighting
from keras_moe.multitask.gradients._gramian import mean_over, times
from keras_moe.multitask.gradients._interior_point import minimize

# Added to norm(g_w)^2, since the norm has no gradient at 0. The paper's code adds 1e-8,
# which changes the weights of much smaller gradients.
_SMOOTHING = 1e-12


@keras.saving.register_keras_serializable("keras_moe")
class CAGrad(GradientWeighting):
    """Maximises the smallest decrease of a loss near the mean gradient.

    The update d maximises min_i g_i . d with norm(d - g_0) <= c norm(g_0), where g_0 is
    the mean of the gradients. By the dual (algorithm 1),
    d = g_0 + c norm(g_0) / norm(g_w) g_w, where g_w = sum_i w_i g_i minimises
    g_w . g_0 + c norm(g_0) norm(g_w) over w_i >= 0, sum_i w_i = 1.

    c = 0 is the mean of the losses. For orthogonal gradients of equal norm all weights
    are (1 + c) / t: the mean, times 1 + c, as in the paper; some implementations divide
    by 1 + c or 1 + c^2. The error of d is below 1e-3 of the root mean square of the
    norms.

    Args:
        c: float in [0, 1), radius of the search relative to norm(g_0). Below 1 the mean
            of the losses converges to a stationary point.
        **kwargs: passed on to `keras.layers.Layer`.

    Call arguments:
        gramian: float tensor of shape `(t, t)`, the entries g_i . g_j.
        task_losses: not used.
        mask: bool tensor of shape `(t,)`, False for undefined tasks.
        training: not used.

    Returns:
        Weights of shape `(t,)`.

    Raises:
        ValueError: if `c` is not in [0, 1) or the shapes do not match.

    Example:

    >>> weights = keras_moe.multitask.gradients.CAGrad(c=0.5)(np.eye(2))
    >>> np.asarray(weights).round(3)
    array([0.75, 0.75], dtype=float32)

    References:
        - [Liu et al., 2021: Conflict-Averse Gradient Descent for Multi-task
          Learning](https://arxiv.org/abs/2110.14048)
    """

    def __init__(self, c: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.c = _checks.rate("c", c)

    def weights_of(self, gramian: Any, task_losses: Any, mask: Any, update: Any) -> Any:
        t = gramian.shape[0]
        mean = mean_over(mask, gramian.dtype)
        by_mean = times(gramian, mean)  # g_i . g_0
        radius = self.c * ops.sqrt(ops.maximum(ops.sum(mean * by_mean), 0.0))
        # The last term keeps the weights outside the mask at 0.
        linear = by_mean + 4.0 * t * (1.0 - ops.cast(mask, gramian.dtype))

        def norm(w: Any, products: Any) -> Any:
            return ops.sqrt(ops.maximum(ops.sum(w * products), 0.0) + _SMOOTHING)

        def derivatives(w: Any) -> tuple[Any, Any]:
            products = times(gramian, w)
            size = norm(w, products)
            direction = products / size
            curvature = gramian - direction[:, None] * direction[None, :]
            return linear + radius * direction, radius / size * curvature

        start = ops.full((t,), 1.0 / t, dtype=gramian.dtype)
        w = ops.where(mask, minimize(derivatives, start, on_simplex=True), 0.0)
        return mean + radius / norm(w, times(gramian, w)) * w

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "c": self.c}
