"""Float64 MoE layers, and the check of every dispatch against the NumPy oracle."""

from fractions import Fraction

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.experts import GLUExperts, LayerExperts, MLPExperts
from keras_moe.layers import MoE
from tests.support import backends, dispatches, moe_oracles, oracles, routing_oracles

D, E, U = 3, 4, 2
OUTPUTS = backends.tolerance(1e-6, 1e-8)
GRADIENTS = backends.tolerance(1e-5, 1e-7)
NO_LOSSES = {
    f"{name}_loss_weight": 0.0 for name in ("load_balancing", "importance", "load")
}


def array(tensor):
    return np.asarray(ops.convert_to_numpy(tensor))


def tokens(*leading, seed=0):
    return np.random.default_rng(seed).normal(size=(*leading, D))


class Call(keras.layers.Layer):
    """A MoE that is called with the inputs alone, in training if it is told so."""

    def __init__(self, moe, prepare=None, **given):
        super().__init__(dtype=moe.dtype_policy)
        self.moe, self.prepare, self.given = moe, prepare, given
        self.built = moe.built

    def call(self, x):
        if self.prepare is not None:
            self.prepare()
        return self.moe(x, **self.given)


def randomised(layer, seed=1):
    """Give all weights random values, biases too; return a dict of them by weight.

    With biases at 0 the rows of dead units would lie on the kink of the next ReLU.
    """
    rng = np.random.default_rng(seed)
    values = {}
    for variable in layer.trainable_variables:
        values[id(variable)] = rng.normal(size=variable.shape)
        variable.assign(values[id(variable)])
    return values


def oracle_experts(experts, values):
    """The experts as functions of a row that read `values`."""

    def of(weights):
        return [values[id(weight)] for weight in weights]

    if isinstance(experts, MLPExperts):
        return moe_oracles.mlp_experts(of(experts.kernels), of(experts.biases))
    if isinstance(experts, GLUExperts):
        kernels = [experts.gate_kernel, experts.up_kernel, experts.down_kernel]
        biases = [experts.gate_bias, experts.up_bias, experts.down_bias]
        return moe_oracles.glu_experts(
            of(kernels), of(biases) if experts.use_bias else None
        )

    def dense_layers(weights):  # kernel, bias, kernel, bias, ...
        kernels, biases = weights[::2], weights[1::2]
        return lambda row: oracles.mlp(
            row, kernels, biases, oracles.relu, oracles.linear
        )

    return [dense_layers(of(layer.trainable_variables)) for layer in experts.layers]


def layer_experts():
    def sequence(*units):
        hidden = [keras.layers.Dense(u, "relu") for u in units]
        return keras.Sequential([*hidden, keras.layers.Dense(U)])

    usual = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    try:
        layers = [keras.layers.Dense(U), sequence(5), sequence(), sequence(4, 3)]
        return LayerExperts(layers)
    finally:
        keras.config.set_dtype_policy(usual)


def check(layer, names, inputs, expected, values, few=True, **given):
    """Outputs and all gradients of every way are those of `expected(factor)`.

    The way "dropping" is "capacity" where not everybody finds a place.
    """
    call = Call(layer, **given)
    weights = layer.trainable_variables
    parts = ["inputs", *[w.path for w in weights]]
    arrays = [inputs, *[values[id(w)] for w in weights]]
    rng, known = np.random.default_rng(2), {}
    if few and dispatches.BACKEND == "jax":
        # Each way takes it over a second to compile. This one it alone has.
        names = [name for name in names if name == "ragged"] or names
    cotangent = rng.normal(size=expected(None).shape)
    priority = layer.priority
    for way in names:
        factor = {"capacity": float(E), "dropping": 0.7}.get(way)
        drops = factor if way == "dropping" else None
        layer.priority = "position" if factor is None else priority
        if drops not in known:
            numeric = oracles.numeric_gradients(
                lambda drops=drops: (expected(drops) * cotangent).sum(), arrays
            )
            known[drops] = expected(drops), numeric
        wanted, numeric = known[drops]
        layer.capacity_factor = factor if layer.router.choice == "token" else None
        layer.dispatch = dispatches.dispatch_of(way)
        with dispatches.chosen(way):
            outputs, by_weight, by_input = backends.outputs_and_gradients(
                call, [inputs], [cotangent]
            )
        np.testing.assert_allclose(outputs[0], wanted, **OUTPUTS, err_msg=way)
        found = [*by_input, *by_weight]
        for part, gradient, value in zip(parts, found, numeric, strict=True):
            np.testing.assert_allclose(
                gradient, value, **GRADIENTS, err_msg=f"{way}: {part}"
            )


def moe(router=None, experts=None, num_experts=E, **kwargs):
    kwargs = {**NO_LOSSES, "dtype": "float64", **kwargs}
    units = kwargs.pop("units", (4, U)) if experts is None else None
    return MoE(num_experts, units, router=router, experts=experts, **kwargs)


def oracle(layer, x, record, values, factor, mask=None):
    """The output for tokens (n, d), with drops where a capacity factor is given."""
    kept = None
    if factor is not None:
        indices, weights = record["expert_indices"], record["combine_weights"]
        (n, k), e = indices.shape, layer.num_experts
        c = moe_oracles.capacity(n, e, k, Fraction(factor).limit_denominator(100))
        kept, _ = moe_oracles.queue(indices, weights, e, c, layer.priority, mask)
    experts = oracle_experts(layer.experts, values)
    return moe_oracles.moe(x, record, experts, mask, kept)


WITH_DROPS = [*dispatches.TOKEN_CHOICE, "dropping"]
WAYS = {"token": WITH_DROPS, "expert": dispatches.EXPERT_CHOICE, "all": ["dense"]}
EXPERTS = {
    "one layer": lambda: MLPExperts(E, U, dtype="float64"),
    "three layers": lambda: MLPExperts(E, (4, 3, U), dtype="float64"),
    "no bias": lambda: MLPExperts(E, (4, U), use_bias=False, dtype="float64"),
    "GLU": lambda: GLUExperts(E, 4, U, dtype="float64"),
    "GLU with biases": lambda: GLUExperts(E, 4, U, use_bias=True, dtype="float64"),
    "layers": layer_experts,
}


def check_top_k(layer, x, names=WITH_DROPS, mask=None, few=True):
    """`check` for a layer with a `TopKRouter`, for tokens of any rank."""
    layer.build(x.shape)
    values = randomised(layer)
    kernel = values[id(layer.router.kernel)]
    rows = x.reshape(-1, D)
    row_mask = None if mask is None else mask.reshape(-1)

    def expected(factor):
        k = layer.top_k
        record = routing_oracles.top_k(rows, kernel, k, renormalize=k > 1)
        outputs = oracle(layer, rows, record, values, factor, row_mask)
        return outputs.reshape(*x.shape[:-1], -1)

    check(layer, names, x, expected, values, few=few, mask=mask)


def float32_model(**kwargs):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((D,))
    layer = MoE(E, (4, U), name="moe", **kwargs)
    return keras.Model(inputs, layer(inputs)), layer


only_tensorflow = pytest.mark.skipif(
    dispatches.BACKEND != "tensorflow", reason="TensorFlow has eager, graph and XLA"
)


def loss_values(layer):
    return sorted(float(array(loss)) for loss in layer.losses)
