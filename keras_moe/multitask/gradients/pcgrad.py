"""PCGrad: conflicting gradients are projected (Yu et al. 2020).

Axis letters: t tasks.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_moe import _checks
from keras_moe.multitask.gradients._base import GradientWeighting


@keras.saving.register_keras_serializable("keras_moe")
class PCGrad(GradientWeighting):
    """Removes from each gradient its components that conflict with other gradients.

    Algorithm 1: for every task i, and for the other tasks j in random order, if g_i' .
    g_j < 0, then g_i' <- g_i' - (g_i' . g_j / norm(g_j)^2) g_j, with g_i' = g_i at the
    start. The update is the sum of all g_i'.

    Without conflicts all weights are 1: the plain sum of the losses.

    Args:
        seed: int or None, seed of the orders. Every training step draws a new order for
            every task; otherwise the order is that of the tasks.
        **kwargs: passed on to `keras.layers.Layer`.

    Call arguments:
        gramian: float tensor of shape `(t, t)`, the entries g_i . g_j.
        task_losses: not used.
        mask: bool tensor of shape `(t,)`, False for undefined tasks.
        training: bool, whether the orders are random.

    Returns:
        Weights of shape `(t,)`, none below 0.

    Raises:
        ValueError: if `seed` is invalid or the shapes do not match.

    Example:

    >>> gradients = np.array([[1.0, 0.0], [-1.0, 1.0]])
    >>> weighting = keras_moe.multitask.gradients.PCGrad()
    >>> np.asarray(weighting(gradients @ gradients.T))  # 1 + 1, 1 + 1/2
    array([2. , 1.5], dtype=float32)

    References:
        - [Yu et al., 2020: Gradient Surgery for Multi-Task
          Learning](https://arxiv.org/abs/2001.06782)
    """

    def __init__(self, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seed = _checks.seed(seed)
        self._seed_generator = keras.random.SeedGenerator(self.seed)

    def weights_of(self, gramian: Any, task_losses: Any, mask: Any, update: Any) -> Any:
        t = gramian.shape[0]
        identity = ops.eye(t, dtype=gramian.dtype)
        squares = ops.diagonal(gramian)
        squares = ops.where(squares > 0, squares, 1.0)
        order = self._orders(t, random=update is not False)
        # g_i' = sum_j combined[i, j] g_j
        combined = identity
        for k in range(t):
            other = ops.take(identity, order[:, k], axis=0)  # one-hot
            products = ops.sum(
                combined * ops.take(gramian, order[:, k], axis=0), axis=-1
            )
            conflict = ops.minimum(products, 0.0)[:, None] * other * (1.0 - identity)
            combined = combined - conflict / squares
        return ops.sum(combined, axis=0)

    def _orders(self, t: int, random: bool) -> Any:
        """Return an order of all tasks for each task, shape `(t, t)`."""
        if not random:
            return ops.tile(ops.arange(t, dtype="int32")[None], (t, 1))
        draws = keras.random.uniform((t, t), dtype="float32", seed=self._seed_generator)
        return ops.argsort(draws, axis=-1)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "seed": self.seed}
