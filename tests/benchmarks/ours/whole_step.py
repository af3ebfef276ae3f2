"""A model with `MoE` or a dense MLP, trained as `fit` does."""

from __future__ import annotations

import keras
import numpy as np

from keras_moe import optimizers
from keras_moe.layers import MoE
from tests.benchmarks import keras_steps
from tests.benchmarks.workload import Workload

FEATURES, HIDDEN, TOP_K = 256, 512, 2
OPTIMIZERS = {"Adam": keras.optimizers.Adam, "FusedAdam": optimizers.FusedAdam}


def make(layer: str, rows: int, experts: int, optimizer: str) -> Workload:
    """Return a training step.

    Args:
        layer: "MoE", or "dense": the MLP of the same FLOPs.
        rows: rows of a batch.
        experts: number of experts.
        optimizer: a key of `OPTIMIZERS`.
    """
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, FEATURES)).astype("float32")
    y = rng.normal(size=(rows, 1)).astype("float32")
    inputs = keras.Input((FEATURES,))
    hidden = keras.layers.Dense(FEATURES, "relu")(inputs)
    if layer == "MoE":
        hidden = MoE(experts, (HIDDEN, FEATURES), TOP_K)(hidden)
    else:
        hidden = keras.layers.Dense(TOP_K * HIDDEN, "relu")(hidden)
        hidden = keras.layers.Dense(FEATURES)(hidden)
    model = keras.Model(inputs, keras.layers.Dense(1)(hidden))
    model.compile(OPTIMIZERS[optimizer](1e-3), "mse")
    return Workload(
        run=keras_steps.training(model, x, y),
        parameters=keras_steps.count_parameters(model),
        packages=("keras", "tensorflow"),
    )
