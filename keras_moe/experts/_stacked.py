"""Stacked experts: `on_slots` and `on_pieces` implemented by `on_rows`.

Axis letters: e experts, d input features, u output units, c slots per expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_moe._layer import Layer
from keras_moe.experts._protocol import GroupedMatmul, Prologue, apply_prologue


class StackedExperts(Layer):
    """The base class of experts with stacked kernels; a subclass defines `on_rows`.

    It implements the protocol `keras_moe.experts._protocol.GroupedExperts`.
    """

    num_experts: int
    on_rows: Callable[..., Any]

    def on_slots(self, slots: Any, training: bool | None = None) -> Any:
        """(e, c, d) -> (e, c, u): each expert on its own slots."""

        def matmul(
            rows: Any, kernel: Any, bias: Any = None, prologue: Prologue | None = None
        ) -> Any:
            rows = ops.matmul(apply_prologue(prologue, rows), kernel)
            return rows if bias is None else rows + ops.expand_dims(bias, 1)

        return self.on_rows(slots, matmul, training=training)

    def on_pieces(
        self, pieces: Sequence[Any], training: bool | None = None
    ) -> list[Any]:
        """Return (rows, u) for each (rows, d) of `pieces`, one piece per expert."""
        parts: dict[int, Sequence[Any]] = {}

        def part(stacked: Any, k: int) -> Any:
            # Unstacked once: each gradient of `stacked[k]` would have the full size.
            if id(stacked) not in parts:
                tensor = ops.convert_to_tensor(stacked)
                parts[id(stacked)] = ops.unstack(tensor, num=self.num_experts)
            return parts[id(stacked)][k]

        def matmul_of(k: int) -> GroupedMatmul:
            def matmul(
                rows: Any,
                kernel: Any,
                bias: Any = None,
                prologue: Prologue | None = None,
            ) -> Any:
                rows = ops.matmul(apply_prologue(prologue, rows), part(kernel, k))
                # `ops.add` lets TensorFlow fuse the bias into the matmul, `+` does not.
                return rows if bias is None else ops.add(rows, part(bias, k))

            return matmul

        return [
            self.on_rows(rows, matmul_of(k), training=training)
            for k, rows in enumerate(pieces)
        ]


def activation_function(argument: str, activation: Any) -> Callable[..., Any]:
    """Return an activation function; layers are invalid (experts would share one)."""
    if isinstance(activation, keras.layers.Layer):
        raise ValueError(
            f"`{argument}` must be the name of an activation or a function, not a "
            f"layer. Received: {argument}={activation!r}"
        )
    return keras.activations.get(activation)
