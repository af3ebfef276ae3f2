"""STAR against the NumPy oracle, by hand, and in its special cases."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_moe.layers import STAR
from tests.support import backends, checks, multitask_oracles, scenario_oracles
from tests.support.checks import array, rows

# -1 and 7 are unknown.
IDS = np.array([0, 2, -1, 0, 2, 1, 7])


class OfInputs(keras.layers.Layer):
    """A layer of inputs alone, with its weights."""

    def __init__(self, layer, ids):
        super().__init__()
        self.layer, self.ids = layer, ids

    def call(self, x, training=None):
        return self.layer(x, self.ids, training=training)


def _layers(layer, values):
    zero = [np.zeros(())] * len(layer.kernels)

    def of(variables):
        return [values[id(v)] for v in variables]

    biases = of(layer.biases) or zero
    own = of(layer.scenario_biases) or [np.zeros(layer.num_scenarios)] * len(zero)
    return list(
        zip(of(layer.kernels), of(layer.scenario_kernels), biases, own, strict=True)
    )


def _oracle(layer, x, ids, values, training=False, statistics=None, final=None):
    hidden = x
    if layer.normalization:
        norm = layer.norm
        weights = [
            values[id(w)]
            for w in (norm.gamma, norm.beta, norm.scenario_gamma, norm.scenario_beta)
        ]
        if not training and statistics is None:
            p = layer.num_scenarios
            statistics = np.zeros((p + 1, x.shape[1])), np.ones((p + 1, x.shape[1]))
        hidden = scenario_oracles.partitioned_normalization(x, ids, weights, statistics)
    auxiliary = None
    if layer.auxiliary_units is not None:
        auxiliary = (
            [values[id(k)][0] for k in layer.auxiliary.kernels],
            [values[id(b)][0] for b in layer.auxiliary.biases],
            values[id(layer.embedding)],
        )
    layers = _layers(layer, values)
    return scenario_oracles.star(hidden, x, ids, layers, auxiliary, final=final)


@pytest.mark.parametrize(
    ("units", "options", "training"),
    checks.few_on_jax(
        [
            ((4, 2), {"normalization": False}, False),
            (2, {"normalization": False, "use_bias": False}, False),
            ((4, 3, 2), {}, False),
            ((4, 2), {}, True),
            ((4, 2), {"auxiliary_units": (3,), "embedding_units": 2}, True),
            (2, {"auxiliary_units": (), "final_activation": "sigmoid"}, False),
        ],
        4,
    ),
)
def test_outputs_and_all_gradients_equal_the_oracle(units, options, training):
    layer = STAR(units, 3, dtype="float64", **options)
    x = rows(len(IDS), 3)
    layer.build(x.shape)
    values = checks.randomised(layer)
    final = None
    if "final_activation" in options:
        final = multitask_oracles.sigmoid

    def expected():
        return [_oracle(layer, x, IDS, values, training, final=final)]

    checks.check(layer, [x], expected, values, scenario=IDS, training=training)


@checks.not_on_jax
@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 6),
    p=st.integers(1, 4),
    units=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    data=st.data(),
)
def test_any_sizes_equal_the_oracle(n, p, units, data):
    ids = np.array(data.draw(st.lists(st.integers(-1, p), min_size=n, max_size=n)))
    layer = STAR(units, p, auxiliary_units=(2,), dtype="float64")
    x = rows(n, 3, seed=n)
    layer.build(x.shape)
    values = checks.randomised(layer)
    wanted = _oracle(layer, x, ids, values)
    np.testing.assert_allclose(array(layer(x, ids)), wanted, **checks.OUTPUTS)


def test_by_hand():
    """W = 2, b = 1; scenario 0 has W_p = 3, b_p = -1, scenario 1 W_p = 0.5, b_p = 4.

    At x = 1 they give 6 * 1 + 0 = 6 and 1 * 1 + 5 = 6; an unknown one 2 * 1 + 1 = 3.
    """
    layer = STAR(1, 2, normalization=False, dtype="float64")
    layer.build((None, 1))
    layer.kernels[0].assign([[2.0]])
    layer.biases[0].assign([1.0])
    layer.scenario_kernels[0].assign([[[3.0]], [[0.5]]])
    layer.scenario_biases[0].assign([[-1.0], [4.0]])
    x = np.array([[1.0], [1.0], [1.0], [2.0]])
    found = array(layer(x, np.array([0, 1, 2, 1])))
    np.testing.assert_allclose(found[:, 0], [6.0, 6.0, 3.0, 7.0], rtol=1e-6)


def test_every_scenario_starts_as_the_shared_network():
    """Also an unknown one."""
    layer = STAR((8, 4), 3)
    x = rows(6, 5).astype("float32")
    first = array(layer(x, np.zeros(6, "int32")))
    for scenario in (1, 2, 3, -1):
        found = array(layer(x, np.full(6, scenario, "int32")))
        np.testing.assert_allclose(found, first, rtol=1e-5, atol=1e-6)
    kernels = [array(kernel) for kernel in layer.scenario_kernels]
    assert all((kernel == 1).all() for kernel in kernels)


@checks.not_on_jax
def test_a_scenario_trains_its_own_weights_and_the_shared_ones():
    layer = STAR((4, 2), 3, dtype="float64")
    x = rows(6, 3)
    layer.build(x.shape)
    ones = np.ones((6, 2))
    call = checks.Call(layer, scenario=np.full(6, 1))
    by_weight, _ = backends.gradients(call, [x], [ones])
    for weight, gradient in zip(layer.trainable_variables, by_weight, strict=True):
        if "scenario_" in weight.path:
            assert not gradient[[0, 2]].any(), weight.path
            assert gradient[1].any(), weight.path
        else:
            assert gradient.any(), weight.path
    # Rows of unknown scenarios train the shared weights alone.
    call = checks.Call(layer, scenario=np.full(6, 3))
    by_weight, _ = backends.gradients(call, [x], [ones])
    for weight, gradient in zip(layer.trainable_variables, by_weight, strict=True):
        assert gradient.any() != ("scenario_" in weight.path), weight.path


@checks.not_on_jax
def test_a_scenario_that_overflows_leaves_the_others_finite():
    layer = STAR((4, 2), 2, normalization=False)
    x = rows(4, 3).astype("float32")
    ids = np.array([0, 1, 0, 1])
    wanted = array(layer(x, ids))
    kernel = array(layer.scenario_kernels[0]).copy()
    kernel[1] = 3e38
    layer.scenario_kernels[0].assign(kernel)
    call = checks.Call(layer, scenario=ids[::2])
    np.testing.assert_allclose(array(call(x[::2])), wanted[::2], rtol=1e-5)
    by_weight, _ = backends.gradients(call, [x[::2]], [np.ones((2, 2), "float32")])
    for weight, gradient in zip(layer.trainable_variables, by_weight, strict=True):
        if "scenario_" not in weight.path:
            assert np.isfinite(gradient).all(), weight.path


@checks.not_on_jax
def test_a_model_learns_scenarios_that_differ():
    """The sign of the target depends on the scenario."""
    inputs, ids = keras.Input((4,)), keras.Input((), dtype="int32")
    layer = STAR((16, 1), 2)
    model = keras.Model([inputs, ids], layer(inputs, ids))
    model.compile(keras.optimizers.Adam(0.02), "mse")
    scenario = np.arange(256) % 2
    x = rows(256, 4).astype("float32")
    y = (x[:, :1] * (1.0 - 2.0 * scenario[:, None])).astype("float32")
    model.fit([x, scenario], y, epochs=60, batch_size=64, verbose=0)
    assert model.evaluate([x, scenario], y, verbose=0) < 0.2


@checks.not_on_jax
def test_dropout_follows_its_seed():
    ids = np.arange(30) % 2
    checks.assert_dropout_follows_its_seed(
        lambda seed: OfInputs(STAR((8, 3), 2, dropout=0.5, seed=seed), ids),
        rows(30, 4).astype("float32"),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"units": ()}, "`units` must name at least one layer"),
        ({"num_scenarios": 0}, "`num_scenarios` must be an integer >= 1.*0"),
        ({"normalization": 1}, "`normalization` must be True or False.*1"),
        ({"auxiliary_units": (0,)}, r"`auxiliary_units\[0\]` must be"),
        ({"embedding_units": 0}, "`embedding_units` must be an integer >= 1"),
        ({"dropout": 1.0}, r"`dropout` must be in \[0, 1\)"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        STAR(**{"units": 4, "num_scenarios": 2, **arguments})


def test_bad_scenarios_are_named():
    layer = STAR(4, 2)
    with pytest.raises(ValueError, match=r"`scenario` must hold integers.*float"):
        layer(np.ones((4, 3)), np.zeros(4))
    with pytest.raises(ValueError, match=r"`scenario` must have the leading axes"):
        layer(np.ones((4, 3)), np.zeros((4, 1), int))
