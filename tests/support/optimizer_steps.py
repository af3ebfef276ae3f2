"""Steps of an optimizer by the backend's compilers, without a model."""

import keras
import numpy as np
import pytest
from keras import ops

from tests.support import optimizer_oracles

# Exact in float32, to which Keras rounds the learning rate and the betas.
RATE, BETA_1, BETA_2, EPSILON = 2.0**-6, 0.875, 1 - 2.0**-7, 1e-7

on_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="sparse gradients, graphs and files"
)
# Keras takes powers in float32 on torch.
EXACT = {"rtol": 1e-9, "atol": 1e-12}
if keras.backend.backend() == "torch":
    EXACT = {"rtol": 1e-6, "atol": 1e-8}
# A table's gradient is sparse on TensorFlow, and dense on every backend.
FORMS = (
    ["sparse", "sparse graph", "sparse xla", "dense", "dense graph", "dense xla"]
    if keras.backend.backend() == "tensorflow"
    else ["dense"]
)


def variable(value, path="embedding/embeddings", dtype="float64"):
    """A weight with the path that a layer would give it."""
    scope, name = path.rsplit("/", 1)
    with keras.name_scope(scope):
        return keras.Variable(value, dtype=dtype, name=name)


def gradient(step, shape, form="dense", dtype="float64"):
    """The gradient of a step of a table (see `optimizer_oracles`)."""
    if "sparse" not in form:
        return ops.convert_to_tensor(optimizer_oracles.dense(step, shape).astype(dtype))
    import tensorflow as tf

    return tf.IndexedSlices(
        tf.constant(np.array([g for _, g in step], dtype)),
        tf.constant([row for row, _ in step]),
        tf.constant(shape),
    )


def train(optimizer, weights, steps, form="eager"):
    """Apply steps, each a list of one gradient for each weight."""
    optimizer.build(weights)

    def apply(gradients):
        optimizer.apply(gradients, weights)

    if "graph" in form or "xla" in form:
        import tensorflow as tf

        apply = tf.function(apply, jit_compile="xla" in form)
    for gradients in steps:
        apply(list(gradients))


def train_table(optimizer, table, steps, form):
    train(optimizer, [table], [[gradient(s, table.shape, form)] for s in steps], form)


def slots(optimizer):
    """The variables of an optimizer after its iteration and its learning rate."""
    return [np.asarray(ops.convert_to_numpy(v)) for v in optimizer.variables[2:]]


def array(weight):
    return np.asarray(ops.convert_to_numpy(weight))
