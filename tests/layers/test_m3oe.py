"""M3oE against the NumPy oracle, by hand, and in its special cases."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_moe.experts import MLPExperts
from keras_moe.layers import STAR, M3oE, MMoE
from tests.support import backends, checks, scenario_oracles
from tests.support.checks import array, arrays, rows

# -1 and 7 are unknown.
IDS = np.array([0, 2, -1, 0, 1, 7])


def _oracle(layer, x, ids, values):
    return scenario_oracles.m3oe(
        x,
        ids,
        checks.experts_of(layer.experts, values),
        checks.mlps(layer.gates, values),
        (layer.num_shared_experts, layer.num_scenarios, len(layer.tasks)),
        values[id(layer.balance_logits)],
        layer.gate_temperature,
    )


@pytest.mark.parametrize(
    ("s", "p", "tasks", "options"),
    checks.few_on_jax(
        [
            (2, 3, 2, {}),
            (1, 3, 2, {"gate_use_bias": True}),
            (2, 1, 2, {"gate_temperature": 0.5}),
            (2, 3, 1, {"gate_units": (3,)}),
        ],
        0,
    ),
)
def test_outputs_and_all_gradients_equal_the_oracle(s, p, tasks, options):
    layer = M3oE(s, (3, 2), tasks, p, dtype="float64", **options)
    x = rows(len(IDS), 3)
    layer.build(x.shape)
    values = checks.randomised(layer)
    checks.check(
        layer, [x], lambda: _oracle(layer, x, IDS, values), values, scenario=IDS
    )


@checks.not_on_jax
@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 5),
    s=st.integers(1, 3),
    p=st.integers(1, 4),
    t=st.integers(1, 3),
    data=st.data(),
)
def test_any_sizes_equal_the_oracle(n, s, p, t, data):
    ids = np.array(data.draw(st.lists(st.integers(-1, p), min_size=n, max_size=n)))
    layer = M3oE(s, 2, t, p, dtype="float64")
    x = rows(n, 3, seed=n)
    layer.build(x.shape)
    values = checks.randomised(layer)
    wanted = _oracle(layer, x, ids, values)
    for found, output in zip(layer(x, ids), wanted, strict=True):
        np.testing.assert_allclose(array(found), output, **checks.OUTPUTS)


def test_by_hand():
    """Expert i gives i + 1: shared 1 and 2, scenarios 3 and 4, tasks 5, 6 and 7.

    Even gates give 1.5. With alpha 0.8 scenario 0 is 0.8 * 3 + 0.2 * 4 = 3.2 and
    scenario 1 is 3.8; task 0 is 0.8 * 5 + 0.1 * (6 + 7) = 5.3, task 1 is 6 and task 2
    6.7. With beta 0.5 task 0 in scenario 0 is 1.5 + 1.6 + 2.65 = 5.75. An unknown
    scenario is 3.5.
    """
    layer = M3oE(2, 1, ["a", "b", "c"], 2, dtype="float64", activation="linear")
    layer.build((None, 1))
    layer.experts.kernels[0].assign(np.zeros((7, 1, 1)))
    layer.experts.biases[0].assign(np.arange(1.0, 8.0)[:, None])
    layer.gates.kernels[0].assign(np.zeros((6, 1, 2)))
    found = layer(np.ones((3, 1)), np.array([0, 1, 2]))
    for task, own in (("a", 2.65), ("b", 3.0), ("c", 3.35)):
        wanted = np.array([1.6, 1.9, 1.75]) + 1.5 + own
        np.testing.assert_allclose(array(found[task])[:, 0], wanted, rtol=1e-6)


def test_gate_weights_are_those_of_the_scenario():
    layer = M3oE(3, 2, 2, 4)
    x = rows(2, 5, 6).astype("float32")
    ids = np.arange(10).reshape(2, 5) % 4
    found = array(layer.gate_weights(x, ids))
    assert found.shape == (2, 5, 2, 3)
    np.testing.assert_allclose(found.sum(axis=-1), 1.0, rtol=1e-5)
    every = [array(layer.gate_weights(x, np.full((2, 5), q))) for q in range(4)]
    for q in range(4):
        np.testing.assert_allclose(found[ids == q], every[q][ids == q], rtol=1e-5)
    unknown = array(layer.gate_weights(x, np.full((2, 5), -1)))
    np.testing.assert_allclose(unknown, np.mean(every, axis=0), rtol=1e-5)


@checks.not_on_jax
def test_without_modules_one_scenario_is_mmoe():
    layer = M3oE(3, (4, 2), 2, 1, module_weight=1e-12, dtype="float64")
    twin = MMoE(3, (4, 2), 2, dtype="float64")
    x = rows(5, 3)
    layer.build(x.shape), twin.build(x.shape)
    kept = [array(w)[:3] for w in layer.experts.weights]
    twin.experts.set_weights(kept)
    twin.gates.set_weights(layer.gates.get_weights())
    for a, b in zip(layer(x, np.zeros(5, int)), twin(x), strict=True):
        np.testing.assert_allclose(array(a), array(b), **checks.OUTPUTS)


@checks.not_on_jax
def test_scenarios_train_their_own_gates():
    layer = M3oE(2, 2, 2, 3, dtype="float64")
    x = rows(6, 3)
    layer.build(x.shape)
    call = checks.Call(layer, scenario=np.ones(6, int))
    by_weight, _ = backends.gradients(call, [x], [np.ones((6, 2))] * 2)
    weights = layer.trainable_variables
    for weight, gradient in zip(weights, by_weight, strict=True):
        if weight is layer.gates.kernels[0]:
            used = np.abs(gradient).reshape(6, -1).max(axis=1) > 0
            assert used.tolist() == [False, False, True, True, False, False]


@checks.not_on_jax
def test_given_experts_and_a_star_before_it():
    inputs, ids = keras.Input((6,)), keras.Input((), dtype="int32")
    hidden = STAR((8,), 2)(inputs, ids)
    layer = M3oE(2, None, ["a", "b"], 2, experts=MLPExperts(6, (5, 3), "tanh"))
    model = keras.Model([inputs, ids], layer(hidden, ids))
    x, scenario = rows(16, 6).astype("float32"), np.arange(16) % 2
    model.compile("adam", {"a": "mse", "b": "mse"})
    y = {"a": x[:, :3], "b": x[:, 3:]}
    before = array(layer.balance_logits).copy()
    model.fit([x, scenario], y, epochs=2, verbose=0)
    assert (array(layer.balance_logits) != before).all()
    again = M3oE.from_config(layer.get_config())
    assert again.experts.units == (5, 3)


@checks.not_on_jax
def test_a_row_of_nan_stays_in_its_row():
    layer = M3oE(2, 3, 2, 2)
    x, ids = rows(3, 4).astype("float32"), np.array([0, 0, 1])
    wanted = arrays(layer(x, ids))
    x[1] = np.nan
    for found, expected in zip(arrays(layer(x, ids)), wanted, strict=True):
        assert np.isnan(found[1]).all()
        np.testing.assert_array_equal(found[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_shared_experts": 0}, "`num_shared_experts` must be an integer >= 1.*0"),
        ({"num_scenarios": 0}, "`num_scenarios` must be an integer >= 1.*0"),
        ({"own_weight": 1.0}, r"`own_weight` must be in \(0, 1\).*1\.0"),
        ({"own_weight": 0.0}, "`own_weight` must be a finite number > 0"),
        ({"module_weight": 1.5}, r"`module_weight` must be in \(0, 1\).*1\.5"),
        ({"tasks": []}, "`tasks` must name at least one task"),
        ({"expert_units": None}, "`expert_units` must be given"),
        (
            {"expert_units": None, "experts": MLPExperts(3, 4)},
            r"`experts\[0\]` must hold 5 experts.*=3",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    good = {"num_shared_experts": 1, "expert_units": 4, "tasks": 2, "num_scenarios": 2}
    with pytest.raises(ValueError, match=message):
        M3oE(**{**good, **arguments})


def test_bad_scenarios_are_named():
    layer = M3oE(1, 4, 2, 2)
    with pytest.raises(ValueError, match=r"`scenario` must hold integers.*float"):
        layer(np.ones((4, 3)), np.zeros(4))
    with pytest.raises(ValueError, match=r"`scenario` must have the leading axes"):
        layer(np.ones((4, 3)), np.zeros((4, 1), int))
