import inspect
import math
import re

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_moe import losses, routing
from tests.support import backends, oracles, routing_oracles

LOG2 = math.log(2.0)
PROBS = np.array(
    [
        [0.7, 0.1, 0.1, 0.1],
        [0.4, 0.4, 0.1, 0.1],
        [0.1, 0.6, 0.2, 0.1],
        [0.2, 0.1, 0.6, 0.1],
    ]
)
MASK = np.array([True, True, True, False])
FIRST_TWO = np.array([True, True, False, False])


class OfOneTensor(keras.layers.Layer):
    """A function as a layer, so that `backends.gradients` can take its gradient."""

    def __init__(self, function):
        super().__init__(dtype="float64")
        self.function = function
        self.built = True

    def call(self, x):
        return self.function(x)


def value(loss):
    array = ops.convert_to_numpy(loss)
    assert array.shape == ()
    return float(array)


def test_load_balancing_by_hand():
    # P = (1.4, 1.2, 1.0, 0.4) / 4 = (0.35, 0.3, 0.25, 0.1)
    # f = (2, 1, 1, 0) / 4;  4 (0.5 * 0.35 + 0.25 * 0.3 + 0.25 * 0.25) = 1.25
    once = np.array([[0], [0], [1], [2]])
    assert value(losses.load_balancing_loss(PROBS, once)) == pytest.approx(1.25)
    # f = (3, 3, 2, 0) / 8;  4 (3 * 0.35 + 3 * 0.3 + 2 * 0.25) / 8 = 1.225
    twice = np.array([[0, 1], [0, 1], [1, 2], [2, 0]])
    assert value(losses.load_balancing_loss(PROBS, twice)) == pytest.approx(1.225)
    # Without the last token f = (2, 1, 0, 0) / 3, P = (1.2, 1.1, 0.4, 0.3) / 3;
    # 4 (2 * 1.2 + 1 * 1.1) / 9 = 14 / 9
    masked = losses.load_balancing_loss(PROBS, once, MASK)
    assert value(masked) == pytest.approx(14 / 9)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_load_balancing_is_one_in_balance_and_e_in_collapse(k):
    balanced = (np.arange(8)[:, None] + np.arange(k)) % 4
    uniform = np.full((8, 4), 0.25)
    assert value(losses.load_balancing_loss(uniform, balanced)) == pytest.approx(1)
    one_hot = np.eye(4)[np.zeros(8, int)]
    collapsed = losses.load_balancing_loss(one_hot, np.zeros((8, 1), int))
    assert value(collapsed) == pytest.approx(4)


def test_importance_by_hand():
    gates = np.array(
        [[0.75, 0.25, 0, 0], [0.5, 0.5, 0, 0], [0, 0.25, 0.75, 0], [0, 0, 0.5, 0.5]]
    )
    # sums (1.25, 1, 1.25, 0.5), mean 1;  (0.0625 + 0 + 0.0625 + 0.25) / 4 = 0.09375
    assert value(losses.importance_loss(gates)) == pytest.approx(0.09375)
    # sums (1.25, 0.75, 0, 0), mean 0.5;
    # (0.5625 + 0.0625 + 0.25 + 0.25) / 4 / 0.25 = 1.125
    assert value(losses.importance_loss(gates, FIRST_TWO)) == pytest.approx(1.125)


def test_load_by_hand():
    probs = np.array(
        [[1, 0.5, 0.5, 0], [1, 0.5, 0.25, 0.25], [1, 1, 0, 0], [1, 0, 0.25, 0.75]]
    )
    # sums (4, 2, 1, 1), mean 2;  (4 + 0 + 1 + 1) / 4 / 4 = 0.375
    assert value(losses.load_loss(probs)) == pytest.approx(0.375)
    # sums (2, 1, 0.75, 0.25), mean 1;  (1 + 0 + 0.0625 + 0.5625) / 4 = 0.40625
    assert value(losses.load_loss(probs, FIRST_TWO)) == pytest.approx(0.40625)


def test_router_z_by_hand():
    # logsumexp: log(1 + 1 + 1 + 1) = 2 log 2 and log(2 + 3 + 1 + 2) = 3 log 2
    logits = np.log(np.array([[1.0, 1, 1, 1], [2, 3, 1, 2]]))
    assert value(losses.router_z_loss(logits)) == pytest.approx(6.5 * LOG2**2)
    masked = losses.router_z_loss(logits, np.array([True, False]))
    assert value(masked) == pytest.approx(4 * LOG2**2)


def test_entropy_by_hand():
    # log 2, 2 log 2, 0 and (1/2 + 2/4 + 2/4) log 2; their mean is 4.5 / 4 log 2
    probs = np.array([[0.5, 0.5, 0, 0], [0.25] * 4, [1, 0, 0, 0], [0.5, 0.25, 0.25, 0]])
    assert value(losses.entropy_loss(probs)) == pytest.approx(1.125 * LOG2)
    assert value(losses.entropy_loss(probs, FIRST_TWO)) == pytest.approx(1.5 * LOG2)


def test_cv_squared_by_hand():
    # mean 2, variance ((2 - 1)² + (3 - 2)²) / 2 = 1;  1 / 2²
    assert value(losses.cv_squared(np.array([1.0, 3.0]))) == pytest.approx(0.25)
    assert value(losses.cv_squared(np.array([1e-8, 3e-8]))) == pytest.approx(0.25, 0.01)
    assert value(losses.cv_squared(np.full(7, 3.0))) == pytest.approx(0)


def inputs_of(name):
    """Arguments of a loss as a function of one tensor, and the oracle of the same."""
    indices = np.array([[0, 1], [0, 1], [1, 2], [2, 0]])
    return {
        "load_balancing": (
            lambda x, mask=None: losses.load_balancing_loss(x, indices, mask),
            lambda x, mask: routing_oracles.load_balancing_loss(x, indices, mask),
        ),
        "importance": (losses.importance_loss, routing_oracles.cv_squared_of_sums),
        "load": (losses.load_loss, routing_oracles.cv_squared_of_sums),
        "router_z": (losses.router_z_loss, routing_oracles.router_z_loss),
        "entropy": (losses.entropy_loss, routing_oracles.entropy_loss),
    }[name]


NAMES = ["load_balancing", "importance", "load", "router_z", "entropy"]


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_equal_the_oracle(name, mask):
    loss, oracle = inputs_of(name)
    x = PROBS.copy()
    counted = np.ones(4, bool) if mask is None else mask
    np.testing.assert_allclose(
        value(loss(x, mask)), oracle(x, counted), **backends.tolerance(1e-9)
    )
    expected = oracles.numeric_gradients(lambda: oracle(x, counted), [x])[0]
    layer = OfOneTensor(lambda x: loss(x, mask))
    gradient = backends.gradients(layer, [PROBS], [np.float64(1.0)])[1][0]
    np.testing.assert_allclose(gradient, expected, **backends.tolerance(1e-6, 1e-8))


@pytest.mark.parametrize("name", NAMES)
def test_padding_counts_nowhere_whatever_it_holds(name):
    loss, _ = inputs_of(name)
    padded = PROBS.copy()
    padded[3] = np.nan
    if name == "load_balancing":
        ids = np.array([[0, 1], [0, 1], [1, 2], [-9, 99]])
        found = losses.load_balancing_loss(padded, ids, MASK)
    else:
        found = loss(padded, MASK)
    assert value(found) == pytest.approx(value(loss(PROBS, MASK)), rel=1e-9)
    layer = OfOneTensor(lambda x: loss(x, MASK))
    gradient = backends.gradients(layer, [padded], [np.float64(1.0)])[1][0]
    assert np.isfinite(gradient).all()
    assert (gradient[3] == 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_no_token_left_is_no_loss(name, dtype):
    loss, _ = inputs_of(name)
    nobody = np.zeros(4, bool)
    x = ops.cast(PROBS, dtype)
    assert value(loss(x, nobody)) == 0
    layer = OfOneTensor(lambda x: loss(ops.cast(x, dtype), nobody))
    gradient = backends.gradients(layer, [PROBS], [np.asarray(1.0, dtype)])[1][0]
    assert (gradient == 0).all()


def test_no_tokens_at_all():
    empty, none = np.zeros((0, 4)), np.zeros(0, bool)
    for mask in (None, none):
        indices = np.zeros((0, 2), "int32")
        assert value(losses.load_balancing_loss(empty, indices, mask)) == 0
        for name in NAMES[1:]:
            assert value(inputs_of(name)[0](empty, mask)) == 0


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_entropy_has_a_finite_slope_at_zero_probability(dtype):
    probs = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    layer = OfOneTensor(lambda x: losses.entropy_loss(ops.cast(x, dtype)))
    gradient = backends.gradients(layer, [probs], [np.asarray(1.0, dtype)])[1][0]
    assert np.isfinite(gradient).all()
    # -(log p + 1) / n wherever p > 0
    assert gradient[1, 0] == pytest.approx(-(math.log(0.5) + 1) / 2, rel=1e-5)


def test_half_precision_is_computed_in_float32():
    for dtype in ("float16", "bfloat16"):
        x = ops.cast(np.full((4096, 4), 0.25), dtype)
        loss = losses.importance_loss(x)
        assert keras.backend.standardize_dtype(loss.dtype) == "float32"
        assert value(losses.entropy_loss(x)) == pytest.approx(2 * LOG2, rel=1e-5)


# Few different sizes, since JAX compiles every operation again for each.
@settings(max_examples=30, deadline=None)
@given(
    n=st.sampled_from([1, 2, 7]), e=st.sampled_from([1, 2, 6]), seed=st.integers(0, 999)
)
def test_bounds_hold_for_any_sizes(n, e, seed):
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(e, 0.3), size=n)
    k = int(rng.choice([1, e]))
    indices = np.array([rng.permutation(e)[:k] for _ in range(n)])
    mask = rng.random(n) < 0.7
    mask[rng.integers(n)] = True
    balance = value(losses.load_balancing_loss(probs, indices, mask))
    assert balance == pytest.approx(
        routing_oracles.load_balancing_loss(probs, indices, mask), rel=1e-9
    )
    assert 0 <= balance <= e + 1e-9
    assert -1e-9 <= value(losses.importance_loss(probs, mask)) <= e - 1 + 1e-9
    assert -1e-9 <= value(losses.entropy_loss(probs, mask)) <= math.log(e) + 1e-9


# Arguments: ranks and sizes.


INDICES = np.array([[0, 1], [0, 1], [1, 2], [2, 0]])
LEGAL = {
    "load_balancing_loss": {
        "router_probs": PROBS,
        "expert_indices": INDICES,
        "mask": MASK,
    },
    "multi_gate_load_balancing_loss": {
        "gate_probs": np.stack([PROBS, PROBS[::-1]], axis=1),
        "gate_weights": np.stack([PROBS > 0.3, PROBS > 0.5], axis=1) * 0.5,
        "mask": MASK,
    },
    "importance_loss": {"gate_weights": PROBS, "mask": MASK},
    "load_loss": {"choice_probs": PROBS, "mask": MASK},
    "router_z_loss": {"router_logits": PROBS, "mask": MASK},
    "entropy_loss": {"router_probs": PROBS, "mask": MASK},
    "cv_squared": {"values": PROBS[0]},
    **{
        name: {
            "targets": PROBS[:, :2],
            "expert_outputs": np.stack([PROBS, -PROBS], axis=-1),
            "gate_weights": PROBS,
            "mask": MASK,
        }
        for name in (
            "local_experts_loss",
            "expected_squared_error",
            "mixture_squared_error",
        )
    },
}
AXES = {
    "expert_indices": "(n, k)",
    "mask": "(n,)",
    "values": "(e,)",
    "targets": "(n, u)",
    "expert_outputs": "(n, e, u)",
}
ARGUMENTS = [(name, argument) for name in LEGAL for argument in LEGAL[name]]
OF_SEVERAL_GATES = "multi_gate_load_balancing_loss"
MASKED = [name for name in LEGAL if "mask" in LEGAL[name]]


def axes_of(name, argument):
    if name == OF_SEVERAL_GATES and argument != "mask":
        return "(n, t, e)"
    return AXES.get(argument, "(n, e)")


def refused(name, message, **changes):
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(losses, name)(**{**LEGAL[name], **changes})


def test_entropy_of_any_leading_axes():
    probs = np.array([[[0.5, 0.5], [1.0, 0.0]]])
    found = ops.convert_to_numpy(losses.entropy(probs))
    np.testing.assert_allclose(found, [[math.log(2), 0.0]], atol=1e-12)
    with pytest.raises(ValueError, match=r"`probs` must have the shape \(..., e\)"):
        losses.entropy(np.array(1.0))


def test_every_public_loss_is_tested_for_its_shapes():
    public = set(losses.__all__)
    # One takes a record, one any leading axes.
    assert public == {*LEGAL, "auxiliary_losses", "entropy"}
    for name in LEGAL:
        assert [*inspect.signature(getattr(losses, name)).parameters] == [*LEGAL[name]]


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_other_ranks_are_refused(name, argument):
    legal, axes = LEGAL[name][argument], axes_of(name, argument)
    for other in (legal[0], legal[None], legal[..., None]):
        message = (
            f"`{argument}` must have the shape {axes}. "
            f"Received: {argument} of shape {np.shape(other)}"
        )
        refused(name, message, **{argument: other})


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_a_missing_argument_is_named(name, argument):
    if argument == "mask":
        return
    axes = axes_of(name, argument)
    message = f"`{argument}` must have the shape {axes}. Received: {argument}=None"
    refused(name, message, **{argument: None})


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("n", [1, 3, 5])
def test_other_numbers_of_tokens_are_refused(name, n):
    first = next(iter(LEGAL[name]))
    message = (
        f"`mask` must have the shape (n,) with n=4 as in `{first}`. "
        f"Received: mask of shape ({n},)"
    )
    refused(name, message, mask=np.ones(n, bool))
    if name == "load_balancing_loss":
        message = (
            "`expert_indices` must have the shape (n, k) with n=4 as in "
            f"`router_probs`. Received: expert_indices of shape ({n}, 2)"
        )
        refused(name, message, expert_indices=np.zeros((n, 2), int))


def test_swapped_arguments_are_refused():
    message = "`expert_indices` must hold integers. Received: expert_indices of dtype"
    changes = {"router_probs": INDICES, "expert_indices": PROBS}
    refused("load_balancing_loss", message, **changes)
    for name in MASKED[1:]:
        first = next(iter(LEGAL[name]))
        axes = axes_of(name, first)
        message = f"`{first}` must have the shape {axes}. Received: {first} of shape"
        refused(name, message, **{first: MASK, "mask": PROBS})


@pytest.mark.parametrize("name", LEGAL)
def test_lists_are_taken(name):
    arguments = LEGAL[name]
    lists = {key: array.tolist() for key, array in arguments.items()}
    found, expected = (getattr(losses, name)(**a) for a in (lists, arguments))
    assert value(found) == pytest.approx(value(expected), rel=1e-6)


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_of_numbers_is_one_of_flags(name):
    loss = getattr(losses, name)
    expected = value(loss(**LEGAL[name]))
    for mask in (MASK.astype(int), MASK.astype("float32"), 0.5 * MASK):
        assert value(loss(**{**LEGAL[name], "mask": mask})) == expected


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="static elsewhere")
@pytest.mark.parametrize("name", MASKED)
def test_unknown_sizes_are_no_error_in_a_graph(name):
    import tensorflow as tf

    loss, arguments = getattr(losses, name), list(LEGAL[name].values())
    specs = [tf.TensorSpec([None, *a.shape[1:]], a.dtype) for a in arguments]
    call = tf.function(loss, input_signature=specs)
    assert value(call(*arguments)) == pytest.approx(value(loss(*arguments)))
    wrong = [*specs[:-1], tf.TensorSpec([None, 1], "bool")]
    with pytest.raises(ValueError, match=r"`mask` must have.*shape \(None, 1\)"):
        tf.function(loss, input_signature=wrong).get_concrete_function()


RECORD = routing.Routing(
    expert_indices=np.array([[0, 1], [0, 1], [1, 2], [2, 0]]),
    combine_weights=np.array([[0.5, 0.5], [1.0, 0.0], [0.75, 0.25], [0.5, 0.5]]),
    router_logits=np.log(PROBS),
    router_probs=PROBS,
    mask=MASK,
    choice_probs=PROBS,
)


def test_the_weighted_losses_of_a_record():
    gates = np.array([[0.5, 0.5, 0, 0], [1, 0, 0, 0], [0, 0.75, 0.25, 0], [0.5] * 4])
    expected = {
        "entropy": -0.5 * value(losses.entropy_loss(PROBS, MASK)),
        "load_balancing": 2.0
        * value(losses.load_balancing_loss(PROBS, RECORD.expert_indices, MASK)),
        "importance": 3.0 * value(losses.importance_loss(gates, MASK)),
        "load": 4.0 * value(losses.load_loss(PROBS, MASK)),
        "router_z": 5.0 * value(losses.router_z_loss(np.log(PROBS), MASK)),
    }
    weights = dict(zip(expected, (-0.5, 2.0, 3.0, 4.0, 5.0), strict=True))
    found = losses.auxiliary_losses(RECORD, weights)
    assert list(found) == list(expected)
    assert {name: value(found[name]) for name in found} == pytest.approx(expected)
    assert losses.auxiliary_losses(RECORD, {}) == {}


def test_a_weighted_loss_of_another_name_is_refused():
    with pytest.raises(ValueError, match=r"`weights` must be one of.*'balance'"):
        losses.auxiliary_losses(RECORD, {"balance": 1.0})
