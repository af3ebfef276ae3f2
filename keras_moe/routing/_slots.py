"""Rows of choices: sorted by expert, or in a fixed number of slots per expert.

Axis letters: n tokens, e experts, k choices per token, c capacity (slots per expert),
m = n * k choices of all tokens; choice i * k + j is the j-th of token i.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import keras
from keras import ops

from keras_moe import _backend, _checks
from keras_moe.routing._choices import sums_by_expert
from keras_moe.routing._records import (
    Routing,
    Slots,
    SortedChoices,
    checked_record,
    tensor,
)


def expert_capacity(
    num_tokens: Any, num_experts: int, top_k: int, capacity_factor: float
) -> Any:
    """Return the number of slots per expert: `ceil(capacity_factor * k * n / e)`.

    At most n, because a token uses at most one slot of an expert, and at least 1.

    Args:
        num_tokens: int, n (or a scalar tensor if n is data-dependent).
        num_experts: int, e.
        top_k: int from 1 to e, k.
        capacity_factor: float > 0.

    Returns:
        An int, or an int32 scalar if `num_tokens` is a tensor.

    Raises:
        ValueError: if an argument is invalid.

    Example:

    >>> from keras_moe.routing import expert_capacity
    >>> expert_capacity(num_tokens=10, num_experts=4, top_k=2, capacity_factor=1.0)
    5
    """
    num_tokens = _checks.scalar("num_tokens", num_tokens, allow_zero=True)
    _checks.positive_int("num_experts", num_experts)
    _checks.top_k(top_k, num_experts)
    capacity_factor = _checks.positive_number("capacity_factor", capacity_factor)
    # Exact fractions: in floats 1.1 * 100 / 10 exceeds 11.
    share = Fraction(capacity_factor).limit_denominator(10**4) * top_k / num_experts
    if isinstance(num_tokens, int):
        slots = -(-share.numerator * num_tokens // share.denominator)
        return max(1, min(slots, num_tokens))
    # LiteRT supports only int32 division, which suffices unless the fraction is long.
    # All operands are positive: export formats round negative quotients differently.
    short = share.numerator * share.denominator < 2**31
    n = ops.cast(num_tokens, "int32" if short else "int64")
    whole, rest = n // share.denominator, n % share.denominator
    part = (share.numerator * rest + share.denominator - 1) // share.denominator
    slots = share.numerator * whole + part
    return ops.cast(ops.maximum(ops.minimum(slots, n), 1), "int32")


def sort_choices(
    routing: Routing, num_experts: int, queue: Any = None
) -> SortedChoices:
    """Sort the choices by expert, and within an expert in the order of `queue`.

    Args:
        routing: the record.
        num_experts: int, e.
        queue: `(m,)` int32, the choices by priority. By default in token order.

    Raises:
        ValueError: if `routing` is not a `Routing`, its shapes are inconsistent or do
            not match `num_experts`, or `queue` has the wrong shape or dtype.
    """
    routing = checked_record(routing, num_experts, kinds=(Routing,))
    if queue is not None:
        _check_queue(queue, routing)
    indices = routing.expert_indices
    if routing.mask is not None:
        indices = ops.where(ops.expand_dims(routing.mask, -1), indices, num_experts)
    # int64 stays: TensorFlow has int32 operations of a GPU on its host, without XLA.
    is_long = keras.backend.standardize_dtype(indices.dtype) == "int64"
    dtype = "int64" if is_long and not _backend.under_xla() else "int32"
    choices = ops.reshape(ops.cast(indices, dtype), (-1,))
    if queue is not None:
        choices = ops.take(choices, queue)
    order = ops.cast(ops.argsort(choices), dtype)
    ones = ops.ones_like(choices, dtype="int32")
    counts = ops.cast(sums_by_expert(ones, choices, num_experts + 1), dtype)
    ends = ops.cast(ops.cumsum(counts[:-1]), dtype)
    if queue is not None:
        order = ops.take(queue, order)
    # On a TPU a scatter writes one number after the other.
    positions = _backend.on_tpu_or(_sorted_positions, _scattered_positions, order)
    k = routing.expert_indices.shape[1]
    return SortedChoices(order, ops.reshape(positions, (-1, k)), shifted(ends), ends)


def _scattered_positions(order: Any) -> Any:
    """Return the inverse of the permutation `order`, (m,)."""
    m = ops.shape(order)[0]
    return ops.scatter(
        ops.cast(ops.expand_dims(order, -1), "int32"),
        ops.cast(ops.arange(m, dtype="int32"), order.dtype),
        (m,),
    )


def _sorted_positions(order: Any) -> Any:
    return ops.cast(ops.argsort(order), order.dtype)


def _check_queue(queue: Any, routing: Routing) -> None:
    sizes = tuple(routing.expert_indices.shape)
    m = sizes[0] * sizes[1] if all(isinstance(size, int) for size in sizes) else None
    _checks.axes(**{"n * k": (m, "=m"), "queue": (queue, "m")})
    _checks.integers(queue=queue)


def shifted(ends: Any) -> Any:
    """Return the start of each run, (e,): the end of the previous run.

    Args:
        ends: `(e,)` int32.

    Raises:
        ValueError: if `ends` has another rank, or is not of integers.
    """
    _checks.axes(ends=(ends, "e"))
    _checks.integers(ends=ends)
    ends = tensor(ends)
    return ops.concatenate([ops.zeros((1,), ends.dtype), ends[:-1]])


def capacity_slots(
    routing: Routing, num_experts: int, expert_capacity: Any, priority: str = "position"
) -> Slots:
    """Assign choices to c slots per expert; choices over capacity are dropped.

    Args:
        routing: the record.
        num_experts: int, e.
        expert_capacity: int, c (or a tensor if c is data-dependent).
        priority: the order of assignment: "position" (all first choices before all
            second choices, then token order) or "probability" (highest combine weight
            first; ties in token order).

    Raises:
        ValueError: if `routing` is not a `Routing`, its shapes are inconsistent or do
            not match `num_experts`, it has no combine weights for the priority
            "probability", or another argument is invalid.
    """
    routing = checked_record(routing, num_experts, kinds=(Routing,))
    _checks.scalar("expert_capacity", expert_capacity)
    _checks.one_of("priority", priority, ("position", "probability"))
    if priority == "probability" and routing.combine_weights is None:
        raise ValueError(
            '`routing` must have combine weights for priority="probability". Received: '
            "routing.combine_weights=None"
        )
    n, k = ops.shape(routing.expert_indices)[0], routing.expert_indices.shape[1]
    if priority == "position":
        ids = ops.reshape(ops.arange(n * k, dtype="int32"), (-1, k))
        queue = ops.reshape(ops.transpose(ids), (-1,))
    else:
        weights = ops.stop_gradient(ops.reshape(routing.combine_weights, (-1,)))
        # The sort order of NaN varies; -inf puts it last, without taking slots.
        weights = ops.where(ops.isfinite(weights), weights, -float("inf"))
        queue = ops.cast(ops.argsort(-weights), "int32")
    runs = sort_choices(routing, num_experts, queue)
    c = expert_capacity
    rank = runs.positions - ops.take(runs.starts, routing.expert_indices)
    kept = rank < c
    if routing.mask is not None:
        kept = ops.logical_and(kept, ops.expand_dims(routing.mask, -1))
    rows = ops.expand_dims(runs.starts, -1) + ops.arange(c, dtype="int32")
    filled = rows < ops.expand_dims(runs.ends, -1)
    return Slots(
        tokens=tokens_in_rows(runs, rows, filled, n, k),
        slot_of_choice=ops.cast(routing.expert_indices, "int32") * c + rank,
        kept=kept,
    )


def tokens_in_rows(runs: SortedChoices, rows: Any, filled: Any, n: Any, k: int) -> Any:
    """Return the token in each of `rows`, of any shape; n where not `filled`.

    Args:
        runs: the sorted choices.
        rows: `(...)` int32, rows of the sorted choices.
        filled: `(...)` bool, False where there is no token.
        n: int, number of tokens (or a tensor if it is data-dependent).
        k: int, choices per token.

    Raises:
        ValueError: if the shapes are inconsistent, or an argument is invalid.
    """
    if not isinstance(runs, SortedChoices):
        raise ValueError(
            "`runs` must be SortedChoices (see `sort_choices`). Received: runs of type "
            f"{type(runs).__name__}"
        )
    n, k = _checks.scalar("n", n, allow_zero=True), _checks.positive_int("k", k)
    _checks.axes(
        n=(n, "=n"),
        k=(k, "=k"),
        **{"runs.order": (runs.order, "m"), "runs.positions": (runs.positions, "nk")},
    )
    _checks.axes(rows=(rows, "..."), filled=(filled, "..."))
    _checks.integers(rows=rows)
    rows, filled = tensor(rows), tensor(filled)
    order = ops.pad(runs.order, ((0, 1),))  # At least one row, even without tokens.
    choices = ops.take(order, ops.minimum(rows, n * k))
    return ops.where(filled, choices // k, n)
