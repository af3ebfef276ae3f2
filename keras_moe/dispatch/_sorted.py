"""Rows sorted by expert, shared by "split", "ragged" and `blocked_in_turn`.

Axis letters: n tokens, d input features, u output units, k choices per token, m = n * k
rows.

The choices are sorted by expert, which makes the rows of an expert contiguous. The
custom gradients gather by the inverse permutation, because the automatic gradient of a
gather is a scatter, which is slow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keras import ops

from keras_moe import _backend
from keras_moe import routing as routing_lib
from keras_moe.dispatch._rows import flat, identity, sum_of_rows
from keras_moe.dispatch._share import Share
from keras_moe.routing import Routing, SortedChoices


def in_sorted_rows(
    compute: Callable[[Any, SortedChoices], Any],
    tokens: Any,
    routing: Routing,
    num_experts: int,
    padding: int = 0,
    share: Share | None = None,
) -> Any:
    """Sort the choices by expert, compute their rows, and restore the token order.

    `compute` maps sorted rows (m + padding, d) to (m + padding, u). Padding rows are
    copies of a token; their outputs are not used. With `share`, m are the rows that it
    has room for, and the other choices have the output 0.
    """
    if share is None:
        runs, kept = routing_lib.sort_choices(routing, num_experts), None
    else:
        runs, kept = share.first_rows()
    if padding:
        runs = runs._replace(order=ops.pad(runs.order, ((0, padding),)))
    # Padding rows copy a row, which an empty batch does not have.
    source = _padded_if_empty if padding else identity
    rows = compute(_to_rows(tokens, runs, kept, source), runs)
    if routing.combine_weights is None:
        return _outputs_of_choices(rows, runs, kept, source)
    weights = ops.cast(routing.combine_weights, rows.dtype)
    return _combine(rows, weights, runs, kept, source)


def _to_rows(
    tokens: Any, runs: SortedChoices, kept: Any, source: Callable[[Any], Any]
) -> Any:
    """(n, d) -> (m, d)."""

    def forward(tokens: Any, constants: Any) -> Any:
        runs, _ = constants
        token_of_row = runs.order // runs.positions.shape[1]
        return _backend.take_rows(source(tokens), token_of_row)

    def gradient(inputs: Any, constants: Any, upstream: Any) -> tuple[Any, ...]:
        runs, kept = constants
        return (sum_of_rows(upstream, runs.positions, kept=kept),)

    return _backend.with_gradient(forward, gradient, (tokens,), (runs, kept))


def _combine(
    rows: Any,
    weights: Any,
    runs: SortedChoices,
    kept: Any,
    source: Callable[[Any], Any],
) -> Any:
    """(m, u), (n, k) -> (n, u): y_i = sum_j w_ij rows[row of choice (i, j)]."""

    def gradient(inputs: Any, constants: Any, upstream: Any) -> tuple[Any, ...]:
        rows, weights = inputs
        runs, kept = constants
        flat_weights = source(ops.reshape(weights, (-1,)))
        weight_of_row = _backend.take_rows(flat_weights, runs.order)
        token_of_row = runs.order // weights.shape[1]
        by_rows = _backend.take_rows(source(upstream), token_of_row)
        by_weights = _backend.take_rows(
            ops.sum(by_rows * rows, axis=-1), ops.reshape(runs.positions, (-1,))
        )
        by_weights = ops.reshape(by_weights, ops.shape(weights))
        if kept is not None:
            by_weights = ops.where(kept, by_weights, ops.zeros_like(by_weights))
        return by_rows * ops.expand_dims(weight_of_row, -1), by_weights

    def forward(rows: Any, weights: Any, constants: Any) -> Any:
        runs, kept = constants
        return sum_of_rows(rows, runs.positions, weights, kept)

    return _backend.with_gradient(forward, gradient, (rows, weights), (runs, kept))


def _outputs_of_choices(
    rows: Any, runs: SortedChoices, kept: Any, source: Callable[[Any], Any]
) -> Any:
    """(m, u) -> (n, k, u): the row of each choice."""

    def gradient(inputs: Any, constants: Any, upstream: Any) -> tuple[Any, ...]:
        runs, _ = constants
        return (_backend.take_rows(source(flat(upstream)), runs.order),)

    def forward(rows: Any, constants: Any) -> Any:
        runs, kept = constants
        # JAX gives a take from an empty tensor another shape.
        shape = (*ops.shape(runs.positions), rows.shape[-1])
        outputs = ops.reshape(ops.take(rows, runs.positions, axis=0), shape)
        return outputs if kept is None else routing_lib.rows_where(kept, outputs)

    return _backend.with_gradient(forward, gradient, (rows,), (runs, kept))


def _padded_if_empty(rows: Any) -> Any:
    """Return `rows`, with an extra zero row if they may be empty."""
    if rows.shape[0]:
        return rows
    return ops.pad(rows, ((0, 1), *[(0, 0)] * (len(rows.shape) - 1)))
