"""A model with a large table, trained with Keras' optimizers or ours."""

from __future__ import annotations

import keras

from keras_moe import optimizers
from tests.benchmarks import keras_steps
from tests.benchmarks.table_work import BATCHES, HIDDEN, WIDTH, draw
from tests.benchmarks.workload import Workload

OPTIMIZERS = {
    "keras Adam": keras.optimizers.Adam,
    "keras Adagrad": keras.optimizers.Adagrad,
    "keras SGD": keras.optimizers.SGD,
    "FusedAdam": optimizers.FusedAdam,
    "FusedAdagrad": optimizers.FusedAdagrad,
    "LazyAdam": optimizers.LazyAdam,
    "RowwiseAdagrad": optimizers.RowwiseAdagrad,
}


def make(optimizer: str, rows: int, columns: int = 20, jit: bool = False) -> Workload:
    """Return a training step.

    Args:
        optimizer: a key of `OPTIMIZERS`.
        rows: rows of the table.
        columns: columns of ids, which share the table.
        jit: whether to compile with XLA.
    """
    keras.utils.set_random_seed(0)
    ids, labels = draw(rows, columns)
    inputs = keras.Input((columns,), dtype="int32")
    vectors = keras.layers.Embedding(rows, WIDTH)(inputs)
    hidden = keras.layers.Dense(HIDDEN, "relu")(keras.layers.Flatten()(vectors))
    model = keras.Model(inputs, keras.layers.Dense(1)(hidden))
    model.compile(OPTIMIZERS[optimizer](1e-3), "mse", jit_compile=jit)
    return Workload(
        run=keras_steps.training(model, ids, labels, BATCHES),
        parameters=keras_steps.count_parameters(model),
        packages=("keras", "tensorflow"),
    )
