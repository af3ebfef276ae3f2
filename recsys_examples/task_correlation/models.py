"""The models that are compared, of equal size: a body and one tower per task.

The paper's mixtures have 8 experts of one layer of 16 units, linear gates, towers of
one layer of 8 units, and ReLU (Ma et al. 2018, section 5.1). Its parameter count leaves
out gates, biases and the output units of the towers; ours includes them. The widths of
the other models are chosen to match the parameter count of the paper's MMoE.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_moe import layers
from recsys_examples.task_correlation.data import TASKS
from recsys_examples.task_correlation.settings import BOTTOM, MMOE, OMOE, PLE

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
_MAX_WIDTH = 1000


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
    return {model: _nearest_width(model, target, dimension) for model in BODIES}


def _nearest_width(model: str, target: int, dimension: int) -> int:
    # The number of parameters is quadratic in the width: fitted to three points.
    points = [1, 2, 3]
    counts_at_points = [parameters(model, w, dimension) for w in points]
    quadratic = np.polyfit(points, counts_at_points, 2)
    counts = np.polyval(quadratic, np.arange(1, _MAX_WIDTH))
    return 1 + int(np.argmin(np.abs(counts - target)))
