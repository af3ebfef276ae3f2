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


def affine(rows: Any, kernel: Any, bias: Any = None) -> Any:
    """Return `rows @ kernel + bias`."""
    outputs = ops.matmul(rows, kernel)
    return outputs if bias is None else outputs + bias


def index(value: int) -> Any:
    """Return an int32 index: JAX needs one dtype for all indices of a slice."""
    return ops.convert_to_tensor(value, "int32")


def part_of(stacked: Any, k: Any) -> Any:
    """Return `stacked[k]`."""
    zeros = [index(0)] * (len(stacked.shape) - 1)
    part = ops.slice(stacked, (k, *zeros), (1, *stacked.shape[1:]))
    return ops.reshape(part, stacked.shape[1:])


def with_part(stacked: Any, k: Any, part: Any) -> Any:
    """Return `stacked` with `part` in place of `stacked[k]`, in its dtype."""
    zeros = [index(0)] * (len(stacked.shape) - 1)
    part = ops.expand_dims(ops.cast(part, stacked.dtype), 0)
    return ops.slice_update(stacked, (k, *zeros), part)


def block_of(rows: Any, first: Any, size: int) -> Any:
    """Return `rows[first : first + size]`, for `rows` (m, d)."""
    return ops.slice(rows, (first, index(0)), (size, rows.shape[-1]))


def with_block(rows: Any, first: Any, block: Any) -> Any:
    """Return `rows` (m, d) with `block` in place of those from `first` on."""
    return ops.slice_update(rows, (first, index(0)), block)
