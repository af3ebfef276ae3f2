"""`MMoE` on the Census-Income rows."""

from __future__ import annotations

import keras

from keras_moe.layers import MMoE, Tower
from keras_moe.multitask import MultiTaskModel
from tests.benchmarks import keras_census
from tests.benchmarks.census_rows import TASKS, Sizes, load
from tests.benchmarks.workload import Workload


def make(path: str, epochs: int) -> Workload:
    """Return training and test.

    Args:
        path: file of `census_rows.prepare`.
        epochs: how often to train on all rows.
    """
    rows, sizes = load(path), Sizes()

    def build(seed: int) -> keras.Model:
        inputs = {name: keras.Input((), dtype="int32", name=name) for name in rows.ids}
        vectors = [
            keras.layers.Embedding(rows.ids[name], sizes.embedding)(column)
            for name, column in inputs.items()
        ]
        for name in rows.numbers:
            inputs[name] = keras.Input((1,), name=name)
            vectors.append(inputs[name])
        features = keras.layers.Concatenate()(vectors)
        shared = MMoE(sizes.experts, sizes.expert_units, TASKS)(features)
        towers = {
            task: Tower(sizes.tower_units, activation="sigmoid")(shared[task])
            for task in TASKS
        }
        model = MultiTaskModel(inputs, towers)
        model.compile(
            keras.optimizers.Adam(1e-3), dict.fromkeys(TASKS, "binary_crossentropy")
        )
        return model

    return keras_census.workload(build, rows, epochs, ("keras", "tensorflow"))
