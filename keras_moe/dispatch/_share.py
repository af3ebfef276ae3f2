"""The share of a device: choices of its experts, of which it expects a part (JAX).

Axis letters: n tokens, d input features, u output units, e experts of the device, k
choices per token, b rows per turn of a loop, m = n * k choices that the device sees.

If experts are split over devices, a device sees all choices of its tokens and expects a
fraction of them. A dispatch computes the first rows of the sorted choices, a number a
little above the expectation. The choices beyond it, which few routings have, are
computed by a loop, b rows of one expert at a time: nothing is dropped, and neither time
nor memory are those of the worst case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from keras import ops

from keras_moe import _backend
from keras_moe.dispatch._rows import affine, flat, with_part
from keras_moe.experts._protocol import Prologue, apply_prologue
from keras_moe.routing import SortedChoices


class Share(NamedTuple):
    """The choices of a device, and the rows that a dispatch has room for.

    Attributes:
        runs: the sorted choices; those of other devices are behind the last run.
        rows: int, the number of sorted choices that the dispatch computes.
    """

    runs: SortedChoices
    rows: int

    def first_runs(self) -> SortedChoices:
        """Return the runs of the first `rows` choices."""
        starts, ends = (
            ops.minimum(x, self.rows) for x in (self.runs.starts, self.runs.ends)
        )
        return self.runs._replace(starts=starts, ends=ends)

    def first_rows(self) -> tuple[SortedChoices, Any]:
        """Return the runs of the first `rows` choices alone, and which are in them.

        The second is bool (n, k).
        """
        runs = self.first_runs()
        kept = runs.positions < runs.ends[-1]
        return runs._replace(
            order=runs.order[: self.rows],
            positions=ops.minimum(runs.positions, self.rows - 1),
        ), kept


def one_expert(rows: Any, experts: Any, training: bool | None) -> Any:
    """(b, d) -> (b, u), for a layer of experts that has only one."""

    def matmul(
        rows: Any, kernel: Any, bias: Any = None, prologue: Prologue | None = None
    ) -> Any:
        weights = [ops.convert_to_tensor(w)[0] for w in (kernel, bias) if w is not None]
        return affine(apply_prologue(prologue, rows), *weights)

    return experts.on_rows(rows, matmul, training=training)


def add_beyond(
    outputs: Any,
    tokens: Any,
    combine_weights: Any,
    weights: Sequence[Any],
    share: Share,
    expert: Callable[[Any, Any, Any], Any],
    seeds: Sequence[Any],
    b: int,
) -> Any:
    """Return `outputs` with those of the choices that `share` has no room for.

    The gradient computes them once more: no activations are kept.

    Args:
        outputs: `(n, u)`, or `(n, k, u)` without combine weights.
        tokens: `(n, d)`.
        combine_weights: `(n, k)`, or None.
        weights: list of `(e, ...)`.
        share: the choices of the device.
        expert: function of a list of `(1, ...)` (the weights of one expert), of `seeds`
            and of `(b, d)`; returns `(b, u)`.
        seeds: list of the states of random generators.
        b: int, the rows of one turn.
    """
    import jax

    k, shape = share.runs.positions.shape[1], outputs.shape
    weighted = combine_weights is not None
    gates = [ops.reshape(combine_weights, (-1,))] if weighted else []

    def part(inputs: Any, seeds: Any, block: _Block) -> Any:
        """Return the rows of a block, where their outputs go, and `expert` of rows."""
        x = _taken(inputs[1], block.choices // k)
        target = block.choices // k if weighted else block.choices
        # Every block draws other numbers than the rows that there is room for.
        shift = [ops.cast((1 + block.first) * 4096, "uint32"), ops.zeros((), "uint32")]
        seeds = [seed + ops.stack(shift) for seed in seeds]
        return x, target, lambda own, x: expert(own, seeds, x)

    def forward(*inputs_and_constants: Any) -> Any:
        *inputs, (runs, seeds) = inputs_and_constants
        gates, weights = inputs[2 : 2 + weighted], inputs[2 + weighted :]

        def of_expert(index: Any, blocks: Any, outputs: Any) -> Any:
            own = [w[index][None] for w in weights]

            def step(block: _Block, outputs: Any) -> Any:
                x, target, compute = part(inputs, seeds, block)
                y = compute(own, x)
                for gate in gates:
                    y = y * _taken(gate, block.choices)[:, None]
                return _added(outputs, target, y)

            return blocks(step, outputs)

        return _for_beyond(runs, share.rows, b, of_expert, inputs[0])

    def gradient(inputs: Any, constants: Any, upstream: Any) -> tuple[Any, ...]:
        runs, seeds = constants
        gates, weights = inputs[2 : 2 + weighted], inputs[2 + weighted :]
        # Sums over blocks use float32 under half precision.
        dtypes = ["float32" if w.dtype.itemsize == 2 else w.dtype for w in weights]

        def of_expert(index: Any, blocks: Any, carry: Any) -> Any:
            by_inputs, by_weights = carry
            own = [w[index][None] for w in weights]

            def step(block: _Block, carry: Any) -> Any:
                (by_tokens, *by_gates), sums = carry
                x, target, compute = part(inputs, seeds, block)
                y, pull = jax.vjp(compute, own, x)
                by_y = _taken(upstream, target)
                for i, gate in enumerate(gates):
                    by_gate = ops.sum(by_y * y, axis=-1)
                    by_gates[i] = _added(by_gates[i], block.choices, by_gate)
                    by_y = by_y * _taken(gate, block.choices)[:, None]
                by_own, by_x = pull(by_y)
                sums = [
                    total + ops.cast(part[0], total.dtype)
                    for total, part in zip(sums, by_own, strict=True)
                ]
                return [_added(by_tokens, block.choices // k, by_x), *by_gates], sums

            zeros = [
                ops.zeros(w.shape[1:], dtype)
                for w, dtype in zip(weights, dtypes, strict=True)
            ]
            by_inputs, sums = blocks(step, (by_inputs, zeros))
            by_weights = [
                with_part(whole, index, part)
                for whole, part in zip(by_weights, sums, strict=True)
            ]
            return by_inputs, by_weights

        carry = (
            [ops.zeros_like(x) for x in (inputs[1], *gates)],
            [ops.zeros_like(w) for w in weights],
        )
        by_inputs, by_weights = _for_beyond(runs, share.rows, b, of_expert, carry)
        return upstream, *by_inputs, *by_weights

    outputs = _backend.with_gradient(
        forward,
        gradient,
        (flat(outputs), tokens, *gates, *weights),
        (share.runs, list(seeds)),
    )
    return ops.reshape(outputs, shape)


class _Block(NamedTuple):
    """Rows of one expert: the first one, and the choices (b,); a large number if none.

    JAX reads zeros there, and writes nothing.
    """

    first: Any
    choices: Any


def _for_beyond(
    runs: SortedChoices, rows: int, b: int, of_expert: Any, carry: Any
) -> Any:
    """Run `of_expert(index, blocks, carry)` for the experts with choices behind `rows`.

    `blocks(step, carry)` runs `step(block, carry)` for those of the expert.
    """
    import jax

    order = ops.pad(runs.order, ((0, b),))

    def turn(state: Any) -> Any:
        index, carry = state
        end = runs.ends[index]

        def blocks(step: Any, carry: Any) -> Any:
            def block(state: Any) -> Any:
                first, carry = state
                choices = jax.lax.dynamic_slice_in_dim(order, first, b)
                inside = first + ops.arange(b, dtype="int32") < end
                choices = ops.where(inside, choices, _NONE)
                return first + b, step(_Block(first, choices), carry)

            start = ops.maximum(runs.starts[index], rows), carry
            return jax.lax.while_loop(lambda state: state[0] < end, block, start)[1]

        return index + 1, of_expert(index, blocks, carry)

    begin = ops.cast(ops.sum(ops.cast(runs.ends <= rows, "int32")), "int32"), carry
    return jax.lax.while_loop(lambda s: s[0] < runs.ends.shape[0], turn, begin)[1]


_NONE = 2**31 - 1


def _taken(values: Any, indices: Any) -> Any:
    return values.at[indices].get(mode="fill", fill_value=0)


def _added(values: Any, indices: Any, parts: Any) -> Any:
    return values.at[indices].add(ops.cast(parts, values.dtype), mode="drop")
