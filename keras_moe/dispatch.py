"""How rows move: to the experts that a router chose for them, and back.

Axis letters: n tokens, d input features, u expert output units, e experts, k choices
a token, c capacity (slots an expert), b rows a block, m = n * k rows to compute.

Every dispatch maps tokens (n, d) to outputs (n, u). All of them give the same numbers
where nothing is dropped; they differ in what they compute and in what they ask of the
compiler:

- `dense`: every expert on every token, then a weighted sum. What a dense gate needs.
- `split`: the choices sorted by expert and cut into one piece for each, multiplied
  alone. Exactly the m rows chosen; the sizes are known only at run time, so XLA cannot
  compile it.
- `blocked`: the same sorted rows in blocks of static size. For XLA.
- `ragged`: the same sorted rows, multiplied by JAX's grouped matmul.
- `capacity`: every expert has c slots and takes tokens until it is full. What is
  dropped contributes nothing.

The three in the middle are dropless, and hand out (n, k, u), the output of each choice
on its own, if a `Routing` has no combine weights. What is gathered forward is gathered
backward too, by the inverse order: the gradient of a gather would be a scatter, which
is slow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_moe import _backend
from keras_moe import routing as routing_lib
from keras_moe.routing import (
    DenseRouting,
    ExpertChoiceRouting,
    Routing,
    Runs,
    Slots,
)

DROPLESS = ("split", "blocked", "ragged")
KNOWN = ("auto", "dense", "capacity", *DROPLESS)
# By who chooses in a router: a token its experts, an expert its tokens, or all.
SERVED = {
    "token": ("dense", "capacity", *DROPLESS),
    "expert": ("dense", "capacity"),
    "all": ("dense",),
}


def dropless_here(experts: Any) -> str:
    """Return the dispatch for the graph that is being traced: what "auto" chooses."""
    if not _backend.under_xla():
        return "split"
    if not hasattr(experts, "on_rows"):
        return "dense"
    return "ragged" if _backend.has_grouped_matmul() else "blocked"


def check_serves(dispatch: str, experts: Any) -> None:
    """Refuse a dropless dispatch that cannot multiply these experts, or not here."""
    needs = {"split": "on_pieces", "blocked": "on_rows", "ragged": "on_rows"}
    if not hasattr(experts, needs.get(dispatch, "call")):
        raise ValueError(
            f"`dispatch` must not be {dispatch!r} for the experts "
            f"{type(experts).__name__}, whose rows it cannot multiply."
        )
    if dispatch == "ragged" and keras.backend.backend() != "jax":
        raise ValueError(
            '`dispatch` may be "ragged" only on the JAX backend. Received: '
            f"dispatch={dispatch!r} on {keras.backend.backend()}"
        )


def checked_here(dispatch: str) -> str:
    """Return `dispatch`, unless the device would expand it to every expert."""
    if dispatch == "ragged" and not _backend.has_grouped_matmul():
        raise ValueError(
            'dispatch="ragged" needs a device with a grouped matmul, which XLA has '
            "for TPUs; elsewhere it would compute every expert on every row. "
            'Set `layer.dispatch = "auto"`.'
        )
    return dispatch


# Dense: every expert on every token.


def dense(
    tokens: Any,
    routing: Routing | ExpertChoiceRouting | DenseRouting,
    experts: Any,
    training: bool | None = None,
) -> Any:
    """Compute every expert on every token: y_i = sum_e g_ie f_e(x_i)."""
    outputs = experts(tokens, training=training)  # (n, e, u)
    gates = routing_lib.gates(routing, experts.num_experts, ops.shape(tokens)[0])
    weights = ops.expand_dims(ops.cast(gates, outputs.dtype), 1)  # (n, 1, e)
    outputs = ops.squeeze(ops.matmul(weights, outputs), axis=1)
    return nan_where(getattr(routing, "invalid", None), outputs)


def nan_where(invalid: Any, outputs: Any) -> Any:
    """Return `outputs` (n, u) with NaN in the rows that are `invalid` (n,) or None."""
    if invalid is None:
        return outputs
    # A scalar: a tensor of NaN is multiplied by 0, and stays NaN, in ONNX.
    return ops.where(ops.expand_dims(invalid, -1), float("nan"), outputs)


# Sorted rows: what the dropless dispatches share.


def _in_runs(
    compute: Callable[[Any, Runs], Any],
    tokens: Any,
    routing: Routing,
    num_experts: int,
    padding: int = 0,
) -> Any:
    """Sort the choices by expert, compute their rows, put them back where they belong.

    `compute` maps sorted rows (m + padding, d) to (m + padding, u). The rows added are
    copies of some token, which nobody asks for.
    """
    runs = routing_lib.sort_choices(routing, num_experts)
    if padding:
        runs = runs._replace(order=ops.pad(runs.order, ((0, padding),)))
    # The rows added copy some row, and of an empty batch there is none.
    source = _not_empty if padding else _identity
    rows = compute(_to_rows(tokens, runs, source), runs)
    if routing.combine_weights is None:
        return _each_choice(rows, runs, source)
    return _combine(rows, ops.cast(routing.combine_weights, rows.dtype), runs, source)


def _to_rows(tokens: Any, runs: Runs, source: Callable[[Any], Any]) -> Any:
    """(n, d) -> (m, d)."""

    def forward(tokens: Any, runs: Runs) -> Any:
        token_of_row = runs.order // runs.positions.shape[1]
        return ops.take(source(tokens), token_of_row, axis=0)

    def gradient(inputs: Any, runs: Runs, upstream: Any) -> tuple[Any, ...]:
        return (_sum_of_rows(upstream, runs.positions),)

    return _backend.with_gradient(forward, gradient, (tokens,), runs)


def _combine(rows: Any, weights: Any, runs: Runs, source: Callable[[Any], Any]) -> Any:
    """(m, u), (n, k) -> (n, u): y_i = sum_j w_ij rows[row of choice (i, j)]."""

    def gradient(inputs: Any, runs: Runs, upstream: Any) -> tuple[Any, ...]:
        rows, weights = inputs
        weight_of_row = ops.take(source(ops.reshape(weights, (-1,))), runs.order)
        by_rows = ops.take(source(upstream), runs.order // weights.shape[1], axis=0)
        by_weights = ops.take(ops.sum(by_rows * rows, axis=-1), runs.positions)
        # What JAX takes from nothing has not even a shape.
        by_weights = ops.reshape(by_weights, ops.shape(weights))
        return by_rows * ops.expand_dims(weight_of_row, -1), by_weights

    def forward(rows: Any, weights: Any, runs: Runs) -> Any:
        return _sum_of_rows(rows, runs.positions, weights)

    return _backend.with_gradient(forward, gradient, (rows, weights), runs)


def _each_choice(rows: Any, runs: Runs, source: Callable[[Any], Any]) -> Any:
    """(m, u) -> (n, k, u): the row of every choice."""

    def gradient(inputs: Any, runs: Runs, upstream: Any) -> tuple[Any, ...]:
        return (ops.take(source(_flat(upstream)), runs.order, axis=0),)

    def forward(rows: Any, runs: Runs) -> Any:
        # What JAX takes from nothing has not even a shape.
        shape = (*ops.shape(runs.positions), rows.shape[-1])
        return ops.reshape(ops.take(rows, runs.positions, axis=0), shape)

    return _backend.with_gradient(forward, gradient, (rows,), runs)


def _not_empty(rows: Any) -> Any:
    """Return `rows`, with one more if there may be none."""
    if rows.shape[0]:
        return rows
    return ops.pad(rows, ((0, 1), *[(0, 0)] * (len(rows.shape) - 1)))


def _sum_of_rows(
    rows: Any, positions: Any, weights: Any = None, kept: Any = None
) -> Any:
    """(m, u), (n, k) -> (n, u). One gather a choice: no (n, k, u) tensor."""
    total = None
    for j in range(positions.shape[1]):
        part = ops.take(rows, positions[:, j], axis=0)
        if weights is not None:
            part = part * weights[:, j : j + 1]
        if kept is not None:
            part = routing_lib.rows_where(kept[:, j], part)
        total = part if total is None else total + part
    return total


def _products_of_rows(outputs: Any, rows: Any, positions: Any) -> Any:
    """(n, u), (m, u), (n, k) -> (n, k): the gradient of `_sum_of_rows` by weights."""
    products = [
        ops.sum(outputs * ops.take(rows, positions[:, j], axis=0), axis=-1)
        for j in range(positions.shape[1])
    ]
    return ops.stack(products, axis=1)


# Split: a piece for every expert.


def split(
    tokens: Any, routing: Routing, experts: Any, training: bool | None = None
) -> Any:
    """Cut the sorted rows into one piece an expert and compute each piece alone."""
    if _backend.under_xla():
        raise ValueError(
            'dispatch="split" needs row counts that only the run knows, and neither '
            "XLA (`jit_compile=True`) nor JAX compiles them. "
            'Use dispatch="auto" or dispatch="blocked".'
        )

    def compute(rows: Any, runs: Runs) -> Any:
        # The rows that are no expert's are a last piece, which nobody computes.
        last = ops.shape(rows)[0] - runs.ends[-1:]
        sizes = ops.concatenate([runs.ends - runs.starts, ops.cast(last, "int32")])
        *pieces, rest = _backend.split_rows(rows, sizes, experts.num_experts + 1)
        outputs = experts.on_pieces(pieces, training=training)
        if routing.mask is not None or routing.combine_weights is None:
            shape = (ops.shape(rest)[0], outputs[0].shape[-1])
            outputs = [*outputs, ops.zeros(shape, outputs[0].dtype)]
        return ops.concatenate(outputs, axis=0)

    return _in_runs(compute, tokens, routing, experts.num_experts)


# Ragged: the grouped matmul of JAX.


def ragged(
    tokens: Any, routing: Routing, experts: Any, training: bool | None = None
) -> Any:
    """Multiply the sorted rows by `jax.lax.ragged_dot`."""

    def compute(rows: Any, runs: Runs) -> Any:
        # Rows that are no expert's go to the last one: every row must be in a run.
        ends = ops.concatenate([runs.ends[:-1], ops.shape(rows)[:1]])
        sizes = ends - runs.starts
        of_row = ops.searchsorted(
            ends, ops.arange(ops.shape(rows)[0], dtype="int32"), side="right"
        )

        def matmul(rows: Any, kernel: Any, bias: Any = None, before: Any = None) -> Any:
            rows = _apply(before, rows)
            rows = _backend.ragged_dot(rows, ops.convert_to_tensor(kernel), sizes)
            return rows if bias is None else rows + ops.take(bias, of_row, axis=0)

        return experts.on_rows(rows, matmul, training=training)

    return _in_runs(compute, tokens, routing, experts.num_experts)


# Capacity: slots that take tokens until they are full.


def capacity(
    tokens: Any,
    routing: Routing,
    experts: Any,
    training: bool | None = None,
    *,
    slots: Slots,
) -> Any:
    """Compute the tokens in the `slots` of every expert."""
    return _in_slots(
        lambda rows: experts.on_slots(rows, training=training), tokens, routing, slots
    )


def expert_choice(
    tokens: Any,
    routing: ExpertChoiceRouting,
    experts: Any,
    training: bool | None = None,
) -> Any:
    """Compute the tokens that the experts chose; a token sums over those who did."""
    n = ops.shape(tokens)[0]
    tokens = ops.pad(tokens, ((0, 1), (0, 0)))  # What slot without a token holds.
    rows = experts.on_slots(
        ops.take(tokens, routing.token_indices, axis=0), training=training
    )
    weights = ops.cast(routing.combine_weights, rows.dtype)
    rows = rows * ops.expand_dims(weights, -1)
    sums = ops.segment_sum(
        ops.reshape(rows, (-1, rows.shape[-1])),
        ops.reshape(routing.token_indices, (-1,)),
        num_segments=n + 1,
    )[:-1]
    return nan_where(routing.invalid, sums)


def _in_slots(
    compute: Callable[[Any], Any], tokens: Any, routing: Routing, slots: Slots
) -> Any:
    """Fill slots (s, c, d), compute them to (s, c, u), and sum the slots of a token."""
    # Where a choice has no slot, any will do: `kept` hides what is read there.
    slots = slots._replace(
        slot_of_choice=ops.where(
            slots.kept, slots.slot_of_choice, ops.zeros_like(slots.slot_of_choice)
        )
    )

    def fill(tokens: Any, slots: Slots) -> Any:
        # One row of zeros more, for the slots without a token.
        return ops.take(ops.pad(tokens, ((0, 1), (0, 0))), slots.tokens, axis=0)

    def fill_gradient(inputs: Any, slots: Slots, upstream: Any) -> tuple[Any, ...]:
        rows = _sum_of_rows(_flat(upstream), slots.slot_of_choice, kept=slots.kept)
        return (rows,)

    def combine(rows: Any, weights: Any, slots: Slots) -> Any:
        return _sum_of_rows(_flat(rows), slots.slot_of_choice, weights, slots.kept)

    def combine_gradient(inputs: Any, slots: Slots, upstream: Any) -> tuple[Any, ...]:
        rows, weights = inputs
        s, c = ops.shape(rows)[:2]
        # The weight of a slot is that of the choice in it.
        target = ops.where(slots.kept, slots.slot_of_choice, s * c)
        weight_of_slot = ops.scatter(
            ops.reshape(target, (-1, 1)), ops.reshape(weights, (-1,)), (s * c + 1,)
        )[:-1]
        by_rows = ops.take(ops.pad(upstream, ((0, 1), (0, 0))), slots.tokens, axis=0)
        by_rows = by_rows * ops.reshape(weight_of_slot, (s, c, 1))
        by_weights = _products_of_rows(upstream, _flat(rows), slots.slot_of_choice)
        none = ops.zeros_like(by_weights)
        return by_rows, ops.where(slots.kept, by_weights, none)

    rows = compute(_backend.with_gradient(fill, fill_gradient, (tokens,), slots))
    if routing.combine_weights is None:
        outputs = ops.take(_flat(rows), slots.slot_of_choice, axis=0)
        return routing_lib.rows_where(slots.kept, outputs)
    weights = ops.cast(routing.combine_weights, rows.dtype)
    return _backend.with_gradient(combine, combine_gradient, (rows, weights), slots)


def _flat(rows: Any) -> Any:
    """(..., d) -> (rows, d)."""
    return ops.reshape(rows, (-1, rows.shape[-1]))


# Blocked: static sizes for XLA.


def blocked(
    tokens: Any, routing: Routing, experts: Any, training: bool | None = None
) -> Any:
    """Multiply the sorted rows in blocks of static size."""
    if _backend.on_accelerator():
        return blocked_at_once(tokens, routing, experts, training)
    return blocked_in_turn(tokens, routing, experts, training)


def blocked_at_once(
    tokens: Any, routing: Routing, experts: Any, training: bool | None = None
) -> Any:
    """All blocks in one batched matmul, each with its expert's kernel: GPU and TPU.

    A loop whose trip count is data would make a GPU ask its host before every block.
    The price is a copy of its expert's kernel for every block.
    """
    e, k = experts.num_experts, routing.expert_indices.shape[1]
    n = ops.shape(tokens)[0]
    b = _rows_a_block(n, k, e)
    runs = routing_lib.sort_choices(routing, e)
    of_block, slots = _block_slots(runs, b, n * k // b + e, n, k)

    def matmul(rows: Any, kernel: Any, bias: Any = None, before: Any = None) -> Any:
        rows = ops.matmul(_apply(before, rows), ops.take(kernel, of_block, axis=0))
        if bias is None:
            return rows
        return rows + ops.expand_dims(ops.take(bias, of_block, axis=0), 1)

    return _in_slots(
        lambda rows: experts.on_rows(rows, matmul, training=training),
        tokens,
        routing,
        slots,
    )


def _rows_a_block(n: Any, k: int, e: int) -> int:
    """At most a quarter of an even load, but 8 at least and 512 at most.

    Padding then adds a quarter at most, unless an even load is below 32 rows.
    """
    if not isinstance(n, int):
        return 32
    b = 8
    while b < 512 and 8 * b * e <= n * k:
        b *= 2
    return b


def _block_slots(runs: Runs, b: int, blocks: Any, n: Any, k: int) -> tuple[Any, Slots]:
    """Return the expert of every block, and the slots that the blocks are."""
    block_ends = ops.cumsum((runs.ends - runs.starts + (b - 1)) // b)
    block_ends = ops.cast(block_ends, "int32")
    # How far the rows of an expert move up to start with a block of their own.
    shifts = routing_lib.shifted(block_ends) * b - runs.starts
    block = ops.arange(blocks, dtype="int32")
    of_block = ops.cast(ops.searchsorted(block_ends, block, side="right"), "int32")
    of_block = ops.minimum(of_block, ops.shape(runs.ends)[0] - 1)
    rows = ops.expand_dims(block * b - ops.take(shifts, of_block), -1)
    rows = rows + ops.arange(b, dtype="int32")
    filled = rows < ops.expand_dims(ops.take(runs.ends, of_block), -1)
    of_choice = ops.searchsorted(
        runs.ends, ops.reshape(runs.positions, (-1,)), side="right"
    )
    shift_of_choice = ops.take(ops.pad(shifts, ((0, 1),)), of_choice)
    return of_block, Slots(
        tokens=routing_lib.tokens_in_rows(runs, rows, filled, n, k),
        slot_of_choice=runs.positions + ops.reshape(shift_of_choice, (-1, k)),
        kept=runs.positions < runs.ends[-1],
    )


def blocked_in_turn(
    tokens: Any, routing: Routing, experts: Any, training: bool | None = None
) -> Any:
    """Blocks one after the other, as many as there are: CPU.

    The last block of an expert may reach into the rows of the next one, which writes
    them again when its turn comes. Hence no gaps between the experts, and the rows of
    one block behind the last.
    """
    num_rows = None
    if tokens.shape[0] is not None:
        num_rows = tokens.shape[0] * routing.expert_indices.shape[1]
    sizes = block_sizes(num_rows, experts.num_experts)

    def compute(rows: Any, runs: Runs) -> Any:
        def matmul(rows: Any, kernel: Any, bias: Any = None, before: Any = None) -> Any:
            return _grouped_dense(rows, kernel, bias, before, runs, sizes)

        return experts.on_rows(rows, matmul, training=training)

    return _in_runs(compute, tokens, routing, experts.num_experts, sizes[-1])


def block_sizes(num_rows: int | None, num_experts: int) -> tuple[int, ...]:
    """Return the sizes that the last block of an expert may have, up to a whole one.

    A whole block is as large as an even load or up to twice as large, so that most
    experts need one block, but no more than 256 rows; or, where that is more, half an
    even load, up to 1024 rows: fewer and longer turns of the loop. The next size that
    holds the rest is at most an eighth of a whole block larger.
    """
    whole = 16
    if num_rows is None:
        return tuple(range(16, 129, 16))
    while whole < 256 and whole * num_experts <= num_rows:
        whole *= 2
    while whole < 1024 and 4 * whole * num_experts <= num_rows:
        whole *= 2
    return tuple(range(whole // 8, whole + 1, whole // 8))


def rows_multiplied(counts: Any) -> int:
    """Return how many rows `blocked_in_turn` multiplies for `counts` rows an expert.

    >>> from keras_moe.dispatch import rows_multiplied
    >>> rows_multiplied([300, 0, 33])  # 128 + 128 + 48, nothing, and 48
    352
    """
    counts = [int(count) for count in counts]
    step, *_, whole = block_sizes(sum(counts), len(counts))
    return sum(count + -(count % whole) % step for count in counts)


def _grouped_dense(
    rows: Any, kernel: Any, bias: Any, before: Any, runs: Runs, sizes: Any
) -> Any:
    """(m, in), (e, in, out) -> (m, out): y_r = before(x_r) W_e + b_e, e that of row r.

    `before` is computed block by block as well, in the cache, and so is its gradient:
    an activation as large as all rows is never stored.
    """
    rows = rows if isinstance(rows, tuple) else (rows,)
    before = before or _identity
    weights = [_backend.as_tensor(w) for w in (kernel, bias) if w is not None]
    width = len(rows)
    e = weights[0].shape[0]

    def forward(*inputs_and_runs: Any) -> Any:
        *inputs, runs = inputs_and_runs
        rows, weights = inputs[:width], inputs[width:]

        def expert(k: Any, outputs: Any) -> Any:
            own = [_slice(w, k) for w in weights]

            def step(first: Any, size: int, inside: Any, carry: Any) -> Any:
                (outputs,) = carry
                block = _affine(
                    before(*[_block(row, first, size) for row in rows]), *own
                )
                # On torch Keras multiplies float64 in float32.
                block = ops.cast(block, outputs.dtype)
                return (ops.slice_update(outputs, (first, _int(0)), block),)

            return k + 1, *_for_blocks(runs, k, sizes, step, (outputs,))

        shape = (ops.shape(rows[0])[0], weights[0].shape[-1])
        outputs = ops.zeros(shape, weights[0].dtype)
        return ops.while_loop(lambda k, _: k < e, expert, (_int(0), outputs))[1]

    def gradient(inputs: Any, runs: Runs, upstream: Any) -> Any:
        rows, weights = inputs[:width], inputs[width:]
        # Sums over many blocks stay float32 where the layer computes in less.
        dtype = keras.backend.standardize_dtype(weights[0].dtype)
        sums_dtype = "float32" if dtype in ("float16", "bfloat16") else dtype

        def expert(k: Any, *carry: Any) -> Any:
            own_kernel = _slice(weights[0], k)

            def step(first: Any, size: int, inside: Any, carry: Any) -> Any:
                by_rows, by_weights = carry[:width], carry[width:]
                blocks = [_block(row, first, size) for row in rows]
                by_output = _block(upstream, first, size)
                if inside is not None:
                    # Rows of the next expert: neither they nor their NaN count here.
                    blocks = [routing_lib.rows_where(inside, block) for block in blocks]
                    by_output = routing_lib.rows_where(inside, by_output)
                hidden, pull = _backend.pullback(before, blocks)
                products = [
                    ops.matmul(ops.transpose(hidden), by_output),
                    ops.sum(by_output, axis=0),
                ]
                by_blocks = pull(ops.matmul(by_output, ops.transpose(own_kernel)))
                return (
                    *[
                        ops.slice_update(whole, (first, _int(0)), block)
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
                ops.slice_update(
                    whole,
                    (k, *[_int(0)] * (len(whole.shape) - 1)),
                    ops.expand_dims(ops.cast(part, whole.dtype), 0),
                )
                for whole, part in zip(carry[width:], inner[width:], strict=True)
            ]
            return k + 1, *inner[:width], *updated

        carry = [ops.zeros_like(x) for x in (*rows, *weights)]
        return ops.while_loop(lambda k, *_: k < e, expert, (_int(0), *carry))[1:]

    return _backend.with_gradient(forward, gradient, (*rows, *weights), runs)


def _for_blocks(runs: Runs, k: Any, sizes: Any, step: Any, carry: Any) -> Any:
    """Run `step(first_row, size, rows_inside, carry)` over the rows of expert k.

    Whole blocks first, then one block of the smallest size that holds the rest: each
    size has a loop, and only that one turns. (A conditional would do the same, but XLA
    copies the rows into every branch.)
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


def _identity(rows: Any) -> Any:
    return rows


def _apply(before: Any, rows: Any) -> Any:
    """Return `before(*rows)` for rows that are one tensor or a tuple of them."""
    rows = rows if isinstance(rows, tuple) else (rows,)
    return (before or _identity)(*rows)


def _affine(rows: Any, kernel: Any, bias: Any = None) -> Any:
    outputs = ops.matmul(rows, kernel)
    return outputs if bias is None else outputs + bias


def _int(value: int) -> Any:
    """An index: JAX wants all indices of a slice to be of one integer type."""
    return ops.convert_to_tensor(value, "int32")


def _slice(stacked: Any, k: Any) -> Any:
    """Return `stacked[k]`."""
    zeros = [_int(0)] * (len(stacked.shape) - 1)
    part = ops.slice(stacked, (k, *zeros), (1, *stacked.shape[1:]))
    return ops.reshape(part, stacked.shape[1:])


def _block(rows: Any, first: Any, size: int) -> Any:
    return ops.slice(rows, (first, _int(0)), (size, rows.shape[-1]))
