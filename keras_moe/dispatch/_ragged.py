"""Ragged dispatch: a grouped matmul of sorted rows, in the form of the device (JAX).

Axis letters: n tokens, d input features, u output units, m = n * k rows.
"""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_moe.dispatch import _blocked, _tpu
from keras_moe.dispatch._grouped_matmul import grouped_dense
from keras_moe.dispatch._sorted import in_sorted_rows
from keras_moe.experts._protocol import GroupedExperts, Prologue
from keras_moe.routing import Routing, SortedChoices


def ragged(
    tokens: Any, routing: Routing, experts: GroupedExperts, training: bool | None = None
) -> Any:
    """Multiply the sorted rows by TPU kernels, or elsewhere in blocks, in turn.

    The device is that of the compilation, whatever the host is.
    """
    n, k = ops.shape(tokens)[0], routing.expert_indices.shape[1]
    num_rows = n * k if isinstance(n, int) else None
    sizes = _blocked.block_sizes(num_rows, experts.num_experts)
    padding = sizes[-1]
    if num_rows:
        tile = _tpu.rows_per_tile(num_rows + padding, experts.num_experts)
        padding += -(num_rows + padding) % tile

    def compute(rows: Any, runs: SortedChoices) -> Any:
        def matmul(
            rows: Any, kernel: Any, bias: Any = None, prologue: Prologue | None = None
        ) -> Any:
            return grouped_dense(
                rows, kernel, bias, prologue, runs, sizes, tpu_kernels=True
            )

        return experts.on_rows(rows, matmul, training=training)

    return in_sorted_rows(compute, tokens, routing, experts.num_experts, padding)
