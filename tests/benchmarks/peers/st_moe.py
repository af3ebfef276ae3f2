"""`MoE` of st-moe-pytorch: top 2 of GLU experts, with one-hot einsums."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from st_moe_pytorch import MoE

from tests.benchmarks import torch_steps
from tests.benchmarks.layer_work import draw_experts, draw_rows, sizes_of
from tests.benchmarks.peers.groups import GROUP, grouped
from tests.benchmarks.workload import Workload

NOTE = (
    f"in groups of {GROUP:,} rows, drops choices above 1.25 times the mean; biases, "
    "GELU, router z-loss"
)


def make(
    sizes: Mapping[str, int], routing: str = "uniform", step: str = "training"
) -> Workload:
    """Return a step of the layer.

    Args:
        sizes: arguments of `LayerSizes`.
        routing: one of `layer_work.ROUTINGS`.
        step: "training" or "forward".
    """
    work = sizes_of(sizes)
    rows, router_kernel = draw_rows(work, routing)
    x = grouped(rows)
    # Its capacity factor counts rows, not choices; its hidden width is 2/3 of the
    # given one, and thresholds of 0 never skip the second expert.
    layer = MoE(
        dim=work.features,
        num_experts=work.experts,
        gating_top_n=work.top_k,
        expert_hidden_mult=1.5 * work.hidden / work.features,
        capacity_factor_train=1.25 * work.top_k,
        capacity_factor_eval=1.25 * work.top_k,
        threshold_train=0.0,
        threshold_eval=0.0,
    )
    kernels = draw_experts(work, "GLU")
    with torch.no_grad():
        layer.gate.to_gates.weight.copy_(torch.from_numpy(router_kernel.T))
        for i, expert in enumerate(layer.experts.experts):
            first, _, last = expert.net
            up, gate = (torch.from_numpy(kernels[name][i].T) for name in ("up", "gate"))
            first.weight.copy_(torch.cat([up, gate]))
            last.weight.copy_(torch.from_numpy(kernels["down"][i].T))
            first.bias.zero_()
            last.bias.zero_()

    def call(x: Any) -> tuple[Any, Any]:
        found = layer(x)
        return found.outputs, found.total_aux_loss

    return torch_steps.workload(
        layer,
        call,
        x,
        step,
        package="st-moe-pytorch",
        sizes=work,
        kind="GLU",
        note=NOTE,
    )
