"""Slots of static shape, shared by "capacity" and `blocked_at_once`.

Axis letters: n tokens, d input features, u output units, k choices per token, s groups
of c slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keras import ops

from keras_moe import _backend
from keras_moe import routing as routing_lib
from keras_moe.dispatch._rows import flat, products_of_rows, sum_of_rows
from keras_moe.routing import Routing, Slots


def in_slots(
    compute: Callable[[Any], Any], tokens: Any, routing: Routing, slots: Slots
) -> Any:
    """Fill slots (s, c, d), compute them to (s, c, u), and sum the slots of a token."""
    # A choice without a slot reads slot 0; `kept` masks the result.
    slots = slots._replace(
        slot_of_choice=ops.where(
            slots.kept, slots.slot_of_choice, ops.zeros_like(slots.slot_of_choice)
        )
    )

    def fill(tokens: Any, slots: Slots) -> Any:
        # An extra row of zeros, for the slots without a token.
        return _backend.take_rows(ops.pad(tokens, ((0, 1), (0, 0))), slots.tokens)

    def fill_gradient(inputs: Any, slots: Slots, upstream: Any) -> tuple[Any, ...]:
        rows = sum_of_rows(flat(upstream), slots.slot_of_choice, kept=slots.kept)
        return (rows,)

    def combine(rows: Any, weights: Any, slots: Slots) -> Any:
        return sum_of_rows(flat(rows), slots.slot_of_choice, weights, slots.kept)

    def combine_gradient(inputs: Any, slots: Slots, upstream: Any) -> tuple[Any, ...]:
        rows, weights = inputs
        s, c = ops.shape(rows)[:2]
        # The weight of a slot is that of the choice in it.
        target = ops.where(slots.kept, slots.slot_of_choice, s * c)
        weight_of_slot = ops.scatter(
            ops.reshape(target, (-1, 1)), ops.reshape(weights, (-1,)), (s * c + 1,)
        )[:-1]
        padded = ops.pad(upstream, ((0, 1), (0, 0)))
        by_rows = _backend.take_rows(padded, slots.tokens)
        by_rows = by_rows * ops.reshape(weight_of_slot, (s, c, 1))
        by_weights = products_of_rows(upstream, flat(rows), slots.slot_of_choice)
        none = ops.zeros_like(by_weights)
        return by_rows, ops.where(slots.kept, by_weights, none)

    rows = compute(_backend.with_gradient(fill, fill_gradient, (tokens,), slots))
    if routing.combine_weights is None:
        outputs = _backend.take_rows(flat(rows), slots.slot_of_choice)
        return routing_lib.rows_where(slots.kept, outputs)
    weights = ops.cast(routing.combine_weights, rows.dtype)
    return _backend.with_gradient(combine, combine_gradient, (rows, weights), slots)
