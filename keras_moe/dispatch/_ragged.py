"""Ragged dispatch: JAX's grouped matmul (`jax.lax.ragged_dot`) on sorted rows.

Axis letters: n tokens, d input features, u output units, m = n * k rows.
"""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_moe import _backend
from keras_moe.dispatch._sorted import in_sorted_rows
from keras_moe.experts._protocol import GroupedExperts, Prologue, apply_prologue
from keras_moe.routing import Routing, SortedChoices


def ragged(
    tokens: Any, routing: Routing, experts: GroupedExperts, training: bool | None = None
) -> Any:
    """Multiply the sorted rows by `jax.lax.ragged_dot`."""

    def compute(rows: Any, runs: SortedChoices) -> Any:
        # Rows without an expert join the last group: `ragged_dot` needs one per row.
        ends = ops.concatenate([runs.ends[:-1], ops.shape(rows)[:1]])
        sizes = ends - runs.starts
        of_row = ops.searchsorted(
            ends, ops.arange(ops.shape(rows)[0], dtype="int32"), side="right"
        )

        def matmul(
            rows: Any, kernel: Any, bias: Any = None, prologue: Prologue | None = None
        ) -> Any:
            rows = apply_prologue(prologue, rows)
            rows = _backend.ragged_dot(rows, ops.convert_to_tensor(kernel), sizes)
            return rows if bias is None else rows + ops.take(bias, of_row, axis=0)

        return experts.on_rows(rows, matmul, training=training)

    return in_sorted_rows(compute, tokens, routing, experts.num_experts)
