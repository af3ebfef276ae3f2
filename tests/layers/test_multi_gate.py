"""MMoE and SharedBottom against the NumPy oracle, and by hand."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_moe.experts import MLPExperts
from keras_moe.layers import MMoE, SharedBottom, Tower
from tests import backends, oracles

ORACLE = backends.tolerance(1e-6, 1e-8)
GRADIENTS = backends.tolerance(1e-5, 1e-7)


def _weights(layer):
    """Random float64 values for every weight, biases too, and the layer told them."""
    rng = np.random.default_rng(1)
    values = [rng.normal(size=w.shape) for w in layer.trainable_variables]
    for variable, value in zip(layer.trainable_variables, values, strict=True):
        variable.assign(value)
    by_path = dict(
        zip([w.path for w in layer.trainable_variables], values, strict=True)
    )

    def pick(owner, kind):
        return [v for p, v in by_path.items() if f"{owner}/{kind}_" in p]

    return (
        values,
        pick("experts", "kernel"),
        pick("experts", "bias"),
        pick("gates", "kernel"),
    )


@pytest.mark.parametrize(
    ("units", "options"),
    [
        ((5,), {}),
        ((6, 5), {}),
        ((6, 4, 5), {"gate_units": (4,)}),
        ((6, 5), {"gate_temperature": 0.3}),
        ((6, 5), {"top_k": 2}),
        ((6, 5), {"gate_x": True}),
    ],
)
def test_outputs_and_all_gradients_equal_the_oracle(units, options):
    options = dict(options)
    separate_gates = options.pop("gate_x", False)
    layer = MMoE(3, units, ["a", "b"], dtype="float64", **options)
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=(4, 3))]
    if separate_gates:
        inputs.append(rng.normal(size=(4, 2)))
    layer(*inputs)
    values, kernels, biases, gate_kernels = _weights(layer)
    cotangents = [rng.normal(size=(4, 5)) for _ in range(2)]

    def oracle():
        return oracles.mmoe(
            inputs[0],
            kernels,
            biases,
            gate_kernels,
            gate_x=inputs[1] if separate_gates else None,
            temperature=options.get("gate_temperature", 1.0),
            top_k=options.get("top_k"),
        )

    outputs = layer(*inputs)
    for output, expected in zip(outputs.values(), oracle(), strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(output), expected, **ORACLE)

    by_weight, by_input = backends.gradients(layer, inputs, cotangents)
    expected = oracles.numeric_gradients(
        lambda: sum((o * c).sum() for o, c in zip(oracle(), cotangents, strict=True)),
        values + inputs,
    )
    for found, wanted in zip([*by_weight, *by_input], expected, strict=True):
        np.testing.assert_allclose(found, wanted, **GRADIENTS)


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 5),
    d=st.integers(1, 4),
    e=st.integers(1, 5),
    t=st.integers(1, 3),
    units=st.lists(st.integers(1, 4), min_size=1, max_size=3),
)
def test_any_sizes_equal_the_oracle(n, d, e, t, units):
    layer = MMoE(e, units, t, dtype="float64")
    x = np.random.default_rng(n).normal(size=(n, d))
    layer(x)
    _, kernels, biases, gate_kernels = _weights(layer)
    expected = oracles.mmoe(x, kernels, biases, gate_kernels)
    for output, wanted in zip(layer(x), expected, strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(output), wanted, **ORACLE)


def test_by_hand():
    """Two experts 2x and -x + 1 of one unit; gates e^(±x) / (e^x + e^-x).

    At x = 0 both gates are 1/2: y = 1/2 * 0 + 1/2 * 1 = 0.5 for both tasks.
    At x = ln(3)/2 task "a" weighs expert 0 by sqrt3 / (sqrt3 + 1/sqrt3) = 3/4, task
    "b" by 1/4; the experts are ln 3 and 1 - ln(3)/2.
    """
    layer = MMoE(2, 1, ["a", "b"], activation="linear", dtype="float64")
    x = np.array([[0.0], [np.log(3) / 2]])
    layer(x)
    layer.experts.kernels[0].assign([[[2.0]], [[-1.0]]])
    layer.experts.biases[0].assign([[0.0], [1.0]])
    layer.gates.kernels[0].assign([[[1.0, -1.0]], [[-1.0, 1.0]]])
    first, second = np.log(3), 1 - np.log(3) / 2
    outputs = {k: ops.convert_to_numpy(v).ravel() for k, v in layer(x).items()}
    np.testing.assert_allclose(outputs["a"], [0.5, 0.75 * first + 0.25 * second])
    np.testing.assert_allclose(outputs["b"], [0.5, 0.25 * first + 0.75 * second])


def test_shared_bottom_is_one_mlp_for_all_tasks():
    layer = SharedBottom((6, 4), ["a", "b"], dtype="float64")
    x = np.random.default_rng(0).normal(size=(5, 3))
    outputs = layer(x)
    kernels = [ops.convert_to_numpy(k)[0] for k in layer.bottom.kernels]
    biases = [np.zeros(6), np.zeros(4)]
    expected = oracles.mlp(x, kernels, biases, oracles.relu, oracles.relu)
    for output in outputs.values():
        np.testing.assert_allclose(ops.convert_to_numpy(output), expected, **ORACLE)


def _gradient_check(layer, inputs, oracle):
    """All gradients of a built float64 layer against those of its oracle.

    `oracle` takes the values of the weights and gives the list of outputs.
    """
    rng = np.random.default_rng(5)
    # Biases too: at 0, a row of dead units would sit on the edge of the next ReLU.
    values = [rng.normal(size=w.shape) for w in layer.trainable_variables]
    for variable, value in zip(layer.trainable_variables, values, strict=True):
        variable.assign(value)
    cotangents = [rng.normal(size=o.shape) for o in oracle(values)]
    by_weight, by_input = backends.gradients(layer, inputs, cotangents)
    expected = oracles.numeric_gradients(
        lambda: sum(
            (o * c).sum() for o, c in zip(oracle(values), cotangents, strict=True)
        ),
        values + inputs,
    )
    for found, wanted in zip([*by_weight, *by_input], expected, strict=True):
        np.testing.assert_allclose(found, wanted, **GRADIENTS)


def test_gradients_of_the_other_layers_equal_the_oracle():
    x = np.random.default_rng(0).normal(size=(4, 3))

    def pairs(values):  # kernel, bias, kernel, bias, ...
        return values[::2], values[1::2]

    experts = MLPExperts(3, (4, 2), dtype="float64")
    experts(x)
    _gradient_check(experts, [x], lambda v: [oracles.mlp_experts(x, *pairs(v))])

    bottom = SharedBottom((4, 2), 2, dtype="float64")
    bottom(x)

    def shared(values):
        kernels, biases = pairs([v[0] for v in values])
        output = oracles.mlp(x, kernels, biases, oracles.relu, oracles.relu)
        return [output, output]

    _gradient_check(bottom, [x], shared)

    tower = Tower((4,), dtype="float64")
    tower(x)
    _gradient_check(
        tower, [x], lambda v: [oracles.mlp(x, *pairs(v), oracles.relu, oracles.linear)]
    )


def test_one_expert_equals_a_shared_bottom():
    x = np.random.default_rng(0).normal(size=(5, 3)).astype("float32")
    mmoe, bottom = MMoE(1, (6, 4), 2), SharedBottom((6, 4), 2)
    expected, _ = mmoe(x), bottom(x)
    bottom.set_weights(mmoe.experts.get_weights())
    for a, b in zip(bottom(x), expected, strict=True):
        np.testing.assert_allclose(
            ops.convert_to_numpy(a), ops.convert_to_numpy(b), rtol=1e-5, atol=1e-6
        )


def test_gates_and_experts_start_different():
    layer = MMoE(
        3,
        (8, 8),
        2,
        kernel_initializer=keras.initializers.GlorotUniform(seed=1),
        gate_kernel_initializer=keras.initializers.GlorotUniform(seed=1),
    )
    layer.build((None, 8))
    draws = [
        part
        for kernel in [*layer.experts.kernels, *layer.gates.kernels]
        for part in ops.convert_to_numpy(kernel)
    ]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert a.shape != b.shape or not np.allclose(a, b)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="reads TensorFlow's graph"
)
@pytest.mark.parametrize("num_experts", [2, 16])
def test_few_large_matmuls_however_many_experts(num_experts):
    """Two expert layers, the gates and the mixture: four, forward."""
    import tensorflow as tf

    layer = MMoE(num_experts, (8, 4), ["a", "b", "c"])
    layer.build((None, 6))
    traced = tf.function(layer).get_concrete_function(tf.TensorSpec((None, 6)))
    kinds = [op.type for op in traced.graph.get_operations()]
    assert sum("MatMul" in kind for kind in kinds) == 4


def test_default_names_are_readable():
    keras.backend.clear_session()
    assert [MMoE(2, 2, 2).name for _ in range(2)] == ["mmoe", "mmoe_1"]
    assert MMoE(2, 2, 2, name="given").name == "given"


def test_gate_weights_are_what_call_uses():
    layer = MMoE(4, 5, ["a", "b"], gate_dropout=0.5)
    x = np.random.default_rng(0).normal(size=(3, 6)).astype("float32")
    outputs = layer(x)
    weights = ops.convert_to_numpy(layer.gate_weights(x))
    experts = ops.convert_to_numpy(layer.experts(x))
    assert weights.shape == (3, 2, 4)
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(
        ops.convert_to_numpy(outputs["b"]),
        (weights[:, 1, :, None] * experts).sum(1),
        rtol=1e-4,
        atol=1e-6,
    )


def test_top_k_keeps_exactly_k_even_among_ties():
    layer = MMoE(5, 4, 2, top_k=2, gate_kernel_initializer="zeros")
    weights = ops.convert_to_numpy(layer.gate_weights(_built(layer)))
    assert ((weights > 0).sum(-1) == 2).all()
    np.testing.assert_allclose(weights.max(-1), 0.5)


def test_gate_dropout_renormalises_and_never_drops_all():
    """With rate 0.9 and 2 experts, 81% of the rows lose both and must keep both."""
    layer = MMoE(2, 1, 1, gate_dropout=0.9, seed=0, gate_kernel_initializer="zeros")
    x = _built(layer, rows=2000)
    weights = ops.convert_to_numpy(layer._gate(x, training=True))
    np.testing.assert_allclose(weights.sum(-1), 1.0)
    both = (weights == 0.5).all(-1).mean()
    one = (weights == 1.0).any(-1).mean()
    # 0.1 * 0.1 keep both and 0.9 * 0.9 lose both; 2 * 0.1 * 0.9 keep one.
    assert abs(both - 0.82) < 0.03
    assert abs(one - 0.18) < 0.03


def test_lower_temperature_sharpens():
    sharp = MMoE(4, 2, 1, gate_temperature=0.1)
    even = MMoE(4, 2, 1, gate_temperature=10.0)
    x = _built(sharp)
    _built(even)
    even.set_weights(sharp.get_weights())
    sharp_max = ops.convert_to_numpy(sharp.gate_weights(x)).max(-1)
    even_max = ops.convert_to_numpy(even.gate_weights(x)).max(-1)
    assert (sharp_max > even_max).all()


def test_gates_stay_float32_in_half_precision():
    layer = MMoE(4, 5, 2, dtype="mixed_float16")
    weights = layer.gate_weights(_built(layer))
    assert keras.backend.standardize_dtype(weights.dtype) == "float32"


def test_a_row_of_nan_stays_in_its_row():
    layer = MMoE(4, 5, ["a"])
    x = _built(layer)
    expected = ops.convert_to_numpy(layer(x)["a"])
    x[1] = np.nan
    found = ops.convert_to_numpy(layer(x)["a"])
    assert np.isnan(found[1]).all()
    np.testing.assert_array_equal(found[[0, 2]], expected[[0, 2]])


def _built(layer, rows=3):
    x = np.random.default_rng(0).normal(size=(rows, 6)).astype("float32")
    layer(x)
    return x


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 0}, r"`num_experts` must be an integer >= 1.*0"),
        ({"num_experts": 2.0}, r"`num_experts` must be an integer >= 1.*2\.0"),
        ({"expert_units": ()}, "`expert_units` must name at least one layer"),
        ({"expert_units": (4, -1)}, r"`expert_units\[1\]` must be .*-1"),
        ({"expert_units": "64"}, "`expert_units` must be an integer or a sequence"),
        ({"expert_units": None}, "`expert_units` must be given.*or `experts`"),
        ({"tasks": 0}, "`tasks` must be an integer >= 1"),
        ({"tasks": []}, "`tasks` must name at least one task"),
        ({"tasks": "click"}, "`tasks` must be a number of tasks or a sequence"),
        ({"tasks": ["a", "a"]}, "must differ. Received 'a' more than once"),
        ({"tasks": ["a b"]}, "Received: 'a b'"),
        ({"tasks": ["a/b"]}, "Received: 'a/b'"),
        ({"tasks": ["_a"]}, "must start with a letter"),
        ({"top_k": 4}, "`top_k` must not exceed `num_experts`.*top_k=4.*=3"),
        ({"top_k": 0}, "`top_k` must be an integer >= 1"),
        ({"gate_units": (0,)}, r"`gate_units\[0\]`"),
        ({"gate_temperature": 0.0}, "`gate_temperature` must be a finite number > 0"),
        ({"gate_temperature": float("nan")}, "`gate_temperature`"),
        ({"gate_dropout": 1.0}, r"`gate_dropout` must be in \[0, 1\).*1\.0"),
        ({"gate_dropout": "0.1"}, "`gate_dropout` must be a number"),
        ({"dropout": -0.1}, "`dropout`"),
        ({"experts": 3, "expert_units": None}, "`experts` must be a Keras layer"),
        ({"experts": MLPExperts(3, 4)}, "`expert_units` must be None"),
        (
            {"experts": MLPExperts(2, 4), "expert_units": None},
            "num_experts=3, experts.num_experts=2",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    good = {"num_experts": 3, "expert_units": 4, "tasks": ["a", "b"]}
    with pytest.raises(ValueError, match=message):
        MMoE(**{**good, **arguments})


def test_gate_inputs_of_another_batch_are_refused():
    layer = MMoE(3, 4, 2)
    with pytest.raises(ValueError, match=r"`gate_inputs`.*\(5, 6\).*\(4, 2\)"):
        layer(np.ones((5, 6)), np.ones((4, 2)))


@keras.saving.register_keras_serializable("tests")
class _PlainExperts(keras.layers.Layer):
    """What a user writes: sublayers and a `call`, nothing more."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.parts = [keras.layers.Dense(4), keras.layers.Dense(4)]

    def call(self, inputs):
        return ops.stack([part(inputs) for part in self.parts], axis=-2)


def test_experts_may_be_any_layer():
    layer = MMoE(2, None, ["a", "b"], experts=_PlainExperts())
    x = np.random.default_rng(0).normal(size=(3, 6)).astype("float32")
    assert layer.compute_output_shape(x.shape) == {"a": (3, 4), "b": (3, 4)}
    outputs = layer(x)
    weights = ops.convert_to_numpy(layer.gate_weights(x))
    first, second = (ops.convert_to_numpy(p(x)) for p in layer.experts.parts)
    expected = weights[:, 0, :1] * first + weights[:, 0, 1:] * second
    np.testing.assert_allclose(
        ops.convert_to_numpy(outputs["a"]), expected, rtol=1e-4, atol=1e-6
    )
    symbolic = layer(keras.Input((6,)))
    assert symbolic["b"].shape == (None, 4)


def test_experts_of_another_shape_are_refused():
    layer = MMoE(2, None, 2, experts=keras.layers.Dense(4))
    with pytest.raises(ValueError, match=r"`experts` must map .* instead of"):
        layer(np.ones((5, 6)))


@pytest.mark.parametrize("shape", [(4,), (None, None)])
def test_inputs_without_a_feature_axis_are_refused(shape):
    with pytest.raises(ValueError, match="Received an input of shape"):
        MMoE(3, 4, 2).build(shape)
