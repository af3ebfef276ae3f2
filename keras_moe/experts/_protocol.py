"""What a dispatch calls: the protocols of experts and of the matmul it gives them.

Axis letters: n rows, d input features, e experts, u output units, c slots an expert,
m rows in a layout of the dispatch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

Prologue = Callable[..., Any]


class GroupedMatmul(Protocol):
    """A matmul of every row by the kernel of its own expert."""

    def __call__(
        self,
        rows: Any,
        kernel: Any,
        bias: Any = None,
        prologue: Prologue | None = None,
    ) -> Any:
        """(m, in), (e, in, out) -> (m, out): y_r = prologue(x_r) W_e + b_e.

        Args:
            rows: tensor of shape `(m, in)`, whose leading axes are those of the
                dispatch: `(e, c, in)` for slots. With a `prologue`, a tuple of such
                tensors if it takes several.
            kernel: tensor or variable of shape `(e, in, out)`.
            bias: tensor or variable of shape `(e, out)`, or None.
            prologue: an elementwise function of as many tensors as `rows` holds, such
                as the activation of the layer before. A dispatch may compute it block
                by block, so that its outputs are never stored as a whole.

        Returns:
            A tensor of the leading axes of `rows`, `(m, out)`.
        """


class Experts(Protocol):
    """Experts that compute all rows, slots, or one piece of rows for each."""

    num_experts: int

    def __call__(self, inputs: Any, training: bool | None = None) -> Any:
        """(..., d) -> (..., e, u): every expert on every row."""

    def on_slots(self, slots: Any, training: bool | None = None) -> Any:
        """(e, c, d) -> (e, c, u): every expert on its own slots."""

    def on_pieces(
        self, pieces: Sequence[Any], training: bool | None = None
    ) -> list[Any]:
        """Return (rows, u) for each (rows, d) of `pieces`, one an expert."""


class GroupedExperts(Experts, Protocol):
    """Experts of one formula and stacked kernels, which a grouped matmul computes."""

    def on_rows(
        self, rows: Any, matmul: GroupedMatmul, training: bool | None = None
    ) -> Any:
        """(m, d) -> (m, u): the formula of one expert, its matmuls by `matmul`."""


def apply_prologue(prologue: Prologue | None, rows: Any) -> Any:
    """Return `prologue(*rows)` for rows that are one tensor or a tuple of them."""
    if prologue is None:
        return rows
    return prologue(*rows) if isinstance(rows, tuple) else prologue(rows)
