"""MMoE(shared_top_k=): a joint budget of experts, and balance over the union."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_moe import losses
from keras_moe.layers import MMoE, OMoE
from tests.support import checks, dispatches, multitask_oracles
from tests.support.checks import array, rows


def _layer(e=6, tasks=2, **options):
    return MMoE(e, 2, tasks, **{"dtype": "float64", **options})


def _with_gates(logits, **options):
    """A layer whose gates have these logits (n, t, e) for the n rows of an identity."""
    n, t, e = logits.shape
    layer = _layer(e, t, **options)
    layer.build((None, n))
    layer.gates.kernels[0].assign(np.transpose(logits, (1, 0, 2)))
    return layer, np.eye(n)


def test_the_weights_by_hand():
    """Probabilities of two tasks over four experts, one shared and one private.

    Task a: 0.5, 0.1, 0.3, 0.1; task b: 0.1, 0.5, 0.3, 0.1. Their sums are 0.6, 0.6,
    0.6 and 0.2 up to a little more for expert 2, which both share. Beside it a adds
    expert 0, weights 0.5 / 0.8 and 0.3 / 0.8, and b adds expert 1.
    """
    probs = np.array([[[0.5, 0.1, 0.3001, 0.1], [0.1, 0.5, 0.3001, 0.1]]])
    layer, x = _with_gates(np.log(probs), shared_top_k=1, top_k=1)
    found = array(layer.gate_weights(x))[0]
    np.testing.assert_allclose(found[0], [0.625, 0, 0.375, 0], atol=1e-4)
    np.testing.assert_allclose(found[1], [0, 0.625, 0.375, 0], atol=1e-4)
    # Without private experts the single shared one keeps its probability, of 1.0001.
    layer, x = _with_gates(np.log(probs), shared_top_k=1, top_k=0)
    found = array(layer.gate_weights(x))[0]
    np.testing.assert_allclose(found, [[0, 0, 0.3001 / 1.0001, 0]] * 2, rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), e=st.integers(1, 7), t=st.integers(1, 3))
@checks.not_on_jax
def test_any_budget_equals_the_oracle_and_is_kept(data, e, t):
    s = data.draw(st.integers(1, e))
    k = data.draw(st.integers(0, e - s))
    logits = rows(5, t, e, seed=e + t)
    layer, x = _with_gates(logits, shared_top_k=s, top_k=k)
    found = array(layer.gate_weights(x))
    by_task = [logits[:, task] for task in range(t)]
    wanted = multitask_oracles.joint_weights(by_task, 1.0, k, s)
    for task in range(t):
        np.testing.assert_allclose(found[:, task], wanted[task], **checks.OUTPUTS)
    assert ((found > 0).sum(axis=-1) == s + k).all()
    union = (found > 0).any(axis=1).sum(axis=-1)
    assert (union <= min(s + t * k, e)).all()
    assert layer._max_chosen() == min(s + t * k, e)


@checks.not_on_jax
def test_one_gate_with_a_budget_is_top_k():
    x = rows(5, 3)
    joint = OMoE(6, 2, 2, shared_top_k=1, top_k=1, dtype="float64")
    plain = OMoE(6, 2, 2, top_k=2, dtype="float64")
    joint(x), plain(x)
    plain.set_weights(joint.get_weights())
    np.testing.assert_allclose(array(joint(x)[0]), array(plain(x)[0]), **checks.OUTPUTS)


@checks.not_on_jax
@pytest.mark.parametrize("budget", [(1, 0), (1, 1), (2, 0), (2, 2)])
@pytest.mark.parametrize("dispatch", ["dense", "auto"])
def test_dropped_experts_leave_weights_that_are_finite(budget, dispatch):
    """All of a task's experts may be dropped, as others choose them with it."""
    s, k = budget
    layer = _layer(
        4, 3, shared_top_k=s, top_k=k, gate_dropout=0.9, seed=0, dispatch=dispatch
    )
    x = rows(300, 3)
    layer.build(x.shape)
    weights = array(layer._gate(x, training=True))
    assert np.isfinite(weights).all()
    assert (weights.sum(axis=-1) > 0).all()
    if s + k > 1:
        np.testing.assert_allclose(weights.sum(axis=-1), 1.0, rtol=1e-6)
    assert ((weights > 0).any(axis=1).sum(axis=-1) <= min(s + 3 * k, 4)).all()
    for output in layer(x, training=True):
        assert np.isfinite(array(output)).all()


@pytest.mark.skipif(dispatches.BACKEND == "jax", reason="split is not for XLA")
@pytest.mark.parametrize(
    ("shared_top_k", "top_k", "tasks", "sparse"),
    [
        (4, 1, 2, True),  # 4/8 (1 - 1/4)^2 = 0.28 idle
        (4, 1, 3, False),  # 4/8 (1 - 1/4)^3 = 0.21
        (6, 0, 9, True),  # 2/8
        (7, 0, 1, False),
        (8, 0, 1, False),
    ],
)
def test_auto_counts_what_all_gates_choose(shared_top_k, top_k, tasks, sparse):
    layer = _layer(8, tasks, shared_top_k=shared_top_k, top_k=top_k)
    assert (layer._resolve_dispatch() == "split") == sparse


def test_a_config_round_trip_keeps_the_budget():
    layer = _layer(shared_top_k=2, top_k=0, load_balancing_loss_weight=0.5)
    again = MMoE.from_config(layer.get_config())
    assert (again.shared_top_k, again.top_k) == (2, 0)
    assert again.load_balancing_loss_weight == 0.5


def _loss(layer, *args, **kwargs):
    layer(*args, **kwargs)
    (loss,) = layer.losses
    return float(ops.convert_to_numpy(loss))


def test_the_balance_loss_by_hand():
    """Two rows, two tasks, three experts, the best of each task.

    Row 0: a (0.6, 0.3, 0.1) chooses 0, b (0.5, 0.1, 0.4) chooses 0: the union is {0}.
    Row 1: a (0.2, 0.7, 0.1) chooses 1, b (0.3, 0.1, 0.6) chooses 2: {1, 2}.
    f = (1, 1, 1) / 3 and the loss 3 * 1/3 * sum P = 1. Without row 1, f = (1, 0, 0),
    P_0 = 0.55 and the loss is 3 * 0.55 = 1.65. Without row 0, f = (0, 1, 1) / 2,
    P = (0.25, 0.4, 0.35) and the loss is 3 (0.4 + 0.35) / 2 = 1.125.
    """
    probs = np.array(
        [[[0.6, 0.3, 0.1], [0.5, 0.1, 0.4]], [[0.2, 0.7, 0.1], [0.3, 0.1, 0.6]]]
    )
    layer, x = _with_gates(np.log(probs), top_k=1, load_balancing_loss_weight=2.0)
    assert _loss(layer, x) == pytest.approx(2.0)
    assert _loss(layer, x, mask=np.array([True, False])) == pytest.approx(3.3)
    assert _loss(layer, x, mask=np.array([False, True])) == pytest.approx(2.25)
    assert _loss(layer, x, mask=np.array([False, False])) == 0.0


def test_one_gate_has_the_loss_of_a_router():
    probs = np.exp(rows(6, 1, 4))
    probs /= probs.sum(axis=-1, keepdims=True)
    best = np.argsort(-probs[:, 0], axis=-1)[:, :2]
    weights = np.zeros_like(probs)
    np.put_along_axis(weights[:, 0], best, 0.5, axis=-1)
    found = losses.multi_gate_load_balancing_loss(probs, weights)
    wanted = losses.load_balancing_loss(probs[:, 0], best)
    np.testing.assert_allclose(array(found), array(wanted), rtol=1e-6)


def test_the_balance_loss_is_1_for_uniform_choices_and_e_for_one_expert():
    weights = np.tile(np.eye(4)[:, None], (1, 3, 1))  # Row i: all gates choose i.
    assert float(losses.multi_gate_load_balancing_loss(weights, weights)) == 1.0
    weights = np.zeros((5, 3, 4))
    weights[..., 2] = 1.0
    assert float(losses.multi_gate_load_balancing_loss(weights, weights)) == 4.0


def test_masked_rows_of_nan_do_not_reach_the_balance_loss():
    layer = _layer(shared_top_k=1, top_k=1, load_balancing_loss_weight=1.0)
    x = rows(4, 3)
    wanted = _loss(layer, x[:3])
    broken = x.copy()
    broken[3] = np.nan
    mask = np.array([True, True, True, False])
    assert _loss(layer, broken, mask=mask) == pytest.approx(wanted)


@checks.not_on_jax
def test_an_attached_mask_reaches_the_balance_loss():
    inputs = keras.Input((3, 4))
    layer = MMoE(6, 2, 2, top_k=1, load_balancing_loss_weight=1.0)
    model = keras.Model(inputs, layer(keras.layers.Masking()(inputs)))
    x = rows(2, 3, 4).astype("float32")
    x[:, 2] = 0.0
    model(x)
    (found,) = model.losses
    found = float(ops.convert_to_numpy(found))
    assert found == pytest.approx(_loss(layer, x[:, :2]), rel=1e-5)


@checks.not_on_jax
def test_the_balance_loss_evens_out_collapsed_gates():
    """All gates start on experts 0 and 1; the loss alone moves them apart."""
    keras.utils.set_random_seed(0)
    layer = MMoE(4, 2, 2, top_k=1, gate_use_bias=True, load_balancing_loss_weight=1.0)
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layer(inputs))
    layer.gates.biases[0].assign(np.tile([2.0, 1.9, 0.0, 0.0], (2, 1)))
    x = rows(256, 4).astype("float32")
    before = _loss(layer, x)
    dataset = x, [np.zeros((256, 2), "float32")] * 2
    model.compile(
        keras.optimizers.Adam(0.05), loss=[lambda y, p: 0.0 * ops.sum(p, axis=-1)] * 2
    )
    model.fit(*dataset, epochs=40, batch_size=256, verbose=0)
    after = _loss(layer, x)
    assert before > 1.5
    assert after < 1.1
