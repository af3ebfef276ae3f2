"""Labels and sample weights by task, and which rows are defined.

Axis letters: n rows, t tasks.

A row with sample weight 0, or masked in the prediction, is undefined for its task. Its
label is replaced, since weight 0 alone does not remove a NaN: 0 * NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe import _backend


def check_keys(argument: str, value: Any, tasks: Sequence[str]) -> None:
    """Raise ValueError if `value` is a dict with a key that is not a task."""
    if not isinstance(value, dict):
        return
    unknown = [key for key in value if key not in tasks]
    if unknown:
        raise ValueError(
            f"the keys of `{argument}` must be tasks of the model, {list(tasks)}. "
            f"Received: {unknown[0]!r} in {argument} with the keys {list(value)}"
        )


def aligned(
    y: Any, y_pred: dict[str, Any], sample_weight: Any, needed: Collection[str]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return labels, weights and masks of defined rows, each by task.

    Args:
        y: as in `labels_by_task`.
        y_pred: dict of predictions by task.
        sample_weight: as in `weights_by_task`.
        needed: the tasks that must have labels.
    """
    weights = broadcast_to_masks(weights_by_task(sample_weight, y_pred), y_pred)
    defined = {task: defined_rows(y_pred[task], weights[task]) for task in weights}
    return labels_by_task(y, y_pred, needed), weights, defined


def labels_by_task(
    y: Any, y_pred: dict[str, Any], needed: Collection[str]
) -> dict[str, Any]:
    """Return a dict of labels with an entry for every task, None if missing.

    Args:
        y: dict of labels by task, sequence of labels, or a tensor if there is one task.
        y_pred: dict of predictions by task.
        needed: the tasks that must have labels.
    """
    tasks = list(y_pred)
    check_keys("y", y, tasks)
    if y is None and needed:
        raise ValueError(
            f"`y` must be a dict of labels by task, {tasks}. Received: y=None"
        )
    if not isinstance(y, dict):
        flat = keras.tree.flatten(y)
        if len(flat) != len(tasks):
            raise ValueError(
                f"`y` must be a dict of labels by task, {tasks}, or as many labels as "
                f"tasks. Received: {len(flat)} labels in a {type(y).__name__}"
            )
        y = keras.tree.pack_sequence_as(y_pred, flat)
    missing = [task for task in tasks if task in needed and y.get(task) is None]
    if missing:
        raise ValueError(
            f"`y` must have labels for {missing[0]!r} and every other task with a loss "
            f"or metric. Received: y with the keys {list(y)}"
        )
    return {task: y.get(task) for task in tasks}


def weights_by_task(sample_weight: Any, y_pred: dict[str, Any]) -> dict[str, Any]:
    """Return a dict of weights with an entry for every task, None if all are 1."""
    tasks = list(y_pred)
    check_keys("sample_weight", sample_weight, tasks)
    if sample_weight is None or isinstance(sample_weight, dict):
        return {task: (sample_weight or {}).get(task) for task in tasks}
    if not keras.tree.is_nested(sample_weight):
        return dict.fromkeys(tasks, sample_weight)
    flat = keras.tree.flatten(sample_weight)
    if len(flat) != len(tasks):
        raise ValueError(
            f"`sample_weight` must be a dict of weights by task, {tasks}, or as many "
            f"weights as tasks. Received: {len(flat)} in a "
            f"{type(sample_weight).__name__}"
        )
    return keras.tree.pack_sequence_as(y_pred, flat)


def broadcast_to_masks(
    weights: dict[str, Any], y_pred: dict[str, Any]
) -> dict[str, Any]:
    """Return the weights, broadcast to the mask of the prediction if there is one.

    Keras multiplies the two, and some backends require equal shapes.
    """
    masks = {task: _backend.keras_mask(part) for task, part in y_pred.items()}
    return {
        task: weight
        if weight is None or masks[task] is None
        # A product, as Keras writes into it, which torch forbids for a broadcast view.
        else _with_rank(ops.convert_to_tensor(weight), len(masks[task].shape))
        * ops.ones_like(masks[task], "float32")
        for task, weight in weights.items()
    }


def fill_sample_weight(sample_weight: Any, y: Any, outputs: dict[str, Any]) -> Any:
    """Return the dict of weights, with ones for tasks of `y` that it lacks.

    Args:
        sample_weight: the argument of `fit`.
        y: its labels.
        outputs: dict of the model's outputs by task.
    """
    check_keys("sample_weight", sample_weight, list(outputs))
    if not isinstance(sample_weight, dict) or not isinstance(y, dict):
        return sample_weight
    check_keys("y", y, list(outputs))
    return {
        task: _ones_for(labels, outputs[task].shape)
        if sample_weight.get(task) is None
        else _squeeze_last_axis(sample_weight[task], outputs[task].shape)
        for task, labels in y.items()
    }


def _ones_for(labels: Any, output_shape: Sequence[int | None]) -> np.ndarray:
    """Return ones for every value of the loss: all axes but the last.

    With one weight per row, the mean loss of a sequence would be divided by the number
    of rows instead of the number of steps.
    """
    given = np.shape(labels)
    axes = [
        given[i] if size is None and i < len(given) else size
        for i, size in enumerate(output_shape[:-1])
    ]
    return np.ones((given[0], *axes[1:]), "float32")


def _squeeze_last_axis(weight: Any, output_shape: Sequence[int | None]) -> Any:
    """Return (n,) for (n, 1), as TensorFlow loses the rank if it varies."""
    shape = np.shape(weight)
    if len(output_shape) == 2 and len(shape) == 2 and shape[1] == 1:
        return np.reshape(ops.convert_to_numpy(weight), (-1,))
    return weight


def defined_rows(prediction: Any, weight: Any) -> Any:
    """Return a bool mask, True for defined rows; None if all are defined.

    It has the shape of `weight` or of the mask of the prediction; if both are given,
    of the two broadcast.
    """
    mask = _backend.keras_mask(prediction)
    if mask is not None:
        mask = ops.cast(mask, "bool")
    if weight is None:
        return mask
    counts = ops.not_equal(ops.convert_to_tensor(weight), 0)
    if mask is None:
        return counts
    rank = max(len(counts.shape), len(mask.shape))
    return ops.logical_and(_with_rank(counts, rank), _with_rank(mask, rank))


def replace_undefined(labels: Any, defined: Any) -> Any:
    """Return `labels` with NaN and infinity replaced in rows that are not `defined`.

    The replacement only needs a finite loss, which is multiplied by 0. The label of the
    first defined row is used, as 0 may be invalid, for example in a log loss.
    """
    if labels is None or defined is None:
        return labels
    labels = ops.convert_to_tensor(labels)
    if not keras.backend.is_float_dtype(keras.backend.standardize_dtype(labels.dtype)):
        return labels
    defined = _with_rank(defined, len(labels.shape))
    of_row = ops.any(defined, axis=tuple(range(1, len(labels.shape))))
    filler = ops.take(labels, ops.argmax(ops.cast(of_row, "int32"), axis=0), axis=0)
    filler = ops.where(ops.isfinite(filler), filler, ops.ones_like(filler))
    return ops.where(ops.logical_or(defined, ops.isfinite(labels)), labels, filler)


def _with_rank(flags: Any, rank: int) -> Any:
    """Add or remove trailing axes of size 1 to get `rank` axes."""
    while len(flags.shape) < rank:
        flags = ops.expand_dims(flags, -1)
    while len(flags.shape) > rank and flags.shape[-1] == 1:
        flags = ops.squeeze(flags, -1)
    return flags
