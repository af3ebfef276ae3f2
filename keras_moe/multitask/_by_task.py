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


def completed(sample_weight: Any, y: Any, tasks: Sequence[str]) -> Any:
    """Return a dict of weights with ones for the tasks of `y` that it leaves out."""
    check_keys("sample_weight", sample_weight, tasks)
    if not isinstance(sample_weight, dict) or not isinstance(y, dict):
        return sample_weight
    check_keys("y", y, tasks)
    return {
        task: _ones_for(labels)
        if sample_weight.get(task) is None
        else sample_weight[task]
        for task, labels in y.items()
    }


def _ones_for(labels: Any) -> np.ndarray:
    """Return one weight a row, of the rank of the labels, which masks need."""
    rows, *others = np.shape(labels)
    return np.ones((rows, *[1] * len(others)), "float32")


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
    """Return `labels` with 1 in the rows that are not `defined`.

    Any label would do, as its loss is multiplied by 0; it must have a finite one. That
    of 0 is not in a loss that takes the logarithm of the label.
    """
    if labels is None or defined is None:
        return labels
    labels = ops.convert_to_tensor(labels)
    defined = _of_rank(defined, len(labels.shape))
    return ops.where(defined, labels, ops.ones_like(labels))


def _of_rank(flags: Any, rank: int) -> Any:
    """Add axes at the end, or take away those of size 1."""
    while len(flags.shape) < rank:
        flags = ops.expand_dims(flags, -1)
    while len(flags.shape) > rank and flags.shape[-1] == 1:
        flags = ops.squeeze(flags, -1)
    return flags
