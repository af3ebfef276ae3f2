"""Blocks of even size, one per expert, and a loop for the rows beyond them.

Axis letters: n tokens, d input features, u output units, e experts, k choices per
token, c slots per expert, b rows per turn of the loop, m = n * k rows, r runs.

c is a little above the mean load m / e, so e * c slots hold all rows. An expert's first
c rows are in its own slots. The rows beyond them, the overflow, fill the slots that
other experts leave empty, in the order of their experts. A batched matmul computes all
slots, where the overflow meets kernels that are not its own. A loop, whose number of
turns depends on the overflow, computes it again with its own kernel. There is no copy
of a kernel and no room for a worst case.
"""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_moe import routing as routing_lib
from keras_moe.dispatch._even_matmul import Overflow, even_dense
from keras_moe.dispatch._share import Share
from keras_moe.dispatch._slots import in_slots
from keras_moe.experts._protocol import GroupedExperts, Prologue
from keras_moe.routing import Routing, Slots, SortedChoices


def blocked_evenly(
    tokens: Any,
    routing: Routing,
    experts: GroupedExperts,
    training: bool | None = None,
    share: Share | None = None,
) -> Any:
    """One batched matmul of all experts, and a loop that rarely turns (GPU)."""
    e, k = experts.num_experts, routing.expert_indices.shape[1]
    n = ops.shape(tokens)[0]
    if share is None:
        b = rows_per_turn(n * k, e)
        runs, c = routing_lib.sort_choices(routing, e), slots_per_expert(n * k, e, b)
    else:  # As many slots as rows.
        b, c = rows_per_turn(share.rows, e), share.rows // e
        runs = share.first_runs()
    slots, overflow = even_slots(runs, c, b, n, k)

    def matmul(
        rows: Any, kernel: Any, bias: Any = None, prologue: Prologue | None = None
    ) -> Any:
        return even_dense(rows, kernel, bias, prologue, overflow, b)

    return in_slots(
        lambda rows: experts.on_rows(rows, matmul, training=training),
        tokens,
        routing,
        slots,
    )


def slots_per_expert(m: Any, e: int, b: int) -> Any:
    """Return c: an eighth and 8 rows above the mean load, and b rows in all.

    With uniform routing few experts overflow: the excess is two standard deviations
    of a load of 64, and three of a load of 512. Works for a symbolic m.
    """
    return 9 * m // (8 * e) + max(8, -(-b // e))


def rows_per_turn(m: Any, e: int) -> int:
    """Return b: a fraction of the mean load in [256, 1024], or of m in [32, 256].

    The time of a turn hardly depends on b below 256 rows.
    """
    b = 256
    while isinstance(m, int) and b < 1024 and 8 * b * e <= m:
        b *= 2
    while isinstance(m, int) and b > 32 and 32 * b > m:
        b //= 2
    return b


def even_slots(
    runs: SortedChoices, c: Any, b: int, n: Any, k: int
) -> tuple[Slots, Overflow]:
    """Return the slots of all choices (e, c), and where the overflow is."""
    e, loads = runs.ends.shape[0], runs.ends - runs.starts
    # Overflow rows and empty slots are each numbered in the order of the experts.
    overflow_ends = _ends(ops.maximum(loads - c, 0))
    room_ends = _ends(ops.maximum(c - loads, 0))
    overflow_starts = routing_lib.shifted(overflow_ends)
    # The slot of an overflow row is its number plus the shift of the slots' expert.
    experts = ops.arange(e, dtype="int32")
    shifts = experts * c + loads - routing_lib.shifted(room_ends)

    # The number of the overflow row of each slot; negative for the expert's own rows.
    slot = ops.expand_dims(ops.arange(c, dtype="int32"), 0)
    overflow = ops.expand_dims(experts * c - shifts, -1) + slot
    own = ops.minimum(loads, c)
    is_own = slot < ops.expand_dims(own, -1)
    first_overflow = runs.starts + c - overflow_starts
    rows = ops.where(
        is_own,
        ops.expand_dims(runs.starts, -1) + slot,
        overflow + ops.take(first_overflow, _at(overflow_ends, overflow)),
    )
    filled = ops.logical_or(is_own, overflow < overflow_ends[-1])

    kept = runs.positions < runs.ends[-1]
    expert = _at(runs.ends, runs.positions)
    rank = runs.positions - ops.take(runs.starts, expert)
    number = ops.take(overflow_starts, expert) + rank - c
    slot_of_choice = ops.where(
        rank < c, expert * c + rank, number + ops.take(shifts, _at(room_ends, number))
    )
    slots = Slots(
        tokens=routing_lib.tokens_in_rows(
            runs, ops.where(filled, rows, 0), filled, n, k
        ),
        slot_of_choice=slot_of_choice,
        kept=kept,
    )
    return slots, _overflow_runs(own, overflow_ends, room_ends, shifts, b)


def _overflow_runs(
    own: Any, overflow_ends: Any, room_ends: Any, shifts: Any, b: int
) -> Overflow:
    """Return the contiguous runs: rows of one expert in slots of one other."""
    ends = ops.sort(
        ops.concatenate([overflow_ends, ops.minimum(room_ends, overflow_ends[-1])])
    )
    starts = routing_lib.shifted(ends)
    shift = ops.take(shifts, _at(room_ends, starts))
    return Overflow(
        own=own,
        experts=_at(overflow_ends, starts),
        starts=starts + shift,
        ends=ends + shift,
        turns=_ends((ends - starts + (b - 1)) // b),
    )


def _ends(counts: Any) -> Any:
    return ops.cast(ops.cumsum(counts), "int32")


def _at(ends: Any, values: Any) -> Any:
    """Return the run (its index) that has each of `values`; the last for others."""
    # Not `searchsorted`, which is a loop on JAX.
    passed = ops.cast(ends <= ops.expand_dims(values, -1), "int32")
    found = ops.cast(ops.sum(passed, axis=-1), "int32")
    return ops.minimum(found, ends.shape[0] - 1)
