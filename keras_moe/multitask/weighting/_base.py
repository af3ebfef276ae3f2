"""The base class of loss weightings.

Axis letters: t tasks.
"""

from __future__ import annotations

from typing import Any, ClassVar

from keras import ops

from keras_moe import _backend, _checks
from keras_moe.multitask._weighting_layer import WeightingLayer, all_finite, task_mask


class LossWeighting(WeightingLayer):
    """Maps the losses of the tasks to one total loss.

    total = sum_i w_i loss_i, where no gradient passes through the weights w_i.
    Subclasses compute the weights in `weights_of`, or the total itself in `total_of`.

    A task outside the mask adds nothing to the total, to the gradients or to the
    state, even if its loss is NaN. Only training steps change the state, and only if
    the losses of all tasks in the mask are finite. Computation is in float32 (float64
    for such a layer) under any dtype policy.

    Class attributes:
        needs_new_losses: whether the train step has to call `update` after the
            optimizer step, with the losses of the same batch before and after it.

    Args:
        **kwargs: passed on to `keras.layers.Layer`.

    Call arguments:
        task_losses: tensor of shape `(t,)`.
        mask: bool tensor of shape `(t,)`, False for a task that is not defined on any
            row of the batch.
        training: bool, whether the state may change.

    Returns:
        The total loss, a scalar.

    Raises:
        ValueError: if the shapes of the losses and the mask are not `(t,)`.

    Example:

    >>> class Mean(keras_moe.multitask.weighting.LossWeighting):
    ...     def weights_of(self, task_losses, mask, training):
    ...         defined = keras.ops.cast(mask, task_losses.dtype)
    ...         return defined / keras.ops.sum(defined)
    >>> float(Mean()(np.array([1.0, np.nan, 5.0]), mask=np.array([True, False, True])))
    3.0
    """

    least_rank = 1
    needs_new_losses: ClassVar[bool] = False

    def call(self, task_losses: Any, mask: Any = None, training: Any = None) -> Any:
        task_losses = ops.cast(task_losses, self.precise_dtype)
        _checks.axes(task_losses=(task_losses, "t"), mask=(mask, "t?"))
        mask = task_mask(mask, task_losses)
        # Before the product, to keep NaN out of the gradient.
        task_losses = ops.where(mask, task_losses, ops.zeros_like(task_losses))
        return self.total_of(task_losses, mask, training)

    def total_of(self, task_losses: Any, mask: Any, training: Any) -> Any:
        """Return the total; the losses outside the mask are 0."""
        constant = ops.stop_gradient(task_losses)
        weights = ops.stop_gradient(self.weights_of(constant, mask, training))
        weights = ops.where(mask, ops.cast(weights, task_losses.dtype), 0.0)
        return ops.sum(weights * task_losses)

    def weights_of(self, task_losses: Any, mask: Any, training: Any) -> Any:
        """Return the weights of the losses, shape `(t,)`, and update the state.

        The losses are constants, and 0 outside the mask, a bool tensor.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must implement `weights_of` or `total_of`."
        )

    def observed(self, task_losses: Any) -> tuple[Any, Any]:
        """Return the mean losses of all replicas, and whether all are finite."""
        replicas = _backend.num_replicas()
        mean = _backend.sum_over_replicas(task_losses) / replicas
        finite = all_finite(mean)
        return ops.where(finite, mean, ops.zeros_like(mean)), finite

    def compute_output_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        return ()
