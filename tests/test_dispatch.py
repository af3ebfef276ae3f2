"""Every dispatch computes the same, at its own cost.

`tests/layers/test_moe_*.py` compare every router and all experts with the oracle; here
records are drawn at random, with any sizes and loads.
"""

import functools
import math
import re

import keras
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from keras import ops

from keras_moe import _backend
from keras_moe import dispatch as dispatch_lib
from keras_moe import routing as routing_lib
from keras_moe.dispatch import _blocked, _even
from keras_moe.experts import MLPExperts
from keras_moe.layers import MoE
from keras_moe.routing import Routing
from tests.support import backends, dispatches, moe_oracles

D, U = 3, 2
BOUNDED = settings(max_examples=30, deadline=None, derandomize=True)
if dispatches.BACKEND == "jax":
    # It compiles every example anew, and would again to find the smallest one.
    BOUNDED = settings(BOUNDED, max_examples=4, phases=[Phase.generate])


def array(tensor):
    return np.asarray(ops.convert_to_numpy(tensor))


class Moved(keras.layers.Layer):
    """Experts behind a dispatch, as a function of tokens and weights of a record."""

    def __init__(self, way, experts, indices, mask=None, capacity=None):
        super().__init__(dtype=experts.dtype_policy)
        self.way, self.experts = way, experts
        self.indices, self.mask, self.capacity = indices, mask, capacity
        self.move = getattr(dispatch_lib, dispatches.dispatch_of(way))
        self.built = True

    def call(self, tokens, weights):
        mask = None if self.mask is None else ops.convert_to_tensor(self.mask)
        record = Routing(ops.convert_to_tensor(self.indices), weights, mask=mask)
        options = {}
        if self.way == "capacity":
            slots = routing_lib.capacity_slots(
                record, self.experts.num_experts, self.capacity
            )
            options = {"slots": slots}
        return self.move(tokens, record, self.experts, **options)


def experts_of(e, units=(3, U), dtype="float64"):
    experts = MLPExperts(e, units, dtype=dtype)
    experts.build((None, D))
    rng = np.random.default_rng(e)
    for weight in experts.trainable_variables:
        weight.assign(rng.normal(size=weight.shape))
    return experts


@BOUNDED
@given(
    n=st.integers(0, 14),
    e=st.integers(1, 6),
    share=st.floats(0, 1),
    skew=st.sampled_from([0.0, 3.0]),
    masked=st.booleans(),
    sizes=st.sampled_from([(1, 1), (4, 2), (8, 8)]),
    seed=st.integers(0, 1000),
)
def test_all_ways_agree_for_any_sizes(n, e, share, skew, masked, sizes, seed):
    """The outputs are the oracle's, and all ways have the gradients of the first."""
    k, rng = 1 + int(share * (e - 1)), np.random.default_rng(seed)
    # Skewed: most tokens want the first experts, and the last ones stay empty.
    wish = rng.random((n, e)) - skew * np.arange(e) / e
    indices = np.argsort(-wish, axis=1)[:, :k].astype("int32")
    mask = rng.random(n) < 0.7 if masked else None
    inputs = [rng.normal(size=(n, D)), rng.random((n, k))]
    experts = experts_of(e)
    kernels, biases = ([array(w) for w in v] for v in (experts.kernels, experts.biases))
    wanted = moe_oracles.moe(
        inputs[0],
        {"expert_indices": indices, "combine_weights": inputs[1]},
        moe_oracles.mlp_experts(kernels, biases),
        mask,
    ).reshape(n, U)
    counted = np.ones((n, 1)) if masked is False else mask[:, None]
    cotangent = counted * rng.normal(size=(n, U))
    reference = None
    for way in dispatches.TOKEN_CHOICE:
        with dispatches.chosen(way, *sizes):
            layer = Moved(way, experts, indices, mask, max(n, 1))
            outputs, *gradients = backends.outputs_and_gradients(
                layer, inputs, [cotangent]
            )
        # The layer above sets what stands in the rows of padding to zero.
        np.testing.assert_allclose(
            counted * outputs[0], wanted, **backends.tolerance(1e-9, 1e-12)
        )
        for by_input in gradients[1]:
            by_input *= counted
        gradients = [*gradients[0], *gradients[1]]
        reference = reference or gradients
        for a, b in zip(gradients, reference, strict=True):
            np.testing.assert_allclose(
                a, b, **backends.tolerance(1e-8, 1e-10), err_msg=way
            )


@pytest.mark.skipif(dispatches.BACKEND == "torch", reason="not compiled there")
@pytest.mark.parametrize("way", [w for w in dispatches.TOKEN_CHOICE if w != "dense"])
def test_sizes_as_they_are_shipped(way):
    """No block is shrunk here: one expert fills several, one a part, one none."""
    e, rng = 5, np.random.default_rng(0)
    first = np.repeat([0, 1, 3, 4], [700, 3, 290, 7])
    rng.shuffle(first)
    indices = np.stack([first, (first + 1) % 2], axis=1).astype("int32")
    mask = rng.random(1000) < 0.9
    inputs = [rng.normal(size=(1000, D)), rng.random((1000, 2))]
    experts, cotangent = experts_of(e), mask[:, None] * rng.normal(size=(1000, U))
    sizes = dispatch_lib.block_sizes(2000, e)

    def by(way):
        with dispatches.chosen(way) as _, pytest.MonkeyPatch.context() as patch:
            patch.setattr(_blocked, "block_sizes", lambda *_: sizes)
            layer = Moved(way, experts, indices, mask, 2000)
            found = backends.outputs_and_gradients(layer, inputs, [cotangent])
        return [mask[:, None] * found[0][0], *found[1], mask[:, None] * found[2][0]]

    for a, b in zip(by(way), by("dense"), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)


# NaN and infinity


BROKEN = [2, 11]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("way", dispatches.TOKEN_CHOICE)
def test_a_broken_row_changes_no_other_output_and_no_other_gradient(way, value):
    """Whole rows of it, in the middle and at the end of the run of an expert."""
    rng = np.random.default_rng(3)
    indices = np.argsort(rng.random((12, 4)), axis=1)[:, :2].astype("int32")
    indices[BROKEN] = [1, 2]  # 0 and 3 know nothing of it.
    tokens, weights = rng.normal(size=(12, D)), rng.random((12, 2))
    experts, others = experts_of(4), np.delete(np.arange(12), BROKEN)
    cotangent = rng.normal(size=(12, U))
    results = []
    for broken in (False, True):
        inputs = [tokens.copy(), weights]
        if broken:
            inputs[0][BROKEN] = value
            # A router that sees such a row gives it such weights.
            inputs[1] = weights.copy()
            inputs[1][BROKEN[0]] = np.nan
        with dispatches.chosen(way):
            layer = Moved(way, experts, indices, None, 24)
            (output,), by_weight, by_input = backends.outputs_and_gradients(
                layer, inputs, [cotangent]
            )
        by_input = [gradient[others] for gradient in by_input]
        # Where every expert sees every token there is none without a broken one.
        by_weight = [] if way == "dense" else [g[[0, 3]] for g in by_weight]
        results.append([output[others], *by_input, *by_weight])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(b, a, **backends.tolerance(1e-9, 1e-12))


# What it costs: the compiler's own figures, no clock.

only_jax = pytest.mark.skipif(
    dispatches.BACKEND != "jax", reason="JAX shows its compiler's"
)
N, K, WIDTH, HIDDEN = 8192, 2, 256, 512


def in_capacity(tokens, record, experts):
    """Capacity with a factor of 1: as many slots as choices."""
    e = experts.num_experts
    c = routing_lib.expert_capacity(tokens.shape[0], e, K, 1.0)
    slots = routing_lib.capacity_slots(record, e, c)
    return dispatch_lib.capacity(tokens, record, experts, slots=slots)


MOVES = {
    "evenly": dispatch_lib.blocked_evenly,
    "in_turn": dispatch_lib.blocked_in_turn,
    "capacity": in_capacity,
}


def tensor(*shape, dtype="float32"):
    import jax

    return jax.ShapeDtypeStruct(shape, dtype)


def differentiated(loss, *tensors):
    """Value and gradients of `loss(weights, ..., constant)`, compiled and never run."""
    import jax

    by = tuple(range(len(tensors) - 1))
    return jax.jit(jax.value_and_grad(loss, by)).lower(*tensors).compile()


@functools.cache
def compiled(move, e, n=N):
    """Forward and backward through experts behind a dispatch."""
    experts = MLPExperts(e, (HIDDEN, WIDTH))
    experts.built = True

    def loss(kernels, biases, tokens, weights, constants):
        indices, cotangent = constants
        experts.kernels, experts.biases = kernels, biases
        outputs = MOVES[move](tokens, Routing(indices, weights), experts)
        return (outputs * cotangent).sum()

    return differentiated(
        loss,
        [tensor(e, WIDTH, HIDDEN), tensor(e, HIDDEN, WIDTH)],
        [tensor(e, HIDDEN), tensor(e, WIDTH)],
        tensor(n, WIDTH),
        tensor(n, K),
        (tensor(n, K, dtype="int32"), tensor(n, WIDTH)),
    )


@functools.cache
def compiled_mlp():
    """One MLP for all tokens, as wide as the K experts of a token together."""
    import jax

    def loss(kernels, biases, tokens, cotangent):
        hidden = jax.nn.relu(tokens @ kernels[0] + biases[0])
        return ((hidden @ kernels[1] + biases[1]) * cotangent).sum()

    h = K * HIDDEN
    return differentiated(
        loss,
        [tensor(WIDTH, h), tensor(h, WIDTH)],
        [tensor(h), tensor(WIDTH)],
        tensor(N, WIDTH),
        tensor(N, WIDTH),
    )


@only_jax
@pytest.mark.parametrize("e", [8, 64, 256])
@pytest.mark.parametrize("move", ["evenly", "capacity"])
def test_the_compiler_counts_few_operations_more_than_for_an_mlp(move, e):
    dense = compiled_mlp().cost_analysis()["flops"]
    # Two matmuls forward and four backward, of 2 n in out operations each.
    assert dense == pytest.approx(6 * 2 * N * WIDTH * K * HIDDEN, rel=0.01)
    assert compiled(move, e).cost_analysis()["flops"] <= 1.35 * dense


@only_jax
@pytest.mark.parametrize(
    ("move", "e"), [("evenly", 8), ("evenly", 256), ("capacity", 64), ("in_turn", 64)]
)
def test_no_tensor_of_tokens_by_experts_by_slots(move, e):
    """The largest are the hidden rows, and the kernels.

    A one-hot dispatch needs n * e * c = k n² numbers, 134 million here, and a dispatch
    to every expert n * e * h.
    """
    shapes = re.findall(r"\w\d+\[([\d,]+)\]", compiled(move, e).as_text())
    sizes = {shape: math.prod(map(int, shape.split(","))) for shape in shapes}
    rows = 1.35 * N * K * HIDDEN
    assert max(sizes.values()) <= max(rows, e * WIDTH * HIDDEN)
    tall = [s for s in sizes if str(N) in s.split(",") or str(N * K) in s.split(",")]
    assert tall
    assert max(sizes[shape] for shape in tall) <= N * K * HIDDEN < N * e * N * K / e


@only_jax
@pytest.mark.parametrize("e", [8, 64, 256])
@pytest.mark.parametrize("move", MOVES)
def test_memory_grows_no_faster_than_the_tokens(move, e):
    """The temporary memory alone, but for one case."""
    small = compiled(move, e).memory_analysis()
    large = compiled(move, e, 2 * N).memory_analysis()
    before, after = small.temp_size_in_bytes, large.temp_size_in_bytes
    if (move, e) == ("capacity", 64):
        # 112 and 256 MiB, 2.29 times as much: at N the compiler keeps hidden rows in
        # what will be an output, which at 2 N is too small for them.
        before += small.output_size_in_bytes
        after += large.output_size_in_bytes
    assert after <= 2.1 * before


@only_jax
@pytest.mark.parametrize("e", [8, 64, 256])
def test_a_whole_layer_costs_little_more_than_an_mlp_and_a_linear_router(
    e, monkeypatch
):
    """Router, choice, losses and all gradients; and nothing in it asks the host."""
    monkeypatch.setattr(_backend, "on_accelerator", lambda: True)
    layer = MoE(e, (HIDDEN, WIDTH), K, dispatch="blocked")
    layer.build((N, WIDTH))
    state = [variable.value for variable in layer.non_trainable_variables]

    def loss(weights, tokens, cotangent):
        outputs, _, losses = layer.stateless_call(
            weights, state, tokens, training=True, return_losses=True
        )
        return (outputs * cotangent).sum() + sum(losses)

    weights = [tensor(*w.shape) for w in layer.trainable_variables]
    program = differentiated(loss, weights, tensor(N, WIDTH), tensor(N, WIDTH))
    # The router is a matmul forward and two backward: 1 in 8 operations for 256.
    dense = compiled_mlp().cost_analysis()["flops"] + 3 * 2 * N * WIDTH * e
    assert program.cost_analysis()["flops"] <= 1.35 * dense
    assert not asks_host(program)


@only_jax
@pytest.mark.parametrize("e", [8, 256])
def test_no_loop_copies_what_is_as_long_as_the_rows(e):
    """XLA may copy a tensor that a loop reads and writes: all rows in every turn."""
    text = compiled("evenly", e).as_text()
    copied = re.findall(r"= \w\d+\[([\d,]+)\]\S* copy\(", text)
    c = _even.slots_per_expert(N * K, e, 256)
    sizes = [math.prod(map(int, shape.split(","))) for shape in copied]
    assert max(sizes, default=0) < e * c * WIDTH


@only_jax
@pytest.mark.parametrize("kind", ["uniform", "Zipf", "all on one", "masked", "empty"])
def test_evenly_as_it_is_shipped(kind):
    """Compiled once for a batch shape; from no overflow to nearly all rows."""
    import jax

    e, k, n = 6, 2, 0 if kind == "empty" else 3000
    rng = np.random.default_rng(0)
    skew = {"Zipf": 1.0, "all on one": 100.0}.get(kind, 0.0)
    wish = -skew * np.log(1.0 + np.arange(e)) + rng.gumbel(size=(n, e))
    indices = np.argsort(-wish, axis=1)[:, :k].astype("int32")
    mask = rng.random(n) < 0.5 if kind == "masked" else None
    inputs = [rng.normal(size=(n, D)), rng.random((n, k))]
    kept = np.ones((n, 1)) if mask is None else mask[:, None]
    cotangent, experts = kept * rng.normal(size=(n, U)), experts_of(e)
    found = []
    for move in (dispatch_lib.blocked_evenly, dispatch_lib.dense):
        layer = Moved("dense", experts, indices, mask)
        layer.move = move
        parts = backends.outputs_and_gradients(layer, inputs, [cotangent])
        found.append([kept * parts[0][0], *parts[1], kept * parts[2][0]])
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
    runs = routing_lib.sort_choices(Routing(indices, None), e)
    b = _even.rows_per_turn(n * k, e)
    c = _even.slots_per_expert(n * k, e, b)
    turns = jax.jit(lambda runs: _even.even_slots(runs, c, b, n, k)[1].turns)(runs)[-1]
    # All on one: c = 9 * 6000 / 48 + 128 / 6 = 1147, so experts 0 and 1 have 1853
    # overflow rows each, for 1147 empty slots an expert. Runs of 1147, 706, 441, 1147
    # and 265 rows need 9 + 6 + 4 + 9 + 3 turns of 128.
    wanted = {"uniform": 0, "masked": 0, "empty": 0, "all on one": 31}
    assert turns == wanted.get(kind, turns)


def asks_host(program):
    """The instructions of a compiled program that wait for its host."""
    asking = r"\b(?:infeed|outfeed|send|recv)(?:-done)?\(|\w*callback\w*"
    return re.findall(asking, program.as_text())


@only_jax
@pytest.mark.parametrize("move", MOVES)
def test_a_compiled_dispatch_asks_no_host(move):
    assert not asks_host(compiled(move, 64))


@only_jax
def test_a_program_that_asks_its_host_would_be_seen():
    import jax

    def asking(x):
        jax.debug.callback(print, x)
        return x.sum()

    assert asks_host(jax.jit(asking).lower(tensor(3)).compile())


@pytest.mark.parametrize("e", [8, 64, 256])
@pytest.mark.parametrize("skew", [0.0, 1.0])
def test_few_rows_more_than_were_chosen_are_multiplied(e, skew):
    """The compiler does not know how often a loop turns, but we do.

    Uniform routing, and shares like those of words, 1, 1/2, 1/3, ... (Zipf).
    """
    rng = np.random.default_rng(0)
    wish = np.log((1.0 + np.arange(e)) ** -skew) + rng.gumbel(size=(N, e))
    counts = np.bincount(np.argsort(-wish, axis=1)[:, :K].ravel(), minlength=e)
    assert dispatch_lib.rows_multiplied(counts) <= 1.35 * N * K
    everything = np.zeros(e, int)
    everything[e // 2] = N * K
    assert dispatch_lib.rows_multiplied(everything) <= 1.02 * N * K


@pytest.mark.skipif(
    dispatches.BACKEND != "tensorflow", reason="loops run eagerly there"
)
@pytest.mark.parametrize("counts", [[40, 0, 3, 16, 1], [0, 0, 61], [7], [0, 5, 300]])
def test_the_rows_that_are_counted_are_the_rows_multiplied(counts, monkeypatch):
    """Each once forward and, for its own gradient and the kernel's, twice backward."""
    import tensorflow as tf

    multiplied, matmul = [], ops.matmul

    def watched(a, b):
        multiplied.append(a.shape[0] * a.shape[1] * b.shape[1] / (D * U))
        return matmul(a, b)

    indices = np.repeat(np.arange(len(counts)), counts)[:, None].astype("int32")
    n = len(indices)
    record = Routing(indices, np.ones((n, 1)))
    experts = experts_of(len(counts), (U,))
    tokens = tf.ones((n, D), "float64")
    monkeypatch.setattr(ops, "matmul", watched)
    with tf.GradientTape() as tape:
        tape.watch(tokens)
        outputs = dispatch_lib.blocked_in_turn(tokens, record, experts)
    assert sum(multiplied) == dispatch_lib.rows_multiplied(counts)
    blocks = len(multiplied)
    multiplied.clear()
    tape.gradient(outputs, [tokens, *[w.value for w in experts.trainable_variables]])
    assert sum(multiplied) == 2 * dispatch_lib.rows_multiplied(counts)
    assert len(multiplied) == 2 * blocks
