"""A trained mixture gets more experts, and its outputs stay as they were."""

import keras
import numpy as np
import pytest

from keras_moe.experts import GLUExperts, LayerExperts, MLPExperts
from keras_moe.layers import CGC, PLE, HoME, MMoE, MoE, OMoE
from keras_moe.routers import DenseRouter, NoisyTopKRouter, TopKRouter
from keras_moe.upcycling import grow
from tests.support import backends, checks
from tests.support.checks import array, arrays, glu_experts, rows

OUTPUTS = backends.tolerance(1e-6, 1e-9)
X = rows(7, 5)


def _mmoe(kind=MMoE, e=4, units=(6, 3), **options):
    return kind(e, units, ["a", "b"], dtype="float64", **options)


def _moe(e=4, units=(6, 3), **options):
    return MoE(e, units, dtype="float64", **options)


def _dense_experts(e):
    def expert(k):
        last = keras.layers.Dense(3, dtype="float64")
        if k % 2:
            return last
        return keras.Sequential([keras.layers.Dense(6, "tanh", dtype="float64"), last])

    return LayerExperts([expert(k) for k in range(e)], dtype="float64")


DENSE = {
    "MMoE": lambda: _mmoe(),
    "MMoE-bias": lambda: _mmoe(gate_use_bias=True, gate_temperature=0.5),
    "MMoE-gate-units": lambda: _mmoe(gate_units=(4,), gate_temperature=2.0),
    "OMoE": lambda: _mmoe(OMoE),
    "MMoE-glu": lambda: _mmoe(units=None, experts=GLUExperts(4, 6, 3, dtype="float64")),
    "MMoE-layers": lambda: _mmoe(units=None, experts=_dense_experts(4)),
    "MoE-dense": lambda: _moe(router="dense"),
    "MoE-dense-bias": lambda: _moe(
        router=DenseRouter(4, temperature=0.5, use_bias=True, dtype="float64")
    ),
}
SPARSE = {
    "MMoE": lambda: _mmoe(top_k=2),
    "MMoE-joint": lambda: _mmoe(top_k=1, shared_top_k=1),
    "MMoE-joint-alone": lambda: _mmoe(top_k=0, shared_top_k=2, gate_use_bias=True),
    "MMoE-layers": lambda: _mmoe(units=None, experts=_dense_experts(4), top_k=2),
    "OMoE": lambda: _mmoe(OMoE, top_k=3),
    "MoE": lambda: _moe(),
    "MoE-top-1": lambda: _moe(top_k=1),
    "MoE-sigmoid": lambda: _moe(
        router=TopKRouter(4, 2, score_function="sigmoid", use_bias=True)
    ),
    "MoE-shared": lambda: _moe(num_shared_experts=2, top_k=2),
    "MoE-capacity": lambda: _moe(capacity_factor=0.75, priority="position"),
    "MoE-own-experts": lambda: _moe(
        units=None, experts=MLPExperts(4, (6, 3), "tanh", dtype="float64")
    ),
}


def _trained(make):
    layer = make()
    layer(X)
    checks.randomised(layer)
    return layer


def _assert_grown(layer, num_experts, name="num_experts"):
    before = [array(w).copy() for w in layer.weights]
    wanted = arrays(layer(X))
    grown = grow(layer, num_experts)
    assert type(grown) is type(layer)
    assert getattr(grown, name) == num_experts
    for found, output in zip(arrays(grown(X)), wanted, strict=True):
        np.testing.assert_allclose(found, output, **OUTPUTS)
    for weight, value in zip(layer.weights, before, strict=True):
        np.testing.assert_array_equal(array(weight), value)
    again = type(grown).from_config(grown.get_config())
    again(X)
    again.set_weights(grown.get_weights())
    for found, output in zip(arrays(again(X)), wanted, strict=True):
        np.testing.assert_allclose(found, output, **OUTPUTS)
    return grown


@checks.not_on_jax
@pytest.mark.parametrize("num_experts", [4, 6, 8, 11])
@pytest.mark.parametrize("name", DENSE)
def test_dense_gates_grow_to_any_number(name, num_experts):
    _assert_grown(_trained(DENSE[name]), num_experts)


LEVELS = {
    "PLE": lambda: PLE(2, 2, 1, (6, 3), ["a", "b"], dtype="float64"),
    "PLE-bias": lambda: PLE(
        3, 2, 2, 3, 2, gate_use_bias=True, gate_temperature=0.5, dtype="float64"
    ),
    "PLE-shared-alone": lambda: PLE(2, 2, 0, 3, 2, gate_units=(4,), dtype="float64"),
    "PLE-glu": lambda: PLE(
        1, 2, 1, tasks=2, experts=[glu_experts(4, 3)], dtype="float64"
    ),
    "CGC": lambda: CGC(2, 1, (6, 3), ["a", "b"], dtype="float64"),
    "CGC-layers": lambda: CGC(
        2, 1, None, ["a", "b"], experts=_dense_experts(4), dtype="float64"
    ),
}


@checks.not_on_jax
@pytest.mark.parametrize("num_experts", [2, 3, 4])
@pytest.mark.parametrize("name", LEVELS)
def test_shared_experts_of_levels_grow_to_any_number(name, num_experts):
    layer = _trained(LEVELS[name])
    grown = _assert_grown(layer, num_experts, "num_shared_experts")
    assert grown.num_task_experts == layer.num_task_experts


@checks.not_on_jax
@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("name", SPARSE)
def test_choices_grow_with_the_number_of_experts(name, factor):
    layer = _trained(SPARSE[name])
    grown = _assert_grown(layer, 4 * factor)
    assert grown.top_k == factor * layer.top_k
    if isinstance(layer, MMoE) and layer.shared_top_k:
        assert grown.shared_top_k == factor * layer.shared_top_k


def test_by_hand():
    """Gate weights 0.6 and 0.4; expert 0 and its copy then have 0.3 each."""
    layer = MMoE(2, 1, 1, dtype="float64")
    layer.build((None, 1))
    layer.gates.kernels[0].assign(np.log([[[0.6, 0.4]]]))
    grown = grow(layer, 3)
    assert grown.gate_use_bias
    found = array(grown.gate_weights(np.ones((1, 1))))
    np.testing.assert_allclose(found, [[[0.3, 0.4, 0.3]]], rtol=1e-6)
    # Without a shift no bias is needed.
    assert not grow(layer, 4).gate_use_bias


@checks.not_on_jax
def test_gate_inputs_keep_their_width():
    layer, gate_x = _mmoe(), rows(7, 2)
    wanted = arrays(layer(X, gate_x))
    grown = grow(layer, 5)
    for found, output in zip(arrays(grown(X, gate_x)), wanted, strict=True):
        np.testing.assert_allclose(found, output, **OUTPUTS)


@checks.not_on_jax
@pytest.mark.parametrize("make", [DENSE["MMoE"], SPARSE["MMoE"], SPARSE["MoE"]])
def test_gradients_are_finite_and_noise_parts_the_copies(make):
    layer = _trained(make)
    same, apart = grow(layer, 8), grow(layer, 8, noise=0.01, seed=3)
    cotangents = [np.ones_like(output) for output in arrays(layer(X))]
    for grown in (same, apart):
        by_weight, by_input = backends.gradients(grown, [X], cotangents)
        assert all(np.isfinite(g).all() for g in (*by_weight, *by_input))
    kernels = [array(grown.experts.kernels[0]) for grown in (layer, same, apart)]
    np.testing.assert_array_equal(kernels[1][4:], kernels[0])
    np.testing.assert_array_equal(kernels[2][:4], kernels[0])
    change = (kernels[2][4:] - kernels[0]).std() / kernels[0].std()
    assert 0.005 < change < 0.02
    twin = grow(layer, 8, noise=0.01, seed=3)
    np.testing.assert_array_equal(array(twin.experts.kernels[0]), kernels[2])


@checks.not_on_jax
def test_a_grown_layer_trains_in_a_model_and_can_be_saved(tmp_path):
    layer = MMoE(4, (8, 3), ["a", "b"], top_k=1, shared_top_k=1, name="body")
    inputs = keras.Input((5,))
    model = keras.Model(inputs, layer(inputs))
    grown = grow(layer, 8, noise=0.05)
    assert grown.name == "body"
    larger = keras.Model(inputs, grown(inputs))
    x = X.astype("float32")
    larger.compile("adam", {"a": "mse", "b": "mse"})
    larger.fit(x, {"a": x[:, :3], "b": x[:, 2:]}, verbose=0)
    larger.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    for a, b in zip(arrays(again(x)), arrays(larger(x)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert model.layers[1].num_experts == 4


class _Own(keras.layers.Layer):
    num_experts = 4

    def call(self, inputs):
        return keras.ops.stack([inputs] * 4, axis=-2)


class _Subclass(MMoE):
    pass


def _refused(make, num_experts=8):
    layer = make()
    layer(X)
    return lambda: grow(layer, num_experts)


@checks.not_on_jax
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grow(_mmoe(), 8), "`layer` must be built before it grows"),
        (_refused(lambda: HoME(1, 1, 3, 2)), "`layer` must be one of.*class HoME"),
        (_refused(lambda: _mmoe(_Subclass)), "`layer` must be one of.*class _Subclass"),
        (
            _refused(lambda: CGC(0, 1, 3, 2)),
            "at least `layer.num_shared_experts`, which must not be 0.*experts=0",
        ),
        (_refused(_mmoe, 3), "`num_experts` must be at least.*=3.*num_experts=4"),
        (_refused(_mmoe, 4.0), "`num_experts` must be an integer >= 1"),
        (_refused(SPARSE["MMoE"], 6), "`num_experts` must be a multiple of.*=6.*=4"),
        (_refused(SPARSE["MoE"], 6), "`num_experts` must be a multiple of.*=6.*=4"),
        (
            _refused(lambda: _mmoe(top_k=1)),
            "`layer` must choose more than one expert.*top_k=1, shared_top_k=None",
        ),
        (
            _refused(lambda: _mmoe(top_k=0, shared_top_k=1)),
            "`layer` must choose more than one expert.*top_k=0, shared_top_k=1",
        ),
        (
            _refused(lambda: _moe(router=NoisyTopKRouter(4, 2))),
            "`layer` must have a TopKRouter or a DenseRouter.*NoisyTopKRouter",
        ),
        (
            _refused(
                lambda: _moe(
                    router=TopKRouter(4, 2, score_function="sigmoid", renormalize=False)
                )
            ),
            "`layer.router` must have renormalize=True with sigmoid scores",
        ),
        (
            _refused(lambda: _mmoe(units=None, experts=_Own())),
            "`layer.experts` must be experts of keras_moe.experts",
        ),
    ],
)
def test_what_cannot_grow_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@checks.not_on_jax
@pytest.mark.parametrize("noise", [-0.1, float("nan"), "0.1"])
def test_a_bad_noise_is_named(noise):
    layer = _trained(_mmoe)
    with pytest.raises(ValueError, match="`noise` must be a finite number >"):
        grow(layer, 8, noise=noise)
