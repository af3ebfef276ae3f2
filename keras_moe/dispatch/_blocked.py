"""Blocked dispatch: each expert's rows in blocks of static size, for XLA.

Axis letters: n tokens, d input features, u output units, e experts, k choices per
token, b rows per block, m = n * k rows.
"""

from __future__ import annotations

from typing import Any

from keras_moe import _backend
from keras_moe.dispatch._even import blocked_evenly
from keras_moe.dispatch._grouped_matmul import grouped_dense
from keras_moe.dispatch._share import Share
from keras_moe.dispatch._sorted import in_sorted_rows
from keras_moe.experts._protocol import GroupedExperts, Prologue
from keras_moe.routing import Routing, SortedChoices


def blocked(
    tokens: Any,
    routing: Routing,
    experts: GroupedExperts,
    training: bool | None = None,
    share: Share | None = None,
) -> Any:
    """Multiply the sorted rows in blocks of static size."""
    # TensorFlow 2.21 aborts where XLA compiles it for a sparse MMoE and any batch size.
    is_safe = isinstance(tokens.shape[0], int) or routing.combine_weights is not None
    if _backend.on_accelerator() and is_safe:
        return blocked_evenly(tokens, routing, experts, training, share)
    return blocked_in_turn(tokens, routing, experts, training, share)


def blocked_in_turn(
    tokens: Any,
    routing: Routing,
    experts: GroupedExperts,
    training: bool | None = None,
    share: Share | None = None,
    *,
    tpu_kernels: bool = False,
) -> Any:
    """Blocks in a loop with a data-dependent trip count (CPU).

    The last block of an expert may overlap the rows of the next expert, which
    overwrites them. This needs no padding between experts, only one block of padding
    after the last run. With `tpu_kernels`, programs for a TPU use its kernels in place
    of the loop.
    """
    n, k = tokens.shape[0], routing.expert_indices.shape[1]
    num_rows = n * k if isinstance(n, int) else None
    if share is not None:
        num_rows = share.rows
    sizes = block_sizes(num_rows, experts.num_experts)

    def compute(rows: Any, runs: SortedChoices) -> Any:
        def matmul(
            rows: Any, kernel: Any, bias: Any = None, prologue: Prologue | None = None
        ) -> Any:
            return grouped_dense(rows, kernel, bias, prologue, runs, sizes, tpu_kernels)

        return experts.on_rows(rows, matmul, training=training)

    return in_sorted_rows(
        compute, tokens, routing, experts.num_experts, sizes[-1], share
    )


def block_sizes(num_rows: int | None, num_experts: int) -> tuple[int, ...]:
    """Return the possible sizes of an expert's last block; the largest is a full block.

    A full block has one to two times the mean load, up to 256 rows: most experts then
    need one block. For larger loads it has up to half the mean load, at most 1024 rows,
    which gives fewer loop iterations. The last block is padded by less than an eighth
    of a full block.
    """
    whole = 16
    if not isinstance(num_rows, int):  # Unknown, or a symbol of JAX' export.
        return tuple(range(16, 129, 16))
    while whole < 256 and whole * num_experts <= num_rows:
        whole *= 2
    while whole < 1024 and 4 * whole * num_experts <= num_rows:
        whole *= 2
    return tuple(range(whole // 8, whole + 1, whole // 8))


def rows_multiplied(counts: Any, num_rows: int | None = None) -> int:
    """Return the number of rows that `blocked_in_turn` computes for `counts`.

    Args:
        counts: `(e,)` ints, the rows of each expert.
        num_rows: int, the rows that there is room for. Default: the sum of `counts`.

    >>> from keras_moe.dispatch import rows_multiplied
    >>> rows_multiplied([300, 0, 33])  # 128 + 128 + 48, nothing, and 48
    352
    """
    counts = [int(count) for count in counts]
    num_rows = sum(counts) if num_rows is None else num_rows
    step, *_, whole = block_sizes(num_rows, len(counts))
    return sum(count + -(count % whole) % step for count in counts)
