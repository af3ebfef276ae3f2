"""The models that are compared: one body each, one tower a task, and equal in size.

The paper's mixtures have 8 experts of one layer of 16 units, linear gates, towers of
one layer of 8 units, and ReLU (Ma et al. 2018, section 5.1). Its count of parameters
leaves out gates, biases and the last units of the towers; ours does not. So every other
model has the width that brings all it trains nearest to the paper's MMoE.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import numpy as np

from keras_moe import layers
from recsys_examples.task_correlation.data import TASKS
from recsys_examples.task_correlation.settings import BOTTOM, MMOE, OMOE, PLE

# By model, the body of a width: that of the shared layer, or of each expert.
BODIES: dict[str, Callable[[int], keras.layers.Layer]] = {
    BOTTOM: partial(layers.SharedBottom, tasks=TASKS),
    OMOE: partial(layers.OMoE, 8, tasks=TASKS),
    MMOE: partial(layers.MMoE, 8, tasks=TASKS),
    # Two levels of 2 shared experts and 2 for each task: the paper knows no PLE.
    PLE: partial(layers.PLE, 2, 2, 2, tasks=TASKS),
}
MMOE_WIDTH = 16
TOWER_UNITS = (8,)
_WIDEST = 1000


def build_model(model: str, width: int, dimension: int) -> keras.Model:
    """Return one of the models: (n, d) -> (n, 2), a column a task."""
    inputs = keras.Input((dimension,))
    shared: Any = BODIES[model](width)(inputs)
    outputs = [layers.Tower(TOWER_UNITS, name=f"{t}_tower")(shared[t]) for t in TASKS]
    return keras.Model(inputs, keras.layers.Concatenate()(outputs))


def parameters(model: str, width: int, dimension: int) -> int:
    """Return the number of trainable parameters."""
    return build_model(model, width, dimension).count_params()


def equal_widths(dimension: int) -> dict[str, int]:
    """Return the width of each model at which all train about as many parameters."""
    target = parameters(MMOE, MMOE_WIDTH, dimension)
    return {model: _nearest_width(model, target, dimension) for model in BODIES}


def _nearest_width(model: str, target: int, dimension: int) -> int:
    # With at most two layers of a width the count is a quadratic in it: three points.
    at = [1, 2, 3]
    quadratic = np.polyfit(at, [parameters(model, w, dimension) for w in at], 2)
    counts = np.polyval(quadratic, np.arange(1, _WIDEST))
    return 1 + int(np.argmin(np.abs(counts - target)))
