"""The models that are compared, of equal size: a body and one tower per task.

The paper's mixtures have 8 experts of one layer of 16 units, linear gates, towers of
one layer of 8 units, and ReLU (Ma et al. 2018, section 5.1). Its parameter count leaves
out gates, biases and the output units of the towers; ours includes them. The widths of
the other models are chosen to match the parameter count of the paper's MMoE.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import keras

from keras_moe import layers
from recsys_examples.task_correlation.data import TASKS
from recsys_examples.task_correlation.settings import BOTTOM, MMOE, OMOE, PLE
from recsys_examples.widths import nearest_width

# Functions from the width, of the shared layer or of each expert, to the body.
BODIES: dict[str, Callable[[int], keras.layers.Layer]] = {
    BOTTOM: lambda width: layers.SharedBottom(width, TASKS),
    OMOE: lambda width: layers.OMoE(num_experts=8, expert_units=width, tasks=TASKS),
    MMOE: lambda width: layers.MMoE(num_experts=8, expert_units=width, tasks=TASKS),
    # Not in the paper, which is older than PLE.
    PLE: lambda width: layers.PLE(
        num_levels=2,
        num_shared_experts=2,
        num_task_experts=2,
        expert_units=width,
        tasks=TASKS,
    ),
}
MMOE_WIDTH = 16
TOWER_UNITS = (8,)


def build_model(model: str, width: int, dimension: int) -> keras.Model:
    """Return one of the models: (n, d) -> (n, 2), one column per task."""
    inputs = keras.Input((dimension,))
    shared: Any = BODIES[model](width)(inputs)
    outputs = [layers.Tower(TOWER_UNITS, name=f"{t}_tower")(shared[t]) for t in TASKS]
    return keras.Model(inputs, keras.layers.Concatenate()(outputs))


def parameters(model: str, width: int, dimension: int) -> int:
    """Return the number of trainable parameters."""
    return build_model(model, width, dimension).count_params()


def equal_widths(dimension: int) -> dict[str, int]:
    """Return the width of each model for about equal numbers of parameters."""
    target = parameters(MMOE, MMOE_WIDTH, dimension)
    return {
        model: nearest_width(partial(_counted, model, dimension), target)
        for model in BODIES
    }


def _counted(model: str, dimension: int, width: int) -> int:
    return parameters(model, width, dimension)
