"""Small models of declared tasks for several test files."""

import keras
import numpy as np
from keras import ops

from keras_moe.multitask import MultiTaskModel

# Tracing a step takes TensorFlow a second; most tests of labels need no graph.
EAGER = keras.backend.backend() == "tensorflow"


def model_of(tasks, weighting=None, optimizer=None, eager=EAGER, **kwargs):
    """A compiled model for features (n, 4): a shared layer, and a tower per task."""
    inputs = keras.Input((4,), name="x")
    hidden = keras.layers.Dense(
        3,
        "tanh",
        kernel_initializer=keras.initializers.GlorotUniform(seed=0),
        name="shared",
    )(inputs)
    outputs = {
        task.name: task.tower(
            (), kernel_initializer=keras.initializers.GlorotUniform(seed=i + 1)
        )(hidden)
        for i, task in enumerate(tasks)
    }
    model = MultiTaskModel(inputs, outputs, weighting, tasks=tasks, **kwargs)
    model.compile(optimizer or keras.optimizers.SGD(0.05), run_eagerly=eager)
    return model


def features(n=12, seed=0):
    return np.random.default_rng(seed).normal(size=(n, 4)).astype("float32")


def state_of(model):
    """The weights, and the states of random generators."""
    return [*model.trainable_variables, *model.non_trainable_variables]


def weights_of(model):
    return [np.array(ops.convert_to_numpy(v)) for v in state_of(model)]


def set_weights(model, values):
    for variable, value in zip(state_of(model), values, strict=True):
        variable.assign(value)


def assert_same_bits(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def assert_near(found, wanted, rtol=1e-5, atol=1e-6):
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)
