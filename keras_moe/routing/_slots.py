"""Where rows go: the choices sorted by expert, and slots of a fixed number.

Axis letters: n tokens, e experts, k choices a token, c capacity (slots an expert),
m = n * k choices of all tokens, of which choice i * k + j is the j-th of token i.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from keras import ops

from keras_moe import _checks
from keras_moe.routing._records import Routing, Runs, Slots, checked_record, tensor


def expert_capacity(
    num_tokens: Any, num_experts: int, top_k: int, capacity_factor: float
) -> Any:
    """Return the slots an expert has: `ceil(capacity_factor * k * n / e)`.

    Never more than n, since a token takes one slot of an expert, and at least 1.

    Args:
        num_tokens: int, n (or a scalar tensor where only the run knows it).
        num_experts: int, e.
        top_k: int from 1 to e, k.
        capacity_factor: float > 0.

    Returns:
        An int, or an int32 scalar if `num_tokens` is a tensor.

    Raises:
        ValueError: if an argument breaks its rule.

    Example:

    >>> from keras_moe.routing import expert_capacity
    >>> expert_capacity(num_tokens=10, num_experts=4, top_k=2, capacity_factor=1.0)
    5
    """
    num_tokens = _checks.scalar("num_tokens", num_tokens, allow_zero=True)
    _checks.positive_int("num_experts", num_experts)
    _checks.top_k(top_k, num_experts)
    _checks.positive_number("capacity_factor", capacity_factor)
    # In fractions, because 1.1 * 100 / 10 is above 11 in floats.
    share = Fraction(capacity_factor).limit_denominator(10**4) * top_k / num_experts
    if isinstance(num_tokens, int):
        slots = -(-share.numerator * num_tokens // share.denominator)
        return max(1, min(slots, num_tokens))
    # LiteRT divides int32 alone, which is enough unless the share is a long fraction;
    # and only what is positive rounds alike in all formats of export.
    short = share.numerator * share.denominator < 2**31
    n = ops.cast(num_tokens, "int32" if short else "int64")
    whole, rest = n // share.denominator, n % share.denominator
    part = (share.numerator * rest + share.denominator - 1) // share.denominator
    slots = share.numerator * whole + part
    return ops.cast(ops.maximum(ops.minimum(slots, n), 1), "int32")


def sort_choices(routing: Routing, num_experts: int, queue: Any = None) -> Runs:
    """Sort the choices by expert; among those of an expert the order is `queue`'s.

    Args:
        routing: the record.
        num_experts: int, e.
        queue: `(m,)` int32, the choices in the order in which they are served. By
            default token by token.

    Raises:
        ValueError: if `routing` is no `Routing`, does not agree with itself or with
            `num_experts`, or if `queue` has another shape or no integers.
    """
    routing = checked_record(routing, num_experts, kinds=(Routing,))
    if queue is not None:
        _check_queue(queue, routing)
    indices = routing.expert_indices
    if routing.mask is not None:
        indices = ops.where(ops.expand_dims(routing.mask, -1), indices, num_experts)
    choices = ops.cast(ops.reshape(indices, (-1,)), "int32")
    if queue is not None:
        choices = ops.take(choices, queue)
    order = ops.cast(ops.argsort(choices), "int32")
    # Counted, not searched for: other runtimes know no `searchsorted`.
    counts = ops.segment_sum(
        ops.ones_like(choices), choices, num_segments=num_experts + 1
    )
    ends = ops.cast(ops.cumsum(counts[:-1]), "int32")
    if queue is not None:
        order = ops.take(queue, order)
    m = ops.shape(order)[0]
    positions = ops.scatter(
        ops.expand_dims(order, -1), ops.arange(m, dtype="int32"), (m,)
    )
    k = routing.expert_indices.shape[1]
    return Runs(order, ops.reshape(positions, (-1, k)), shifted(ends), ends)


def _check_queue(queue: Any, routing: Routing) -> None:
    sizes = tuple(routing.expert_indices.shape)
    m = sizes[0] * sizes[1] if all(isinstance(size, int) for size in sizes) else None
    _checks.axes(**{"n * k": (m, "=m"), "queue": (queue, "m")})
    _checks.integers(queue=queue)


def shifted(ends: Any) -> Any:
    """Return where runs start from where they end, (e,): the ends of those before.

    Args:
        ends: `(e,)` int32.

    Raises:
        ValueError: if `ends` has another rank, or no integers.
    """
    _checks.axes(ends=(ends, "e"))
    _checks.integers(ends=ends)
    ends = tensor(ends)
    return ops.concatenate([ops.zeros((1,), "int32"), ends[:-1]])


def capacity_slots(
    routing: Routing, num_experts: int, expert_capacity: Any, priority: str = "position"
) -> Slots:
    """Give every expert c slots and fill them; what finds its expert full is dropped.

    Args:
        routing: the record.
        num_experts: int, e.
        expert_capacity: int, c (or a tensor where only the run knows it).
        priority: who comes first: "position" (all first choices before all second
            ones, then the order of the tokens) or "probability" (the highest combine
            weight; ties in the order of the tokens).

    Raises:
        ValueError: if `routing` is no `Routing`, does not agree with itself or with
            `num_experts`, has no combine weights for the priority "probability", or if
            another argument breaks its rule.
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
        # A sort may do anything to a NaN; here it comes last and pushes nobody out.
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


def tokens_in_rows(runs: Runs, rows: Any, filled: Any, n: Any, k: int) -> Any:
    """Return the token in every one of `rows`, of any shape; n where not `filled`.

    Args:
        runs: the sorted choices.
        rows: `(...)` int32, rows of the choices.
        filled: `(...)` bool, False where there is no token.
        n: int, number of tokens (or a tensor where only the run knows it).
        k: int, choices a token.

    Raises:
        ValueError: if the shapes do not agree, or if an argument breaks its rule.
    """
    if not isinstance(runs, Runs):
        raise ValueError(
            "`runs` must be the Runs of `sort_choices`. Received: runs of type "
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
    order = ops.pad(runs.order, ((0, 1),))  # So that there is a row even of no tokens.
    choices = ops.take(order, ops.minimum(rows, n * k))
    return ops.where(filled, choices // k, n)
