"""Choices: top k, gathers, gates, and counts per expert.

Axis letters: n tokens, e experts, k choices per token, t gates, d features of a row.
"""

from __future__ import annotations

from typing import Any

from keras import backend, ops

from keras_moe import _backend, _checks, _mesh
from keras_moe.routing._records import (
    DenseRouting,
    ExpertChoiceRouting,
    Routing,
    checked_record,
    tensor,
)


def top_k(scores: Any, k: int) -> Any:
    """Return the indices of the k largest of `scores`, best first.

    Ties go to the lower index.

    Args:
        scores: `(..., e)`, for tokens `(n, e)`.
        k: int from 1 to e.

    Returns:
        Indices of shape `(..., k)`.

    Raises:
        ValueError: if `scores` is a scalar, or `k` is not in [1, e].
    """
    _checks.axes(scores=(scores, "...e"))
    scores = tensor(scores)
    k = _checks.choices("k", k, scores.shape[-1])
    return _mesh.by_rows(lambda rows: _backend.top_k(rows, k)[1], scores)


def choose(values: Any, indices: Any) -> Any:
    """Return `values[i, indices[i, j]]`.

    Args:
        values: `(..., e)`, for tokens `(n, e)`.
        indices: `(..., k)` int in [0, e), with the leading axes of `values`.

    Returns:
        A tensor of shape `(..., k)`.

    Raises:
        ValueError: if the leading axes differ, or `indices` are not integers.
    """
    _checks.axes(values=(values, "...e"), indices=(indices, "...k"))
    _checks.integers(indices=indices)
    return _backend.on_tpu_or(_compared, _gathered, tensor(values), tensor(indices))


def _gathered(values: Any, indices: Any) -> Any:
    return ops.take_along_axis(values, indices, axis=-1)


def _compared(values: Any, indices: Any) -> Any:
    """Return the same; its gradient needs no scatter, which is slow on a TPU."""
    experts = ops.arange(values.shape[-1], dtype=indices.dtype)
    columns = []
    for j in range(indices.shape[-1]):
        own = indices[..., j : j + 1] == experts
        columns.append(ops.sum(ops.where(own, values, ops.zeros_like(values)), axis=-1))
    return ops.cast(ops.stack(columns, axis=-1), values.dtype)


def rows_where(kept: Any, rows: Any) -> Any:
    """Return `rows` with zeros where not `kept`; unlike a product, it removes NaN.

    Args:
        kept: `(...)` bool.
        rows: `(..., d)`, with the leading axes of `kept`.

    Returns:
        A tensor of the shape of `rows`.

    Raises:
        ValueError: if the leading axes differ.
    """
    _checks.axes(rows=(rows, "...d"), kept=(kept, "..."))
    kept, rows = tensor(kept), tensor(rows)
    return ops.where(ops.expand_dims(kept, -1), rows, ops.zeros_like(rows))


def gates(
    routing: Routing | ExpertChoiceRouting | DenseRouting,
    num_experts: int,
    num_tokens: Any,
) -> Any:
    """Return the combine weights as `(n, e)`, 0 for experts that are not chosen.

    Args:
        routing: a record of any kind, with combine weights.
        num_experts: int, e.
        num_tokens: int, n (or a tensor if n is data-dependent).

    Raises:
        ValueError: if the shapes of the record are inconsistent or do not match
            `num_experts` and `num_tokens`, or if it has no combine weights.
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
        # Slots without a token hold the index n, hence n + 1 rows.
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
    """Return the union of the experts chosen by the t gates of each token.

    Args:
        gates: `(n, t, e)`, the weights of t gates, 0 where an expert is not chosen.
        max_experts: int, the maximum number of experts in a union, k.

    Returns:
        A `Routing` without combine weights, whose choices are the union (each expert
        is computed once per token), and the gate weights `(n, t, k)` of these experts.

    Raises:
        ValueError: if `gates` has another rank, or `max_experts` is not in [1, e].
    """
    _checks.axes(gates=(gates, "nte"))
    gates = tensor(gates)
    max_experts = _checks.choices("max_experts", max_experts, gates.shape[-1])
    e = gates.shape[-1]
    # NaN counts as chosen, which propagates it to the output.
    chosen = ops.any(gates != 0, axis=1)
    # Chosen experts in index order: expert 0 scores e, expert e - 1 scores 1; others 0.
    scores = ops.where(chosen, e - ops.arange(e, dtype="int32"), 0)
    best = _mesh.by_rows(
        lambda rows: ops.top_k(rows, max_experts)[0], ops.cast(scores, "float32")
    )
    best = ops.cast(best, "int32")
    indices = e - best
    padded = ops.pad(gates, ((0, 0), (0, 0), (0, 1)))  # Weight 0 for no expert.
    wanted = ops.broadcast_to(
        ops.expand_dims(indices, 1), (*ops.shape(gates)[:2], max_experts)
    )
    return Routing(indices, None), ops.take_along_axis(padded, wanted, axis=-1)


def expert_counts(
    indices: Any, num_experts: int, counted: Any = None, dtype: Any = "float32"
) -> Any:
    """Return the number of choices of each expert, (n, k) -> (e,).

    Args:
        indices: `(n, k)` int32.
        num_experts: int, e.
        counted: `(n,)` bool, the tokens that count. All by default.
        dtype: dtype of the counts.

    Raises:
        ValueError: if a shape is wrong, the shapes differ in n, or `indices` are not
            integers.
    """
    _checks.positive_int("num_experts", num_experts)
    _checks.axes(indices=(indices, "nk"), counted=(counted, "n?"))
    _checks.integers(indices=indices)
    try:
        dtype = backend.standardize_dtype(dtype)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"`dtype` must be a dtype. Received: dtype={dtype!r}"
        ) from error
    indices = ops.convert_to_tensor(indices)
    counts = ops.ones_like(indices, dtype=dtype)
    if counted is not None:
        counted = ops.expand_dims(ops.cast(counted, "bool"), -1)
        counts = counts * ops.cast(counted, dtype)
        # Indices of masked tokens may be out of range.
        indices = ops.where(counted, indices, ops.zeros_like(indices))
    return sums_by_expert(
        ops.reshape(counts, (-1,)), ops.reshape(indices, (-1,)), num_experts
    )


def sums_by_expert(values: Any, experts: Any, num_experts: int) -> Any:
    """(m,), (m,) int in [0, e) -> (e,): the sum of the values of each expert."""

    def compared(values: Any, experts: Any) -> Any:
        # XLA computes the sum without an (m, e) tensor.
        own = ops.expand_dims(experts, -1) == ops.arange(num_experts, dtype="int32")
        column = ops.expand_dims(values, -1)
        sums = ops.sum(ops.where(own, column, ops.zeros_like(column)), axis=0)
        return ops.cast(sums, values.dtype)  # Sums of int32 may be int64.

    def scattered(values: Any, experts: Any) -> Any:
        # Not `searchsorted`, which export formats do not support.
        return ops.segment_sum(values, experts, num_segments=num_experts)

    return _backend.on_tpu_or(compared, scattered, values, experts)
