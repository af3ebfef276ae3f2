"""Pallas kernels of a TPU for sorted rows: grouped matmuls and their gradients.

A kernel computes a tile of rows for each expert that has rows in it: a *visit*. Biases,
activations and their gradients are computed while the tile is in the core's memory.

Axis letters: e experts, m rows, v visits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from keras_moe.routing import SortedChoices

_MOST_ROWS = 512
_LARGEST_PART = 1024
# The largest blocks of rows, in bytes, and of a kernel, in numbers. They are in memory
# twice, as the next one is read, and a kernel once more in the dtype of the rows.
_ROWS_BYTES = 2**21
_KERNEL_SIZE = 2**22
# Of 128 MiB in a v5e or v6e.
_CORE_BYTES = 64 * 2**20


class Visits(NamedTuple):
    """The visits in their order; those after the last one repeat it.

    Attributes:
        experts: `(v,)` int32, ascending.
        tiles: `(v,)` int32, ascending.
        count: `(1,)` int32, the number of visits.
        starts: `(e,)` int32, the first row of each expert.
        ends: `(e,)` int32, the row after the last one of each expert.
    """

    experts: Any
    tiles: Any
    count: Any
    starts: Any
    ends: Any


def visits(runs: SortedChoices, num_rows: int, tile: int) -> Visits:
    """Return the visits of tiles of `tile` rows; an expert without rows has one.

    The last expert also visits the rows of no expert, which are at the end.
    """
    tiles, e = pl.cdiv(num_rows, tile), runs.ends.shape[0]
    ends = runs.ends.at[-1].set(num_rows)
    first = jnp.minimum(runs.starts // tile, tiles - 1)
    last = jnp.maximum(first, (ends - 1) // tile)
    until = jnp.cumsum(last - first + 1, dtype="int32")
    visit = jnp.arange(tiles + e - 1, dtype="int32")
    done = jnp.sum(visit[:, None] >= until, axis=1, dtype="int32")
    experts = jnp.minimum(done, e - 1)
    of_visit = jnp.minimum(last[experts] - until[experts] + 1 + visit, tiles - 1)
    return Visits(experts, of_visit, until[-1:], runs.starts, runs.ends)


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


def products(
    rows: Sequence[Any],
    kernel: Any,
    bias: Any,
    prologue: Callable[..., Any],
    runs: SortedChoices,
) -> Any:
    """(m, in), (e, in, out), (e, out) -> (m, out): y_r = prologue(x_r) W_e + b_e.

    The rows of no expert are zeros.
    """
    (m, width), dtype = rows[0].shape, rows[0].dtype
    e, _, out = kernel.shape
    tile, part = _blocks(m, e, width, out, len(rows) * dtype.itemsize)
    plan = visits(runs, m, tile)

    def compute(v: Any, plan: Visits, *refs: Any) -> None:
        *tiles, read_kernel, own_bias, outputs, own_kernel = refs
        _cast_once(read_kernel, own_kernel, v, plan)
        values = prologue(*map(_float32, tiles)).astype(dtype)
        product = jnp.dot(values, own_kernel[...], preferred_element_type="float32")
        _store(outputs, product + _float32(own_bias), v, plan)

    return pl.pallas_call(
        _on_visits(compute, axis=1),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(plan),
            grid=(pl.cdiv(out, part), len(plan.tiles)),
            in_specs=[
                *[pl.BlockSpec((tile, width), _row_block)] * len(rows),
                pl.BlockSpec((None, width, part), lambda i, v, e, *_: (e[v], 0, i)),
                pl.BlockSpec((None, 1, part), lambda i, v, e, *_: (e[v], 0, i)),
            ],
            out_specs=pl.BlockSpec((tile, part), _part_block),
            scratch_shapes=[pltpu.VMEM((width, part), dtype)],
        ),
        out_shape=jax.ShapeDtypeStruct((m, out), dtype),
        **_options(
            flops=2 * len(plan.tiles) * tile * width * out,
            moved=[(row, pl.cdiv(out, part)) for row in rows] + [(kernel, 1)],
            written=m * out * dtype.itemsize,
        ),
    )(*plan, *rows, kernel, bias[:, None])


def row_gradients(
    upstream: Any,
    kernel: Any,
    rows: Sequence[Any],
    pull: Callable[..., Sequence[Any]],
    runs: SortedChoices,
) -> list[Any]:
    """(m, out), (e, in, out) -> tensors (m, in): `pull(g_r W_e^T, *x_r)`.

    They take the memory of `rows`, (m, in); without `rows` it is one tensor. The rows
    of no expert are zeros.
    """
    (m, out), dtype = upstream.shape, upstream.dtype
    e, width, _ = kernel.shape
    tile, part = _blocks(m, e, out, width, dtype.itemsize)
    plan = visits(runs, m, tile)
    num_outputs = len(rows) or 1

    def compute(v: Any, plan: Visits, *refs: Any) -> None:
        by_output, read_kernel, *others, own_kernel = refs
        tiles, outputs = others[: len(rows)], others[len(rows) :]
        _cast_once(read_kernel, own_kernel, v, plan)
        product = jax.lax.dot_general(
            by_output[...],
            own_kernel[...],
            (((1,), (1,)), ((), ())),
            preferred_element_type="float32",
        )
        by_rows = pull(product, *map(_float32, tiles))
        for ref, values in zip(outputs, by_rows, strict=True):
            _store(ref, values, v, plan)

    row_specs = [pl.BlockSpec((tile, part), _part_block)] * num_outputs
    parts = pl.cdiv(width, part)
    return pl.pallas_call(
        _on_visits(compute, axis=1),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(plan),
            grid=(parts, len(plan.tiles)),
            in_specs=[
                pl.BlockSpec((tile, out), _row_block),
                pl.BlockSpec((None, part, out), lambda i, v, e, *_: (e[v], i, 0)),
                *row_specs[: len(rows)],
            ],
            out_specs=row_specs,
            scratch_shapes=[pltpu.VMEM((part, out), dtype)],
        ),
        out_shape=[jax.ShapeDtypeStruct((m, width), dtype)] * num_outputs,
        input_output_aliases={len(plan) + 2 + i: i for i in range(len(rows))},
        **_options(
            flops=2 * len(plan.tiles) * tile * width * out,
            moved=[(upstream, parts), (kernel, 1), *[(row, 1) for row in rows]],
            written=m * width * dtype.itemsize * num_outputs,
        ),
    )(*plan, upstream, kernel, *rows)


def weight_gradients(
    rows: Sequence[Any],
    upstream: Any,
    prologue: Callable[..., Any],
    runs: SortedChoices,
    dtype: Any,
) -> list[Any]:
    """(m, in), (m, out) -> (e, in, out), (e, out): by kernel and bias, of `dtype`.

    The sums of prologue(x_r)^T g_r and of g_r over the rows of an expert, of which no
    others are used, even NaN.
    """
    (m, width), out = rows[0].shape, upstream.shape[1]
    e = runs.ends.shape[0]
    tile = rows_per_tile(m, e)
    part_in, part_out = _part(width, _LARGEST_PART), _part(out, _LARGEST_PART)
    plan = visits(runs, m, tile)
    num_visits = len(plan.tiles)

    def compute(*refs: Any) -> None:
        plan, i, v = Visits(*refs[:5]), pl.program_id(1), pl.program_id(2)
        *tiles, by_output, by_kernel, by_bias, sums, bias_sums = refs[5:]
        expert, end = plan.experts[v], num_visits - 1
        after = plan.experts[jnp.minimum(v + 1, end)]
        is_last = jnp.logical_or(v == end, after != expert)

        @pl.when(_is_first(v, plan))
        def _() -> None:
            sums[...] = jnp.zeros_like(sums)
            bias_sums[...] = jnp.zeros_like(bias_sums)

        @pl.when(v < plan.count[0])
        def _() -> None:
            def own(values: Any) -> Any:
                row = _row_numbers(values.shape, v, plan)
                inside = (row >= plan.starts[expert]) & (row < plan.ends[expert])
                return jnp.where(inside, values, 0.0)

            values = own(prologue(*map(_float32, tiles)))
            own_output = own(_float32(by_output))
            bias_sums[...] += jnp.sum(own_output, axis=0, keepdims=True)
            sums[...] += jnp.dot(
                values.astype(upstream.dtype).T,
                own_output.astype(upstream.dtype),
                preferred_element_type="float32",
            )

        @pl.when(is_last)
        def _() -> None:
            by_kernel[...] = sums[...].astype(dtype)

        @pl.when(jnp.logical_and(is_last, i == 0))
        def _() -> None:
            by_bias[...] = bias_sums[...].astype(dtype)

    def of_bias(j: Any, i: Any, v: Any, experts: Any, *_: Any) -> Any:
        # The sums are the same for all parts i; no block may be written again later.
        return jnp.where(i == 0, experts[v], e - 1), 0, j

    parts_in, parts_out = pl.cdiv(width, part_in), pl.cdiv(out, part_out)
    by_kernel, by_bias = pl.pallas_call(
        compute,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(plan),
            grid=(parts_out, parts_in, num_visits),
            in_specs=[
                *[pl.BlockSpec((tile, part_in), lambda j, i, v, e, t, *_: (t[v], i))]
                * len(rows),
                pl.BlockSpec((tile, part_out), lambda j, i, v, e, t, *_: (t[v], j)),
            ],
            out_specs=[
                pl.BlockSpec(
                    (None, part_in, part_out), lambda j, i, v, e, *_: (e[v], i, j)
                ),
                pl.BlockSpec((None, 1, part_out), of_bias),
            ],
            scratch_shapes=[
                pltpu.VMEM((part_in, part_out), "float32"),
                pltpu.VMEM((1, part_out), "float32"),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((e, width, out), dtype),
            jax.ShapeDtypeStruct((e, 1, out), dtype),
        ],
        **_options(
            flops=2 * num_visits * tile * width * out,
            moved=[*[(row, parts_out) for row in rows], (upstream, parts_in)],
            written=e * width * out * jnp.dtype(dtype).itemsize,
        ),
    )(*plan, *rows, upstream)
    return [by_kernel, by_bias[:, 0]]


def _blocks(
    num_rows: int, num_experts: int, width: int, out: int, itemsize: int
) -> tuple[int, int]:
    """Return the rows of a tile and the part of `out` of blocks that fit the core."""
    tile = rows_per_tile(num_rows, num_experts)
    while tile > 128 and tile * width * itemsize > _ROWS_BYTES:
        tile //= 2
    return tile, _part(out, max(128, min(_KERNEL_SIZE // width, _LARGEST_PART)))


def _part(width: int, largest: int) -> int:
    """Return the size of equal parts, a multiple of 128 unless there is one part."""
    if width <= largest:
        return width
    parts = -(-width // largest)
    return -(-width // (128 * parts)) * 128


def _on_visits(compute: Callable[..., None], axis: int) -> Callable[..., None]:
    """Return a kernel that calls `compute(v, plan, *refs)` for each visit."""

    def kernel(*refs: Any) -> None:
        plan, v = Visits(*refs[:5]), pl.program_id(axis)
        pl.when(v < plan.count[0])(lambda: compute(v, plan, *refs[5:]))

    return kernel


def _is_first(v: Any, plan: Visits) -> Any:
    """Whether the visit before this one, if any, was of another expert."""
    before = plan.experts[jnp.maximum(v - 1, 0)]
    return jnp.logical_or(v == 0, before != plan.experts[v])


def _cast_once(kernel: Any, cast: Any, v: Any, plan: Visits) -> None:
    """Keep the kernel of an expert in the dtype of `cast`."""

    @pl.when(_is_first(v, plan))
    def _() -> None:
        cast[...] = kernel[...].astype(cast.dtype)


def _store(ref: Any, values: Any, v: Any, plan: Visits) -> None:
    """Write the rows from the expert's first one on; the next expert overwrites its."""
    row, expert = _row_numbers(values.shape, v, plan), plan.experts[v]
    values = jnp.where(row < plan.ends[expert], values, 0.0)
    values = jnp.where(row < plan.starts[expert], _float32(ref), values)
    ref[...] = values.astype(ref.dtype)


def _row_numbers(shape: tuple[int, ...], v: Any, plan: Visits) -> Any:
    rows = jax.lax.broadcasted_iota("int32", shape, 0)
    return rows + plan.tiles[v] * shape[0]


def _float32(ref: Any) -> Any:
    return ref[...].astype("float32")


def _row_block(i: Any, v: Any, experts: Any, tiles: Any, *_: Any) -> Any:
    return tiles[v], 0


def _part_block(i: Any, v: Any, experts: Any, tiles: Any, *_: Any) -> Any:
    return tiles[v], i


def _options(
    flops: int, moved: Sequence[tuple[Any, int]], written: int
) -> dict[str, Any]:
    """Return the cost for XLA, and the memory; `moved` has (tensor, times read)."""
    read = sum(tensor.size * tensor.dtype.itemsize * times for tensor, times in moved)
    cost = pl.CostEstimate(
        flops=flops, bytes_accessed=read + written, transcendentals=0
    )
    memory = pltpu.CompilerParams(vmem_limit_bytes=_CORE_BYTES)
    return {"cost_estimate": cost, "compiler_params": memory}
