"""Slots of static shape, shared by "capacity" and `blocked_evenly`.

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
        weights = ops.pad(ops.reshape(weights, (-1,)), ((0, 1),))
        weight_of_slot = ops.take(weights, _choice_of_slot(slots))
        padded = ops.pad(upstream, ((0, 1), (0, 0)))
        by_rows = _backend.take_rows(padded, slots.tokens)
        by_rows = by_rows * ops.expand_dims(weight_of_slot, -1)
        by_weights = products_of_rows(upstream, flat(rows), slots.slot_of_choice)
        none = ops.zeros_like(by_weights)
        return by_rows, ops.where(slots.kept, by_weights, none)

    def of_choices(rows: Any, slots: Slots) -> Any:
        outputs = _backend.take_rows(flat(rows), slots.slot_of_choice)
        return routing_lib.rows_where(slots.kept, outputs)

    def of_choices_gradient(
        inputs: Any, slots: Slots, upstream: Any
    ) -> tuple[Any, ...]:
        upstream = ops.pad(flat(upstream), ((0, 1), (0, 0)))
        return (_backend.take_rows(upstream, _choice_of_slot(slots)),)

    rows = compute(_backend.with_gradient(fill, fill_gradient, (tokens,), slots))
    if routing.combine_weights is None:
        return _backend.with_gradient(of_choices, of_choices_gradient, (rows,), slots)
    weights = ops.cast(routing.combine_weights, rows.dtype)
    return _backend.with_gradient(combine, combine_gradient, (rows, weights), slots)


def _choice_of_slot(slots: Slots) -> Any:
    """Return the choice in each slot, (s, c); n * k in an empty slot."""
    s, c = ops.shape(slots.tokens)
    m = ops.shape(slots.slot_of_choice)[0] * slots.slot_of_choice.shape[1]
    # Numbers from -m to -1, because a scatter has zeros where nothing is written.
    choices = ops.arange(m, dtype="int32") - m
    target = ops.where(slots.kept, slots.slot_of_choice, s * c)
    found = ops.scatter(ops.reshape(target, (-1, 1)), choices, (s * c + 1,))
    return ops.reshape(found[:-1] + m, (s, c))
