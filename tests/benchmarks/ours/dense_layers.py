"""The dense MLP or GLU with the FLOPs of k experts: k times the width of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from tests.benchmarks import layer_steps
from tests.benchmarks.keras_steps import count_parameters
from tests.benchmarks.layer_work import LayerSizes, draw_rows, sizes_of
from tests.benchmarks.workload import Workload, repeated


def make(
    kind: str,
    sizes: Mapping[str, int],
    routing: str = "uniform",
    step: str = "training",
    compiler: str = "graph",
) -> Workload:
    """Return a step of the layer.

    Args:
        kind: "MLP" or "GLU".
        sizes: arguments of `LayerSizes`.
        routing: decides the inputs, which are those of the sparse layers.
        step: "training" or "forward".
        compiler: "graph" or "XLA".
    """
    keras.utils.set_random_seed(0)
    work = sizes_of(sizes)
    x, _ = draw_rows(work, routing)
    layer = _layer(kind, work)
    return Workload(
        run=repeated(layer_steps.compiled(layer, x, step, compiler)),
        parameters=count_parameters(layer),
        packages=("keras", keras.backend.backend()),
        facts={"flops": work.flops(kind)},
    )


def _layer(kind: str, work: LayerSizes) -> Any:
    h, d = work.top_k * work.hidden, work.features
    inputs = keras.Input((d,))
    if kind == "GLU":
        gate = keras.layers.Dense(h, "silu", use_bias=False)(inputs)
        hidden = gate * keras.layers.Dense(h, use_bias=False)(inputs)
        outputs = keras.layers.Dense(d, use_bias=False)(hidden)
    else:
        outputs = keras.layers.Dense(d)(keras.layers.Dense(h, "relu")(inputs))
    return keras.Model(inputs, outputs)
