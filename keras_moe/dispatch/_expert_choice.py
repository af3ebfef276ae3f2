"""Capacity dispatch for expert choice routing (Zhou et al. 2022).

Axis letters: n tokens, d input features, e experts, u output units, c slots per expert.
"""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_moe.dispatch._rows import nan_where
from keras_moe.experts._protocol import Experts
from keras_moe.routing import ExpertChoiceRouting


def expert_choice(
    tokens: Any,
    routing: ExpertChoiceRouting,
    experts: Experts,
    training: bool | None = None,
) -> Any:
    """Compute the chosen tokens, and sum the weighted outputs of each token."""
    n = ops.shape(tokens)[0]
    tokens = ops.pad(tokens, ((0, 1), (0, 0)))  # For the slots without a token.
    rows = experts.on_slots(
        ops.take(tokens, routing.token_indices, axis=0), training=training
    )
    weights = ops.cast(routing.combine_weights, rows.dtype)
    rows = rows * ops.expand_dims(weights, -1)
    sums = ops.segment_sum(
        ops.reshape(rows, (-1, rows.shape[-1])),
        ops.reshape(routing.token_indices, (-1,)),
        num_segments=n + 1,
    )[:-1]
    return nan_where(routing.invalid, sums)
