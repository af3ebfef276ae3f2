"""Every layer in one model, on two replicas and on one device.

Each replica gets one half of a batch. The oracle trains on one device: it
differentiates the halves one after the other and applies the mean of their gradients.
So losses that are not linear in the rows, capacities and normalizations are those of a
half.
"""

import keras
import numpy as np
import tensorflow as tf

from keras_moe.layers import MoE
from tests.support.layer_cases import CASES

HALF, STEPS = 8, 3
# Variants with the same state and the same collectives as another one.
LEFT_OUT = (
    "one-layer",
    "gate-inputs",
    "own-",
    "prior-inputs",
    "one-task",
    "linear",
    "plain",
    "without-task-experts",
    "task-inputs",
    "AdaTT-shared",
    "all-arguments",
)
NAMES = [case.name for case in CASES if not any(part in case.name for part in LEFT_OUT)]


def columns():
    rng = np.random.default_rng(5)
    shapes = ((6,), (3,), (5, 6))
    found = {
        shape: rng.normal(size=(2 * HALF, *shape)).astype("float32") for shape in shapes
    }
    return {**found, (): rng.integers(0, 3, 2 * HALF).astype("int32")}


def build() -> keras.Model:
    """Return a model of all cases, and of a MoE that adds losses after a sum."""
    keras.utils.set_random_seed(0)
    inputs = {
        shape: keras.Input(shape, dtype=value.dtype.name)
        for shape, value in columns().items()
    }
    outputs = []
    for case in CASES:
        if case.name not in NAMES:
            continue
        quiet = {key: 0.0 for key in case.kwargs if key.endswith("dropout")}
        layer = case.make(**{**case.kwargs, **quiet}, name=case.name)
        found = layer(*[inputs[shape] for shape in case.shapes])
        outputs += map(keras.layers.Flatten(), keras.tree.flatten(found))
    balanced = MoE(
        4,
        (8, 5),
        router="bias_balanced",
        load_balancing_loss_weight=1.0,
        routing_metrics=["load_cv"],
        name="balanced",
    )
    outputs.append(balanced(inputs[(6,)]))
    model = keras.Model(list(inputs.values()), keras.layers.Concatenate()(outputs))
    model.compile(keras.optimizers.SGD(2.0), "mse", metrics=["mae"])
    return model


def data(model):
    width = model.output_shape[-1]
    y = np.random.default_rng(6).normal(size=(2 * HALF, width)).astype("float32")
    return list(columns().values()), y


def mirrored(strategy) -> dict:
    with strategy.scope():
        model = build()
    x, y = data(model)
    fitted = model.fit(
        x, y, batch_size=2 * HALF, epochs=STEPS, shuffle=False, verbose=0
    )
    return {"history": fitted.history, **weights_of(model)}


def by_halves() -> dict:
    model = build()
    x, y = data(model)

    @tf.function
    def differentiate(x, y):
        with tf.GradientTape() as tape:
            outputs = model(x, training=True)
            loss = model.compute_loss(x, y, outputs, training=True)
        model.compute_metrics(x, y, outputs)
        return loss, tape.gradient(loss, model.trainable_variables)

    history = []
    # Averages that replicas move from one value; a router's state counts both halves.
    averages = [v for v in model.non_trainable_variables if "moving_" in v.path]
    for _ in range(STEPS):
        model.reset_metrics()
        before, found, moved = [v.numpy() for v in averages], [], []
        for rows in (slice(HALF), slice(HALF, None)):
            for variable, value in zip(averages, before, strict=True):
                variable.assign(value)
            found.append(differentiate([tf.constant(v[rows]) for v in x], y[rows]))
            moved.append([v.numpy() for v in averages])
        for variable, old, *new in zip(averages, before, *moved, strict=True):
            # Of a scenario, the mean over the halves that have rows of it.
            halves = np.maximum(np.sum([a != old for a in new], axis=0), 1)
            variable.assign(old + np.sum([a - old for a in new], axis=0) / halves)
        (first, gradients), (second, others) = found
        both = zip(gradients, others, strict=True)
        mean = [tf.add(a, b) / 2 for a, b in both]
        model.optimizer.apply_gradients(
            zip(mean, model.trainable_variables, strict=True)
        )
        logs = {k: float(v) for k, v in model.get_metrics_result().items()}
        history.append({**logs, "loss": float(first + second) / 2})
    series = {name: [logs[name] for logs in history] for name in history[0]}
    return {"history": series, **weights_of(model)}


def weights_of(model) -> dict:
    # Keras keeps the averages of the first replica for its own normalization.
    kept = [
        variable
        for variable in model.weights
        if not ("batch_normalization" in variable.path and "moving_" in variable.path)
    ]
    return {
        "paths": [variable.path for variable in kept],
        "weights": [variable.numpy().tolist() for variable in kept],
    }
