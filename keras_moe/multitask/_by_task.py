"""Labels and sample weights by task: the rows that are defined, and the others.

Axis letters: n rows, t tasks.

A row with sample weight 0, or outside the mask of a prediction, is undefined for its
task. Weight 0 alone does not take a label out: 0 times NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe import _backend


def check_keys(argument: str, value: Any, tasks: Sequence[str]) -> None:
    """Refuse a dict with a key that is no task; what is no dict passes."""
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
    """Return labels, weights and which rows are defined, each by task.

    Args:
        y: as in `labels_by_task`.
        y_pred: dict of predictions by task.
        sample_weight: as in `weights_by_task`.
        needed: the tasks that must have labels.
    """
    weights = as_wide_as_masks(weights_by_task(sample_weight, y_pred), y_pred)
    defined = {task: defined_rows(y_pred[task], weights[task]) for task in weights}
    return labels_by_task(y, y_pred, needed), weights, defined


def labels_by_task(
    y: Any, y_pred: dict[str, Any], needed: Collection[str]
) -> dict[str, Any]:
    """Return the labels as a dict with an entry for every task, None where missing.

    Args:
        y: dict of labels by task; or a sequence of them, or one tensor for one task.
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
    """Return the weights with an entry for every task, None where all are 1."""
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


def as_wide_as_masks(weights: dict[str, Any], y_pred: dict[str, Any]) -> dict[str, Any]:
    """Return weights of the shape of the mask of a prediction, where there are both.

    Keras multiplies the two, and some backends take nothing but equal shapes.
    """
    masks = {task: _backend.keras_mask(part) for task, part in y_pred.items()}
    return {
        task: weight
        if weight is None or masks[task] is None
        # A product, as torch cannot write into a broadcast tensor, and Keras does.
        else _of_rank(ops.convert_to_tensor(weight), len(masks[task].shape))
        * ops.ones_like(masks[task], "float32")
        for task, weight in weights.items()
    }


def completed(sample_weight: Any, y: Any, outputs: dict[str, Any]) -> Any:
    """Return a dict of weights with ones for the tasks of `y` that it leaves out.

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
        else _flat_if_one_a_row(sample_weight[task], outputs[task].shape)
        for task, labels in y.items()
    }


def _ones_for(labels: Any, output_shape: Sequence[int | None]) -> np.ndarray:
    """Return a weight for every value of the loss: all axes but the last.

    One weight a row would be the divisor of a mean over all steps of a sequence.
    """
    given = np.shape(labels)
    axes = [
        given[i] if size is None and i < len(given) else size
        for i, size in enumerate(output_shape[:-1])
    ]
    return np.ones((given[0], *axes[1:]), "float32")


def _flat_if_one_a_row(weight: Any, output_shape: Sequence[int | None]) -> Any:
    """Return (n,) for (n, 1): with another rank every time, TensorFlow forgets it."""
    shape = np.shape(weight)
    if len(output_shape) == 2 and len(shape) == 2 and shape[1] == 1:
        return np.reshape(ops.convert_to_numpy(weight), (-1,))
    return weight


def defined_rows(prediction: Any, weight: Any) -> Any:
    """Return bool, True where a row is defined; None if all are.

    The shape is that of `weight`, or of the mask of the prediction, or of both.
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
    return ops.logical_and(_of_rank(counts, rank), _of_rank(mask, rank))


def without_undefined(labels: Any, defined: Any) -> Any:
    """Return `labels` with numbers for NaN and infinity in rows that are not `defined`.

    Any label will do whose loss is finite, since it is multiplied by 0. It is that of
    the first defined row, for which the loss was made; a loss of the logarithm of the
    label has none at 0.
    """
    if labels is None or defined is None:
        return labels
    labels = ops.convert_to_tensor(labels)
    if not keras.backend.is_float_dtype(keras.backend.standardize_dtype(labels.dtype)):
        return labels
    defined = _of_rank(defined, len(labels.shape))
    of_row = ops.any(defined, axis=tuple(range(1, len(labels.shape))))
    filler = ops.take(labels, ops.argmax(ops.cast(of_row, "int32"), axis=0), axis=0)
    filler = ops.where(ops.isfinite(filler), filler, ops.ones_like(filler))
    return ops.where(ops.logical_or(defined, ops.isfinite(labels)), labels, filler)


def _of_rank(flags: Any, rank: int) -> Any:
    """Add axes at the end, or take away those of size 1."""
    while len(flags.shape) < rank:
        flags = ops.expand_dims(flags, -1)
    while len(flags.shape) > rank and flags.shape[-1] == 1:
        flags = ops.squeeze(flags, -1)
    return flags
