"""The sparse block of Mixtral in KerasHub: top k of GLU experts."""

from __future__ import annotations

from collections.abc import Mapping

import keras
import numpy as np
from keras_hub.src.models.mixtral.mixtral_decoder import MixtralSparseMoeBlock

from tests.benchmarks import layer_steps
from tests.benchmarks.keras_steps import count_parameters
from tests.benchmarks.layer_work import draw_experts, draw_rows, facts, sizes_of
from tests.benchmarks.workload import Workload, repeated

# Softmax over all experts, then the k largest, rescaled to a sum of 1; as in ours.
NOTE = "computes every expert on every row"


def make(
    sizes: Mapping[str, int],
    routing: str = "uniform",
    step: str = "training",
    compiler: str = "graph",
) -> Workload:
    """Return a step of the block, with a load-balancing loss as ours (weight 0.01).

    Args:
        sizes: arguments of `LayerSizes`.
        routing: one of `layer_work.ROUTINGS`.
        step: "training" or "forward".
        compiler: "graph" or "XLA".
    """
    work = sizes_of(sizes)
    rows, router_kernel = draw_rows(work, routing)
    x = rows[None]  # A batch of one sequence; the block flattens it.
    block = MixtralSparseMoeBlock(
        hidden_dim=work.features,
        intermediate_dim=work.hidden,
        num_experts=work.experts,
        top_k=work.top_k,
        router_aux_loss_coef=0.01,
    )
    block.build(x.shape)
    kernels, bank = draw_experts(work, "GLU"), block.expert_bank
    block._sparse_feedforward_gate_dense.kernel.assign(router_kernel)
    bank._expert_feedforward_gate_dense.assign(kernels["gate"])
    bank._expert_feedforward_intermediate_dense.assign(kernels["up"])
    bank._expert_feedforward_output_dense.assign(kernels["down"])
    return Workload(
        run=repeated(layer_steps.compiled(block, x, step, compiler)),
        parameters=count_parameters(block),
        packages=("keras-hub", "keras", "tensorflow"),
        facts=facts(work, "GLU", _some_outputs(block, x), NOTE),
    )


def _some_outputs(block: MixtralSparseMoeBlock, x: np.ndarray) -> np.ndarray:
    """Return the outputs in parts, since all rows may not fit in memory."""
    rows = np.split(x, range(512, x.shape[1], 512), axis=1)
    return np.concatenate(
        [keras.ops.convert_to_numpy(block(part)[0]) for part in rows], axis=1
    )
