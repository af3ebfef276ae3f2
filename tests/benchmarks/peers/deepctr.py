"""DeepCTR's MMOE and PLE, on `tf.keras`, which is Keras 3 here.

The sizes are those of the other models, and `l2_reg_embedding` is 0 in place of 1e-5.
DeepCTR then still adds penalties of weight 0, which make the gradients of its tables
dense; `penalties=False` removes them. Its gates have no bias.
"""

from __future__ import annotations

from typing import Any

import keras
from deepctr.feature_column import DenseFeat, SparseFeat
from deepctr.models import MMOE, PLE

from tests.benchmarks import keras_steps
from tests.benchmarks.click_rows import TASKS, Sizes, draw
from tests.benchmarks.mixture_sizes import ple_sizes
from tests.benchmarks.workload import Workload


def make(model: str, experts: int, step: str, penalties: bool = True) -> Workload:
    """Return the training or serving step of a model.

    Args:
        model: "MMoE" or "PLE".
        experts: number of experts, for PLE of each level.
        step: "training" or "serving".
        penalties: whether to keep DeepCTR's penalties of weight 0.
    """
    keras.utils.set_random_seed(0)
    sizes = Sizes()
    x, labels = draw(sizes)
    built = build(model, experts, sizes)
    if not penalties:
        for variable in built.trainable_variables:
            variable.regularizer = None
        if built.losses:
            raise RuntimeError("DeepCTR's model has penalties that were not removed.")
    built.compile(keras.optimizers.Adam(1e-3), ["binary_crossentropy"] * len(TASKS))
    if step == "training":
        run = keras_steps.training(built, x, tuple(labels[t] for t in TASKS))
    else:
        run = keras_steps.serving(built, x)
    return Workload(
        run=run,
        parameters=keras_steps.count_parameters(built),
        packages=("deepctr", "keras", "tensorflow"),
    )


def build(model: str, experts: int, sizes: Sizes) -> keras.Model:
    """Return the model, not compiled."""
    columns = [
        SparseFeat(name, sizes.ids, embedding_dim=sizes.embedding)
        for name in sizes.id_names
    ]
    columns += [DenseFeat(name, 1) for name in sizes.number_names]
    return mixture(model, experts, columns, sizes.expert_units, sizes.tower_units)


def mixture(
    model: str,
    experts: int,
    columns: list[Any],
    expert_units: tuple[int, ...],
    tower_units: tuple[int, ...],
) -> keras.Model:
    """Return a model on any columns."""
    common = {
        "expert_dnn_hidden_units": expert_units,
        "tower_dnn_hidden_units": tower_units,
        "l2_reg_embedding": 0,
        "task_names": TASKS,
    }
    if model == "MMoE":
        return MMOE(columns, num_experts=experts, **common)
    numbers = ple_sizes(experts)
    return PLE(
        columns,
        num_levels=numbers["num_levels"],
        shared_expert_num=numbers["num_shared_experts"],
        specific_expert_num=numbers["num_task_experts"],
        **common,
    )
