"""Row operations: gathers, sums and products over the choices of a token.

Axis letters: n tokens, d input features, u output units, k choices per token, m rows.
"""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_moe import _backend
from keras_moe import routing as routing_lib


def flat(rows: Any) -> Any:
    """(..., d) -> (rows, d)."""
    return ops.reshape(rows, (-1, rows.shape[-1]))


def nan_where(invalid: Any, outputs: Any) -> Any:
    """Return `outputs` (n, u) with NaN in the rows that are `invalid` (n,) or None."""
    if invalid is None:
        return outputs
    # A scalar: a tensor of NaN is multiplied by 0, and stays NaN, in ONNX.
    return ops.where(ops.expand_dims(invalid, -1), float("nan"), outputs)


def sum_of_rows(
    rows: Any, positions: Any, weights: Any = None, kept: Any = None
) -> Any:
    """(m, u), (n, k) -> (n, u). One gather per choice: no (n, k, u) tensor."""
    total = None
    for j in range(positions.shape[1]):
        part = _backend.take_rows(rows, positions[:, j])
        if weights is not None:
            part = part * weights[:, j : j + 1]
        if kept is not None:
            part = routing_lib.rows_where(kept[:, j], part)
        total = part if total is None else total + part
    return total


def products_of_rows(outputs: Any, rows: Any, positions: Any) -> Any:
    """(n, u), (m, u), (n, k) -> (n, k): the gradient of `sum_of_rows` by weights."""
    products = [
        ops.sum(outputs * _backend.take_rows(rows, positions[:, j]), axis=-1)
        for j in range(positions.shape[1])
    ]
    return ops.stack(products, axis=1)


def identity(rows: Any) -> Any:
    """Return `rows`."""
    return rows
