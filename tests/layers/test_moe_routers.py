"""MoE against the NumPy oracle: every router by every dispatch."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_moe import routers
from tests.support import backends, dispatches
from tests.support import routing_oracles as o
from tests.support.checks import not_on_jax
from tests.support.moe_layers import (
    GRADIENTS,
    OUTPUTS,
    WAYS,
    WITH_DROPS,
    Call,
    E,
    U,
    array,
    check,
    moe,
    oracle,
    randomised,
    tokens,
)

EXPERT_BIAS = np.array([0.3, -0.2, 0.1, -0.4])
EVERYBODY = np.ones(9, bool)


def noise(seed, n=9):
    """The first draw of another generator with the router's seed is the router's."""
    return array(
        keras.random.normal(
            (n, E), dtype="float64", seed=keras.random.SeedGenerator(seed)
        )
    )


# Name: the router, its oracle as a function of tokens and weights, whether in training.
ROUTERS = {
    "top-2": (
        lambda: routers.TopKRouter(E, 2, dtype="float64"),
        lambda x, kernel: o.top_k(x, kernel, 2),
        False,
    ),
    "switch": (
        lambda: routers.TopKRouter(E, 1, use_bias=True, dtype="float64"),
        lambda x, kernel, bias: o.top_k(x, kernel, 1, bias, renormalize=False),
        True,
    ),
    "sigmoid": (
        lambda: routers.TopKRouter(E, 3, score_function="sigmoid", dtype="float64"),
        lambda x, kernel: o.top_k(x, kernel, 3, score_function="sigmoid"),
        False,
    ),
    "noisy": (
        lambda: routers.NoisyTopKRouter(E, 2, seed=3, dtype="float64"),
        lambda x, *kernels: o.noisy_top_k(x, *kernels, noise(3), 2),
        True,
    ),
    "bias_balanced": (
        lambda: routers.BiasBalancedRouter(
            E,
            2,
            num_groups=2,
            top_k_groups=1,
            routed_scaling_factor=2.5,
            dtype="float64",
        ),
        lambda x, kernel: o.bias_balanced(x, kernel, EXPERT_BIAS, 2, 2, 1, 2.5),
        True,
    ),
    "sinkhorn": (
        lambda: routers.SinkhornRouter(E, 2, iterations=5, dtype="float64"),
        lambda x, kernel: o.sinkhorn(x, kernel, 2, 5, 1.0, True, EVERYBODY),
        True,
    ),
    "hierarchical": (
        lambda: routers.HierarchicalRouter(2, 2, 2, 1, dtype="float64"),
        lambda x, kernel, kernels: o.hierarchical(x, kernel, kernels, None, None, 2, 1),
        False,
    ),
    "expert_choice": (
        lambda: routers.ExpertChoiceRouter(E, 2, capacity_factor=0.8, dtype="float64"),
        lambda x, kernel: o.expert_choice(x, kernel, 2, 0.8, EVERYBODY),
        True,
    ),
    "dense": (
        lambda: routers.DenseRouter(E, temperature=0.7, dtype="float64"),
        lambda x, kernel: o.dense(x, kernel, 0.7),
        False,
    ),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_with_every_dispatch(name):
    check_router(*ROUTERS[name], few=name != "top-2")


def check_router(make, record, training, n=9, few=True, expert_bias=EXPERT_BIAS):
    router, x = make(), tokens(n)
    options = {}
    if training and router.choice == "token":
        options = {"priority": "probability", "dispatch": "capacity"}
    layer = moe(router, **options)
    layer.build(x.shape)
    values = randomised(layer)
    weights = [values[id(w)] for w in router.trainable_variables]

    def expected(factor):
        return oracle(layer, x, record(x, *weights), values, factor)

    def prepare():
        if isinstance(router, routers.NoisyTopKRouter):
            fresh = keras.random.SeedGenerator(3)
            router.seed_generator.state.assign(fresh.state)
        if isinstance(router, routers.BiasBalancedRouter):
            router.expert_bias.assign(expert_bias)

    check(
        layer,
        WAYS[router.choice],
        x,
        expected,
        values,
        few=few,
        prepare=prepare,
        training=training,
    )


ALL_EXPERTS = {
    "noisy": (
        lambda: routers.NoisyTopKRouter(E, E, seed=3, dtype="float64"),
        lambda x, *kernels: o.noisy_top_k(x, *kernels, noise(3, len(x)), E),
        True,
    ),
    "bias_balanced": (
        lambda: routers.BiasBalancedRouter(E, E, dtype="float64"),
        lambda x, kernel: o.bias_balanced(x, kernel, EXPERT_BIAS, E),
        False,
    ),
    "sinkhorn": (
        lambda: routers.SinkhornRouter(E, E, iterations=5, dtype="float64"),
        lambda x, kernel: o.sinkhorn(x, kernel, E, 5, 1.0, True, np.ones(len(x), bool)),
        True,
    ),
    "hierarchical": (
        lambda: routers.HierarchicalRouter(2, 2, 2, 2, dtype="float64"),
        lambda x, kernel, kernels: o.hierarchical(x, kernel, kernels, None, None, 2, 2),
        False,
    ),
    "expert_choice": (
        lambda: routers.ExpertChoiceRouter(E, E, capacity_factor=1.0, dtype="float64"),
        lambda x, kernel: o.expert_choice(x, kernel, E, 1.0, np.ones(len(x), bool)),
        False,
    ),
}


@not_on_jax
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("name", ALL_EXPERTS)
def test_all_experts_chosen_with_every_router(name, n):
    check_router(*ALL_EXPERTS[name], n=n)


@not_on_jax
@pytest.mark.parametrize("n", [1, 6])
def test_a_bias_that_sends_all_to_the_same_two_experts(n):
    bias = np.array([0.0, 9.0, 0.0, 9.0])

    def record(x, kernel):
        record = o.bias_balanced(x, kernel, bias, 2)
        assert set(record["expert_indices"].ravel()) == {1, 3}
        return record

    def make():
        return routers.BiasBalancedRouter(E, 2, dtype="float64")

    check_router(make, record, False, n=n, expert_bias=bias)


@not_on_jax
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 10),
    e=st.integers(1, 5),
    share=st.floats(0, 1),
    factor=st.sampled_from([0.5, 1.0, 2.0]),
    seed=st.integers(0, 1000),
)
def test_an_expert_choice_of_any_size(n, e, share, factor, seed):
    """The outputs are the oracle's; both ways have the same gradients."""
    k, x = 1 + int(share * (e - 1)), tokens(n, seed=seed)
    router = routers.ExpertChoiceRouter(e, k, capacity_factor=factor, dtype="float64")
    layer = moe(router, num_experts=e, units=U)
    layer.build(x.shape)
    values = randomised(layer, seed)
    kernel = values[id(router.kernel)]
    record = o.expert_choice(x, kernel, k, factor, np.ones(n, bool))
    wanted, results = oracle(layer, x, record, values, None), []
    for dispatch in dispatches.EXPERT_CHOICE:
        layer.dispatch = dispatch
        found = backends.outputs_and_gradients(Call(layer), [x], [tokens(n)[:, :U]])
        np.testing.assert_allclose(found[0][0], wanted, **OUTPUTS, err_msg=dispatch)
        results.append([*found[1], *found[2]])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, **GRADIENTS)


def test_a_hash_router_with_every_dispatch():
    layer, x, ids = moe("hash", top_k=2), tokens(9), np.arange(9)
    layer.build(x.shape, ids.shape)
    values = randomised(layer)
    chosen = array(routers.HashRouter(E, 2)(ids).expert_indices)
    record = {"expert_indices": chosen, "combine_weights": np.full((9, 2), 0.5)}
    check(
        layer,
        WITH_DROPS,
        x,
        lambda factor: oracle(layer, x, record, values, factor),
        values,
        router_inputs=ids,
    )
