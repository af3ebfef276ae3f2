"""Dense dispatch: every expert on every token, then a weighted sum.

Axis letters: n tokens, d input features, e experts, u output units.
"""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_moe import routing as routing_lib
from keras_moe.dispatch._rows import nan_where
from keras_moe.experts._protocol import Experts
from keras_moe.routing import DenseRouting, ExpertChoiceRouting, Routing


def dense(
    tokens: Any,
    routing: Routing | ExpertChoiceRouting | DenseRouting,
    experts: Experts,
    training: bool | None = None,
) -> Any:
    """Compute every expert on every token: y_i = sum_e g_ie f_e(x_i)."""
    outputs = experts(tokens, training=training)  # (n, e, u)
    gates = routing_lib.gates(routing, experts.num_experts, ops.shape(tokens)[0])
    weights = ops.expand_dims(ops.cast(gates, outputs.dtype), 1)  # (n, 1, e)
    outputs = ops.squeeze(ops.matmul(weights, outputs), axis=1)
    return nan_where(getattr(routing, "invalid", None), outputs)
