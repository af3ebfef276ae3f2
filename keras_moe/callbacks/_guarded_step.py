"""A training step that changes nothing if an input or a gradient is not finite.

One function per backend puts it in the place of `model.train_step`. What it found goes
to a `Findings`; -1 stands for "all finite".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_moe import _backend


class Findings:
    """What the last steps found that was not finite.

    Attributes:
        batches: number of batches that were not applied.
        rows: dict from the name of a feature to its first row that is not finite.
        indices: list, for every trainable variable the first index of its first axis at
            which the gradient is not finite.
    """

    def __init__(self) -> None:
        self.batches = 0
        self.rows: dict[str, int] = {}
        self.indices: list[int] = []

    def add(self, names: Sequence[str], rows: Any, indices: Any, batches: int) -> None:
        """Note the last batch of `batches` that were not applied."""
        self.batches += batches
        found = dict(zip(names, map(int, np.asarray(rows)), strict=True))
        self.rows = {name: row for name, row in found.items() if row >= 0}
        self.indices = [int(index) for index in np.asarray(indices)]


def install(model: keras.Model, findings: Findings) -> Callable[[], None]:
    """Guard the training step of a model before `fit` makes its train function.

    A guard that an interrupted `fit` left is removed.

    Returns:
        A function that updates `findings`, where the device does not do so itself.
    """
    remove(model)
    return {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}[_backend.name()](
        model, findings
    )


def remove(model: keras.Model) -> None:
    """Undo `install`; the next `fit` makes its train function again."""
    guarded = vars(model).pop("train_step", None)
    optimizer = getattr(guarded, "optimizer", model.optimizer)
    vars(optimizer).pop("apply", None)
    model.train_function = None


def _put(model: Any, guarded_step: Any, guarded_apply: Any) -> None:
    """Replace the step of a model and the `apply` of its optimizer."""
    guarded_step.optimizer = model.optimizer
    model.train_step, model.optimizer.apply = guarded_step, guarded_apply
    model.train_function = None


def _tensorflow(model: Any, findings: Findings) -> Callable[[], None]:
    import tensorflow as tf

    step, optimizer, apply = model.train_step, model.optimizer, model.optimizer.apply
    # Made in the first trace, when the features are known.
    state: dict[str, Any] = {}

    def guarded_apply(grads: Any, trainable_variables: Any = None) -> None:
        grads = list(grads)
        variables = list(trainable_variables or model.trainable_variables)
        if not optimizer.built:
            optimizer.build(variables)  # not in a branch
        features, names = state["features"], state["names"]
        checked = [] if _scales_losses(optimizer) else grads
        ok = _screened([*features, *checked])
        if "rows" not in state:
            with tf.init_scope():
                state["batches"] = tf.Variable(0)
                state["rows"] = tf.Variable(tf.fill([len(names)], -1))
                state["indices"] = tf.Variable(tf.fill([len(variables)], -1))

        def bad() -> Any:
            rows = [_first(feature) for feature in features]
            indices = [_first(gradient) for gradient in checked]
            indices += [tf.constant(-1)] * (len(variables) - len(indices))
            is_bad = tf.reduce_any(tf.stack([*rows, *indices]) >= 0)
            # The screening sums squares, which may overflow.
            tf.cond(is_bad, lambda: note(rows, indices), good)
            return is_bad

        def note(rows: Any, indices: Any) -> Any:
            if rows:
                state["rows"].assign(tf.stack(rows))
            state["indices"].assign(tf.stack(indices))
            state["batches"].assign_add(1)
            return tf.constant(True)

        def good() -> Any:
            apply(grads, variables)
            return tf.constant(False)

        state["is_bad"] = tf.cond(ok, good, bad)

    def guarded_step(data: Any) -> Any:
        if model.optimizer is not optimizer:  # compiled again
            return step(data)
        state["names"], state["features"] = _float_features(data)
        kept = [*model.non_trainable_variables, *model.metrics_variables]
        before = [tf.identity(variable.value) for variable in kept]
        logs = step(data)

        def restored() -> Any:
            for variable, value in zip(kept, before, strict=True):
                variable.assign(value)
            return tree.map_structure(
                lambda new, old: ops.cast(new, old.dtype),
                dict(model.get_metrics_result()),
                dict(logs),
            )

        # The forward pass has changed averages and metrics.
        return tf.cond(state["is_bad"], restored, lambda: dict(logs))

    def read() -> None:
        batches = int(state["batches"]) if "batches" in state else 0
        if batches:
            rows, indices = state["rows"].numpy(), state["indices"].numpy()
            findings.add(state["names"], rows, indices, batches)
            state["batches"].assign(0)

    _put(model, guarded_step, guarded_apply)
    return read


def _jax(model: Any, findings: Findings) -> Callable[[], None]:
    import jax

    step, optimizer, apply = model.train_step, model.optimizer, model.optimizer.apply
    traced: dict[str, Any] = {}

    def seeing_apply(grads: Any, trainable_variables: Any = None) -> None:
        traced["gradients"] = list(grads)
        apply(grads, trainable_variables)

    def guarded_step(state: Any, data: Any) -> Any:
        if model.optimizer is not optimizer:  # compiled again
            return step(state, data)
        names, features = _float_features(data)
        logs, new_state = step(state, data)
        checked = [] if _scales_losses(optimizer) else traced.pop("gradients")
        number = len(model.trainable_variables)
        rows = [_first(feature) for feature in features]
        indices = [_first(gradient) for gradient in checked]
        indices += [ops.full((), -1, "int32")] * (number - len(indices))
        is_bad = ops.any(ops.stack([*rows, *indices]) >= 0)

        def note(*found: Any) -> None:
            findings.add(names, found[: len(names)], found[len(names) :], 1)

        jax.lax.cond(
            is_bad,
            lambda *found: jax.debug.callback(note, *found),
            lambda *found: None,
            *rows,
            *indices,
        )

        def kept(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: ops.where(is_bad, o, n), new, old)

        pairs = zip(model.metrics_variables, state[-1], strict=True)
        with keras.StatelessScope(state_mapping=list(pairs)):
            logs_before = dict(model.get_metrics_result())
        return kept(dict(logs), logs_before), kept(new_state, tuple(state))

    _put(model, guarded_step, seeing_apply)
    return jax.effects_barrier


def _torch(model: Any, findings: Findings) -> Callable[[], None]:
    step, optimizer, apply = model.train_step, model.optimizer, model.optimizer.apply
    state: dict[str, Any] = {}

    def guarded_apply(grads: Any, trainable_variables: Any = None) -> None:
        grads = list(grads)
        checked = [] if _scales_losses(optimizer) else grads
        rows = [int(_first(feature)) for feature in state["features"]]
        indices = [int(_first(gradient)) for gradient in checked]
        indices += [-1] * (len(grads) - len(indices))
        state["is_bad"] = max([*rows, *indices]) >= 0
        if state["is_bad"]:
            findings.add(state["names"], rows, indices, 1)
        else:
            apply(grads, trainable_variables)

    def guarded_step(data: Any) -> Any:
        if model.optimizer is not optimizer:  # compiled again
            return step(data)
        state["names"], state["features"] = _float_features(data)
        kept = [*model.non_trainable_variables, *model.metrics_variables]
        before = [ops.copy(variable.value) for variable in kept]
        logs = step(data)
        if not state["is_bad"]:
            return logs
        for variable, value in zip(kept, before, strict=True):
            variable.assign(value)
        return model.get_metrics_result()

    _put(model, guarded_step, guarded_apply)
    return lambda: None


def _float_features(data: Any) -> tuple[list[str], list[Any]]:
    """Return names and tensors of the features that may be infinite or NaN."""
    x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
    names, features = [], []
    for path, feature in tree.flatten_with_path(x):
        dtype = getattr(feature, "dtype", None)
        if dtype is not None and "float" in keras.backend.standardize_dtype(dtype):
            names.append("/".join(map(str, path)) or "inputs")
            features.append(feature)
    return names, features


def _screened(tensors: Sequence[Any]) -> Any:
    """Return False if a tensor is not finite: one pass over memory (TensorFlow)."""
    import tensorflow as tf

    dense = [_values(tensor) for tensor in tensors if tensor is not None]
    sums = [tf.cast(tf.nn.l2_loss(tensor), "float32") for tensor in dense]
    return tf.math.is_finite(tf.add_n(sums)) if sums else tf.constant(True)


def _first(tensor: Any) -> Any:
    """Return the first index of the first axis with a value that is not finite."""
    if tensor is None:
        return ops.full((), -1, "int32")
    bad = ops.logical_not(ops.isfinite(_values(tensor)))
    if len(bad.shape) > 1:
        bad = ops.any(bad, axis=tuple(range(1, len(bad.shape))))
    bad = ops.reshape(bad, (-1,))
    # A last entry that is found if no other is.
    padded = ops.concatenate([bad, ops.ones((1,), "bool")])
    first = ops.cast(ops.argmax(ops.cast(padded, "int32")), "int32")
    found = ops.where(ops.any(bad), first, -1)
    ids = getattr(tensor, "indices", None)
    if ids is None or callable(ids):
        return ops.cast(found, "int32")
    ids = ops.concatenate([ops.cast(ids, "int32"), ops.zeros((1,), "int32")])
    return ops.where(found >= 0, ops.take(ids, first, axis=0), -1)


def _values(tensor: Any) -> Any:
    """Return the values of a gradient by rows, or the tensor itself."""
    values = getattr(tensor, "values", None)
    return tensor if values is None or callable(values) else values


def _scales_losses(optimizer: Any) -> bool:
    # It checks gradients itself: one that is not finite is a part of its search.
    return isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
