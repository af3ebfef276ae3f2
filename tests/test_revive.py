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
    hashed = layers.MoE(3, 4, router="hash")
    hashed(X, router_inputs=np.arange(32))
    with pytest.raises(ValueError, match=r"`layer.router` must have a kernel"):
        upcycling.revive(hashed, 1, source=0)
