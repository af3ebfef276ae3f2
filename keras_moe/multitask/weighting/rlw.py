"""Random loss weighting (Lin et al. 2022).

Axis letters: t tasks.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_moe import _checks
from keras_moe.multitask.weighting._base import LossWeighting


@keras.saving.register_keras_serializable("keras_moe")
class RLW(LossWeighting):
    """Draws new weights in every training step: a baseline for other weightings.

    "normal": w = t softmax(z) with standard normal z. "dirichlet": w / t is uniform
    over the simplex. The weights sum to t, so that their expectation is 1, as in the
    plain sum; in the paper they sum to 1. Outside of training all are 1.

    Args:
        distribution: "normal" or "dirichlet".
        seed: int or None, seed of the weights.
        **kwargs: passed on to `keras.layers.Layer`.

    Call arguments:
        task_losses: tensor of shape `(t,)`.
        mask: bool tensor of shape `(t,)`, False for undefined tasks. The weights of
            other tasks do not depend on it.
        training: bool, whether the weights are random.

    Returns:
        The total loss, a scalar.

    Raises:
        ValueError: if an argument is invalid, or the shapes are not `(t,)`.

    Example:

    >>> weighting = keras_moe.multitask.weighting.RLW(seed=1)
    >>> float(weighting(np.array([1.0, 3.0])))
    4.0
    >>> float(weighting(np.array([2.0, 2.0]), training=True))
    4.0

    References:
        - [Lin et al., 2022: Reasonable Effectiveness of Random Weighting: A Litmus Test
          for Multi-Task Learning](https://arxiv.org/abs/2111.10603)
    """

    def __init__(
        self, distribution: str = "normal", seed: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.distribution = _checks.one_of(
            "distribution", distribution, ["normal", "dirichlet"]
        )
        self.seed = _checks.seed(seed)
        self._seed_generator = keras.random.SeedGenerator(self.seed)

    def weights_of(self, task_losses: Any, mask: Any, training: Any) -> Any:
        if not training:
            return ops.ones_like(task_losses)
        shape, dtype = task_losses.shape, task_losses.dtype
        if self.distribution == "normal":
            drawn = keras.random.normal(shape, dtype=dtype, seed=self._seed_generator)
            return shape[0] * ops.softmax(drawn)
        uniform = keras.random.uniform(
            shape, 1e-7, 1.0, dtype=dtype, seed=self._seed_generator
        )
        # Exponential variables divided by their sum.
        drawn = -ops.log(uniform)
        return shape[0] * drawn / ops.sum(drawn)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "distribution": self.distribution,
            "seed": self.seed,
        }
