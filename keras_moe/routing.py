"""Who goes where: the records that routers write and dispatches read.

Axis letters: n tokens, e experts, k choices a token, c capacity (slots an expert),
m = n * k choices of all tokens, of which choice i * k + j is the j-th of token i.

Three kinds of record cover every router. In `Routing` each token chooses k experts, in
`ExpertChoiceRouting` each expert chooses c tokens, in `DenseRouting` each token goes to
every expert with a weight. A record is a named tuple of tensors: it passes through
compilers and `keras.tree`, and a router can be an operation of a functional model.
"""

from __future__ import annotations

from collections import namedtuple
from fractions import Fraction
from functools import cache
from typing import Any, NamedTuple

from keras import KerasTensor, ops

from keras_moe import _backend, _checks


class Record:
    """A named tuple whose optional fields may be missing.

    A field that is None is no field of the tuple, because a functional model takes
    nothing but tensors as outputs of an operation. Its attribute is None all the same.

    Attributes:
        kind: `Routing`, `ExpertChoiceRouting` or `DenseRouting`.
    """

    __slots__ = ()
    kind: type[Record]
    _fields: tuple[str, ...]

    def __init_subclass__(cls) -> None:
        if "_fields" not in vars(cls) and not issubclass(cls, tuple):
            cls.kind = cls
            cls._fields = tuple(cls.__annotations__)

    def __new__(cls, *values: Any, **named: Any) -> Any:
        """Return a record of the fields that are not None."""
        fields = dict(zip(cls._fields, values, strict=False))
        unknown = [name for name in named if name not in cls._fields or name in fields]
        fields |= named
        missing = [n for n in cls._fields if n not in fields and not hasattr(cls, n)]
        if unknown or missing or len(values) > len(cls._fields):
            raise TypeError(
                f"{cls.__name__} takes {', '.join(cls._fields)}. Received "
                f"{len(values)} positional arguments and {sorted(named)}."
            )
        present = tuple(n for n in cls._fields if fields.get(n) is not None)
        kind = _record_type(cls, present)  # type: ignore[arg-type]
        return kind(*[fields[name] for name in present])

    def _replace(self, **changes: Any) -> Any:
        """Return the record with other values; None takes a field away."""
        fields = {name: getattr(self, name) for name in self.kind._fields}
        return self.kind(**{**fields, **changes})


@cache
def _record_type(kind: type[Record], present: tuple[str, ...]) -> Any:
    """Return the named tuple of the fields that are present, a subclass of `kind`."""
    # The tuple comes first, so that its fields hide the defaults in `kind`.
    bases = (namedtuple(kind.__name__, present), kind)
    missing = {name: None for name in kind._fields if name not in present}
    return type(
        kind.__name__,
        bases,
        {"__slots__": (), "_replace": Record._replace, **missing},
    )


class Routing(Record):
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
            the noise of the router is drawn anew (0 or 1 in inference), or None for a
            router that never has noise.
    """

    expert_indices: Any
    combine_weights: Any
    router_logits: Any = None
    router_probs: Any = None
    mask: Any = None
    choice_probs: Any = None


class ExpertChoiceRouting(Record):
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


class DenseRouting(Record):
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


_AXES: dict[type, dict[str, str]] = {
    Routing: {
        "expert_indices": "nk",
        "combine_weights": "nk?",
        "router_logits": "ne?",
        "router_probs": "ne?",
        "mask": "n?",
        "choice_probs": "ne?",
    },
    ExpertChoiceRouting: {
        "token_indices": "ec",
        "combine_weights": "ec",
        "router_logits": "ne?",
        "router_probs": "ne?",
        "mask": "n?",
        "invalid": "n?",
    },
    DenseRouting: {
        "combine_weights": "ne",
        "router_logits": "ne?",
        "router_probs": "ne?",
        "mask": "n?",
    },
}


def checked_record(
    routing: Any, num_experts: int, num_tokens: Any = None, *, kinds: Any = tuple(_AXES)
) -> Any:
    """Return the record with tensors as fields, if their shapes agree.

    Args:
        routing: a record of one of `kinds`.
        num_experts: int, e.
        num_tokens: int, n (or a tensor where only the run knows it). Not checked by
            default.
        kinds: tuple of classes. All three by default.

    Returns:
        A record of the same kind.

    Raises:
        ValueError: if `routing` is no such record, if a field has another shape than
            its class says, or indices are no integers.
    """
    if not isinstance(routing, kinds):
        raise ValueError(
            f"`routing` must be one of {[kind.__name__ for kind in kinds]} of "
            f"keras_moe.routing. Received: routing of type {type(routing).__name__}"
        )
    specs = next(specs for kind, specs in _AXES.items() if isinstance(routing, kind))
    sizes: dict[str, Any] = {
        "num_experts": (_checks.positive_int("num_experts", num_experts), "=e")
    }
    if num_tokens is not None:
        sizes["num_tokens"] = (_checks.scalar("num_tokens", num_tokens, True), "=n")
    fields = {
        f"routing.{name}": (getattr(routing, name), specs[name]) for name in specs
    }
    _checks.axes(**sizes, **fields)
    for name in ("expert_indices", "token_indices"):
        if name in specs:
            _checks.integers(**{f"routing.{name}": getattr(routing, name)})
    arrays = {
        name: ops.convert_to_tensor(getattr(routing, name))
        for name in specs
        if not _is_tensor(getattr(routing, name))
    }
    return routing._replace(**arrays) if arrays else routing


def _is_tensor(value: Any) -> bool:
    return value is None or ops.is_tensor(value) or isinstance(value, KerasTensor)


def _tensor(value: Any) -> Any:
    return value if _is_tensor(value) else ops.convert_to_tensor(value)


def top_k(scores: Any, k: int) -> Any:
    """Return the indices of the k largest of `scores`, best first.

    Equal scores go to the lower index.

    Args:
        scores: `(..., e)`, for tokens `(n, e)`.
        k: int from 1 to e.

    Returns:
        Indices of shape `(..., k)`.

    Raises:
        ValueError: if `scores` is a scalar, or `k` breaks its rule.
    """
    _checks.axes(scores=(scores, "...e"))
    scores = _tensor(scores)
    return _backend.top_k(scores, _checks.choices("k", k, scores.shape[-1]))[1]


def choose(values: Any, indices: Any) -> Any:
    """Return `values[i, indices[i, j]]`.

    Args:
        values: `(..., e)`, for tokens `(n, e)`.
        indices: `(..., k)` int in [0, e), with the leading axes of `values`.

    Returns:
        A tensor of shape `(..., k)`.

    Raises:
        ValueError: if the leading axes do not agree, or `indices` are no integers.
    """
    _checks.axes(values=(values, "...e"), indices=(indices, "...k"))
    _checks.integers(indices=indices)
    return ops.take_along_axis(_tensor(values), _tensor(indices), axis=-1)


def rows_where(kept: Any, rows: Any) -> Any:
    """Return `rows` with zeros where not `kept`; unlike a product, also for NaN.

    Args:
        kept: `(...)` bool.
        rows: `(..., d)`, with the leading axes of `kept`.

    Returns:
        A tensor of the shape of `rows`.

    Raises:
        ValueError: if the leading axes do not agree.
    """
    _checks.axes(rows=(rows, "...d"), kept=(kept, "..."))
    kept, rows = _tensor(kept), _tensor(rows)
    return ops.where(ops.expand_dims(kept, -1), rows, ops.zeros_like(rows))


def gates(
    routing: Routing | ExpertChoiceRouting | DenseRouting,
    num_experts: int,
    num_tokens: Any,
) -> Any:
    """Return the weight of every expert for every token, `(n, e)`, 0 if not chosen.

    Args:
        routing: a record of any kind, with combine weights.
        num_experts: int, e.
        num_tokens: int, n (or a tensor where only the run knows it).

    Raises:
        ValueError: if the record does not agree with itself or with `num_experts` and
            `num_tokens`, or has no combine weights.
    """
    routing = checked_record(routing, num_experts, num_tokens)
    if routing.combine_weights is None:
        raise ValueError(
            "`routing` must have combine weights. Received: "
            "routing.combine_weights=None"
        )
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

    Raises:
        ValueError: if `gates` has another rank, or `max_experts` is not in [1, e].
    """
    _checks.axes(gates=(gates, "nte"))
    gates = _tensor(gates)
    max_experts = _checks.choices("max_experts", max_experts, gates.shape[-1])
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

    Raises:
        ValueError: if a shape is another one, if the shapes do not agree in n, or if
            `indices` are no integers.
    """
    _checks.positive_int("num_experts", num_experts)
    _checks.axes(indices=(indices, "nk"), counted=(counted, "n?"))
    _checks.integers(indices=indices)
    indices = ops.convert_to_tensor(indices)
    counts = ops.ones_like(indices, dtype=dtype)
    if counted is not None:
        counted = ops.expand_dims(ops.cast(counted, "bool"), -1)
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
    ends = _tensor(ends)
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
    rows, filled = _tensor(rows), _tensor(filled)
    order = ops.pad(runs.order, ((0, 1),))  # So that there is a row even of no tokens.
    choices = ops.take(order, ops.minimum(rows, n * k))
    return ops.where(filled, choices // k, n)
