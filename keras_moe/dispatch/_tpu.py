"""Grouped matmuls of sorted rows by the kernels of a TPU.

XLA has a grouped kernel for `ragged_dot` and its gradient by the rows. It expands the
gradient by the kernels over all experts; megablox' `tgmm` (Pallas) does not.

Axis letters: e experts, m rows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_moe.routing import SortedChoices

_LARGEST_TILE = 1024
_MOST_ROWS = 512


def rows_per_tile(num_rows: int, num_experts: int) -> int:
    """Return the rows of a tile: at most an eighth of the mean load, in [128, 512].

    An expert's first and last tile may be those of its neighbours too: a tile is
    computed once for every expert in it, which adds at most an eighth. Fewer than 128
    rows are one tile.
    """
    if num_rows <= 128:
        return max(16, -(-num_rows // 16) * 16)
    rows = 128
    while rows < _MOST_ROWS and 16 * rows * num_experts <= num_rows:
        rows *= 2
    return rows


def supports(num_rows: Any, dtype: Any) -> bool:
    """Whether the kernels take such rows; symbolic numbers of rows are not static."""
    dtype = keras.backend.standardize_dtype(dtype)
    return isinstance(num_rows, int) and num_rows > 0 and dtype in _TYPES


_TYPES = ("float32", "bfloat16", "float16")


def affine(rows: Any, kernel: Any, bias: Any, runs: SortedChoices) -> Any:
    """(m, in), (e, in, out), (e, out) or None -> (m, out): y_r = x_r W_e + b_e."""
    outputs = _ragged_dot(rows, kernel, runs)
    if bias is None:
        return outputs
    # A matmul with one-hot rows, which XLA adds as it makes them: a gather of the
    # biases would read and write an (m, out) tensor several times. In such a matmul a
    # bias that is not finite would reach the rows of every expert.
    experts = _expert_of_row(rows, runs)
    finite = ops.isfinite(bias)
    broken = ops.logical_and(experts, ops.logical_not(ops.all(finite, axis=-1)))
    bias = ops.where(finite, bias, ops.zeros_like(bias))
    outputs = outputs + ops.matmul(ops.cast(experts, bias.dtype), bias)
    return ops.where(ops.any(broken, axis=-1, keepdims=True), float("nan"), outputs)


def affine_gradient(
    rows: Any,
    weights: Sequence[Any],
    runs: SortedChoices,
    upstream: Any,
) -> tuple[Any, ...]:
    """Return the gradients of `affine` by its rows, kernel and bias (if any)."""
    kernel, *bias = weights
    by_weights = [kernel_gradient(rows, upstream, runs)]
    if bias:
        # Not by one-hot rows, which would spread the NaN of a row to every expert.
        ones = ops.ones((rows.shape[0], 8), rows.dtype)
        by_weights.append(kernel_gradient(ones, upstream, runs)[:, 0])
    by_rows = _ragged_dot(upstream, ops.transpose(kernel, (0, 2, 1)), runs)
    return by_rows, *by_weights


def kernel_gradient(rows: Any, upstream: Any, runs: SortedChoices) -> Any:
    """(m, in), (m, out) -> (e, in, out): the sum of x_r^T g_r over the rows of e."""
    m, e = rows.shape[0], runs.ends.shape[0]
    dtype = keras.backend.standardize_dtype(rows.dtype)
    if dtype == "float16":  # Not on a TPU.
        rows, upstream = ops.cast(rows, "float32"), ops.cast(upstream, "float32")
    tile = rows_per_tile(m, e)
    widest = _LARGEST_TILE // (1 if dtype == "bfloat16" else 2)
    tiles = tile, _tile(rows.shape[1], widest), _tile(upstream.shape[1], widest)
    sizes = runs.ends - runs.starts
    # The kernel mixes dtypes of integers if JAX may use 64 bits.
    with _bits_32():
        found = _tgmm()(ops.transpose(rows), upstream, sizes, rows.dtype, tiles)
    return ops.cast(found, dtype)


def _tile(width: int, widest: int) -> int:
    """Return a width of tiles, a multiple of 128 unless there is one tile."""
    if width <= widest:
        return width
    parts = -(-width // widest)
    return -(-width // (128 * parts)) * 128


def _bits_32() -> Any:
    import jax

    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(False)
    from jax.experimental import disable_x64

    return disable_x64()


def _tgmm() -> Callable[..., Any]:
    # The package has a function `gmm` too, which hides its module of that name.
    name = "jax.experimental.pallas.ops.tpu.megablox.gmm"
    return importlib.import_module(name).tgmm


def _ragged_dot(rows: Any, kernel: Any, runs: SortedChoices) -> Any:
    import jax

    # Rows without an expert join the last group: `ragged_dot` needs one per row.
    ends = ops.concatenate([runs.ends[:-1], ops.full((1,), rows.shape[0], "int32")])
    return jax.lax.ragged_dot(rows, kernel, ends - runs.starts)


def _expert_of_row(rows: Any, runs: SortedChoices) -> Any:
    """Return (m, e) bool: whether a row is in the run of an expert."""
    row = ops.expand_dims(ops.arange(rows.shape[0], dtype="int32"), 1)
    return ops.logical_and(row >= runs.starts, row < runs.ends)
