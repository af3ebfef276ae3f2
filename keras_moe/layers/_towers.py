"""One MLP per task, computed together, with a transform after each layer.

Axis letters: n rows, d input features, t tasks, h hidden units, u output units.

`MLPExperts` holds the weights, one expert per task. The transform gets the activations
of all tasks: `CrossStitch` mixes them across tasks, `PPNet` scales them.
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
    transform: Callable[[int, Any], Any],
    training: bool | None = None,
) -> list[Any]:
    """Return one (..., u) per task from inputs (..., d) that all tasks share.

    `transform(i, activations)` maps the activations of layer i, after dropout, to the
    inputs of layer i + 1; both have the shape `(t, n, h)`.
    """
    steps = itertools.count()

    def matmul(rows: Any, kernel: Any, bias: Any = None, prologue: Any = None) -> Any:
        i = next(steps)
        if i > 0:
            rows = transform(i - 1, apply_prologue(prologue, rows))
        if towers.fast_in_turn:
            return _in_turn(rows, kernel, bias)
        rows = _shared_matmul(rows, kernel) if i == 0 else ops.matmul(rows, kernel)
        return rows if bias is None else rows + ops.expand_dims(bias, 1)

    leading = ops.shape(inputs)[:-1]
    rows = ops.reshape(inputs, (-1, inputs.shape[-1]))
    outputs = towers.on_rows(rows, matmul, training=training)
    outputs = transform(len(towers.units) - 1, outputs)
    shape = (*_backend.restored_axes(leading), towers.units[-1])
    return [
        ops.reshape(output, shape)
        for output in ops.unstack(outputs, num=towers.num_experts)
    ]


def _in_turn(rows: Any, kernel: Any, bias: Any) -> Any:
    """(n, d) or (t, n, d), (t, d, h) -> (t, n, h), one fused matmul per task."""
    t = kernel.shape[0]
    pieces = ops.unstack(rows, num=t) if len(rows.shape) == 3 else [rows] * t
    # Unstacked once: each gradient of `kernel[k]` would have the full size.
    kernels = ops.unstack(ops.convert_to_tensor(kernel), num=t)
    outputs = [ops.matmul(x, w) for x, w in zip(pieces, kernels, strict=True)]
    if bias is not None:
        biases = ops.unstack(ops.convert_to_tensor(bias), num=t)
        # `ops.add` lets TensorFlow fuse the bias into the matmul, `+` does not.
        outputs = [ops.add(y, b) for y, b in zip(outputs, biases, strict=True)]
    return ops.stack(outputs)


def _shared_matmul(rows: Any, kernel: Any) -> Any:
    """(n, d), (t, d, h) -> (t, n, h) in one matmul, as the tasks share the rows."""
    t, d, h = kernel.shape
    flat = ops.reshape(ops.transpose(kernel, (1, 0, 2)), (d, t * h))
    outputs = ops.reshape(ops.matmul(rows, flat), (-1, t, h))
    return ops.transpose(outputs, (1, 0, 2))
