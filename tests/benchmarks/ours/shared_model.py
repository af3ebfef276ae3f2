"""`MMoE` on columns of ids and a history of ids, with any number of tasks."""

from __future__ import annotations

import keras
import numpy as np

from keras_moe import optimizers
from keras_moe.layers import MMoE, Tower
from keras_moe.multitask import MultiTaskModel
from tests.benchmarks import keras_steps
from tests.benchmarks.workload import Workload

BATCH, IDS, WIDTH = 2048, 10_000, 16
EXPERTS, EXPERT_UNITS, TOWER_UNITS = 8, (128, 64), (32,)


def make(features: int = 16, tasks: int = 2, history: int = 16) -> Workload:
    """Return a training step with `LazyAdam`.

    Args:
        features: columns of ids, each with its table.
        tasks: number of binary tasks.
        history: ids in the history of each row, whose vectors are averaged.
    """
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = {f"id_{i}": rng.integers(0, IDS, (BATCH, 1)) for i in range(features)}
    x["history"] = rng.integers(0, IDS, (BATCH, history))
    names = [f"task_{i}" for i in range(tasks)]
    y = {name: (rng.random((BATCH, 1)) < 0.2).astype("float32") for name in names}

    inputs, vectors = {}, []
    for name, ids in x.items():
        inputs[name] = keras.Input(ids.shape[1:], dtype="int32", name=name)
        embedded = keras.layers.Embedding(IDS, WIDTH)(inputs[name])
        vectors.append(keras.layers.GlobalAveragePooling1D()(embedded))
    shared = MMoE(EXPERTS, EXPERT_UNITS, names)(keras.layers.Concatenate()(vectors))
    outputs = {
        name: Tower(TOWER_UNITS, activation="sigmoid")(shared[name]) for name in names
    }
    model = MultiTaskModel(inputs, outputs)
    losses = dict.fromkeys(names, "binary_crossentropy")
    model.compile(optimizers.LazyAdam(1e-3), losses)
    return Workload(
        run=keras_steps.training(model, x, y),
        parameters=keras_steps.count_parameters(model),
        packages=("keras", "tensorflow"),
    )
