"""The grouped matmul of `blocked_evenly`: all slots at once, the overflow in a loop.

Axis letters: e experts, c slots per expert, b rows per turn, r runs of overflow rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
from keras import ops

from keras_moe import _backend
from keras_moe import routing as routing_lib
from keras_moe.dispatch._compiled import with_gradient
from keras_moe.dispatch._rows import (
    affine,
    block_of,
    flat,
    identity,
    index,
    part_of,
    with_block,
    with_part,
)
from keras_moe.experts._protocol import Prologue


class Overflow(NamedTuple):
    """The slots with rows of another expert than their own, as r contiguous runs.

    Attributes:
        own: `(e,)` int32, the slots of each expert with rows of its own.
        experts: `(r,)` int32, the expert of each run, ascending.
        starts: `(r,)` int32, the first slot of each run.
        ends: `(r,)` int32, the last slot plus 1; equal to the start of an empty run.
        turns: `(r,)` int32, the turns of the loop up to the end of each run.
    """

    own: Any
    experts: Any
    starts: Any
    ends: Any
    turns: Any


def even_dense(
    rows: Any,
    kernel: Any,
    bias: Any,
    prologue: Prologue | None,
    overflow: Overflow,
    b: int,
) -> Any:
    """(e, c, in), (e, in, out) -> (e, c, out): y_r = prologue(x_r) W_e + b_e.

    e is the expert of row r: that of the slot, or for an overflow row its own.
    """
    rows = rows if isinstance(rows, tuple) else (rows,)
    weights = [_backend.as_tensor(w) for w in (kernel, bias) if w is not None]
    matmul = _Matmul(prologue or identity, len(rows), b)
    return with_gradient(_forward, _gradient, matmul, (*rows, *weights), overflow)


class _Matmul(NamedTuple):
    """What tracing reads beside tensors. All of it must be here: traces are reused.

    Attributes:
        activate: the prologue.
        width: int, the number of tensors that it reads.
        b: int, the rows per turn.
    """

    activate: Prologue
    width: int
    b: int


def _forward(matmul: _Matmul, *inputs_and_overflow: Any) -> Any:
    activate, width, b = matmul
    *inputs, overflow = inputs_and_overflow
    rows, weights = inputs[:width], inputs[width:]
    e = weights[0].shape[0]
    row_weights = [weights[0], *[ops.expand_dims(w, 1) for w in weights[1:]]]
    outputs = affine(activate(*rows), *row_weights)
    rows = [flat(row) for row in rows]

    def step(expert: Any, first: Any, inside: Any, outputs: Any) -> Any:
        own = [part_of(w, expert) for w in weights]
        block = affine(activate(*[block_of(row, first, b) for row in rows]), *own)
        return (_updated(outputs, first, inside, block),)

    carry = (flat(outputs),)
    _, outputs = _for_overflow(overflow, b, ops.shape(rows[0])[0], step, carry)
    return ops.reshape(outputs, (e, -1, outputs.shape[-1]))


def _gradient(matmul: _Matmul, inputs: Any, overflow: Overflow, upstream: Any) -> Any:
    activate, width, b = matmul
    rows, weights = inputs[:width], inputs[width:]
    e = weights[0].shape[0]
    hidden, pull = _backend.pullback(activate, rows)
    by_hidden = ops.matmul(upstream, ops.transpose(weights[0], (0, 2, 1)))
    # Sums over blocks use float32 under half precision.
    dtype = keras.backend.standardize_dtype(weights[0].dtype)
    sums_dtype = "float32" if dtype in ("float16", "bfloat16") else dtype

    # No other rows than its own reach the kernel of an expert, even NaN.
    slots = ops.expand_dims(ops.arange(ops.shape(hidden)[1], dtype="int32"), 0)
    hidden = routing_lib.rows_where(slots < ops.expand_dims(overflow.own, -1), hidden)
    rows = [flat(row) for row in rows]
    by_output, by_hidden = flat(upstream), flat(by_hidden)
    num_slots = ops.shape(by_output)[0]

    def step(expert: Any, first: Any, inside: Any, *carry: Any) -> Any:
        last, by_hidden, *sums = carry
        parts, totals = sums[: len(weights)], sums[len(weights) :]
        block = activate(*[block_of(row, first, b) for row in rows])
        block, by_block = (
            routing_lib.rows_where(inside, x)
            for x in (block, block_of(by_output, first, b))
        )
        products = [
            ops.matmul(ops.transpose(block), by_block),
            ops.sum(by_block, axis=0),
        ]
        # The turns of an expert follow each other: one sum is enough.
        parts = [
            ops.where(expert == last, part, ops.zeros_like(part))
            + ops.cast(product, sums_dtype)
            for part, product in zip(parts, products, strict=False)
        ]
        kernel = part_of(weights[0], expert)
        by_block = ops.matmul(by_block, ops.transpose(kernel))
        totals = [
            with_part(total, expert, part)
            for total, part in zip(totals, parts, strict=True)
        ]
        by_hidden = _updated(by_hidden, first, inside, by_block)
        return expert, by_hidden, *parts, *totals

    def remove(expert: Any, first: Any, inside: Any, by_output: Any) -> Any:
        zeros = ops.zeros((b, by_output.shape[-1]), by_output.dtype)
        return (_updated(by_output, first, inside, zeros),)

    carry = (
        index(-1),
        by_hidden,
        *[ops.zeros(w.shape[1:], sums_dtype) for w in weights],
        *[ops.zeros_like(w) for w in weights],
    )
    turns, _, by_hidden, *sums = _for_overflow(overflow, b, num_slots, step, carry)
    # A loop of its own, after the other: XLA copies the whole of a tensor that a
    # loop reads and writes, in every turn.
    start = turns - overflow.turns[-1]
    _, by_output = _for_overflow(overflow, b, num_slots, remove, (by_output,), start)
    by_output, by_hidden = (
        ops.reshape(x, (e, -1, x.shape[-1])) for x in (by_output, by_hidden)
    )
    by_weights = [
        ops.matmul(ops.transpose(hidden, (0, 2, 1)), by_output),
        ops.sum(by_output, axis=1),
    ]
    totals = sums[len(weights) :]
    return (
        *pull(by_hidden),
        *[
            ops.cast(own, total.dtype) + total
            for own, total in zip(by_weights, totals, strict=False)
        ],
    )


def _for_overflow(
    overflow: Overflow, b: int, num_slots: Any, step: Any, carry: Any, start: Any = None
) -> Any:
    """Run `step(expert, first_slot, inside, *carry)` over blocks of b slots.

    `start` is 0, as a tensor that another loop has computed. Returns the number of
    turns too.
    """

    def turn(t: Any, *carry: Any) -> Any:
        run = ops.sum(ops.cast(overflow.turns <= t, "int32"))
        turns_before = ops.take(routing_lib.shifted(overflow.turns), run)
        slot = ops.take(overflow.starts, run) + (t - turns_before) * b
        end = ops.take(overflow.ends, run)
        # A block that would pass the last slot begins earlier.
        first = ops.minimum(slot, num_slots - b)
        slots = first + ops.arange(b, dtype="int32")
        inside = ops.logical_and(slots >= slot, slots < end)
        return t + 1, *step(ops.take(overflow.experts, run), first, inside, *carry)

    turns = overflow.turns[-1]
    start = index(0) if start is None else start
    return ops.while_loop(lambda t, *_: t < turns, turn, (start, *carry))


def _updated(rows: Any, first: Any, inside: Any, block: Any) -> Any:
    """Return `rows` with those of `block` that are `inside`."""
    kept = ops.expand_dims(inside, -1)
    old = block_of(rows, first, inside.shape[0])
    # On torch, Keras computes float64 matmuls in float32.
    return with_block(rows, first, ops.where(kept, ops.cast(block, rows.dtype), old))
