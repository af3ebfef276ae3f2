"""`upcycling.revive`: weights, router and optimizer slots of a dead expert."""

import keras
import numpy as np
import pytest

from keras_moe import experts, layers, optimizers, upcycling

X = np.random.default_rng(0).normal(size=(32, 6)).astype("float32")


def trained(layer, optimizer):
    inputs = keras.Input((6,))
    outputs = layer(inputs)
    flat = (
        keras.layers.Concatenate()(keras.tree.flatten(outputs))
        if isinstance(outputs, dict)
        else outputs
    )
    model = keras.Model(inputs, keras.layers.Dense(1)(flat))
    model.compile(optimizer, "mse")
    model.fit(X, X[:, :1], batch_size=16, epochs=2, verbose=0)
    return model


def array(variable):
    return np.asarray(keras.ops.convert_to_numpy(variable))


@pytest.mark.parametrize("make", [keras.optimizers.Adam, optimizers.FusedAdam])
def test_weights_router_and_slots(make):
    moe = layers.MoE(4, (8, 6), router="noisy_top_k")
    model = trained(moe, make(0.01))
    before = [array(w) for w in moe.experts.weights]
    kernel = moe.experts.kernels[0]
    index = model.optimizer._get_variable_index(kernel)
    momentum = model.optimizer._momentums[index]
    old = array(momentum)
    upcycling.revive(
        moe, [1, 3], source=0, noise=1e-6, seed=0, optimizer=model.optimizer
    )
    value = array(kernel)
    np.testing.assert_allclose(value[[1, 3]], value[[0, 0]], atol=1e-4)
    assert np.abs(value[1] - value[3]).max() > 0  # Each has its own noise.
    column = array(moe.router.kernel)
    np.testing.assert_allclose(column[:, 1], column[:, 0], atol=1e-4)
    noise = array(moe.router.noise_kernel)
    np.testing.assert_allclose(noise[:, 3], noise[:, 0], atol=1e-4)
    after = array(momentum)
    assert (after[[1, 3]] == 0).all()
    assert np.abs(old[[0, 2]]).max() > 0
    np.testing.assert_array_equal(after[[0, 2]], old[[0, 2]])
    # What belongs to the others is as it was.
    for weight, was in zip(moe.experts.weights, before, strict=True):
        np.testing.assert_array_equal(array(weight)[[0, 2]], was[[0, 2]])


def test_averages_of_weights_are_the_new_weights():
    moe = layers.MoE(4, (8, 6))
    model = trained(moe, keras.optimizers.Adam(0.01, use_ema=True))
    upcycling.revive(moe, np.int64(1), source=0, optimizer=model.optimizer)
    kernel = moe.experts.kernels[0]
    index = model.optimizer._get_variable_index(kernel)
    average = model.optimizer._model_variables_moving_average[index]
    np.testing.assert_array_equal(array(average)[1], array(kernel)[1])
    assert (array(model.optimizer._momentums[index])[1] == 0).all()


def test_another_layer_of_the_same_name_keeps_its_slots():
    inputs = keras.Input((6,))
    moes = [layers.MoE(4, 6, name="moe") for _ in range(2)]
    towers = [keras.Model(inputs, moe(inputs)) for moe in moes]
    model = keras.Model(inputs, keras.layers.Add()([tower(inputs) for tower in towers]))
    model.compile("adam", "mse")
    model.fit(X, X, epochs=1, verbose=0)
    slots = model.optimizer._momentums
    other = slots[model.optimizer._get_variable_index(moes[1].experts.kernels[0])]
    before = array(other)
    upcycling.revive(moes[0], 1, source=0, optimizer=model.optimizer)
    np.testing.assert_array_equal(array(other), before)


def test_gates_of_mmoe():
    mmoe = layers.MMoE(4, (8, 6), ["a", "b"], gate_use_bias=True)
    trained(mmoe, "adam")
    upcycling.revive(mmoe, 2, source=1, noise=1e-6)
    kernel, bias = array(mmoe.gates.kernels[-1]), array(mmoe.gates.biases[-1])
    np.testing.assert_allclose(kernel[..., 2], kernel[..., 1], atol=1e-4)
    np.testing.assert_allclose(bias[:, 2], bias[:, 1], atol=1e-4)
    gates = array(mmoe.gate_weights(X))
    np.testing.assert_allclose(gates[..., 2], gates[..., 1], atol=1e-3)


def test_what_is_wrong_is_named():
    moe = layers.MoE(3, 4)
    with pytest.raises(ValueError, match="must be built"):
        upcycling.revive(moe, 1, source=0)
    moe(X)
    for wrong, match in [
        ({"experts": 3, "source": 0}, "`experts` must be below"),
        ({"experts": 1, "source": 1}, "and not `source`"),
        ({"experts": [], "source": 1}, "at least one"),
        ({"experts": 1, "source": 0, "noise": 0}, "`noise`"),
    ]:
        with pytest.raises(ValueError, match=match):
            upcycling.revive(moe, **wrong)
    with pytest.raises(TypeError, match="`layer` must be a MoE or an MMoE"):
        upcycling.revive(keras.layers.Dense(2), 1, source=0)
    any_layers = experts.LayerExperts([keras.layers.Dense(4) for _ in range(3)])
    other = layers.MoE(experts=any_layers)
    other(X)
    with pytest.raises(ValueError, match="stacked kernels"):
        upcycling.revive(other, 1, source=0)
    with pytest.raises(ValueError, match=r"`optimizer` must have slots.*Ftrl"):
        upcycling.revive(moe, 1, source=0, optimizer=keras.optimizers.Ftrl())
    hashed = layers.MoE(3, 4, router="hash")
    hashed(X, router_inputs=np.arange(32))
    with pytest.raises(ValueError, match=r"`layer.router` must have a kernel"):
        upcycling.revive(hashed, 1, source=0)
