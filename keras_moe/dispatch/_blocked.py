"""Blocked dispatch: each expert's rows in blocks of static size, for XLA.

Axis letters: n tokens, d input features, u output units, e experts, k choices per
token, b rows per block, m = n * k rows.
"""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_moe import _backend
from keras_moe import routing as routing_lib
from keras_moe.dispatch._grouped_matmul import grouped_dense
from keras_moe.dispatch._slots import in_slots
from keras_moe.dispatch._sorted import in_sorted_rows
from keras_moe.experts._protocol import GroupedExperts, Prologue, apply_prologue
from keras_moe.routing import Routing, Slots, SortedChoices


def blocked(
    tokens: Any, routing: Routing, experts: GroupedExperts, training: bool | None = None
) -> Any:
    """Multiply the sorted rows in blocks of static size."""
    if _backend.on_accelerator():
        return blocked_at_once(tokens, routing, experts, training)
    return blocked_in_turn(tokens, routing, experts, training)


def blocked_at_once(
    tokens: Any, routing: Routing, experts: GroupedExperts, training: bool | None = None
) -> Any:
    """All blocks in one batched matmul, each with its expert's kernel (GPU, TPU).

    A loop with a data-dependent trip count would synchronize GPU and host before every
    block. The cost is a copy of the expert's kernel for every block.
    """
    e, k = experts.num_experts, routing.expert_indices.shape[1]
    n = ops.shape(tokens)[0]
    b = _rows_per_block(n, k, e)
    runs = routing_lib.sort_choices(routing, e)
    of_block, slots = _block_slots(runs, b, n * k // b + e, n, k)

    def matmul(
        rows: Any, kernel: Any, bias: Any = None, prologue: Prologue | None = None
    ) -> Any:
        rows = ops.matmul(
            apply_prologue(prologue, rows), ops.take(kernel, of_block, axis=0)
        )
        if bias is None:
            return rows
        return rows + ops.expand_dims(ops.take(bias, of_block, axis=0), 1)

    return in_slots(
        lambda rows: experts.on_rows(rows, matmul, training=training),
        tokens,
        routing,
        slots,
    )


def _rows_per_block(n: Any, k: int, e: int) -> int:
    """Return b: at most a quarter of the mean load, in [8, 512].

    Padding then adds at most a quarter, unless the mean load is below 32 rows.
    """
    if not isinstance(n, int):
        return 32
    b = 8
    while b < 512 and 8 * b * e <= n * k:
        b *= 2
    return b


def _block_slots(
    runs: SortedChoices, b: int, blocks: Any, n: Any, k: int
) -> tuple[Any, Slots]:
    """Return the expert of each block, and the blocks as slots."""
    block_ends = ops.cumsum((runs.ends - runs.starts + (b - 1)) // b)
    block_ends = ops.cast(block_ends, "int32")
    # The offset that aligns an expert's first row with the start of a block.
    shifts = routing_lib.shifted(block_ends) * b - runs.starts
    block = ops.arange(blocks, dtype="int32")
    of_block = ops.cast(ops.searchsorted(block_ends, block, side="right"), "int32")
    of_block = ops.minimum(of_block, ops.shape(runs.ends)[0] - 1)
    rows = ops.expand_dims(block * b - ops.take(shifts, of_block), -1)
    rows = rows + ops.arange(b, dtype="int32")
    filled = rows < ops.expand_dims(ops.take(runs.ends, of_block), -1)
    of_choice = ops.searchsorted(
        runs.ends, ops.reshape(runs.positions, (-1,)), side="right"
    )
    shift_of_choice = ops.take(ops.pad(shifts, ((0, 1),)), of_choice)
    return of_block, Slots(
        tokens=routing_lib.tokens_in_rows(runs, rows, filled, n, k),
        slot_of_choice=runs.positions + ops.reshape(shift_of_choice, (-1, k)),
        kept=runs.positions < runs.ends[-1],
    )


def blocked_in_turn(
    tokens: Any, routing: Routing, experts: GroupedExperts, training: bool | None = None
) -> Any:
    """Blocks in a loop with a data-dependent trip count (CPU).

    The last block of an expert may overlap the rows of the next expert, which
    overwrites them. This needs no padding between experts, only one block of padding
    after the last run.
    """
    num_rows = None
    if tokens.shape[0] is not None:
        num_rows = tokens.shape[0] * routing.expert_indices.shape[1]
    sizes = block_sizes(num_rows, experts.num_experts)

    def compute(rows: Any, runs: SortedChoices) -> Any:
        def matmul(
            rows: Any, kernel: Any, bias: Any = None, prologue: Prologue | None = None
        ) -> Any:
            return grouped_dense(rows, kernel, bias, prologue, runs, sizes)

        return experts.on_rows(rows, matmul, training=training)

    return in_sorted_rows(compute, tokens, routing, experts.num_experts, sizes[-1])


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


def rows_multiplied(counts: Any) -> int:
    """Return the number of rows that `blocked_in_turn` computes for `counts`.

    Args:
        counts: `(e,)` ints, the rows of each expert.

    >>> from keras_moe.dispatch import rows_multiplied
    >>> rows_multiplied([300, 0, 33])  # 128 + 128 + 48, nothing, and 48
    352
    """
    counts = [int(count) for count in counts]
    step, *_, whole = block_sizes(sum(counts), len(counts))
    return sum(count + -(count % whole) % step for count in counts)
