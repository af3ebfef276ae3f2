"""The grouped matmul of sorted rows: a loop over blocks, or the kernels of a TPU.

Axis letters: e experts, m rows; here k is the expert of a loop iteration.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_moe import _backend
from keras_moe import routing as routing_lib
from keras_moe.dispatch import _tpu
from keras_moe.dispatch._compiled import with_gradient
from keras_moe.dispatch._rows import (
    affine,
    block_of,
    identity,
    index,
    part_of,
    with_block,
    with_part,
)
from keras_moe.experts._protocol import Prologue
from keras_moe.routing import SortedChoices


def grouped_dense(
    rows: Any,
    kernel: Any,
    bias: Any,
    prologue: Prologue | None,
    runs: SortedChoices,
    sizes: tuple[int, ...],
    tpu_kernels: bool = False,
) -> Any:
    """(m, in), (e, in, out) -> (m, out): y_r = prologue(x_r) W_e + b_e for row r of e.

    `prologue` and its gradient are also computed block by block, in cache: the
    activations of all m rows are never stored. With `tpu_kernels`, programs for a TPU
    use its kernels in place of the loop.
    """
    rows = rows if isinstance(rows, tuple) else (rows,)
    weights = [w for w in (kernel, bias) if w is not None]
    dtype = _backend.as_tensor(kernel).dtype
    # The kernels cast what they read, and return gradients that were not rounded.
    read = _backend.without_autocast if tpu_kernels else _backend.as_tensor
    weights = [read(w) for w in weights]
    on_tpu = tpu_kernels and _tpu.supports(rows, weights[0], dtype)
    matmul = _Matmul(prologue or identity, len(rows), sizes, dtype, on_tpu)
    return with_gradient(_forward, _gradient, matmul, (*rows, *weights), runs)


class _Matmul(NamedTuple):
    """What tracing reads beside tensors. All of it must be here: traces are reused.

    Attributes:
        activate: the prologue.
        width: int, the number of tensors that it reads.
        sizes: the sizes of a block, ascending.
        dtype: that of the products.
        on_tpu: bool, whether programs for a TPU use its kernels.
    """

    activate: Prologue
    width: int
    sizes: tuple[int, ...]
    dtype: Any
    on_tpu: bool


def _forward(matmul: _Matmul, *inputs_and_runs: Any) -> Any:
    in_loop = functools.partial(_forward_in_loop, matmul)
    if not matmul.on_tpu:
        return in_loop(*inputs_and_runs)
    on_tpu = functools.partial(_forward_on_tpu, matmul)
    return _backend.on_tpu_or(on_tpu, in_loop, *inputs_and_runs)


def _gradient(matmul: _Matmul, inputs: Any, runs: SortedChoices, upstream: Any) -> Any:
    in_loop = functools.partial(_gradient_in_loop, matmul)
    if not matmul.on_tpu:
        return in_loop(inputs, runs, upstream)
    on_tpu = functools.partial(_gradient_on_tpu, matmul)
    return _backend.on_tpu_or(on_tpu, in_loop, inputs, runs, upstream)


def _forward_in_loop(matmul: _Matmul, *inputs_and_runs: Any) -> Any:
    activate, width, sizes, dtype, _ = matmul
    *inputs, runs = inputs_and_runs
    rows, weights = inputs[:width], inputs[width:]
    e = weights[0].shape[0]

    def expert(k: Any, outputs: Any) -> Any:
        own = [ops.cast(part_of(w, k), dtype) for w in weights]

        def step(first: Any, size: int, inside: Any, carry: Any) -> Any:
            (outputs,) = carry
            block = affine(
                activate(*[block_of(row, first, size) for row in rows]), *own
            )
            # On torch, Keras computes float64 matmuls in float32.
            block = ops.cast(block, outputs.dtype)
            return (with_block(outputs, first, block),)

        return k + 1, *_for_blocks(runs, k, sizes, step, (outputs,))

    shape = (ops.shape(rows[0])[0], weights[0].shape[-1])
    outputs = ops.zeros(shape, dtype)
    return ops.while_loop(lambda k, _: k < e, expert, (index(0), outputs))[1]


def _gradient_in_loop(
    matmul: _Matmul, inputs: Any, runs: SortedChoices, upstream: Any
) -> Any:
    activate, width, sizes, dtype, _ = matmul
    rows, weights = inputs[:width], inputs[width:]
    e = weights[0].shape[0]
    # Sums over blocks use float32 under half precision.
    name = keras.backend.standardize_dtype(dtype)
    sums_dtype = "float32" if name in ("float16", "bfloat16") else dtype

    def expert(k: Any, *carry: Any) -> Any:
        own_kernel = ops.cast(part_of(weights[0], k), dtype)

        def step(first: Any, size: int, inside: Any, carry: Any) -> Any:
            by_rows, by_weights = carry[:width], carry[width:]
            blocks = [block_of(row, first, size) for row in rows]
            by_output = block_of(upstream, first, size)
            if inside is not None:
                # Exclude the rows of the next expert, even NaN.
                blocks = [routing_lib.rows_where(inside, block) for block in blocks]
                by_output = routing_lib.rows_where(inside, by_output)
            hidden, pull = _backend.pullback(activate, blocks)
            products = [
                ops.matmul(ops.transpose(hidden), by_output),
                ops.sum(by_output, axis=0),
            ]
            by_blocks = pull(ops.matmul(by_output, ops.transpose(own_kernel)))
            return (
                *[
                    with_block(whole, first, block)
                    for whole, block in zip(by_rows, by_blocks, strict=True)
                ],
                *[
                    total + ops.cast(product, sums_dtype)
                    for total, product in zip(by_weights, products, strict=False)
                ],
            )

        zeros = [ops.zeros(w.shape[1:], sums_dtype) for w in weights]
        inner = _for_blocks(runs, k, sizes, step, (*carry[:width], *zeros))
        updated = [
            with_part(whole, k, part)
            for whole, part in zip(carry[width:], inner[width:], strict=True)
        ]
        return k + 1, *inner[:width], *updated

    carry = [ops.zeros_like(x) for x in (*rows, *weights)]
    found = ops.while_loop(lambda k, *_: k < e, expert, (index(0), *carry))
    return tuple(found[1:])


def _forward_on_tpu(matmul: _Matmul, *inputs_and_runs: Any) -> Any:
    *inputs, runs = inputs_and_runs
    rows, weights = inputs[: matmul.width], inputs[matmul.width :]
    return _tpu.affine(rows, weights, matmul.activate, runs)


def _gradient_on_tpu(
    matmul: _Matmul, inputs: Any, runs: SortedChoices, upstream: Any
) -> Any:
    rows, weights = inputs[: matmul.width], inputs[matmul.width :]
    return _tpu.affine_gradient(rows, weights, matmul.activate, runs, upstream)


def _for_blocks(runs: SortedChoices, k: Any, sizes: Any, step: Any, carry: Any) -> Any:
    """Run `step(first_row, size, rows_inside, carry)` over the rows of expert k.

    Full blocks first, then one block of the smallest size that fits the rest: each size
    has its own loop, and one of them runs. (With a conditional, XLA would copy the rows
    into every branch.)
    """
    whole, end = sizes[-1], runs.ends[k]

    def run_whole(first: Any, *carry: Any) -> Any:
        return first + whole, *step(first, whole, None, carry)

    carry = ops.while_loop(
        lambda first, *_: first + whole <= end, run_whole, (runs.starts[k], *carry)
    )
    for size in sizes:

        def run_rest(first: Any, *carry: Any, size: int = size) -> Any:
            inside = ops.arange(size, dtype="int32") < end - first
            return first + size, *step(first, size, inside, carry)

        def fits(first: Any, *carry: Any, size: int = size) -> Any:
            return ops.logical_and(first < end, end - first <= size)

        carry = ops.while_loop(fits, run_rest, carry)
    return carry[1:]
