"""Ragged dispatch: a grouped matmul of sorted rows, in the form of the device (JAX)."""

from __future__ import annotations

from typing import Any

from keras_moe.dispatch._blocked import blocked_in_turn
from keras_moe.dispatch._share import Share
from keras_moe.experts._protocol import GroupedExperts
from keras_moe.routing import Routing


def ragged(
    tokens: Any,
    routing: Routing,
    experts: GroupedExperts,
    training: bool | None = None,
    share: Share | None = None,
) -> Any:
    """Multiply the sorted rows by TPU kernels, or elsewhere in blocks, in turn.

    The device is that of the compilation, whatever the host is.
    """
    return blocked_in_turn(tokens, routing, experts, training, share, tpu_kernels=True)
