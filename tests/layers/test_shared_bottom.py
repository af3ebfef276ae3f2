"""SharedBottom, and plain MLPs, against the NumPy oracle."""

import numpy as np
from keras import ops

from keras_moe.experts import MLPExperts
from keras_moe.layers import MMoE, SharedBottom, Tower
from tests.support import backends, checks, oracles


def test_shared_bottom_is_one_mlp_for_all_tasks():
    layer = SharedBottom((6, 4), ["a", "b"], dtype="float64")
    x = np.random.default_rng(0).normal(size=(5, 3))
    outputs = layer(x)
    kernels = [ops.convert_to_numpy(k)[0] for k in layer.bottom.kernels]
    biases = [np.zeros(6), np.zeros(4)]
    expected = oracles.mlp(x, kernels, biases, oracles.relu, oracles.relu)
    for output in outputs.values():
        np.testing.assert_allclose(
            ops.convert_to_numpy(output), expected, **checks.OUTPUTS
        )


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
        np.testing.assert_allclose(found, wanted, **checks.GRADIENTS)


def test_gradients_of_the_other_layers_equal_the_oracle():
    x = np.random.default_rng(0).normal(size=(4, 3))

    def pairs(values):  # kernel, bias, kernel, bias, ...
        return values[::2], values[1::2]

    experts = MLPExperts(3, (4, 2), dtype="float64")
    experts.build(x.shape)
    _gradient_check(experts, [x], lambda v: [oracles.mlp_experts(x, *pairs(v))])

    bottom = SharedBottom((4, 2), 2, dtype="float64")
    bottom.build(x.shape)

    def shared(values):
        kernels, biases = pairs([v[0] for v in values])
        output = oracles.mlp(x, kernels, biases, oracles.relu, oracles.relu)
        return [output, output]

    _gradient_check(bottom, [x], shared)

    tower = Tower((4,), dtype="float64")
    tower.build(x.shape)
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
