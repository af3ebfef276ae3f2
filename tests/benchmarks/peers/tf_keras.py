"""A model with a large table, trained with the optimizers of tf_keras (Keras 2)."""

from __future__ import annotations

import tf_keras

from tests.benchmarks import keras_steps
from tests.benchmarks.table_work import BATCHES, HIDDEN, WIDTH, draw
from tests.benchmarks.workload import Workload

OPTIMIZERS = {
    "tf_keras Adam": tf_keras.optimizers.Adam,
    "tf_keras Adagrad": tf_keras.optimizers.Adagrad,
}


def make(optimizer: str, rows: int, columns: int = 20) -> Workload:
    """Return a training step.

    Args:
        optimizer: a key of `OPTIMIZERS`.
        rows: rows of the table.
        columns: columns of ids, which share the table.
    """
    tf_keras.utils.set_random_seed(0)
    ids, labels = draw(rows, columns)
    inputs = tf_keras.Input((columns,), dtype="int32")
    vectors = tf_keras.layers.Embedding(rows, WIDTH)(inputs)
    hidden = tf_keras.layers.Dense(HIDDEN, "relu")(tf_keras.layers.Flatten()(vectors))
    model = tf_keras.Model(inputs, tf_keras.layers.Dense(1)(hidden))
    model.compile(OPTIMIZERS[optimizer](1e-3, jit_compile=False), "mse")
    return Workload(
        run=keras_steps.training(model, ids, labels, BATCHES),
        parameters=keras_steps.count_parameters(model),
        packages=("tf_keras", "tensorflow"),
    )
