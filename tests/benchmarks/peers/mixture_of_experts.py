"""`MoE` of mixture-of-experts: top 2 of MLP experts, with one-hot einsums."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from mixture_of_experts import MoE

from tests.benchmarks import torch_steps
from tests.benchmarks.layer_work import draw_experts, draw_rows, sizes_of
from tests.benchmarks.peers.groups import GROUP, grouped
from tests.benchmarks.workload import Workload

NOTE = (
    f"in groups of {GROUP:,} rows, drops choices above 1.25 times the mean; no biases"
)


def make(
    sizes: Mapping[str, int], routing: str = "uniform", step: str = "training"
) -> Workload:
    """Return a step of the layer, which always takes the best 2.

    Args:
        sizes: arguments of `LayerSizes`.
        routing: one of `layer_work.ROUTINGS`.
        step: "training" or "forward".
    """
    work = sizes_of(sizes)
    rows, router_kernel = draw_rows(work, routing)
    x = grouped(rows)
    # Its capacity factor counts rows, not choices.
    layer = MoE(
        dim=work.features,
        num_experts=work.experts,
        hidden_dim=work.hidden,
        second_policy_train="all",
        second_policy_eval="all",
        capacity_factor_train=1.25 * 2,
        capacity_factor_eval=1.25 * 2,
    )
    kernels = draw_experts(work, "MLP")
    with torch.no_grad():
        layer.gate.w_gating.copy_(torch.from_numpy(router_kernel))
        layer.experts.w1.copy_(torch.from_numpy(kernels["up"]))
        layer.experts.w2.copy_(torch.from_numpy(kernels["down"]))

    return torch_steps.workload(
        layer,
        layer,
        x,
        step,
        package="mixture-of-experts",
        sizes=work,
        kind="MLP",
        note=NOTE,
    )
