"""The interface between dispatch and experts: protocols of experts and their matmul.

Axis letters: n rows, d input features, e experts, u output units, c slots per expert,
m rows in a layout of the dispatch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

Prologue = Callable[..., Any]


class GroupedMatmul(Protocol):
    """A matmul of each row with the kernel of its expert."""

    def __call__(
        self,
        rows: Any,
        kernel: Any,
        bias: Any = None,
        prologue: Prologue | None = None,
    ) -> Any:
        """(m, in), (e, in, out) -> (m, out): y_r = prologue(x_r) W_e + b_e.

        Args:
            rows: tensor of shape `(m, in)`, or with other leading axes of the dispatch
                such as `(e, c, in)` for slots. A tuple of such tensors for a `prologue`
                of several tensors.
            kernel: tensor or variable of shape `(e, in, out)`.
            bias: tensor or variable of shape `(e, out)`, or None.
            prologue: an elementwise function of the tensors in `rows`, such as the
                activation of the previous layer. A dispatch may compute it block by
                block to save memory.

        Returns:
            A tensor of shape `(m, out)`, with the leading axes of `rows`.
        """


class Experts(Protocol):
    """Experts that compute all rows, slots, or one piece of rows per expert."""

    num_experts: int

    def __call__(self, inputs: Any, training: bool | None = None) -> Any:
        """(..., d) -> (..., e, u): every expert on every row."""

    def on_slots(self, slots: Any, training: bool | None = None) -> Any:
        """(e, c, d) -> (e, c, u): each expert on its own slots."""

    def on_pieces(
        self, pieces: Sequence[Any], training: bool | None = None
    ) -> list[Any]:
        """Return (rows, u) for each (rows, d) of `pieces`, one piece per expert."""


class GroupedExperts(Experts, Protocol):
    """Experts with stacked kernels, which support a grouped matmul."""

    def on_rows(
        self, rows: Any, matmul: GroupedMatmul, training: bool | None = None
    ) -> Any:
        """(m, d) -> (m, u): one expert per row, with `matmul` for all matmuls."""


def apply_prologue(prologue: Prologue | None, rows: Any) -> Any:
    """Return `prologue(*rows)`, for `rows` a tensor or a tuple of tensors."""
    if prologue is None:
        return rows
    return prologue(*rows) if isinstance(rows, tuple) else prologue(rows)


@dataclasses.dataclass(frozen=True)
class GatedProduct:
    """The prologue `activation(gate) * up`.

    Equal for equal activations, so that JAX reuses a program.
    """

    activation: Callable[..., Any]

    def __call__(self, gate: Any, up: Any) -> Any:
        return self.activation(gate) * up
