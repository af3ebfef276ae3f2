"""MoE against the NumPy oracle: kinds and numbers of experts, shared experts."""

import json

import keras
import numpy as np
import pytest

from keras_moe import routers
from keras_moe.experts import GLUExperts, LayerExperts, MLPExperts
from keras_moe.layers import MoE
from tests.support import backends, dispatches, moe_oracles, oracles, routing_oracles
from tests.support.checks import not_on_jax
from tests.support.moe_layers import (
    EXPERTS,
    WAYS,
    WITH_DROPS,
    Call,
    D,
    E,
    U,
    array,
    check,
    check_top_k,
    loss_values,
    moe,
    oracle,
    oracle_experts,
    randomised,
    tokens,
)


@pytest.mark.parametrize("name", EXPERTS)
def test_every_kind_of_experts_with_every_dispatch(name):
    experts = EXPERTS[name]()
    stacked = hasattr(experts, "on_rows")
    names = WITH_DROPS if stacked else [*dispatches.UNSTACKED, "dropping"]
    few = name not in ("three layers", "GLU with biases")
    check_top_k(moe(experts=experts), tokens(9), names, few=few)


@pytest.mark.parametrize(
    ("leading", "masked"),
    [
        ((9,), [0]),
        ((9,), [3, 8]),
        ((9,), range(9)),
        ((2, 5), None),
        ((2, 5), [1, 4, 9]),
        ((2, 1, 3), None),
    ],
)
def test_masks_and_leading_axes(leading, masked):
    mask = None
    if masked is not None:
        mask = np.ones(leading, bool)
        mask.reshape(-1)[list(masked)] = False
    check_top_k(moe(), tokens(*leading), mask=mask, few=leading != (2, 5))


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_k": 4}, {"num_experts": 7}])
@pytest.mark.parametrize("n", [1, 6])
def test_few_tokens_many_experts_and_all_experts(options, n):
    check_top_k(moe(**options), tokens(n))


@pytest.mark.parametrize(
    "router",
    ["top_k", *[pytest.param(name, marks=not_on_jax)
                for name in ("sinkhorn", "expert_choice", "dense")]],
)  # fmt: skip
def test_one_expert_is_a_plain_mlp(router):
    layer, x = moe(router, num_experts=1, top_k=1), tokens(6)
    layer.build(x.shape)
    values = randomised(layer)
    experts = layer.experts
    kernels = [values[id(w)][0] for w in experts.kernels]
    biases = [values[id(w)][0] for w in experts.biases]

    def expected(factor):
        return oracles.mlp(x, kernels, biases, oracles.relu, oracles.linear)

    names = [way for way in WAYS[layer.router.choice] if way != "dropping"]
    check(layer, names, x, expected, values)


@pytest.mark.parametrize("n", [1, 11])
def test_all_tokens_on_one_expert(n):
    """Expert 2 has all rows, the others none and no gradient."""
    layer, x = moe(top_k=1), tokens(n)
    layer.build(x.shape)
    values = randomised(layer)
    x[:, 0] = 1.0 + np.abs(x[:, 0])
    kernel = values[id(layer.router.kernel)]
    kernel[0] += np.array([0.0, 0.0, 9.0, 0.0])
    layer.router.kernel.assign(kernel)
    record = routing_oracles.top_k(x, kernel, 1, renormalize=False)
    assert (record["expert_indices"] == 2).all()

    def expected(factor):
        record = routing_oracles.top_k(x, kernel, 1, renormalize=False)
        return oracle(layer, x, record, values, factor)

    check(layer, WITH_DROPS, x, expected, values, few=n == 1)


@pytest.mark.parametrize("way", dispatches.TOKEN_CHOICE)
def test_no_token(way):
    layer = moe(dispatch=dispatches.dispatch_of(way))
    with dispatches.chosen(way):
        layer.build((0, D))
        (found,), by_weight, (by_input,) = backends.outputs_and_gradients(
            Call(layer), [tokens(0)], [np.zeros((0, U))]
        )
    assert found.shape == (0, U)
    assert by_input.shape == (0, D)
    assert all((gradient == 0).all() for gradient in by_weight)


def test_shared_experts_see_every_token():
    x, mask = tokens(9), np.arange(9) != 2
    layer = moe(num_shared_experts=2)
    layer.build(x.shape)
    values = randomised(layer)
    kernel = values[id(layer.router.kernel)]
    experts, shared = (
        oracle_experts(part, values) for part in (layer.experts, layer.shared_experts)
    )

    def expected(factor):
        record = routing_oracles.top_k(x, kernel, 2)
        return moe_oracles.moe(x, record, experts, mask, shared=shared)

    names = ["dense", *dispatches.DROPLESS]
    check(layer, names, x, expected, values, mask=mask)


def test_shared_experts_are_initialized_differently():
    for initializer in (keras.initializers.GlorotUniform(seed=1), "glorot_uniform"):
        layer = MoE(2, (4, U), num_shared_experts=2, kernel_initializer=initializer)
        layer.build((None, D))
        pairs = zip(layer.experts.kernels, layer.shared_experts.kernels, strict=True)
        for routed, shared in pairs:
            assert (array(routed) != array(shared)).all()


def test_a_file_keeps_the_parts_that_were_given(tmp_path):
    def model_of(**kwargs):
        inputs = keras.Input((D,))
        return keras.Model(inputs, MoE(E, name="moe", **kwargs)(inputs))

    given = {
        "parts": {
            "router": routers.TopKRouter(E, 3, score_function="sigmoid"),
            "experts": GLUExperts(E, 4, U),
            "num_shared_experts": 1,
        },
        "layers": {
            "experts": LayerExperts([keras.layers.Dense(U) for _ in range(E)]),
            "dispatch": "dense",
            "top_k": 1,
        },
        "drops": {
            "expert_units": [4, U],
            "capacity_factor": 0.75,
            "priority": "probability",
            "load_balancing_loss_weight": 0.5,
        },
    }
    x = tokens(9).astype("float32")
    for name, kwargs in given.items():
        model = model_of(**kwargs)
        model.save(tmp_path / f"{name}.keras")
        again = keras.models.load_model(tmp_path / f"{name}.keras")
        np.testing.assert_allclose(array(again(x)), array(model(x)), rtol=1e-6)
        layer, other = model.get_layer("moe"), again.get_layer("moe")
        # In the file: before, shapes of parts were tuples, and now they are lists.
        assert json.dumps(other.get_config()) == json.dumps(layer.get_config())
        assert other.loss_weights == layer.loss_weights
        assert loss_values(other) == pytest.approx(loss_values(layer))


def test_dropout_is_only_for_training():
    x = tokens(30).astype("float32")
    for experts in (
        MLPExperts(E, (16, U), dropout=0.5, seed=0),
        GLUExperts(E, 16, U, dropout=0.5, seed=0),
    ):
        layer = MoE(E, experts=experts)
        for dispatch in ("auto", "dense", "blocked", "capacity"):
            layer.dispatch = dispatch
            still = array(layer(x))
            assert (array(layer(x)) == still).all()
            moved = array(layer(x, training=True))
            assert not np.allclose(moved, still)
            assert np.isfinite(moved).all()
