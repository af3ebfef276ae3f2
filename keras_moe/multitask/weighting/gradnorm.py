"""GradNorm: gradient norms balanced by training rates (Chen et al. 2018).

Axis letters: t tasks.
"""

from __future__ import annotations

from typing import Any, ClassVar

import keras
from keras import ops

from keras_moe import _backend, _checks
from keras_moe.multitask._weighting_layer import all_finite, assign_where, value_of
from keras_moe.multitask.gradients._base import GradientWeighting
from keras_moe.multitask.gradients._gramian import mean_over


@keras.saving.register_keras_serializable("keras_moe")
class GradNorm(GradientWeighting):
    """Learns weights of the losses by which slow tasks have larger gradients.

    With n_i the norm of the gradient of the unweighted loss i, the weights descend
    sum_i abs(w_i n_i - mean(w n) r_i^alpha) (equation 2), whose target, the second
    term, is a constant of the gradient. r_i = (loss_i / loss_i(0)) / mean of these
    ratios is the inverse training rate of task i, and loss_i(0) its loss in the first
    training step in which it was defined. The gradient by w_i is n_i sign(w_i n_i -
    target_i). Then the weights are scaled so that they sum to t (algorithm 1). A step
    uses the weights from before its update. At the start all are 1: the plain sum.

    Differences to the paper: norms are divided by their root mean square over the
    tasks, so that `learning_rate` does not depend on their scale; steps are plain
    gradient steps; weights are at least 0; norms are by all shared parameters, not
    those of the last shared layer. In a step with undefined tasks their weights stay,
    and the sum of the others stays.

    Args:
        alpha: float >= 0, strength with which the training rates are pulled together.
            0 makes all gradient norms equal.
        learning_rate: float > 0, step size of the weights.
        **kwargs: passed on to `keras.layers.Layer`.

    Call arguments:
        gramian: float tensor of shape `(t, t)`, inner products of the gradients of the
            unweighted losses.
        task_losses: tensor of shape `(t,)`, the unweighted losses; needed in training.
        mask: bool tensor of shape `(t,)`, False for undefined tasks.
        training: bool, whether the weights are updated.

    Returns:
        Weights of shape `(t,)`. They also multiply the losses for the task-specific
        parameters (`scales_losses`).

    Raises:
        ValueError: if an argument is invalid, the shapes do not match, or the losses
            are missing in training.

    Attributes:
        loss_weights: variable of shape `(t,)`, the w_i.
        first_losses: variable of shape `(t,)`, the loss_i(0), NaN before.

    Example:

    >>> weighting = keras_moe.multitask.weighting.GradNorm(learning_rate=0.1)
    >>> gramian, losses = np.diag([4.0, 4.0]), np.array([1.0, 1.0])
    >>> weights = weighting(gramian, losses, training=True)
    >>> weights = weighting(gramian, np.array([1.0, 0.5]), training=True)
    >>> np.asarray(weighting.loss_weights)  # The second task is faster.
    array([1.1, 0.9], dtype=float32)

    References:
        - [Chen et al., 2018: GradNorm: Gradient Normalization for Adaptive Loss
          Balancing in Deep Multitask Networks](https://arxiv.org/abs/1711.02257)
    """

    scales_losses: ClassVar[bool] = True

    def __init__(
        self, alpha: float = 1.5, learning_rate: float = 0.025, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.alpha = _checks.non_negative_number("alpha", alpha)
        self.learning_rate = _checks.positive_number("learning_rate", learning_rate)

    def build(self, input_shape: tuple[int, ...]) -> None:
        shape = (input_shape[0],)
        self.loss_weights = self.add_statistic("loss_weights", shape, "ones")
        unknown = keras.initializers.Constant(float("nan"))
        self.first_losses = self.add_statistic("first_losses", shape, unknown)

    def weights_of(self, gramian: Any, task_losses: Any, mask: Any, update: Any) -> Any:
        weights = value_of(self.loss_weights)
        if update is False:
            return weights
        if task_losses is None:
            raise ValueError(
                "`task_losses` must be given to GradNorm in training. "
                "Received: task_losses=None"
            )
        replicas = _backend.num_replicas()
        task_losses = _backend.sum_over_replicas(task_losses) / replicas
        first = value_of(self.first_losses)
        first = ops.where(ops.logical_and(mask, ops.isnan(first)), task_losses, first)
        following = self._descend(weights, gramian, task_losses / first, mask)
        update = ops.logical_and(update, all_finite(following))
        assign_where(update, self.first_losses, first)
        assign_where(update, self.loss_weights, following)
        return weights

    def _descend(self, weights: Any, gramian: Any, ratios: Any, mask: Any) -> Any:
        """Return the weights after a step; `ratios` are loss_i / loss_i(0)."""
        mean = mean_over(mask, gramian.dtype)
        known = ops.logical_and(mask, ops.isfinite(ratios))  # Not if loss_i(0) is 0.
        ratios = ops.maximum(ops.where(known, ratios, 1.0), 0.0)
        average = ops.sum(mean * ratios)
        rates = ratios / ops.where(average > 0, average, 1.0)
        norms = ops.sqrt(ops.maximum(ops.diagonal(gramian), 0.0))
        target = ops.sum(mean * weights * norms) * ops.power(rates, self.alpha)
        change = self.learning_rate * norms * ops.sign(weights * norms - target)
        moved = ops.maximum(weights - change, 0.0)
        total = ops.sum(mean * moved)
        scale = ops.sum(mean * weights) / ops.where(total > 0, total, 1.0)
        return ops.where(ops.logical_and(mask, total > 0), moved * scale, weights)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "alpha": self.alpha,
            "learning_rate": self.learning_rate,
        }
