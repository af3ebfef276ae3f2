"""Training steps with one gradient per task, or with the losses after the step.

Keras' own step differentiates one scalar. Here a step differentiates the losses of the
tasks and the rest (regularizers, auxiliary losses) separately, and the model combines
the gradients. One function per backend, each the step of Keras with that change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_moe import _backend


class LossParts(NamedTuple):
    """The losses of a batch.

    Attributes:
        losses: `(t,)`, those of the tasks, in the order of the outputs.
        mask: `(t,)` bool, the tasks that are defined in the batch; None for all.
        rest: a scalar, the sum of all other losses.
    """

    losses: Any
    mask: Any
    rest: Any


def _on_tensorflow(model: Any, data: Any) -> Any:
    import tensorflow as tf

    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    with tf.GradientTape(persistent=True) as tape:
        y_pred = model(x, training=True)
        total, parts = model.loss_and_parts(x, y, y_pred, sample_weight, True)
        scale = model.optimizer.scale_loss(ops.ones(()))
        targets = [target * scale for target in model.differentiated(total, parts)]
    replicas = _backend.num_replicas()
    model._loss_tracker.update_state(
        total * replicas, sample_weight=tf.shape(keras.tree.flatten(x)[0])[0]
    )
    variables = model.trainable_weights
    gradients = [tape.gradient(target, variables) for target in targets]
    del tape
    model.optimizer.apply_gradients(
        zip(model.combined(gradients, parts, scale), variables, strict=True)
    )
    if model.needs_new_losses:
        with keras.StatelessScope():  # Statistics are not updated twice.
            again = model(x, training=True)
            _, after = model.loss_and_parts(x, y, again, sample_weight, True)
            new_losses = after.losses
        model.loss_weighting.update(parts.losses, new_losses, mask=parts.mask)
    return model.compute_metrics(x, y, y_pred, sample_weight)


def _on_torch(model: Any, data: Any) -> Any:
    import torch

    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    y_pred = model(x, training=True)
    total, parts = model.loss_and_parts(x, y, y_pred, sample_weight, True)
    model._loss_tracker.update_state(
        total, sample_weight=keras.tree.flatten(x)[0].shape[0]
    )
    scale = model.optimizer.scale_loss(ops.ones(()))
    variables = list(model.trainable_weights)
    values = [variable.value for variable in variables]
    gradients = [
        torch.autograd.grad(
            target * scale, values, retain_graph=True, allow_unused=True
        )
        if getattr(target, "requires_grad", False)
        else [None] * len(values)
        for target in model.differentiated(total, parts)
    ]
    with torch.no_grad():
        combined = model.combined(gradients, parts, scale)
        model.optimizer.apply(combined, variables)
        if model.needs_new_losses:
            with keras.StatelessScope():
                again = model(x, training=True)
                _, after = model.loss_and_parts(x, y, again, sample_weight, True)
            model.loss_weighting.update(parts.losses, after.losses, mask=parts.mask)
    return model.compute_metrics(x, y, y_pred, sample_weight)


def _on_jax(model: Any, state: Any, data: Any) -> Any:
    import jax

    trainable, non_trainable, optimizer_variables, metrics_variables = state
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)

    def losses(trainable: Any, non_trainable: Any, metrics_variables: Any) -> Any:
        _, aux = model.compute_loss_and_updates(
            trainable,
            non_trainable,
            metrics_variables,
            x,
            y,
            sample_weight,
            training=True,
            optimizer_variables=optimizer_variables,
        )
        parts, model.last_parts = model.last_parts, None
        unscaled = aux[0]
        return model.differentiated(unscaled, parts), (aux, parts)

    targets, pull, (aux, parts) = jax.vjp(
        lambda values: losses(values, non_trainable, metrics_variables),
        trainable,
        has_aux=True,
    )
    unscaled, y_pred, non_trainable, metrics_variables = aux
    mapping = list(zip(model.optimizer.variables, optimizer_variables, strict=True))
    with keras.StatelessScope(state_mapping=mapping):
        scale = model.optimizer.scale_loss(ops.ones(()))
    gradients = []
    for i in range(len(targets)):
        # One at a time: the cotangent of one target, zeros for the others.
        seeds = [ops.zeros_like(target) for target in targets]
        seeds[i] = ops.cast(scale, targets[i].dtype)
        gradients.append(pull(seeds)[0])
    mapping = _pairs(model.non_trainable_variables, non_trainable)
    with keras.StatelessScope(state_mapping=mapping) as scope:
        combined = model.combined(gradients, parts, scale)
    non_trainable = _values(scope, model.non_trainable_variables, non_trainable)
    trainable, optimizer_variables = model.optimizer.stateless_apply(
        optimizer_variables, combined, trainable
    )
    if model.needs_new_losses:
        _, (_, after) = losses(trainable, non_trainable, metrics_variables)
        mapping = _pairs(model.non_trainable_variables, non_trainable)
        with keras.StatelessScope(state_mapping=mapping) as scope:
            model.loss_weighting.update(parts.losses, after.losses, mask=parts.mask)
        non_trainable = _values(scope, model.non_trainable_variables, non_trainable)
    logs, metrics_variables = model._update_metrics_variables(
        metrics_variables, unscaled, x, y, y_pred, sample_weight
    )
    return logs, (trainable, non_trainable, optimizer_variables, metrics_variables)


def _pairs(variables: Any, values: Any) -> list[tuple[Any, Any]]:
    return list(zip(variables, values, strict=True))


def _values(scope: Any, variables: Any, values: Any) -> list[Any]:
    """Return the values after the scope."""
    found = [scope.get_current_value(variable) for variable in variables]
    return [old if new is None else new for old, new in zip(values, found, strict=True)]


_STEPS: dict[str, Callable[..., Any]] = {
    "tensorflow": _on_tensorflow,
    "jax": _on_jax,
    "torch": _on_torch,
}


def train_step(model: Any, *args: Any) -> Any:
    """Run a training step of Keras' trainer on the current backend."""
    return _STEPS[_backend.name()](model, *args)
