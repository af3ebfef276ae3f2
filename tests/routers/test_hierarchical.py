"""HierarchicalRouter against the NumPy oracle, by hand, and its limits."""

import keras
import numpy as np
import pytest

from keras_moe import routers, routing
from tests.support import backends, oracles, routing_oracles
from tests.support.router_cases import (
    Fields,
    array,
    arrays,
    make,
    tokens,
    with_random_weights,
)

HIERARCHIES = [
    {"top_k_groups": 2, "top_k_experts": 2},
    {"top_k_groups": 1, "top_k_experts": 2},
    {"top_k_groups": 2, "top_k_experts": 1, "use_bias": True},
    {"top_k_groups": 1, "top_k_experts": 1},
    {"top_k_groups": 3, "top_k_experts": 4, "use_bias": True},
]


@pytest.mark.parametrize("options", HIERARCHIES)
def test_a_hierarchy_and_its_gradients_equal_the_oracle(options):
    x = tokens().astype("float64")
    router = routers.HierarchicalRouter(3, 4, dtype="float64", **options)
    weights = with_random_weights(router)
    kept = (router.top_k_groups, router.top_k_experts)
    assert router.num_experts == 12
    assert router.top_k == kept[0] * kept[1]

    def oracle():
        biases = weights[2:] or [None, None]
        return routing_oracles.hierarchical(x, *weights[:2], *biases, *kept)

    expected, found = oracle(), arrays(router(x))
    assert set(found) == set(expected)
    for field, values in expected.items():
        np.testing.assert_allclose(
            found[field], values, **backends.tolerance(1e-6, 1e-9), err_msg=field
        )
    fields = ["combine_weights", "router_logits", "router_probs"]
    rng = np.random.default_rng(2)
    cotangents = [rng.normal(size=expected[field].shape) for field in fields]
    layer = Fields(router, floats=True)
    layer.build(x.shape)
    by_weight, by_input = backends.gradients(layer, [x], cotangents)

    def scalar():
        record = oracle()
        terms = zip(fields, cotangents, strict=True)
        return sum((record[field] * c).sum() for field, c in terms)

    numeric = oracles.numeric_gradients(scalar, [x, *weights])
    for gradient, values in zip([*by_input, *by_weight], numeric, strict=True):
        np.testing.assert_allclose(gradient, values, **backends.tolerance(1e-4, 1e-7))


def test_a_hierarchy_that_keeps_all_is_the_dense_mixture_of_two_levels():
    """Jordan and Jacobs 1994: the weight of expert (i, j) is g_i g_j|i."""
    router = routers.HierarchicalRouter(3, 4, 3, 4, dtype="float64")
    with_random_weights(router)
    choices = router(tokens().astype("float64"))
    record, gates = arrays(choices), routing.gates(choices, 12, 7)
    np.testing.assert_allclose(
        array(gates), record["router_probs"], **backends.tolerance(1e-9)
    )
    np.testing.assert_allclose(record["router_probs"].sum(axis=1), 1, rtol=1e-6)
    logits = record["router_logits"]
    np.testing.assert_allclose(
        routing_oracles.softmax(logits), record["router_probs"], rtol=1e-6
    )


def test_a_hierarchy_by_hand():
    # Primary gates 1/2, 1/6 and 1/3; secondary ones 1/4, 3/4 and 3/5, 2/5 and 0.9, 0.1
    x = np.ones((1, 1))

    def of(top_k_groups, top_k_experts):
        router = routers.HierarchicalRouter(3, 2, top_k_groups, top_k_experts)
        router.build((None, 1))
        router.kernel.assign(np.log([[3.0, 1.0, 2.0]]))
        router.expert_kernel.assign(np.log([[[1.0, 3.0]], [[3.0, 2.0]], [[9.0, 1.0]]]))
        record = arrays(router(x))
        probs = [[1 / 8, 3 / 8, 1 / 10, 1 / 15, 3 / 10, 1 / 30]]
        np.testing.assert_allclose(record["router_probs"], probs, rtol=1e-5)
        weights = record["combine_weights"][0].tolist()
        return record["expert_indices"][0].tolist(), pytest.approx(weights, rel=1e-5)

    # One of each level: their probabilities.
    assert of(1, 1) == ([1], [3 / 8])
    # Groups 0 and 2 share 3/5 and 2/5; in each the best expert.
    assert of(2, 1) == ([1, 4], [0.6 * 0.75, 0.4 * 0.9])
    # All experts of both. 0.6 (1/4, 3/4) and 0.4 (0.9, 0.1), the largest first.
    assert of(2, 2) == ([1, 4, 0, 5], [0.45, 0.36, 0.15, 0.04])
    assert of(1, 2) == ([1, 0], [3 / 8, 1 / 8])


@pytest.mark.parametrize("options", HIERARCHIES)
def test_choices_of_a_hierarchy_are_different_experts_of_few_groups(options):
    x = tokens(20)
    x[3], x[5, 1] = np.nan, np.inf
    router = routers.HierarchicalRouter(3, 4, **options)
    with_random_weights(router)
    chosen = arrays(router(x))["expert_indices"]
    assert chosen.shape == (20, router.top_k)
    assert chosen.dtype == np.int32
    assert ((chosen >= 0) & (chosen < 12)).all()
    for row in chosen:
        groups, counts = np.unique(row // 4, return_counts=True)
        assert len(set(row)) == router.top_k
        assert len(groups) == options["top_k_groups"]
        assert (counts == options["top_k_experts"]).all()


def test_a_hierarchy_of_one_group_or_of_single_experts_is_a_flat_router():
    x = tokens()
    flat = make("top_k", 4)
    flat.build(x.shape)
    expected = arrays(flat(x))
    one_group = routers.HierarchicalRouter(1, 4, 1, 2)
    one_group.build(x.shape)
    one_group.expert_kernel.assign(array(flat.kernel)[None])
    single = routers.HierarchicalRouter(4, 1, 2, 1)
    single.build(x.shape)
    single.kernel.assign(flat.kernel)
    for router in (one_group, single):
        found = arrays(router(x))
        for field in ("expert_indices", "combine_weights", "router_probs"):
            np.testing.assert_allclose(found[field], expected[field], rtol=1e-5)


def test_kernels_of_a_hierarchy_differ():
    router = routers.HierarchicalRouter(4, 4, kernel_initializer=glorot(seed=1))
    router.build((None, 8))
    kernel, kernels = array(router.kernel), array(router.expert_kernel)
    assert (kernels[0] != kernels[1]).all()
    assert (kernels[0] != kernel).all()
    # Every secondary gate is drawn with its own fans: sqrt(6 / (8 + 4)) is the bound.
    assert 0.6 < np.abs(kernels).max() <= np.sqrt(6 / 12)


def glorot(seed):
    return keras.initializers.GlorotUniform(seed=seed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4), "`num_groups`.*0"),
        ((4, 0), "`experts_per_group`.*0"),
        ((2, 4, 3), "`top_k_groups` must not exceed `num_groups`.*=3, num_groups=2"),
        ((4, 2, 2, 3), "`top_k_experts` must not exceed `experts_per_group`.*=3"),
        ((4, 2, 0), "`top_k_groups`.*0"),
    ],
)
def test_bad_arguments_of_a_hierarchy_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        routers.HierarchicalRouter(*arguments)
