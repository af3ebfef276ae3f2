"""`MoE` with MLP or GLU experts, its default load-balancing loss, and any dispatch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from keras_moe.experts import GLUExperts, MLPExperts
from keras_moe.layers import MoE
from tests.benchmarks import layer_steps
from tests.benchmarks.keras_steps import count_parameters
from tests.benchmarks.layer_work import draw_experts, draw_rows, facts, sizes_of
from tests.benchmarks.workload import Workload, repeated

NOTES = {"capacity": "drops choices above 1.25 times the mean"}


def make(
    kind: str,
    sizes: Mapping[str, int],
    routing: str = "uniform",
    step: str = "training",
    compiler: str = "graph",
    dispatch: str = "auto",
) -> Workload:
    """Return a step of the layer.

    Args:
        kind: "MLP" or "GLU".
        sizes: arguments of `LayerSizes`.
        routing: one of `layer_work.ROUTINGS`.
        step: "training" or "forward".
        compiler: "graph" or "XLA".
        dispatch: the argument of `MoE`.
    """
    work = sizes_of(sizes)
    x, router_kernel = draw_rows(work, routing)
    layer = MoE(experts=_experts(kind, work), top_k=work.top_k, dispatch=dispatch)
    layer.build(x.shape)
    layer.router.kernel.assign(router_kernel)
    _assign(layer.experts, draw_experts(work, kind))
    call = layer_steps.compiled(layer, x, step, compiler)
    outputs = layer_steps.compiled(layer, x, "forward", compiler)()
    values = keras.ops.convert_to_numpy(outputs)
    backend = keras.backend.backend()
    return Workload(
        run=repeated(call),
        parameters=count_parameters(layer),
        packages=("keras", backend),
        facts=facts(work, kind, values, NOTES.get(dispatch, "")),
    )


def _experts(kind: str, work: Any) -> Any:
    e, d, h = work.experts, work.features, work.hidden
    if kind == "GLU":
        return GLUExperts(num_experts=e, hidden_units=h)
    return MLPExperts(num_experts=e, units=(h, d))


def _assign(experts: Any, kernels: Mapping[str, Any]) -> None:
    if "gate" in kernels:
        experts.gate_kernel.assign(kernels["gate"])
        experts.up_kernel.assign(kernels["up"])
        experts.down_kernel.assign(kernels["down"])
        return
    experts.kernels[0].assign(kernels["up"])
    experts.kernels[1].assign(kernels["down"])
