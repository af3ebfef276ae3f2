"""Capacity dispatch: a fixed number of slots per expert (Fedus et al. 2021).

Axis letters: n tokens, d input features, e experts, u output units, k choices per
token, c capacity (slots per expert).

c = ceil(capacity_factor * k * n / e). Choices over capacity are dropped and contribute
zero; the remaining weights are not rescaled.
"""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_moe import routing as routing_lib
from keras_moe.dispatch._rows import nan_where
from keras_moe.dispatch._slots import in_slots
from keras_moe.experts._protocol import Experts
from keras_moe.routing import Routing, Slots

DEFAULT_FACTOR = 1.25


def within_capacity(
    tokens: Any,
    routing: Routing,
    experts: Experts,
    training: bool | None = None,
    *,
    capacity_factor: float | None = None,
    priority: str = "position",
) -> tuple[Any, Any]:
    """Return outputs (n, u), and bool (n, k): the choices that have a slot."""
    slots, finite = slots_within_capacity(
        tokens,
        routing,
        experts.num_experts,
        capacity_factor=capacity_factor,
        priority=priority,
    )
    outputs = capacity(tokens, routing, experts, training, slots=slots)
    return nan_where(ops.logical_not(finite), outputs), slots.kept


def slots_within_capacity(
    tokens: Any,
    routing: Routing,
    num_experts: int,
    *,
    capacity_factor: float | None = None,
    priority: str = "position",
) -> tuple[Slots, Any]:
    """Return the slots of `within_capacity`, and bool (n,): the finite tokens."""
    # A token with non-finite weights takes no slot; its output is NaN.
    finite = ops.all(ops.isfinite(routing.combine_weights), axis=-1)
    mask = finite
    if routing.mask is not None:
        mask = ops.logical_and(finite, routing.mask)
    slots = routing_lib.capacity_slots(
        routing._replace(mask=mask),
        num_experts,
        routing_lib.expert_capacity(
            ops.shape(tokens)[0],
            num_experts,
            routing.expert_indices.shape[1],
            DEFAULT_FACTOR if capacity_factor is None else capacity_factor,
        ),
        priority,
    )
    return slots, finite


def capacity(
    tokens: Any,
    routing: Routing,
    experts: Experts,
    training: bool | None = None,
    *,
    slots: Slots,
) -> Any:
    """Compute the tokens in the `slots` of each expert."""
    return in_slots(
        lambda rows: experts.on_slots(rows, training=training), tokens, routing, slots
    )
