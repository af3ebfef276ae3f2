import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.experts import (
    GLUExperts,
    LayerExperts,
    MLPExperts,
    StackedKernels,
)
from keras_moe.layers import PLE, MMoE, MoE
from tests.support import backends, moe_oracles, oracles


@pytest.mark.parametrize("units", [(4,), (6, 4), (6, 5, 4)])
@pytest.mark.parametrize("use_bias", [True, False])
def test_equals_each_expert_alone(units, use_bias):
    experts = MLPExperts(3, units, use_bias=use_bias, dtype="float64")
    x = np.random.default_rng(0).normal(size=(5, 2))
    experts(x)
    rng = np.random.default_rng(1)
    for bias in experts.biases:
        bias.assign(rng.normal(size=bias.shape))
    expected = oracles.mlp_experts(
        x,
        [ops.convert_to_numpy(k) for k in experts.kernels],
        [ops.convert_to_numpy(b) for b in experts.biases],
    )
    found = ops.convert_to_numpy(experts(x))
    np.testing.assert_allclose(found, expected, **backends.tolerance(1e-9))


def test_wide_experts_equal_each_expert_alone():
    """They are computed one by one on TensorFlow; see layers/test_wide_experts.py."""
    experts = MLPExperts(3, (33, 4), dtype="float64")
    x = np.random.default_rng(0).normal(size=(5, 2))
    experts(x)
    expected = oracles.mlp_experts(
        x,
        [ops.convert_to_numpy(k) for k in experts.kernels],
        [ops.convert_to_numpy(b) for b in experts.biases],
    )
    found = ops.convert_to_numpy(experts(x))
    np.testing.assert_allclose(found, expected, **backends.tolerance(1e-9))


def test_kernels_that_experts_compute_are_told_apart():
    """The second kernel may have the address of the first, which is free by then."""

    class Squared(StackedKernels):
        def build(self, input_shape):
            self.first = self.add_weight(shape=(2, 3, 3), name="first")
            self.second = self.add_weight(shape=(2, 3, 3), name="second")

        def on_rows(self, rows, matmul, training=None):
            rows = matmul(rows, ops.square(self.first))
            return matmul(rows, ops.square(self.second))

    experts = Squared(2, dtype="float64")
    experts.build((None, 3))
    x = np.random.default_rng(0).normal(size=(4, 3))
    found = experts.on_pieces([ops.convert_to_tensor(x)] * 2)
    first, second = (ops.convert_to_numpy(w) ** 2 for w in experts.weights)
    for k in range(2):
        expected = x @ first[k] @ second[k]
        result = ops.convert_to_numpy(found[k])
        np.testing.assert_allclose(result, expected, **backends.tolerance(1e-9))


def test_experts_with_slots_alone_are_mixed_from_several_streams():
    """`on_pieces` is needed by a dispatch only."""

    class Slots(keras.layers.Layer):
        num_experts = 3

        def build(self, input_shape):
            shape = (3, input_shape[-1], 4)
            self.kernel = self.add_weight(shape=shape, name="kernel")

        def call(self, inputs, training=None):
            return ops.einsum("nd,edu->neu", inputs, self.kernel)

        def on_slots(self, slots, training=None):
            return ops.matmul(slots, self.kernel)

    ple = PLE(2, 1, 1, tasks=2, experts=[Slots(), Slots()])
    assert [tuple(y.shape) for y in ple(np.ones((5, 2)))] == [(5, 4)] * 2


def test_leading_axes_are_kept():
    experts = MLPExperts(3, (6, 4))
    x = np.random.default_rng(0).normal(size=(2, 5, 7)).astype("float32")
    together = ops.convert_to_numpy(experts(x))
    assert together.shape == (2, 5, 3, 4)
    alone = ops.convert_to_numpy(experts(x[1]))
    np.testing.assert_allclose(together[1], alone, rtol=1e-5, atol=1e-6)


def test_dropout_leaves_the_output_layer_whole():
    """With one layer there is nothing to drop; with two there is."""
    x = np.ones((4, 3), "float32")
    for units, changes in [((8,), False), ((8, 8), True)]:
        experts = MLPExperts(2, units, dropout=0.5, seed=0)
        still = ops.convert_to_numpy(experts(x))
        moved = ops.convert_to_numpy(experts(x, training=True))
        assert np.allclose(still, moved) is not changes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 0}, "`num_experts`"),
        ({"num_experts": True}, "`num_experts`.*True"),
        ({"units": ()}, "`units` must name at least one layer"),
        ({"dropout": 2}, "`dropout`"),
        ({"activation": keras.layers.PReLU()}, "`activation` must be.*PReLU"),
        ({"final_activation": keras.layers.ReLU()}, "`final_activation`.*ReLU"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MLPExperts(**{"num_experts": 2, "units": (4,), **arguments})


# Gated units


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_gated_units_and_their_gradients_equal_each_expert_alone(use_bias, activation):
    experts = GLUExperts(3, 4, 2, activation, use_bias, dtype="float64")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 3))
    experts.build(x.shape)
    values = [rng.normal(size=w.shape) for w in experts.trainable_variables]
    for weight, value in zip(experts.trainable_variables, values, strict=True):
        weight.assign(value)
    kernels, biases = (values[::2], values[1::2]) if use_bias else (values, None)

    def expected():
        function = moe_oracles.silu if activation == "silu" else sigmoid
        of_row = moe_oracles.glu_experts(kernels, biases, function)
        return np.array([[expert(row) for expert in of_row] for row in x])

    cotangent = rng.normal(size=(5, 3, 2))
    (outputs,), by_weight, by_input = backends.outputs_and_gradients(
        experts, [x], [cotangent]
    )
    np.testing.assert_allclose(outputs, expected(), **backends.tolerance(1e-9))
    numeric = oracles.numeric_gradients(
        lambda: (expected() * cotangent).sum(), [*values, x]
    )
    for found, wanted in zip([*by_weight, *by_input], numeric, strict=True):
        np.testing.assert_allclose(found, wanted, **backends.tolerance(1e-5, 1e-7))


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def test_gated_units_by_hand():
    """With a linear gate y = (x G) (x U) D: at x = 2 it is (2 * 3) (2 * 0.5) 4 = 24."""
    experts = GLUExperts(1, 1, activation="linear")
    experts.build((None, 1))
    values = {"gate_kernel": 3.0, "up_kernel": 0.5, "down_kernel": 4.0}
    for name, value in values.items():
        getattr(experts, name).assign([[[value]]])
    assert ops.convert_to_numpy(experts(np.array([[2.0]]))).item() == 24.0


def test_kernels_of_gated_units_start_unlike_each_other():
    glorot = keras.initializers.GlorotUniform(seed=1)
    experts = GLUExperts(2, 8, kernel_initializer=glorot)
    experts.build((None, 8))
    kernels = [experts.gate_kernel, experts.up_kernel, experts.down_kernel]
    draws = [ops.convert_to_numpy(kernel)[k] for kernel in kernels for k in range(2)]
    for i, draw in enumerate(draws):
        assert all((draw != other).all() for other in draws[:i])
    # The bound of one expert alone: sqrt(6 / (8 + 8)).
    assert 0.5 < max(np.abs(draw).max() for draw in draws) <= np.sqrt(6 / 16)


# Experts of any kind


def kinds():
    return [
        keras.layers.Dense(4),
        keras.Sequential([keras.layers.Dense(7, "tanh"), keras.layers.Dense(4)]),
    ]


def test_layers_are_called_one_by_one():
    layers = kinds()
    experts = LayerExperts(layers)
    x = np.random.default_rng(0).normal(size=(2, 5, 3)).astype("float32")
    together = ops.convert_to_numpy(experts(x))
    assert together.shape == (2, 5, 2, 4)
    for k, layer in enumerate(layers):
        alone = ops.convert_to_numpy(layer(x.reshape(10, 3))).reshape(2, 5, 4)
        np.testing.assert_allclose(together[:, :, k], alone, rtol=1e-5, atol=1e-6)
    pieces = experts.on_pieces([x[0], x[1, :0]])
    np.testing.assert_allclose(
        ops.convert_to_numpy(pieces[0]), together[0, :, 0], rtol=1e-5, atol=1e-6
    )
    assert pieces[1].shape == (0, 4)


def test_layers_are_in_the_file(tmp_path):
    inputs = keras.Input((3,))
    model = keras.Model(inputs, LayerExperts(kinds(), name="experts")(inputs))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    kept = [type(layer) for layer in again.get_layer("experts").layers]
    assert kept == [keras.layers.Dense, keras.Sequential]
    x = np.ones((2, 3), "float32")
    assert (ops.convert_to_numpy(again(x)) == ops.convert_to_numpy(model(x))).all()


def test_training_reaches_the_layers():
    dropping = keras.Sequential([keras.layers.Dropout(0.5, seed=1)])
    experts = LayerExperts([dropping, keras.layers.Activation("linear")])
    x = np.ones((8, 6), "float32")
    still = ops.convert_to_numpy(experts(x))
    assert (still == 1).all()
    moved = ops.convert_to_numpy(experts(x, training=True))
    assert set(moved[:, 0].ravel()) == {0.0, 2.0}
    assert (moved[:, 1] == 1).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GLUExperts(2, 0), "`hidden_units`.*0"),
        (lambda: GLUExperts(2, 4, 0), "`units`.*0"),
        (lambda: GLUExperts(0, 4), "`num_experts`.*0"),
        (lambda: GLUExperts(2, 4, dropout=1.0), "`dropout`.*1.0"),
        (lambda: LayerExperts([]), "`layers` must be a sequence of at least one"),
        (lambda: LayerExperts([3]), "`layers` must be a sequence.*3"),
        (lambda: LayerExperts([keras.layers.Dense(2)] * 2), "must be distinct layers"),
        (
            lambda: LayerExperts([keras.layers.Dense(k) for k in (2, 3)])(
                np.ones((1, 4))
            ),
            r"with the same u.*\(None, 2\), \(None, 3\)",
        ),
    ],
)
def test_bad_arguments_of_the_others_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_layers_of_keras_rs_are_experts(tmp_path):
    """An MLP and a cross network of DCN-V2, in mixtures of every kind."""
    keras_rs = pytest.importorskip("keras_rs")

    def mixed(count):
        mlp = [keras.layers.Dense(8, "relu"), keras.layers.Dense(6)]
        cross = keras_rs.layers.FeatureCross(projection_dim=3)
        others = [keras.layers.Dense(6) for _ in range(count - 2)]
        # The cross cannot tell its output shape without a call: it comes first.
        return LayerExperts([cross, keras.Sequential(mlp), *others])

    inputs = keras.Input((6,))
    sparse = MoE(4, experts=mixed(4))(inputs)
    shared = MMoE(8, None, 2, top_k=2, experts=mixed(8))(sparse)
    extracted = PLE(2, 1, 1, None, 2, experts=[mixed(3), mixed(3)])(shared[0])
    model = keras.Model(inputs, [shared[1], *extracted])
    x = np.random.default_rng(0).normal(size=(64, 6)).astype("float32")
    model.compile("sgd", loss=["mse"] * 3)
    before = model.get_weights()
    model.fit(x, [x] * 3, epochs=2, verbose=0)
    still = [
        weight.path
        for weight, value in zip(model.weights, before, strict=True)
        if np.array_equal(weight, value)
    ]
    assert still == []
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    for a, b in zip(
        model.predict(x, verbose=0), again.predict(x, verbose=0), strict=True
    ):
        np.testing.assert_array_equal(a, b)
