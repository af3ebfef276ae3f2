"""Checks of multi-task layers: outputs and all gradients against the NumPy oracles."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.experts import GLUExperts, LayerExperts, MLPExperts
from keras_moe.layers import OMoE
from tests.contracts import Call
from tests.support import backends, moe_oracles, multitask_oracles, oracles

OUTPUTS = backends.tolerance(1e-6, 1e-8)
GRADIENTS = backends.tolerance(1e-5, 1e-7)

# JAX compiles every operation for every shape: all of these tests would take minutes.
not_on_jax = pytest.mark.skipif(
    keras.backend.backend() == "jax", reason="compiled for seconds; others say the same"
)


def few_on_jax(cases, *kept):
    """All cases of a test, of which JAX runs those `kept`, by their numbers."""
    return [
        case if i in kept else pytest.param(*case, marks=not_on_jax)
        for i, case in enumerate(cases)
    ]


def array(tensor):
    return np.asarray(ops.convert_to_numpy(tensor))


def arrays(outputs):
    return [array(output) for output in keras.tree.flatten(outputs)]


def rows(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def randomised(layer, seed=1):
    """Give all weights random values, biases too; return a dict of them by weight."""
    rng = np.random.default_rng(seed)
    values = {}
    for variable in layer.trainable_variables:
        values[id(variable)] = rng.normal(size=variable.shape)
        variable.assign(values[id(variable)])
    return values


def mlps(stacked, values, activation=oracles.relu, final_activation=oracles.linear):
    """The MLPs of stacked experts, gates too, as functions that read `values`."""
    return multitask_oracles.mlps(
        [values[id(kernel)] for kernel in stacked.kernels],
        [values[id(bias)] for bias in stacked.biases],
        activation,
        final_activation,
    )


def experts_of(experts, values):
    """Experts of any kind as functions (n, d) -> (n, u) that read `values`.

    `MLPExperts` are those that the family makes: a ReLU after every layer.
    """
    if isinstance(experts, MLPExperts):
        return mlps(experts, values, oracles.relu, oracles.relu)
    if isinstance(experts, GLUExperts):
        kernels = [experts.gate_kernel, experts.up_kernel, experts.down_kernel]
        return moe_oracles.glu_experts([values[id(kernel)] for kernel in kernels])

    def dense_layers(weights):  # kernel, bias, kernel, bias, ...
        found = [values[id(weight)] for weight in weights]
        return lambda x: oracles.mlp(
            x, found[::2], found[1::2], oracles.relu, oracles.linear
        )

    return [dense_layers(layer.trainable_variables) for layer in experts.layers]


def layer_experts(num_experts, units, hidden=3):
    """Float64 experts of two kinds in turn: a Dense layer, and an MLP of two."""

    def expert(k):
        last = keras.layers.Dense(units, dtype="float64")
        if k % 2 == 0:
            return last
        first = keras.layers.Dense(hidden, "relu", dtype="float64")
        return keras.Sequential([first, last])

    return LayerExperts([expert(k) for k in range(num_experts)], dtype="float64")


def glu_experts(num_experts, units):
    return GLUExperts(num_experts, 3, units, dtype="float64")


def levels_of(layer, values):
    """Experts, gates, and the gate of the shared stream, of each level of a layer."""
    shared = [mlps(gate, values)[0] for gate in layer.shared_gates]
    return [
        (experts_of(experts, values), mlps(gates, values), shared_gate)
        for experts, gates, shared_gate in zip(
            layer.experts, layer.gates, [*shared, None], strict=True
        )
    ]


def check(
    layer,
    inputs,
    expected,
    values,
    moving=None,
    tolerance=(OUTPUTS, GRADIENTS),
    **given,
):
    """Outputs and all gradients of a built float64 layer are those of its oracle.

    `expected` takes nothing and returns the outputs; it reads `inputs` and `values`,
    which central differences move. `moving` may give other outputs to differentiate.
    """
    of_outputs, of_gradients = tolerance
    wanted, moving = expected(), moving or expected
    cotangents = [rows(*output.shape, seed=9 + i) for i, output in enumerate(wanted)]
    weights = layer.trainable_variables
    numeric = oracles.numeric_gradients(
        lambda: sum((o * c).sum() for o, c in zip(moving(), cotangents, strict=True)),
        [*inputs, *[values[id(weight)] for weight in weights]],
    )
    outputs, by_weight, by_input = backends.outputs_and_gradients(
        Call(layer, **given), inputs, cotangents
    )
    for output, value in zip(outputs, wanted, strict=True):
        np.testing.assert_allclose(output, value, **of_outputs)
    parts = [*["inputs"] * len(inputs), *[weight.path for weight in weights]]
    found = [*by_input, *by_weight]
    for part, gradient, value in zip(parts, found, numeric, strict=True):
        np.testing.assert_allclose(gradient, value, **of_gradients, err_msg=part)


def check_multi_gate(layer, x, **given):
    """Outputs and all gradients of a layer for x (..., d) are those of the oracle."""
    layer.build(x.shape)
    values = randomised(layer)
    experts = experts_of(layer.experts, values)
    gates = mlps(layer.gates, values)
    flat = x.reshape(-1, x.shape[-1])
    options = {
        "temperature": layer.gate_temperature,
        "top_k": layer.top_k,
        "shared_top_k": layer.shared_top_k,
    }

    def expected():
        if isinstance(layer, OMoE):
            tasks = len(layer.tasks)
            outputs = multitask_oracles.omoe(flat, experts, gates[0], tasks, **options)
        else:
            outputs = multitask_oracles.mmoe(flat, experts, gates, **options)
        return [output.reshape(*x.shape[:-1], -1) for output in outputs]

    check(layer, [x], expected, values, **given)


def draws(layer):
    """The initial kernel of every expert and of every gate, one array each."""
    return [
        part
        for weight in layer.trainable_variables
        if len(weight.shape) == 3
        for part in array(weight)
    ]


def assert_all_different(parts):
    """No two arrays of one shape are near each other."""
    for i, part in enumerate(parts):
        for other in parts[:i]:
            assert part.shape != other.shape or not np.allclose(part, other)


def assert_dropout_follows_its_seed(make, x):
    """Drawn anew in training, the same for the same seed, and off in inference."""
    layer, twin = make(seed=3), make(seed=3)
    still, _ = arrays(layer(x)), twin(x)
    twin.set_weights(layer.get_weights())
    first, second = arrays(layer(x, training=True)), arrays(twin(x, training=True))
    for a, b, c in zip(first, second, still, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.allclose(a, c)
    for a, b in zip(first, arrays(layer(x, training=True)), strict=True):
        assert not np.allclose(a, b)
    other = make(seed=4)
    other(x)
    other.set_weights(layer.get_weights())
    for a, b in zip(first, arrays(other(x, training=True)), strict=True):
        assert not np.allclose(a, b)
