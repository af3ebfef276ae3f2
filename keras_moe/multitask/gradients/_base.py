"""The base class of gradient weightings.

Axis letters: t tasks.
"""

from __future__ import annotations

from typing import Any, ClassVar

from keras import ops

from keras_moe import _checks
from keras_moe.multitask._weighting_layer import WeightingLayer, all_finite, task_mask


class GradientWeighting(WeightingLayer):
    """Maps inner products of the tasks' gradients to a weight for each gradient.

    With g_i the gradient of loss i by the shared parameters, the shared parameters are
    updated by sum_i w_i g_i. Task-specific parameters keep the gradients of the plain
    sum of the losses, unless `scales_losses`. All methods need only the Gramian, with
    the entries g_i . g_j.

    The method sees the Gramian divided by the mean of its diagonal, so the scale of the
    gradients has no effect on the weights. Subclasses implement `weights_of`. The base
    class ensures for every method:

    - A task outside the mask has the weight 0, and the other weights are those of the
      method without it, even if its row is NaN.
    - A single task in the mask has the weight 1.
    - A Gramian that is not finite within the mask gives NaN weights and no change of
      the state, so that an optimizer with loss scaling skips the step.

    Class attributes:
        scales_losses: whether the weights also multiply the losses for the
            task-specific parameters.

    Args:
        **kwargs: passed on to `keras.layers.Layer`.

    Call arguments:
        gramian: float tensor of shape `(t, t)`.
        task_losses: float tensor of shape `(t,)`, or None; only some methods use it.
        mask: bool tensor of shape `(t,)`, False for a task that is not defined on any
            row of the batch.
        training: bool, whether the state may change.

    Returns:
        Weights of shape `(t,)` in float32 (float64 for such a layer).

    Raises:
        ValueError: if the shapes do not match.

    Example:

    >>> class Unit(keras_moe.multitask.gradients.GradientWeighting):
    ...     def weights_of(self, gramian, task_losses, mask, update):
    ...         return 1 / keras.ops.sqrt(keras.ops.diagonal(gramian))
    >>> np.asarray(Unit()(np.diag([4.0, 4.0, np.nan]), mask=np.array([1, 1, 0]) > 0))
    array([1., 1., 0.], dtype=float32)
    """

    scales_losses: ClassVar[bool] = False

    def call(
        self,
        gramian: Any,
        task_losses: Any = None,
        mask: Any = None,
        training: Any = None,
    ) -> Any:
        gramian = ops.stop_gradient(ops.cast(gramian, self.precise_dtype))
        _check_square(gramian)
        _checks.axes(
            gramian=(gramian, "st"), task_losses=(task_losses, "t?"), mask=(mask, "t?")
        )
        mask = task_mask(mask, gramian)
        pairs = ops.logical_and(mask[:, None], mask[None, :])
        gramian = ops.where(pairs, gramian, 0.0)
        finite = all_finite(gramian)
        # Linear solvers of TensorFlow raise for NaN.
        gramian = ops.where(finite, gramian, 0.0)
        update: Any = finite if training else False
        if task_losses is not None:
            task_losses = ops.stop_gradient(ops.cast(task_losses, gramian.dtype))
            task_losses = ops.where(mask, task_losses, 0.0)
            if training:
                update = ops.logical_and(finite, all_finite(task_losses))
        count = ops.sum(ops.cast(mask, gramian.dtype))
        largest = ops.max(ops.diagonal(gramian))  # Before the sum, which may overflow.
        gramian = gramian / ops.where(largest > 0, largest, 1.0)
        scale = ops.sum(ops.diagonal(gramian)) / ops.maximum(count, 1.0)
        gramian = gramian / ops.where(scale > 0, scale, 1.0)
        weights = self.weights_of(gramian, task_losses, mask, update)
        weights = ops.where(count > 1, ops.cast(weights, gramian.dtype), 1.0)
        weights = ops.where(finite, weights, float("nan"))
        return ops.stop_gradient(ops.where(mask, weights, 0.0))

    def weights_of(self, gramian: Any, task_losses: Any, mask: Any, update: Any) -> Any:
        """Return the weights of the gradients, shape `(t,)`, and update the state.

        Args:
            gramian: tensor of shape `(t, t)`, finite, 0 outside the mask, with a mean
                diagonal of 1 within the mask (0 if all gradients are 0).
            task_losses: tensor of shape `(t,)`, 0 outside the mask, or None.
            mask: bool tensor of shape `(t,)`.
            update: False, or in training a bool scalar: False if the Gramian or a loss
                is not finite, when the state must stay as it is.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `weights_of`.")

    def compute_output_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        return (input_shape[0],)


def _check_square(gramian: Any) -> None:
    shape = tuple(gramian.shape)
    if len(shape) != 2 or shape[0] is None or shape[0] != shape[1]:
        raise ValueError(
            "`gramian` must have the shape (t, t) with a static t. "
            f"Received: gramian of shape {shape}"
        )
