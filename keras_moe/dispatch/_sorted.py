"""Sorted rows: what "split", "ragged" and "blocked" (in turn) share.

Axis letters: n tokens, d input features, u output units, k choices a token, m = n * k
rows.

The choices are sorted by expert, so that the rows of an expert are one run. What is
gathered forward is gathered backward too, by the inverse order: the gradient of a
gather would be a scatter, which is slow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keras import ops

from keras_moe import _backend
from keras_moe import routing as routing_lib
from keras_moe.dispatch._rows import flat, identity, sum_of_rows
from keras_moe.routing import Routing, Runs


def in_runs(
    compute: Callable[[Any, Runs], Any],
    tokens: Any,
    routing: Routing,
    num_experts: int,
    padding: int = 0,
) -> Any:
    """Sort the choices by expert, compute their rows, put them back where they belong.

    `compute` maps sorted rows (m + padding, d) to (m + padding, u). The rows added are
    copies of some token, and no choice reads them.
    """
    runs = routing_lib.sort_choices(routing, num_experts)
    if padding:
        runs = runs._replace(order=ops.pad(runs.order, ((0, padding),)))
    # The rows added copy some row, and of an empty batch there is none.
    source = _not_empty if padding else identity
    rows = compute(_to_rows(tokens, runs, source), runs)
    if routing.combine_weights is None:
        return _each_choice(rows, runs, source)
    return _combine(rows, ops.cast(routing.combine_weights, rows.dtype), runs, source)


def _to_rows(tokens: Any, runs: Runs, source: Callable[[Any], Any]) -> Any:
    """(n, d) -> (m, d)."""

    def forward(tokens: Any, runs: Runs) -> Any:
        token_of_row = runs.order // runs.positions.shape[1]
        return ops.take(source(tokens), token_of_row, axis=0)

    def gradient(inputs: Any, runs: Runs, upstream: Any) -> tuple[Any, ...]:
        return (sum_of_rows(upstream, runs.positions),)

    return _backend.with_gradient(forward, gradient, (tokens,), runs)


def _combine(rows: Any, weights: Any, runs: Runs, source: Callable[[Any], Any]) -> Any:
    """(m, u), (n, k) -> (n, u): y_i = sum_j w_ij rows[row of choice (i, j)]."""

    def gradient(inputs: Any, runs: Runs, upstream: Any) -> tuple[Any, ...]:
        rows, weights = inputs
        weight_of_row = ops.take(source(ops.reshape(weights, (-1,))), runs.order)
        by_rows = ops.take(source(upstream), runs.order // weights.shape[1], axis=0)
        by_weights = ops.take(ops.sum(by_rows * rows, axis=-1), runs.positions)
        # JAX gives a take from an empty tensor another shape.
        by_weights = ops.reshape(by_weights, ops.shape(weights))
        return by_rows * ops.expand_dims(weight_of_row, -1), by_weights

    def forward(rows: Any, weights: Any, runs: Runs) -> Any:
        return sum_of_rows(rows, runs.positions, weights)

    return _backend.with_gradient(forward, gradient, (rows, weights), runs)


def _each_choice(rows: Any, runs: Runs, source: Callable[[Any], Any]) -> Any:
    """(m, u) -> (n, k, u): the row of every choice."""

    def gradient(inputs: Any, runs: Runs, upstream: Any) -> tuple[Any, ...]:
        return (ops.take(source(flat(upstream)), runs.order, axis=0),)

    def forward(rows: Any, runs: Runs) -> Any:
        # JAX gives a take from an empty tensor another shape.
        shape = (*ops.shape(runs.positions), rows.shape[-1])
        return ops.reshape(ops.take(rows, runs.positions, axis=0), shape)

    return _backend.with_gradient(forward, gradient, (rows,), runs)


def _not_empty(rows: Any) -> Any:
    """Return `rows`, with one more if there may be none."""
    if rows.shape[0]:
        return rows
    return ops.pad(rows, ((0, 1), *[(0, 0)] * (len(rows.shape) - 1)))
