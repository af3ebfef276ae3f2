"""One MLP a task, all computed together, with something between their layers.

Axis letters: n rows, d input features, t tasks, h hidden units, u output units.

`MLPExperts` holds the weights, one expert a task. A layer says what happens to the
activations of all tasks after each of its layers: `CrossStitch` mixes them across
tasks, `PPNet` scales them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from keras import ops

from keras_moe import _backend
from keras_moe.experts import MLPExperts
from keras_moe.experts._protocol import apply_prologue


def run_towers(
    towers: MLPExperts,
    inputs: Any,
    between: Callable[[int, Any], Any],
    training: bool | None = None,
) -> list[Any]:
    """Return one (..., u) a task from inputs (..., d) that all tasks share.

    `between(i, activations)` gives what goes on from layer i, of the shape `(t, n, h)`
    of the activations. Dropout comes before it.
    """
    steps = itertools.count()

    def matmul(rows: Any, kernel: Any, bias: Any = None, prologue: Any = None) -> Any:
        i = next(steps)
        if i == 0:
            rows = _shared_matmul(rows, kernel)
        else:
            rows = apply_prologue(prologue, rows)
            rows = ops.matmul(between(i - 1, rows), kernel)
        return rows if bias is None else rows + ops.expand_dims(bias, 1)

    leading = ops.shape(inputs)[:-1]
    rows = ops.reshape(inputs, (-1, inputs.shape[-1]))
    outputs = towers.on_rows(rows, matmul, training=training)
    outputs = between(len(towers.units) - 1, outputs)
    shape = (*_backend.restored_axes(leading), towers.units[-1])
    return [
        ops.reshape(output, shape)
        for output in ops.unstack(outputs, num=towers.num_experts)
    ]


def towers_config(towers: MLPExperts) -> dict[str, Any]:
    """Return the arguments of a layer that it has handed on to its towers."""
    config = towers.get_config()
    handed_on = (
        "units",
        "activation",
        "dropout",
        "kernel_initializer",
        "kernel_regularizer",
        "seed",
    )
    return {name: config[name] for name in handed_on}


def _shared_matmul(rows: Any, kernel: Any) -> Any:
    """(n, d), (t, d, h) -> (t, n, h): the tasks share the rows, so one matmul."""
    t, d, h = kernel.shape
    flat = ops.reshape(ops.transpose(kernel, (1, 0, 2)), (d, t * h))
    outputs = ops.reshape(ops.matmul(rows, flat), (-1, t, h))
    return ops.transpose(outputs, (1, 0, 2))
