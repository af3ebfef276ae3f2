"""DeepCTR's MMOE on the Census-Income rows, with the penalty that it has by default."""

from __future__ import annotations

import keras
from deepctr.feature_column import DenseFeat, SparseFeat
from deepctr.models import MMOE

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
    columns = [
        SparseFeat(name, count, embedding_dim=sizes.embedding)
        for name, count in rows.ids.items()
    ]
    columns += [DenseFeat(name, 1) for name in rows.numbers]

    def build(seed: int) -> keras.Model:
        model = MMOE(
            columns,
            num_experts=sizes.experts,
            expert_dnn_hidden_units=sizes.expert_units,
            tower_dnn_hidden_units=sizes.tower_units,
            task_names=TASKS,
            seed=seed,
        )
        losses = ["binary_crossentropy"] * len(TASKS)
        model.compile(keras.optimizers.Adam(1e-3), losses)
        return model

    packages = ("deepctr", "keras", "tensorflow")
    return keras_census.workload(build, rows, epochs, packages)
