"""PEPNet and its parts against the NumPy oracle, by hand, and with gates of 1."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_moe.layers import EPNet, GateNU, PEPNet, PPNet
from tests.support import backends, oracles, sharing_oracles
from tests.support.checks import not_on_jax

ORACLE = backends.tolerance(1e-6, 1e-8)
GRADIENTS = backends.tolerance(1e-5, 1e-7)
D, P, Q = 3, 2, 4  # Features of the embedding, of the domain, and prior ones.


def _arrays(outputs):
    return [ops.convert_to_numpy(o) for o in keras.tree.flatten(outputs)]


def _assert_equal(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


def _randomised(layer):
    """Random values for every weight, biases too: a list, and a dict by variable."""
    rng = np.random.default_rng(1)
    values = {}
    for variable in layer.trainable_variables:
        values[id(variable)] = rng.normal(size=variable.shape)
        variable.assign(values[id(variable)])
    return list(values.values()), values


def _of(values, variables):
    return [values[id(variable)] for variable in variables]


def _gate_weights(values, gate):
    """Kernel, bias, kernel, bias."""
    dense = (gate.hidden, gate.gates)
    return _of(values, [w for part in dense for w in (part.kernel, part.bias)])


def _tower_weights(values, ppnet):
    return _of(values, ppnet.towers.kernels), _of(values, ppnet.towers.biases)


def _all_gate_weights(values, ppnet):
    return [_gate_weights(values, gate) for gate in ppnet.gates]


def _inputs(*widths, rows=4):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(rows, width)) for width in widths]


def _check(layer, inputs, oracle, values):
    """Outputs and all gradients; `oracle` reads `values` and `inputs` in place."""
    outputs = _arrays(layer(*inputs))
    _assert_equal(outputs, oracle(), ORACLE)
    rng = np.random.default_rng(5)
    cotangents = [rng.normal(size=o.shape) for o in outputs]
    by_weight, by_input = backends.gradients(layer, inputs, cotangents)
    expected = oracles.numeric_gradients(
        lambda: sum((o * c).sum() for o, c in zip(oracle(), cotangents, strict=True)),
        values + inputs,
    )
    _assert_equal([*by_weight, *by_input], expected, GRADIENTS)


@pytest.mark.parametrize("options", [{}, {"hidden_units": 7, "scale": 0.5}])
def test_gate_nu_equals_the_oracle(options):
    layer, inputs = GateNU(5, dtype="float64", **options), _inputs(D)
    layer.build(*[x.shape for x in inputs])
    values, by_variable = _randomised(layer)
    weights = _gate_weights(by_variable, layer)
    assert weights[0].shape == (D, options.get("hidden_units", 5))
    scale = options.get("scale", 2.0)
    _check(
        layer,
        inputs,
        lambda: [sharing_oracles.gate_nu(inputs[0], weights, scale)],
        values,
    )


@pytest.mark.parametrize("options", [{}, {"gate_units": 7, "gate_scale": 3.0}])
def test_epnet_equals_the_oracle(options):
    """The embedding gets no gradient through the gate, which the oracle holds still."""
    layer, inputs = EPNet(dtype="float64", **options), _inputs(D, P)
    layer.build(*[x.shape for x in inputs])
    values, by_variable = _randomised(layer)
    weights, stopped = _gate_weights(by_variable, layer.gate), inputs[0].copy()
    scale = options.get("gate_scale", 2.0)
    _check(
        layer,
        inputs,
        lambda: [sharing_oracles.epnet(*inputs, weights, scale, stopped)],
        values,
    )


@pytest.mark.parametrize("units", [(5,), (6, 5), (6, 4, 5)])
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("options", [{}, {"gate_units": 7, "gate_scale": 3.0}])
def test_ppnet_equals_the_oracle(units, prior, options):
    layer = PPNet(units, ["a", "b"], dtype="float64", **options)
    inputs = _inputs(D, Q) if prior else _inputs(D)
    layer.build(*[x.shape for x in inputs])
    values, by_variable = _randomised(layer)
    kernels, biases = _tower_weights(by_variable, layer)
    gates, stopped = _all_gate_weights(by_variable, layer), inputs[0].copy()
    for width, weights in zip(units, gates, strict=True):
        assert weights[0].shape[1] == options.get("gate_units", width)

    def oracle():
        return sharing_oracles.ppnet(
            inputs[0],
            inputs[1] if prior else None,
            kernels,
            biases,
            gates,
            options.get("gate_scale", 2.0),
            stopped,
        )

    _check(layer, inputs, oracle, values)


@pytest.mark.parametrize("prior", [False, True])
def test_pepnet_equals_the_oracle(prior):
    """Neither the embedding nor EPNet learns through the gates of the towers."""
    layer = PEPNet((6, 5), ["a", "b", "c"], gate_units=3, dtype="float64")
    inputs = _inputs(D, P, Q) if prior else _inputs(D, P)
    layer.build(*[x.shape for x in inputs])
    values, by_variable = _randomised(layer)
    kernels, biases = _tower_weights(by_variable, layer.ppnet)
    gates = _all_gate_weights(by_variable, layer.ppnet)
    domain_gate = _gate_weights(by_variable, layer.epnet.gate)
    stopped = inputs[0].copy()

    def embedding():
        return sharing_oracles.epnet(*inputs[:2], domain_gate, 2.0, stopped)

    stopped_embedding = embedding()

    def oracle():
        return sharing_oracles.ppnet(
            embedding(),
            inputs[2] if prior else None,
            kernels,
            biases,
            gates,
            2.0,
            stopped_embedding,
        )

    _check(layer, inputs, oracle, values)


@not_on_jax
@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 5),
    widths=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    t=st.integers(1, 4),
    units=st.lists(st.integers(1, 4), min_size=1, max_size=3),
)
def test_any_sizes_equal_the_oracle(n, widths, t, units):
    layer = PPNet(units, t, dtype="float64")
    inputs = _inputs(*widths, rows=n)
    layer.build(*[x.shape for x in inputs])
    _, by_variable = _randomised(layer)
    expected = sharing_oracles.ppnet(
        *inputs,
        *_tower_weights(by_variable, layer),
        _all_gate_weights(by_variable, layer),
        2.0,
        inputs[0],
    )
    _assert_equal(_arrays(layer(*inputs)), expected, ORACLE)


def test_further_leading_axes_are_rows():
    layer = PEPNet((6, 5), 2, dtype="float64")
    inputs = _inputs(D, P, Q, rows=8)
    expected = [o.reshape((2, 4, 5)) for o in _arrays(layer(*inputs))]
    found = layer(*[x.reshape((2, 4, -1)) for x in inputs])
    _assert_equal(_arrays(found), expected, ORACLE)


def test_by_hand():
    """Embedding 3, domain 1, gate 2 sigmoid(ln 3 * relu(1 * 1)) = 2 * 3/4: 4.5.

    Towers 2x and -x + 5, which are 9 and 0.5, prior 2. The gates of the towers see
    the prior alone, relu(2), by which they are 2 sigmoid(0) = 1 and
    2 sigmoid(-2 * ln(3) / 2) = 2 * 1/4: 9 and 0.25.
    """
    layer = PEPNet(1, ["a", "b"], gate_units=1, dtype="float64")
    inputs = [np.array([[3.0]]), np.array([[1.0]]), np.array([[2.0]])]
    layer.build(*[x.shape for x in inputs])
    layer.epnet.gate.hidden.kernel.assign([[1.0], [0.0]])  # Domain, embedding.
    layer.epnet.gate.gates.kernel.assign([[np.log(3)]])
    layer.ppnet.towers.kernels[0].assign([[[2.0]], [[-1.0]]])
    layer.ppnet.towers.biases[0].assign([[0.0], [5.0]])
    layer.ppnet.gates[0].hidden.kernel.assign([[1.0], [0.0]])  # Prior, embedding.
    layer.ppnet.gates[0].gates.kernel.assign([[0.0, -np.log(3) / 2]])
    np.testing.assert_allclose(_arrays(layer.epnet(*inputs[:2])), [[[4.5]]])
    outputs = layer(*inputs)
    np.testing.assert_allclose(_arrays(outputs["a"]), [[[9.0]]])
    np.testing.assert_allclose(_arrays(outputs["b"]), [[[0.25]]])


def _open(gate):
    """Gates of 2 sigmoid(0) = 1."""
    for variable in gate.trainable_variables:
        variable.assign(ops.zeros(variable.shape))


def test_gates_of_1_leave_separate_mlps():
    layer = PEPNet((6, 4, 5), ["a", "b"], dtype="float64")
    inputs = _inputs(D, P, Q)
    layer.build(*[x.shape for x in inputs])
    _, by_variable = _randomised(layer)
    for gate in (layer.epnet.gate, *layer.ppnet.gates):
        _open(gate)
    expected = sharing_oracles.separate_mlps(
        inputs[0], *_tower_weights(by_variable, layer.ppnet)
    )
    _assert_equal(_arrays(layer(*inputs)), expected, ORACLE)


def test_gates_lie_between_0_and_their_scale_and_start_around_half_of_it():
    gate = GateNU(64, scale=3.0)
    x = np.random.default_rng(0).normal(size=(500, 8)).astype("float32")
    gates = _arrays(gate(x))[0]
    assert abs(gates.mean() - 1.5) < 0.1
    extreme = _arrays(gate(1e4 * x))[0]
    assert extreme.min() < 1e-3
    assert extreme.max() > 3 - 1e-3
    assert ((extreme >= 0) & (extreme <= 3)).all()


def test_every_task_and_layer_starts_with_draws_of_its_own():
    initializer = keras.initializers.GlorotUniform(seed=1)
    layer = PEPNet(
        (4, 4),
        1,
        kernel_initializer=initializer,
        gate_kernel_initializer=initializer,
    )
    layer.build((None, 4), (None, 2), (None, 2))
    draws = [
        _arrays(w)[0].reshape(w.shape[-2:]) for w in layer.weights if "kernel" in w.path
    ]
    assert len(draws) == 8
    for i, a in enumerate(draws):
        for b in draws[:i]:
            rows = min(len(a), len(b))
            assert not np.allclose(a[:rows], b[:rows])


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="reads TensorFlow's graph"
)
@pytest.mark.parametrize("tasks", [2, 9])
def test_few_large_matmuls_however_many_tasks(tasks):
    """Two layers and two gate units of two layers: six, forward."""
    import tensorflow as tf

    layer = PPNet((8, 4), tasks)
    layer.build((None, 6), (None, 3))
    specs = tf.TensorSpec((None, 6)), tf.TensorSpec((None, 3))
    traced = tf.function(layer).get_concrete_function(*specs)
    kinds = [op.type for op in traced.graph.get_operations()]
    assert sum("MatMul" in kind for kind in kinds) == 6


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_gates_are_computed_in_float32(policy):
    gate = GateNU(4, dtype=policy)
    outputs = gate(np.ones((2, 3), "float32"))
    assert keras.backend.standardize_dtype(outputs.dtype) == gate.compute_dtype
    assert gate.hidden.compute_dtype == gate.gates.compute_dtype == "float32"


def test_dropout_is_active_in_training_alone_and_follows_its_seed():
    inputs = [x.astype("float32") for x in _inputs(D, P)]
    layers = [PEPNet((16, 4), 2, dropout=0.5, seed=3) for _ in range(2)]
    calm, _ = (layer(*inputs) for layer in layers)
    layers[1].set_weights(layers[0].get_weights())
    first, second = (_arrays(layer(*inputs, training=True)) for layer in layers)
    _assert_equal(first, second, {"rtol": 0})
    assert not np.allclose(first[0], _arrays(calm)[0])


def test_a_row_of_nan_stays_in_its_row():
    layer = PEPNet((4, 5), ["a", "b"])
    inputs = [x.astype("float32") for x in _inputs(D, P, Q)]
    expected = _arrays(layer(*inputs))
    inputs[2][1] = np.nan
    for found, wanted in zip(_arrays(layer(*inputs)), expected, strict=True):
        assert np.isnan(found[1]).all()
        np.testing.assert_array_equal(found[[0, 2, 3]], wanted[[0, 2, 3]])


def test_default_names_are_readable():
    keras.backend.clear_session()
    assert [PEPNet(2, 2).name for _ in range(2)] == ["pepnet", "pepnet_1"]
    assert [PPNet(2, 2).name, EPNet().name, GateNU(2).name] == [
        "ppnet",
        "epnet",
        "gate_nu",
    ]


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (GateNU, {"units": 0}, "`units` must be an integer >= 1.*0"),
        (GateNU, {"hidden_units": 0}, "`hidden_units` must be an integer >= 1.*0"),
        (GateNU, {"scale": 0.0}, "`scale` must be a finite number > 0"),
        (EPNet, {"gate_units": 1.5}, r"`gate_units` must be an integer >= 1.*1\.5"),
        (EPNet, {"gate_scale": -1.0}, r"`gate_scale` must be a finite.*-1\.0"),
        (PPNet, {"units": ()}, "`units` must name at least one layer"),
        (PPNet, {"tasks": ["a b"]}, "Received: 'a b'"),
        (PPNet, {"gate_units": 0}, "`gate_units` must be an integer >= 1"),
        (PPNet, {"gate_scale": "2"}, "`gate_scale` must be a finite number > 0"),
        (PPNet, {"dropout": 1.0}, r"`dropout` must be in \[0, 1\)"),
        (PEPNet, {"units": "64"}, "`units` must be an integer or a sequence"),
        (PEPNet, {"gate_scale": 0.0}, "`gate_scale` must be a finite number > 0"),
    ],
)
def test_bad_arguments_are_named(make, arguments, message):
    good = {
        GateNU: {"units": 4},
        EPNet: {},
        PPNet: {"units": 4, "tasks": ["a", "b"]},
        PEPNet: {"units": 4, "tasks": ["a", "b"]},
    }
    with pytest.raises(ValueError, match=message):
        make(**{**good[make], **arguments})


def test_bad_inputs_are_named():
    x, short = np.ones((5, 6)), np.ones((4, 2))
    with pytest.raises(ValueError, match=r"`domain_inputs`.*\(5, 6\).*\(4, 2\)"):
        EPNet()(x, short)
    with pytest.raises(ValueError, match=r"`prior_inputs`.*\(5, 6\).*\(4, 2\)"):
        PPNet(4, 2)(x, short)
    with pytest.raises(ValueError, match=r"`prior_inputs`.*\(5, 6\).*\(4, 2\)"):
        PEPNet(4, 2)(x, x, short)
    with pytest.raises(ValueError, match="Received an input of shape"):
        EPNet().build((None, None), (None, 2))
    with pytest.raises(ValueError, match="Received an input of shape"):
        PPNet(4, 2).build((4,))


def test_an_embedding_of_one_unit_is_not_broadcast():
    layer = EPNet()
    layer(np.ones((5, 6)), np.ones((5, 3)))
    with pytest.raises(ValueError, match="axis -1"):
        layer(np.ones((5, 1)), np.ones((5, 8)))
