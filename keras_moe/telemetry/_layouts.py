"""Gates over the experts of their task, as gates over all experts of a level.

Axis letters: n rows, g gates, e experts, m experts of one task, s shared experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops

from keras_moe.layers import PLE, HoME
from keras_moe.layers._mixture import spread


def on_all_experts(
    layer: Any, level: int, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights `(n, g, e)`, and bool `(g, e)`: the experts a gate can have.

    A gate of `PLE` or `HoME` weights the experts of its own task (or group) and the
    shared ones. All others weight every expert already.
    """
    g = weights.shape[1]
    if isinstance(layer, PLE):
        blocks = [(list(range(g)), g, layer.num_task_experts)]
    elif isinstance(layer, HoME):
        m, c = layer.num_task_experts, layer.num_groups
        blocks = [(list(range(g)), g, m)]
        if level == 1:
            blocks.append((layer.group_of_task, c, m))
    else:
        return weights, np.ones(weights.shape[1:], bool)
    parts: list[np.ndarray] = []
    readable: list[np.ndarray] = []
    start = 0
    for owners, num_blocks, m in blocks:
        own = weights[..., start : start + m]
        for rows, found in ((own, parts), (np.ones((1, g, m)), readable)):
            found.append(ops.convert_to_numpy(spread(rows, owners, num_blocks)))
        start += m
    parts.append(weights[..., start:])
    readable.append(np.ones((1, g, weights.shape[-1] - start)))
    return np.concatenate(parts, -1), np.concatenate(readable, -1)[0] > 0
