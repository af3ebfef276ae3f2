"""The sparse block of Mixtral in transformers, with each of its implementations.

"deepgemm" and "sonicmoe" are kernels for GPUs and are not measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from tests.benchmarks import torch_steps
from tests.benchmarks.layer_work import draw_experts, draw_rows, sizes_of
from tests.benchmarks.workload import Workload

# Softmax over all experts, then the k largest, rescaled to a sum of 1; as in ours.
NOTE = "without load-balancing loss, which its language model adds"
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def make(
    sizes: Mapping[str, int],
    implementation: str,
    routing: str = "uniform",
    step: str = "training",
) -> Workload:
    """Return a step of the block.

    Args:
        sizes: arguments of `LayerSizes`.
        implementation: one of `IMPLEMENTATIONS`.
        routing: one of `layer_work.ROUTINGS`.
        step: "training" or "forward".
    """
    work = sizes_of(sizes)
    rows, router_kernel = draw_rows(work, routing)
    x = rows[None]
    config = MixtralConfig(
        hidden_size=work.features,
        intermediate_size=work.hidden,
        num_local_experts=work.experts,
        num_experts_per_tok=work.top_k,
    )
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config)
    kernels = draw_experts(work, "GLU")
    with torch.no_grad():
        block.gate.weight.copy_(torch.from_numpy(router_kernel.T))
        gate_and_up = [_transposed(kernels[name]) for name in ("gate", "up")]
        block.experts.gate_up_proj.copy_(torch.cat(gate_and_up, 1))
        block.experts.down_proj.copy_(_transposed(kernels["down"]))

    def call(x: Any) -> tuple[Any, float]:
        return block(x), 0.0

    return torch_steps.workload(
        block,
        call,
        x,
        step,
        package="transformers",
        sizes=work,
        kind="GLU",
        note=NOTE,
    )


def _transposed(kernels: Any) -> torch.Tensor:
    return torch.from_numpy(kernels).transpose(1, 2)
