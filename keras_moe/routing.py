"""Who goes where: the records that routers write and dispatches read.

Axis letters: n tokens, e experts, k choices a token, c capacity (slots an expert),
m = n * k choices of all tokens, of which choice i * k + j is the j-th of token i.

Three kinds of record cover every router. In `Routing` each token chooses k experts, in
`ExpertChoiceRouting` each expert chooses c tokens, in `DenseRouting` each token goes to
every expert with a weight. A record holds tensors only, so that it passes through
compilers and `keras.tree` as it is.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple

from keras import ops

from keras_moe import _backend


class Routing(NamedTuple):
    """Each token chooses k experts.

    Attributes:
        expert_indices: `(n, k)` int32 in [0, e), the first choice first. What stands in
            the row of a masked token has no meaning.
        combine_weights: `(n, k)` float, the weight of each choice in the output. None
            if outputs are wanted choice by choice; an index of e then is no expert's.
        router_logits: `(n, e)` float, or None for a router without logits.
        router_probs: `(n, e)` float in [0, 1], or None for a router without scores.
        mask: `(n,)` bool, False for padding, or None. Padding is not routed.
        choice_probs: `(n, e)` float, the probability that a token chooses an expert if
            the noise of the router is drawn anew, or None for a router without noise.
    """

    expert_indices: Any
    combine_weights: Any
    router_logits: Any = None
    router_probs: Any = None
    mask: Any = None
    choice_probs: Any = None


class ExpertChoiceRouting(NamedTuple):
    """Each expert chooses c tokens.

    Attributes:
        token_indices: `(e, c)` int32 in [0, n), the best token first; n where an expert
            has found fewer than c tokens.
        combine_weights: `(e, c)` float, 0 in the slots without a token.
        router_logits: `(n, e)` float.
        router_probs: `(n, e)` float.
        mask: `(n,)` bool, False for padding, or None.
        invalid: `(n,)` bool, True for tokens whose logits are not finite. They are not
            chosen by any expert, so that they cannot push others out, and their outputs
            are NaN.
    """

    token_indices: Any
    combine_weights: Any
    router_logits: Any = None
    router_probs: Any = None
    mask: Any = None
    invalid: Any = None


class DenseRouting(NamedTuple):
    """Each token goes to every expert.

    Attributes:
        combine_weights: `(n, e)` float.
        router_logits: `(n, e)` float.
        router_probs: `(n, e)` float.
        mask: `(n,)` bool, False for padding, or None.
    """

    combine_weights: Any
    router_logits: Any = None
    router_probs: Any = None
    mask: Any = None


class Runs(NamedTuple):
    """The m choices sorted by expert: a run of rows for each, one behind the other.

    Attributes:
        order: `(m,)` int32, the choice in every row.
        positions: `(n, k)` int32, the row of every choice.
        starts: `(e,)` int32, the first row of every expert.
        ends: `(e,)` int32, the row behind its last. The choices of padding tokens come
            behind the last run.
    """

    order: Any
    positions: Any
    starts: Any
    ends: Any


class Slots(NamedTuple):
    """Rows of static shape that take tokens: s groups of c slots.

    Attributes:
        tokens: `(s, c)` int32 in [0, n), the token in every slot; n in an empty one.
        slot_of_choice: `(n, k)` int32, the slot of every choice, counted through all
            groups. Where `kept` is False it has no meaning.
        kept: `(n, k)` bool, whether the choice has a slot.
    """

    tokens: Any
    slot_of_choice: Any
    kept: Any


def top_k(scores: Any, k: int) -> Any:
    """Return the indices `(n, k)` of the k largest of `scores` `(n, e)`, best first.

    Equal scores go to the lower index.
    """
    return _backend.top_k(scores, k)[1]


def choose(values: Any, indices: Any) -> Any:
    """Return `values[i, indices[i, j]]`: (n, e), (n, k) -> (n, k)."""
    return ops.take_along_axis(values, indices, axis=-1)


def rows_where(kept: Any, rows: Any) -> Any:
    """Return `rows` with zeros where not `kept`; unlike a product, also for NaN."""
    return ops.where(ops.expand_dims(kept, -1), rows, ops.zeros_like(rows))


def gates(
    routing: Routing | ExpertChoiceRouting | DenseRouting,
    num_experts: int,
    num_tokens: Any,
) -> Any:
    """Return the weight of every expert for every token, `(n, e)`, 0 if not chosen."""
    if isinstance(routing, DenseRouting):
        return routing.combine_weights
    weights = routing.combine_weights
    if isinstance(routing, ExpertChoiceRouting):
        # Slots without a token hold the index n, hence one row more.
        shape = (num_tokens + 1, num_experts)
        experts = ops.broadcast_to(
            ops.expand_dims(ops.arange(num_experts, dtype="int32"), -1),
            ops.shape(weights),
        )
        places = ops.stack([routing.token_indices, experts], axis=-1)
        flat = ops.reshape(places, (-1, 2))
        return ops.scatter(flat, ops.reshape(weights, (-1,)), shape)[:-1]
    total = 0.0
    for j in range(weights.shape[1]):  # One (n, e) at a time, never (n, k, e).
        chosen = ops.one_hot(
            routing.expert_indices[:, j], num_experts, dtype=weights.dtype
        )
        total = total + chosen * weights[:, j : j + 1]
    return total


def union(gates: Any, max_experts: int) -> tuple[Routing, Any]:
    """Let each token be computed once by every expert that one of its gates chose.

    Args:
        gates: `(n, t, e)`, the weights of t gates, 0 where an expert is not chosen.
        max_experts: int, the most experts that the t gates of a token can choose, k.

    Returns:
        A `Routing` without combine weights, whose choices are the experts of the
        token, and the weights `(n, t, k)` of the gates for them.
    """
    e = gates.shape[-1]
    # NaN counts as chosen, so that what is not a number gives no number.
    chosen = ops.any(gates != 0, axis=1)
    # The chosen ones in their order: the first scores e, the last 1, the others 0.
    scores = ops.where(chosen, e - ops.arange(e, dtype="int32"), 0)
    best = ops.cast(ops.top_k(ops.cast(scores, "float32"), max_experts)[0], "int32")
    indices = e - best
    padded = ops.pad(gates, ((0, 0), (0, 0), (0, 1)))  # Weight 0 for no expert.
    wanted = ops.broadcast_to(
        ops.expand_dims(indices, 1), (*ops.shape(gates)[:2], max_experts)
    )
    return Routing(indices, None), ops.take_along_axis(padded, wanted, axis=-1)


def expert_counts(
    indices: Any, num_experts: int, counted: Any = None, dtype: Any = "float32"
) -> Any:
    """Return how often each expert was chosen, (n, k) -> (e,).

    Args:
        indices: `(n, k)` int32.
        num_experts: int, e.
        counted: `(n,)` bool, the tokens that count. All by default.
        dtype: of the counts.
    """
    indices = ops.convert_to_tensor(indices)
    counts = ops.ones_like(indices, dtype=dtype)
    if counted is not None:
        counted = ops.expand_dims(counted, -1)
        counts = counts * ops.cast(counted, dtype)
        # What stands in the row of a masked token may be no expert at all.
        indices = ops.where(counted, indices, ops.zeros_like(indices))
    return ops.segment_sum(
        ops.reshape(counts, (-1,)),
        ops.reshape(indices, (-1,)),
        num_segments=num_experts,
    )


def expert_capacity(
    num_tokens: Any, num_experts: int, top_k: int, capacity_factor: float
) -> Any:
    """Return the slots an expert has: `ceil(capacity_factor * k * n / e)`.

    Never more than n, since a token takes one slot of an expert, and at least 1.
    `num_tokens` is an int, or a tensor where only the run knows it.

    >>> from keras_moe.routing import expert_capacity
    >>> expert_capacity(num_tokens=10, num_experts=4, top_k=2, capacity_factor=1.0)
    5
    """
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
    """
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


def shifted(ends: Any) -> Any:
    """Return where runs start from where they end, (e,): the ends of those before."""
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
    """
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
    """Return the token in every one of `rows`, of any shape; n where not `filled`."""
    order = ops.pad(runs.order, ((0, 1),))  # So that there is a row even of no tokens.
    choices = ops.take(order, ops.minimum(rows, n * k))
    return ops.where(filled, choices // k, n)
