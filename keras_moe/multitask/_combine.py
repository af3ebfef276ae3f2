"""One gradient from the gradients of several tasks.

Axis letters: t tasks, p values of a variable.

G_ij = sum over the shared variables of <g_i, g_j>; the combined gradient of a shared
variable is sum_i w_i g_i, with the weights w of a `GradientWeighting`. Other variables
get the sum of the gradients, as in training with the plain sum of the losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keras import ops

from keras_moe import _backend


def combine(
    by_task: Sequence[Sequence[Any]],
    rest: Sequence[Any],
    weighting: Any,
    *,
    task_losses: Any,
    mask: Any,
    shared: Sequence[bool] | None,
    scale: Any = 1.0,
) -> list[Any]:
    """Return one gradient per variable, None where no loss depends on it.

    Args:
        by_task: for each task, its gradient of every variable or None.
        rest: the gradients of the other losses, such as regularizers, which are added.
        weighting: a `GradientWeighting`.
        task_losses: `(t,)`, the losses.
        mask: `(t,)` bool, the tasks that are defined in the batch; None for all.
        shared: for each variable, whether it is shared. None: a variable is shared if
            the gradients of two tasks or more are not zero in it.
        scale: the factor by which all gradients are scaled.
    """
    columns = [
        None if all(g is None for g in column) else _backend.stack_gradients(column)
        for column in zip(*by_task, strict=True)
    ]
    gramian: Any = 0.0
    flags: list[Any] = []
    for i, column in enumerate(columns):
        if column is None:
            flags.append(None)
            continue
        values = ops.cast(ops.reshape(column.values, (len(by_task), -1)), "float32")
        values = values / scale
        products = ops.matmul(values, ops.transpose(values))  # (t, p), (p, t) -> (t, t)
        if shared is None:
            # A NaN has reached it, too: the weighting has to see it.
            some = ops.not_equal(ops.diagonal(products), 0)
            reached = ops.sum(ops.cast(some, "int32"))
            flag = reached >= 2
        else:
            flag = ops.convert_to_tensor(shared[i])
        flags.append(flag)
        gramian = gramian + ops.where(flag, products, ops.zeros_like(products))
    weights = weighting(gramian, task_losses=task_losses, mask=mask, training=True)
    ones = ops.ones_like(weights)
    combined = []
    for column, flag, extra in zip(columns, flags, rest, strict=True):
        if column is None:
            combined.append(extra)
            continue
        use = weights if weighting.scales_losses else ops.where(flag, weights, ones)
        gradient = column.weighted_sum(ops.cast(use, column.values.dtype))
        combined.append(_backend.add_gradients(gradient, extra))
    return combined
