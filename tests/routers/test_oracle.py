"""Records of the flat routers and their gradients against the NumPy oracle."""

import keras
import numpy as np
import pytest

from keras_moe import routers
from tests.support import backends, oracles, routing_oracles
from tests.support.router_cases import Fields, array, arrays, tokens

EXPERT_BIAS = np.array([0.3, -0.2, 0.1, 0.0, -0.4, 0.25])


def oracle_of(name, kwargs, training, noise):
    """The oracle as a function of the tokens and the layer's weights in their order."""
    everybody = np.ones(len(noise), bool)
    options = {key: v for key, v in kwargs.items() if key not in ("seed", "use_bias")}
    k = options.pop("top_k", None)
    o = routing_oracles
    if name == "top_k":
        options.setdefault("renormalize", k > 1)
        return lambda x, kernel, bias=0.0: o.top_k(x, kernel, k, bias, **options)
    if name == "noisy_top_k":
        return lambda x, *kernels: o.noisy_top_k(x, *kernels, noise, k)
    if name == "bias_balanced":
        options["renormalize"] = k > 1
        return lambda x, kernel: o.bias_balanced(x, kernel, EXPERT_BIAS, k, **options)
    if name == "expert_choice":
        factor = options["capacity_factor"]
        return lambda x, kernel: o.expert_choice(x, kernel, k, factor, everybody)
    if name == "sinkhorn":
        steps = options["iterations"] if training else 0
        t = options.get("temperature", 1.0)
        return lambda x, w: o.sinkhorn(x, w, k, steps, t, k > 1, everybody)
    return lambda x, kernel: o.dense(x, kernel, options["temperature"])


GROUPS = {"num_groups": 3, "top_k_groups": 2, "routed_scaling_factor": 2.5}


@pytest.mark.parametrize(
    ("name", "kwargs", "training"),
    [
        ("top_k", {"top_k": 2}, True),
        ("top_k", {"top_k": 1}, True),
        ("top_k", {"top_k": 6, "renormalize": False, "use_bias": True}, False),
        ("top_k", {"top_k": 3, "score_function": "sigmoid", "use_bias": True}, True),
        ("top_k", {"top_k": 1, "score_function": "sigmoid"}, False),
        ("noisy_top_k", {"top_k": 2, "seed": 3}, True),
        ("noisy_top_k", {"top_k": 5, "seed": 4}, True),
        ("bias_balanced", {"top_k": 2}, True),
        ("bias_balanced", {"top_k": 3, **GROUPS}, False),
        ("bias_balanced", {"top_k": 1, "num_groups": 6, "top_k_groups": 2}, False),
        ("bias_balanced", {"top_k": 2, "score_function": "softmax"}, False),
        ("expert_choice", {"top_k": 2, "capacity_factor": 1.0}, True),
        ("expert_choice", {"top_k": 1, "capacity_factor": 0.7}, False),
        ("expert_choice", {"top_k": 6, "capacity_factor": 3.0}, False),
        ("sinkhorn", {"top_k": 2, "iterations": 7, "temperature": 0.5}, True),
        ("sinkhorn", {"top_k": 1, "iterations": 3}, True),
        ("sinkhorn", {"top_k": 1, "iterations": 3}, False),
        ("dense", {"temperature": 0.5}, False),
    ],
)
def test_record_and_gradients_equal_the_oracle(name, kwargs, training):
    x, rng = tokens().astype("float64"), np.random.default_rng(1)
    router = routers.KNOWN[name](6, dtype="float64", **kwargs)
    router.build(x.shape)
    weights = [rng.normal(size=w.shape) for w in router.trainable_variables]
    for variable, weight in zip(router.trainable_variables, weights, strict=True):
        variable.assign(weight)
    # The first draw of another generator with the router's seed is the router's.
    noise = keras.random.normal(
        (7, 6), dtype="float64", seed=keras.random.SeedGenerator(kwargs.get("seed"))
    )
    oracle = oracle_of(name, kwargs, training, array(noise))
    expected = oracle(x, *weights)

    def start():
        if name == "bias_balanced":
            router.expert_bias.assign(EXPERT_BIAS)
        if name == "noisy_top_k":
            fresh = keras.random.SeedGenerator(kwargs["seed"])
            router.seed_generator.state.assign(fresh.state)

    start()
    found = arrays(router(x, training=training))
    for field, values in expected.items():
        np.testing.assert_allclose(
            found.pop(field), values, **backends.tolerance(1e-6, 1e-9), err_msg=field
        )
    assert not found.pop("invalid", np.zeros(1)).any()
    assert not found

    start()
    fields = [field for field in expected if not field.endswith("indices")]
    cotangents = [rng.normal(size=expected[field].shape) for field in fields]
    layer = Fields(router, training, floats=True)
    layer.build(x.shape)
    by_weight, by_input = backends.gradients(layer, [x], cotangents)

    def scalar():
        record = oracle(x, *weights)
        return sum(
            (record[field] * c).sum()
            for field, c in zip(fields, cotangents, strict=True)
        )

    numeric = oracles.numeric_gradients(scalar, [x, *weights])
    for gradient, values in zip([*by_input, *by_weight], numeric, strict=True):
        np.testing.assert_allclose(gradient, values, **backends.tolerance(1e-4, 1e-7))
