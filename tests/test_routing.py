"""Records: capacity and who gets it, by hand and against a literal queue."""

from fractions import Fraction

import keras
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from keras import ops

from keras_moe import routing
from tests import moe_oracles

BOUNDED = settings(max_examples=60, deadline=None, derandomize=True)
# JAX compiles every operation again for new sizes.
if keras.backend.backend() == "jax":
    BOUNDED = settings(BOUNDED, max_examples=5, phases=[Phase.generate])


def array(tensor):
    return np.asarray(ops.convert_to_numpy(tensor))


def drawn(n, e, k, seed=0, ties=False, masked=False):
    """A record of n tokens with k different experts each, and its mask."""
    rng = np.random.default_rng(seed)
    indices = rng.permuted(np.tile(np.arange(e), (n, 1)), axis=1)[:, :k]
    weights = rng.random((n, k))
    if ties:
        weights = weights.round(1)
    mask = rng.random(n) < 0.7 if masked else None
    return routing.Routing(
        indices.astype("int32"), weights.astype("float32"), mask=mask
    )


@pytest.mark.parametrize("width", [3, 40])
def test_equal_scores_go_to_the_lower_index(width):
    scores = np.random.default_rng(0).integers(0, 3, size=(50, width)).astype("float32")
    for k in (1, 2, width):
        found = ops.convert_to_numpy(routing.top_k(ops.convert_to_tensor(scores), k))
        wanted = np.argsort(-scores, axis=-1, kind="stable")[:, :k]
        np.testing.assert_array_equal(found, wanted)


sizes = {
    "n": st.integers(0, 14),
    "e": st.integers(1, 6),
    "share": st.floats(0, 1),
    "seed": st.integers(0, 1000),
    "masked": st.booleans(),
}


def k_of(e, share):
    return 1 + int(share * (e - 1))


# Capacity


@pytest.mark.parametrize(
    ("n", "e", "k", "factor", "slots"),
    [
        (8, 4, 2, 1.0, 4),  # 1 * 2 * 8 / 4
        (10, 4, 2, 1.0, 5),
        (10, 4, 2, 1.25, 7),  # 6.25
        (100, 10, 1, 1.1, 11),  # 1.1 * 100 / 10 is 11.000000000000002 in floats
        (100, 3, 1, 1 / 3, 12),  # 11.1...
        (3, 8, 1, 1.0, 1),  # 0.375
        (3, 8, 1, 0.001, 1),
        (4, 2, 2, 3.0, 4),  # 12, but a token takes one slot of an expert
        (0, 4, 2, 1.0, 1),
    ],
)
def test_capacity_by_hand(n, e, k, factor, slots):
    assert routing.expert_capacity(n, e, k, factor) == slots
    tensor = ops.convert_to_tensor(n, "int32")
    assert int(routing.expert_capacity(tensor, e, k, factor)) == slots


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    n=st.integers(0, 10**6),
    e=st.integers(1, 512),
    k=st.integers(1, 8),
    hundredths=st.integers(1, 800),
)
def test_capacity_is_the_formula(n, e, k, hundredths):
    factor = Fraction(hundredths, 100)
    wanted = moe_oracles.capacity(n, e, k, factor)
    assert routing.expert_capacity(n, e, k, float(factor)) == wanted


def test_capacity_of_many_tokens_does_not_overflow():
    n = ops.convert_to_tensor(2**21, "int32")
    assert int(routing.expert_capacity(n, 4096, 8, 1.2345)) == 5057
    assert routing.expert_capacity(2**21, 4096, 8, 1.2345) == 5057  # 5056.51...


# Who gets a slot


def test_who_is_dropped_by_hand():
    """Four tokens, two choices each, experts 0 to 2 with c = 2 slots.

    token  first  second  weights
    0      0      1       0.6 0.4
    1      0      1       0.9 0.1
    2      0      2       0.7 0.3
    3      1      0       0.8 0.2

    By position the first choices are served first: 0 and 1 fill expert 0, token 2
    finds it full, token 3 gets expert 1. Then the second ones: token 0 fills expert 1,
    token 1 finds it full, token 2 gets expert 2, token 3 finds expert 0 full.

    By probability: 0.9 and 0.7 fill expert 0 (tokens 1 and 2), 0.8 takes expert 1, 0.6
    (token 0) finds 0 full, 0.4 (token 0) fills 1, 0.3 takes 2, 0.2 finds 0 full and
    0.1 (token 1) finds 1 full.
    """
    record = routing.Routing(
        np.array([[0, 1], [0, 1], [0, 2], [1, 0]], "int32"),
        np.array([[0.6, 0.4], [0.9, 0.1], [0.7, 0.3], [0.8, 0.2]], "float32"),
    )
    slots = routing.capacity_slots(record, 3, 2)
    assert array(slots.kept).tolist() == [
        [True, True],
        [True, False],
        [False, True],
        [True, False],
    ]
    assert array(slots.tokens).tolist() == [[0, 1], [3, 0], [2, 4]]
    slots = routing.capacity_slots(record, 3, 2, "probability")
    assert array(slots.kept).tolist() == [
        [False, True],
        [True, False],
        [True, True],
        [True, False],
    ]
    assert array(slots.tokens).tolist() == [[1, 2], [3, 0], [2, 4]]


@BOUNDED
@given(
    **sizes,
    c=st.integers(1, 14),
    ties=st.booleans(),
    priority=st.sampled_from(["position", "probability"]),
)
def test_slots_are_those_of_a_queue(n, e, share, seed, masked, c, ties, priority):
    k = k_of(e, share)
    record = drawn(n, e, k, seed, ties, masked)
    c = min(c, max(1, n))
    slots = routing.capacity_slots(record, e, c, priority)
    kept, tokens = moe_oracles.queue(
        record.expert_indices, record.combine_weights, e, c, priority, record.mask
    )
    assert (array(slots.kept) == kept).all()
    wanted = [[*row, *[n] * (c - len(row))] for row in tokens]
    assert array(slots.tokens).tolist() == wanted
    flat = array(slots.tokens).reshape(-1)
    for i, j in np.argwhere(kept):
        slot = array(slots.slot_of_choice)[i, j]
        assert flat[slot] == i
        assert slot // c == record.expert_indices[i, j]
    assert kept.sum() == (flat < n).sum()


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_served_last(broken):
    rng = np.random.default_rng(0)
    weights = rng.random((40, 1)).astype("float32")
    weights[::3] = broken
    record = routing.Routing(np.zeros((40, 1), "int32"), weights)
    slots = routing.capacity_slots(record, 1, 40, "probability")
    whole = [i for i in np.argsort(-weights[:, 0], kind="stable") if i % 3]
    assert array(slots.tokens)[0].tolist() == [*whole, *range(0, 40, 3)]


# Sorted choices


@BOUNDED
@given(**sizes)
def test_runs_are_a_permutation_in_the_order_of_experts(n, e, share, seed, masked):
    k = k_of(e, share)
    record = drawn(n, e, k, seed, masked=masked)
    order, positions, starts, ends = map(array, routing.sort_choices(record, e))
    mask = np.ones(n, bool) if masked is False else record.mask
    wanted = [
        [i * k + j for i in range(n) for j in range(k) if mask[i]
         and record.expert_indices[i, j] == expert]
        for expert in range(e)
    ]  # fmt: skip
    assert [order[a:b].tolist() for a, b in zip(starts, ends, strict=True)] == wanted
    assert starts[0] == 0
    assert (starts[1:] == ends[:-1]).all()
    assert sorted(order) == list(range(n * k))
    assert (order[positions.reshape(-1)] == np.arange(n * k)).all()


def test_what_stands_in_a_masked_row_has_no_meaning():
    record = drawn(9, 4, 2, masked=True)
    indices = record.expert_indices.copy()
    indices[~record.mask] = 3 - indices[~record.mask]
    other = record._replace(expert_indices=indices)
    for make in (routing.sort_choices, lambda r, e: routing.capacity_slots(r, e, 2)):
        for a, b in zip(make(record, 4), make(other, 4), strict=True):
            if a.shape == (9, 2):
                a, b = array(a)[record.mask], array(b)[record.mask]
            assert (array(a) == array(b)).all()


def test_the_order_of_equals_is_kept_among_many():
    """A sort that is stable for a few rows only would pass every test above."""
    record = drawn(5000, 3, 2)
    order, _, starts, ends = map(array, routing.sort_choices(record, 3))
    for a, b in zip(starts, ends, strict=True):
        assert (np.diff(order[a:b]) > 0).all()


# Gates


def test_gates_by_hand():
    record = routing.Routing(
        np.array([[2, 0], [1, 2]], "int32"),
        ops.convert_to_tensor([[0.7, 0.3], [0.6, 0.4]]),
    )
    gates = routing.gates(record, 3, 2)
    np.testing.assert_allclose(array(gates), [[0.3, 0, 0.7], [0, 0.6, 0.4]], rtol=1e-6)
    # Of three tokens expert 0 takes the last two, expert 1 only the first.
    record = routing.ExpertChoiceRouting(
        np.array([[2, 1], [0, 3]], "int32"), np.array([[0.9, 0.5], [0.8, 0.0]])
    )
    gates = routing.gates(record, 2, 3)
    wanted = [[0, 0.8], [0.5, 0], [0.9, 0]]
    np.testing.assert_allclose(array(gates), wanted, rtol=1e-6)
    dense = routing.DenseRouting(np.ones((2, 3)))
    assert routing.gates(dense, 3, 2) is dense.combine_weights
