"""Whether tasks pull the shared parameters in the same direction.

Axis letters: t tasks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe import _backend
from keras_moe.multitask import MultiTaskModel


def gradient_conflict(
    model: MultiTaskModel, x: Any, y: Any, sample_weight: Any = None
) -> np.ndarray:
    """Return the cosines between the gradients of the tasks, `(t, t)`.

    The gradients are of the task losses by the shared parameters: those that have a
    gradient of two tasks or more. 1: the tasks agree; 0: they do not touch each other;
    below 0: a step for one task raises the loss of the other (Yu et al. 2020, PCGrad).
    Dropout and router noise are off. The gradients of one sample are noisy: compare the
    signs of several samples.

    Args:
        model: a compiled `MultiTaskModel` of at least two tasks, on any backend.
        x: a sample of what `fit` reads.
        y: its labels, in the form that `fit` takes.
        sample_weight: its weights, in that form.

    Returns:
        An array in the order of `model.tasks`. NaN for a task without a label in the
        sample, or whose gradient is 0.

    Raises:
        TypeError: if `model` is not a `MultiTaskModel`.
        ValueError: if it is not compiled, has one task, or the numbers of rows differ.

    Example:

    >>> inputs = keras.Input((4,))
    >>> shared = keras_moe.layers.MMoE(3, 8, ["click", "stars"])(inputs)
    >>> outputs = {t: keras_moe.layers.Tower(())(shared[t]) for t in shared}
    >>> model = keras_moe.multitask.MultiTaskModel(inputs, outputs)
    >>> model.compile("adam", "mse")
    >>> x = np.ones((8, 4), "float32")
    >>> y = {"click": x[:, :1], "stars": x[:, :1]}
    >>> keras_moe.telemetry.gradient_conflict(model, x, y).shape
    (2, 2)
    """
    return GradientConflict(model, several=False)(x, y, sample_weight)


class GradientConflict:
    """`gradient_conflict` of one model.

    Args:
        model: as for `gradient_conflict`.
        several: bool, whether several calls follow. If so, the gradients are compiled
            on TensorFlow, but for a model with `run_eagerly`. On JAX they always are.
    """

    def __init__(self, model: MultiTaskModel, *, several: bool = True) -> None:
        if not isinstance(model, MultiTaskModel):
            raise TypeError(
                "`model` must be a MultiTaskModel, whose losses are known by task. "
                f"Received: model of type {type(model).__name__}"
            )
        if not model.compiled:
            raise ValueError(
                "`model` must be compiled: its losses are needed. "
                f"Received: model {model.name!r}, which is not compiled"
            )
        if len(model.tasks) < 2:
            raise ValueError(
                f"`model` must have two tasks or more. Received: tasks={model.tasks}"
            )
        self._model = model
        self._gradients: Any = _on_torch
        if _backend.name() == "jax":
            self._gradients = _Compiled(_jax_program)
        elif _backend.name() == "tensorflow":
            self._gradients = _on_tensorflow
            if several and not model.run_eagerly:
                self._gradients = _Compiled(_tensorflow_program)

    def __call__(self, x: Any, y: Any, sample_weight: Any = None) -> np.ndarray:
        """Return the cosines `(t, t)`."""
        check_rows(x=x, y=y, sample_weight=sample_weight)
        x, y = keras.tree.map_structure(ops.convert_to_tensor, (x, y))
        sample_weight = self._model.complete_weights(y, sample_weight)
        found = self._gradients(self._model, x, y, sample_weight)
        return _cosines(
            [[None if g is None else _dense(g) for g in own] for own in found]
        )


def check_rows(**given: Any) -> None:
    """Raise ValueError unless the arrays have equal numbers of rows, at least one.

    Each argument is an array, or a list or dict of arrays; None passes.
    """
    first: int | None = None
    for name, value in given.items():
        if value is None:
            continue
        parts = keras.tree.flatten(value)
        for part in parts:
            if not hasattr(part, "shape") and not isinstance(part, int | float):
                raise ValueError(
                    f"`{name}` must be an array, or a list or dict of arrays. "
                    f"Received: {name} of type {type(value).__name__}"
                )
        sizes = [len(p) if np.ndim(p) else 0 for p in parts]
        first = sizes[0] if first is None and sizes else first
        if not sizes or min(sizes) < 1 or {*sizes} != {first}:
            beside = "" if name == "x" else f", as many as `x`: {first}"
            raise ValueError(
                f"`{name}` must be an array, or a list or dict of arrays, of one row "
                f"or more and equal numbers of rows{beside}. Received: rows {sizes}"
            )


def _losses(model: Any, x: Any, y: Any, sample_weight: Any) -> list[Any]:
    _, parts = model.loss_and_parts(x, y, model(x), sample_weight, False)
    return list(ops.unstack(parts.losses, num=len(model.tasks)))


def _without_state(*arguments: Any) -> list[Any]:
    with keras.StatelessScope():  # The metrics of the losses are those of `fit`.
        return _losses(*arguments)


def _on_tensorflow(model: Any, *data: Any) -> list[list[Any]]:
    import tensorflow as tf

    with tf.GradientTape(persistent=True) as tape:
        losses = _without_state(model, *data)
    variables = [variable.value for variable in model.trainable_variables]
    return [tape.gradient(loss, variables) for loss in losses]


def _on_torch(model: Any, *data: Any) -> list[list[Any]]:
    import torch

    values = [variable.value for variable in model.trainable_variables]
    found = []
    for loss in _without_state(model, *data):
        gradients: Sequence[Any] = [None] * len(values)
        if loss.requires_grad:
            gradients = torch.autograd.grad(
                loss, values, retain_graph=True, allow_unused=True
            )
        found.append(list(gradients))
    return found


class _Compiled:
    """A compiled program of a model, made anew if other variables are trainable.

    Operation by operation, gradients take twice as long, on JAX seconds.

    Args:
        make: function of a model; its result is called with the data.
    """

    def __init__(self, make: Callable[[Any], Callable[..., Any]]) -> None:
        self._make = make
        self._program: Any = None
        self._known: list[Any] = []

    def __call__(self, model: Any, *data: Any) -> Any:
        # None between both: with all frozen, the variables are the same in all.
        known = [*model.trainable_variables, None, *model.non_trainable_variables]
        if [*map(id, known)] != [*map(id, self._known)]:
            self._known, self._program = known, self._make(model)
        return self._program(*data)


def _tensorflow_program(model: Any) -> Callable[..., Any]:
    import tensorflow as tf

    return tf.function(functools.partial(_on_tensorflow, model), autograph=False)


def _jax_program(model: Any) -> Callable[..., Any]:
    import jax

    compiled = jax.jit(_gradients_of(model))
    parts = (model.trainable_variables, model.non_trainable_variables)

    def program(*data: Any) -> Any:
        # Zeros where a loss does not depend on a variable.
        return compiled(*[[v.value for v in part] for part in parts], *data)

    return program


def _gradients_of(model: Any) -> Any:
    """Return a function of the values of variables and of data, for JAX."""
    import jax

    trained, others = model.trainable_variables, model.non_trainable_variables

    def gradients(values: Any, other_values: Any, *data: Any) -> list[Any]:
        def losses(values: Any) -> Any:
            mapping = [
                *zip(trained, values, strict=True),
                *zip(others, other_values, strict=True),
            ]
            with keras.StatelessScope(state_mapping=mapping):
                return _losses(model, *data)

        targets, pull = jax.vjp(losses, values)
        found = []
        for i in range(len(targets)):
            seeds = [ops.zeros_like(target) for target in targets]
            seeds[i] = ops.ones_like(targets[i])
            found.append(pull(seeds)[0])
        return found

    return gradients


def _dense(gradient: Any) -> np.ndarray:
    """A gradient as an array; the rows of a table that a batch reads, summed."""
    dense = ops.convert_to_tensor(gradient)
    return np.asarray(ops.convert_to_numpy(dense), "float64")


def _cosines(gradients: list[list[np.ndarray | None]]) -> np.ndarray:
    t = len(gradients)
    products = np.zeros((t, t))
    for of_tasks in zip(*gradients, strict=True):
        used = [g is not None and bool(np.any(g)) for g in of_tasks]
        if sum(used) < 2:
            continue  # A tower, or the gate of one task.
        flat = [np.zeros(1) if g is None else g.ravel() for g in of_tasks]
        size = max(part.size for part in flat)
        rows = np.stack(
            [part if part.size == size else np.zeros(size) for part in flat]
        )
        products += rows @ rows.T
    lengths = np.sqrt(np.diag(products))
    lengths = np.where(lengths > 0, lengths, np.nan)
    return products / lengths[:, None] / lengths[None, :]
