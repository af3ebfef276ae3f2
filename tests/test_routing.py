"""Records: capacity and who gets it, by hand and against a literal queue."""

import copy
import inspect
import pickle
import re
from fractions import Fraction

import keras
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from keras import ops

from keras_moe import routing
from tests.support import moe_oracles

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
    k = min(k, e)
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
    dense = routing.DenseRouting(ops.ones((2, 3)))
    assert routing.gates(dense, 3, 2) is dense.combine_weights


# Arguments: ranks, sizes and numbers.


N, E, K, T = 3, 4, 2, 5
RNG = np.random.default_rng(0)
SCORES = RNG.random((N, E)).astype("float32")
CHOSEN = np.array([[0, 1], [1, 2], [2, 3]], "int32")
FLAGS = np.array([True, False, True])
CHOICE = routing.Routing(
    CHOSEN, SCORES[:, :K], SCORES, SCORES, mask=FLAGS, choice_probs=SCORES
)
BY_EXPERT = routing.ExpertChoiceRouting(
    np.array([[0, 1], [1, 2], [2, 3], [0, 3]], "int32"), np.ones((E, 2), "float32")
)
DENSE = routing.DenseRouting(SCORES)
ROWS = np.array([[0, 1, 2], [3, 4, 5]], "int32")
LEGAL = {
    "checked_record": {"routing": CHOICE, "num_experts": E, "num_tokens": N},
    "top_k": {"scores": SCORES, "k": K},
    "choose": {"values": SCORES, "indices": CHOSEN},
    "rows_where": {"kept": FLAGS, "rows": SCORES},
    "gates": {"routing": CHOICE, "num_experts": E, "num_tokens": N},
    "union": {"gates": RNG.random((N, T, E)).astype("float32"), "max_experts": E},
    "expert_counts": {"indices": CHOSEN, "num_experts": E, "counted": FLAGS},
    "expert_capacity": {
        "num_tokens": N,
        "num_experts": E,
        "top_k": K,
        "capacity_factor": 1.5,
    },
    "sort_choices": {
        "routing": CHOICE,
        "num_experts": E,
        "queue": np.arange(N * K, dtype="int32"),
    },
    "shifted": {"ends": np.array([2, 3, 3, 6], "int32")},
    "capacity_slots": {"routing": CHOICE, "num_experts": E, "expert_capacity": 2},
    "tokens_in_rows": {
        "runs": routing.sort_choices(CHOICE, E),
        "rows": ROWS,
        "filled": ROWS > 1,
        "n": N,
        "k": K,
    },
}
NO_RECORD = "`routing` must be one of ['Routing'"
OTHERS = {
    "num_experts": [0, -1, 1.5, None, True],
    "k": [0, 1.5, None],
    "max_experts": [0, E + 1, 1.5, None],
    "top_k": [0, E + 1, 1.5, None],
    "capacity_factor": [0.0, -1.0, float("nan"), float("inf"), None],
    "expert_capacity": [0, -1, 1.5, None, np.array([1, 2]), np.array(1.5)],
    "num_tokens": [-1, 1.5, np.array([1, 2]), np.array(1.5)],
    "n": [-1, 1.5, None, np.array([1, 2]), np.array(1.5)],
}
NUMBERS = [
    (name, argument, other)
    for name, arguments in LEGAL.items()
    for argument in arguments
    for other in OTHERS.get(argument, [])
]
RECORDS = [name for name in LEGAL if "routing" in LEGAL[name]]


def refused(name, message, **changes):
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(routing, name)(**{**LEGAL[name], **changes})


def test_every_public_routing_function_is_tested_for_its_arguments():
    public = {
        name
        for name, function in inspect.getmembers(routing, inspect.isfunction)
        if function.__module__.startswith(routing.__name__)
    }
    assert public == set(LEGAL)
    for name in public:
        getattr(routing, name)(**LEGAL[name])


@pytest.mark.parametrize(
    ("name", "argument", "axes", "others"),
    [
        ("top_k", "scores", "(..., e)", [1.0]),
        ("choose", "values", "(..., e)", [1.0]),
        ("choose", "indices", "(..., k)", [1, CHOSEN[0], CHOSEN[None], CHOSEN[:1]]),
        ("rows_where", "rows", "(..., d)", [1.0]),
        ("rows_where", "kept", "(...)", [True, FLAGS[None], FLAGS[:, None], FLAGS[:1]]),
        ("union", "gates", "(n, t, e)", [SCORES, SCORES[None, None], SCORES[0]]),
        ("expert_counts", "indices", "(n, k)", [CHOSEN[:, 0], CHOSEN[None], 1]),
        ("expert_counts", "counted", "(n,)", [FLAGS[:, None], FLAGS[:1], True]),
        ("sort_choices", "queue", "(m,)", [CHOSEN, CHOSEN[0], 1]),
        ("shifted", "ends", "(e,)", [CHOSEN, 1]),
        ("tokens_in_rows", "filled", "(...)", [ROWS[0] > 1, ROWS[:1] > 1, True]),
    ],
)
def test_other_shapes_are_refused(name, argument, axes, others):
    for other in others:
        rule = f"`{argument}` must have the shape {axes}"
        refused(name, rule, **{argument: other})
        received = f"Received: {argument} of shape {np.shape(other)}"
        refused(name, received, **{argument: other})


@pytest.mark.parametrize(("name", "argument", "other"), NUMBERS)
def test_numbers_that_break_their_rule_are_refused(name, argument, other):
    refused(name, f"`{argument}` must ", **{argument: other})
    refused(name, f"Received: {argument}", **{argument: other})


@pytest.mark.parametrize("name", RECORDS)
def test_records_that_do_not_agree_are_refused(name):
    for field in CHOICE._fields:
        legal = getattr(CHOICE, field)
        for other in (legal[0], legal[None], legal[..., None]):
            message = f"Received: routing.{field} of shape {np.shape(other)}"
            refused(name, message, routing=CHOICE._replace(**{field: other}))
        other = CHOICE._replace(**{field: np.concatenate([legal, legal])})
        refused(name, " with n=", routing=other)
    refused(name, "e=7 as in `num_experts`", num_experts=7)
    weights = CHOICE._replace(combine_weights=SCORES)
    refused(name, "k=2 as in `routing.expert_indices`", routing=weights)
    floats = CHOICE._replace(expert_indices=SCORES[:, :K])
    message = "`routing.expert_indices` must hold integers. Received: "
    refused(name, message, routing=floats)
    for other in (SCORES, None, CHOSEN.tolist()):
        refused(name, NO_RECORD, routing=other)
    if "num_tokens" in LEGAL[name]:
        refused(name, "n=9 as in `num_tokens`", num_tokens=9)
        message = "`routing.token_indices` must have the shape (e, c) with e=5 as in"
        refused(name, message, routing=BY_EXPERT, num_experts=5)
        message = "`routing.combine_weights` must have the shape (n, e) with e=5 as in"
        refused(name, message, routing=DENSE, num_experts=5)
    else:
        for other in (BY_EXPERT, DENSE):
            refused(name, NO_RECORD, routing=other)


def test_arguments_that_are_swapped_or_have_no_meaning_are_refused():
    refused("top_k", "`k` must not exceed the number of experts e.", k=E + 1)
    message = "`indices` must hold integers. Received: indices of dtype float"
    refused("choose", message, values=CHOSEN, indices=SCORES[:, :K])
    refused("expert_counts", message, indices=SCORES)
    refused("rows_where", "`kept` must have the shape", kept=SCORES, rows=FLAGS)
    refused("shifted", "`ends` must hold integers.", ends=SCORES[0])
    refused("sort_choices", "`queue` must hold integers.", queue=np.ones(N * K))
    refused("tokens_in_rows", "`rows` must hold integers.", rows=ROWS + 0.5)
    refused("tokens_in_rows", "`runs` must be SortedChoices", runs=CHOSEN)
    refused("tokens_in_rows", "n=4 as in `n`", n=N + 1)
    refused("tokens_in_rows", "k=1 as in `k`", k=1)
    message = "`priority` must be one of ['position', 'probability']. Received: "
    refused("capacity_slots", message, priority="positon")
    without = CHOICE._replace(combine_weights=None)
    message = '`routing` must have combine weights for priority="probability"'
    refused("capacity_slots", message, routing=without, priority="probability")
    refused("gates", "`routing` must have combine weights", routing=without)


def test_leading_axes_of_any_rank():
    scores = RNG.random((2, N, E)).astype("float32")
    best = array(routing.top_k(scores, K))
    values = array(routing.choose(scores, best))
    kept = array(routing.rows_where(values > 0.5, RNG.random((2, N, K, 7))))
    for i in range(2):
        assert (best[i] == array(routing.top_k(scores[i], K))).all()
        assert (best[i, 0] == array(routing.top_k(scores[i, 0], K))).all()
        assert (values[i] == array(routing.choose(scores[i], best[i]))).all()
    assert ((kept != 0).all(axis=-1) == (values > 0.5)).all()
    rows = array(routing.tokens_in_rows(**LEGAL["tokens_in_rows"]))
    flat = {**LEGAL["tokens_in_rows"], "rows": ROWS.reshape(-1)}
    flat["filled"] = flat["rows"] > 1
    assert (rows.reshape(-1) == array(routing.tokens_in_rows(**flat))).all()


def lists(value):
    if isinstance(value, routing.Routing):
        fields = {name: lists(getattr(value, name)) for name in value._fields}
        return value._replace(**fields)
    return value.tolist() if isinstance(value, np.ndarray) else value


def flat(outputs):
    return [array(x) for x in keras.tree.flatten(outputs) if x is not None]


@pytest.mark.parametrize("name", LEGAL)
def test_lists_are_taken(name):
    arguments = {key: lists(value) for key, value in LEGAL[name].items()}
    found = flat(getattr(routing, name)(**arguments))
    expected = flat(getattr(routing, name)(**LEGAL[name]))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_a_mask_of_numbers_is_one_of_flags():
    for mask in (FLAGS.astype("int32"), FLAGS.astype("float32"), 0.5 * FLAGS):
        for name in ("sort_choices", "capacity_slots"):
            changed = {**LEGAL[name], "routing": CHOICE._replace(mask=mask)}
            found = flat(getattr(routing, name)(**changed))
            expected = flat(getattr(routing, name)(**LEGAL[name]))
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_array_equal(a, b)
        counts = routing.expert_counts(CHOSEN, E, mask)
        assert array(counts).tolist() == [1, 1, 1, 1]
        rows = array(routing.rows_where(mask, SCORES))
        np.testing.assert_array_equal(rows, SCORES * FLAGS[:, None])


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="static elsewhere")
def test_unknown_sizes_are_no_error_in_a_graph():
    import tensorflow as tf

    def all_of_it(indices, weights, mask, probs):
        n = ops.shape(indices)[0]
        record = routing.Routing(indices, weights, probs, probs, mask)
        c = routing.expert_capacity(n, E, K, 1.0)
        slots = routing.capacity_slots(record, E, c, "probability")
        order = routing.sort_choices(record, E, ops.arange(n * K))
        return [
            *slots,
            *order,
            routing.gates(record, E, n),
            routing.expert_counts(indices, E, mask),
            routing.rows_where(mask, routing.choose(probs, routing.top_k(probs, K))),
        ]

    arguments = [CHOSEN, SCORES[:, :K], FLAGS, SCORES]
    specs = [tf.TensorSpec([None, *a.shape[1:]], a.dtype) for a in arguments]
    graph = tf.function(all_of_it, input_signature=specs)
    for a, b in zip(flat(graph(*arguments)), flat(all_of_it(*arguments)), strict=True):
        np.testing.assert_allclose(a, b)
    unknown_rank = tf.function(
        lambda scores: routing.top_k(scores, K),
        input_signature=[tf.TensorSpec(None, "float32")],
    )
    expected = array(routing.top_k(SCORES, K))
    np.testing.assert_array_equal(array(unknown_rank(SCORES)), expected)


def test_a_record_survives_copies_and_pickles():
    record = routing.Routing(
        np.zeros((3, 2), "int32"), np.ones((3, 2)), mask=np.ones(3, bool)
    )
    for again in (pickle.loads(pickle.dumps(record)), copy.deepcopy(record)):
        assert type(again) is type(record)
        assert again._fields == ("expert_indices", "combine_weights", "mask")
        np.testing.assert_array_equal(again.mask, record.mask)
    assert record._replace(mask=None).mask is None
    with pytest.raises(TypeError, match="Routing takes expert_indices"):
        routing.Routing(np.zeros((3, 2)))
