"""`MMoE` and `PLE` as in the quick start: an embedding a column, and towers."""

from __future__ import annotations

import keras

from keras_moe import optimizers
from keras_moe.layers import PLE, MMoE, Tower
from keras_moe.multitask import MultiTaskModel
from tests.benchmarks import keras_steps
from tests.benchmarks.click_rows import TASKS, Sizes, draw
from tests.benchmarks.mixture_sizes import ple_sizes
from tests.benchmarks.workload import Workload

OPTIMIZERS = {"Adam": keras.optimizers.Adam, "FusedAdam": optimizers.FusedAdam}


def make(
    model: str, experts: int, step: str, optimizer: str = "Adam", jit: bool = False
) -> Workload:
    """Return the training or serving step of a model.

    Args:
        model: "MMoE" or "PLE".
        experts: number of experts, for PLE of each level.
        step: "training" or "serving".
        optimizer: a key of `OPTIMIZERS`.
        jit: whether to compile with XLA.
    """
    keras.utils.set_random_seed(0)
    sizes = Sizes()
    x, y = draw(sizes)
    built = build(model, experts, sizes)
    built.compile(
        OPTIMIZERS[optimizer](1e-3),
        dict.fromkeys(TASKS, "binary_crossentropy"),
        jit_compile=jit,
    )
    if step == "training":
        run = keras_steps.training(built, x, y)
    else:
        run = keras_steps.serving(built, x)
    return Workload(
        run=run,
        parameters=keras_steps.count_parameters(built),
        packages=("keras", "tensorflow"),
    )


def build(model: str, experts: int, sizes: Sizes) -> MultiTaskModel:
    """Return the model, with one embedding for each column of ids."""
    inputs = {
        name: keras.Input((), dtype="int32", name=name) for name in sizes.id_names
    }
    vectors = [
        keras.layers.Embedding(sizes.ids, sizes.embedding)(column)
        for column in inputs.values()
    ]
    for name in sizes.number_names:
        inputs[name] = keras.Input((1,), name=name)
        vectors.append(inputs[name])
    features = keras.layers.Concatenate()(vectors)
    if model == "MMoE":
        layer = MMoE(experts, sizes.expert_units, TASKS)
    else:
        layer = PLE(**ple_sizes(experts), expert_units=sizes.expert_units, tasks=TASKS)
    shared = layer(features)
    towers = {
        task: Tower(sizes.tower_units, activation="sigmoid")(shared[task])
        for task in TASKS
    }
    return MultiTaskModel(inputs, towers)
