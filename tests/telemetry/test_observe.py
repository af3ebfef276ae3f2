"""What `observe` reads of each mixture, against the layers' own outputs."""

import keras
import numpy as np
import pytest

from keras_moe import layers, routers, telemetry

TASKS = ["click", "stars"]
X = np.random.default_rng(0).normal(size=(60, 6)).astype("float32")


def model_of(layer, inputs=None):
    inputs = keras.Input((6,)) if inputs is None else inputs
    return keras.Model(inputs, layer(inputs))


def observed(layer, x=X):
    found = telemetry.observe(model_of(layer), x)
    check(found)
    return found


def check(found):
    """The figures of every mixture can be computed, and a fresh one has no sign."""
    for mixture in found:
        figures = telemetry.summarise(mixture)
        assert figures["finite_rows"] == 1.0
        similarity = figures["output_similarity"]
        experts = mixture.weights.shape[-1]
        assert similarity is None or similarity.shape == (experts, experts)
        signs = telemetry.signs_of_collapse(
            mixture.name, mixture.gates, figures, mixture.top_k
        )
        assert not signs


def test_a_router_by_hand():
    """Expert 2 is the first choice of rows with x0 > 0, expert 0 of the others."""
    moe = layers.MoE(3, (4, 2), top_k=1)
    model = model_of(moe)
    kernel = np.zeros((6, 3), "float32")
    kernel[0] = [-1.0, 0.0, 1.0]
    moe.router.kernel.assign(kernel)
    x = np.zeros((10, 6), "float32")
    x[:, 0] = [1, 1, 1, 1, 1, 1, 1, -1, -1, -1]
    (mixture,) = telemetry.observe(model, x)
    figures = telemetry.summarise(mixture)
    np.testing.assert_allclose(figures["load"], [0.3, 0.0, 0.7], atol=1e-6)
    np.testing.assert_allclose(figures["relative_usage"], [0.9, 0.0, 2.1], atol=1e-6)
    np.testing.assert_allclose(figures["load_cv"], np.std([0.9, 0, 2.1]), atol=1e-6)
    probs = np.exp([1.0, 0.0, -1.0]) / np.exp([1.0, 0.0, -1.0]).sum()
    entropy = -(probs * np.log(probs)).sum() / np.log(3)
    np.testing.assert_allclose(figures["entropy"], [entropy], rtol=1e-5)
    np.testing.assert_allclose(mixture.weights.sum(-1)[:, 0], probs[0], rtol=1e-5)
    assert (mixture.weights[:7, 0].argmax(-1) == 2).all()


def test_dropped_choices_are_counted():
    moe = layers.MoE(2, (4,), top_k=1, capacity_factor=1.0)
    model = model_of(moe)
    moe.router.kernel.assign(np.array([[9.0, -9.0]] + [[0.0, 0.0]] * 5, "float32"))
    (mixture,) = telemetry.observe(model, np.ones((10, 6), "float32"))
    # All ten rows want expert 0, which has five slots.
    assert telemetry.summarise(mixture)["dropped"] == 0.5


@pytest.mark.parametrize("router", [*routers.KNOWN])
def test_every_router(router):
    if router == "hash":
        ids = keras.Input((), dtype="int32")
        inputs = keras.Input((6,))
        outputs = layers.MoE(4, 5, router=router)(inputs, router_inputs=ids)
        model = keras.Model([inputs, ids], outputs)
        (mixture,) = telemetry.observe(model, [X, np.arange(60, dtype="int32")])
    else:
        options = {} if router == "dense" else {"top_k": 2}
        (mixture,) = observed(layers.MoE(4, 5, router=router, **options))
    assert mixture.weights.shape == (60, 1, 4)
    np.testing.assert_allclose(mixture.usage.sum(), 1.0, rtol=1e-5)
    figures = telemetry.summarise(mixture)
    assert figures["kernel_similarity"].shape == (4, 4)


def test_padding_is_left_out():
    inputs = keras.Input((4,), dtype="int32")
    tokens = keras.layers.Embedding(9, 6, mask_zero=True)(inputs)
    model = keras.Model(inputs, layers.MoE(4, 5)(tokens))
    (mixture,) = telemetry.observe(model, np.array([[1, 2, 0, 0], [3, 0, 0, 0]]))
    assert mixture.weights.shape == (3, 1, 4)


def test_gates_of_mmoe():
    mmoe = layers.MMoE(4, (5, 3), TASKS)
    (mixture,) = observed(mmoe)
    assert mixture.gates == ("click", "stars")
    gates = keras.ops.convert_to_numpy(mmoe.gate_weights(X))
    np.testing.assert_allclose(mixture.weights, gates, rtol=1e-6)
    figures = telemetry.summarise(mixture)
    np.testing.assert_allclose(figures["usage"], gates.mean(axis=0), rtol=1e-5)
    apart = np.abs(gates[:, 0] - gates[:, 1]).sum(-1).mean() / 2
    np.testing.assert_allclose(figures["gate_distance"], apart, rtol=1e-5)
    entropy = -(gates * np.log(gates)).sum(-1).mean(0) / np.log(4)
    np.testing.assert_allclose(figures["entropy"], entropy, rtol=1e-5)


def test_ple_has_its_experts_in_one_order():
    """Own experts of the first task, of the second, shared: 2 + 2 + 1."""
    ple = layers.PLE(2, 1, 2, (5, 3), TASKS, name="ple")
    first, second = observed(ple)
    assert (first.name, second.name) == ("ple/level_0", "ple/level_1")
    expected = [[True, True, False, False, True], [False, False, True, True, True]]
    assert first.readable.tolist() == second.readable.tolist() == expected
    own = [keras.ops.convert_to_numpy(gates) for gates in ple.gate_weights(X)]
    for mixture, gates in zip((first, second), own, strict=True):
        np.testing.assert_allclose(mixture.weights[:, 0, [0, 1, 4]], gates[:, 0])
        np.testing.assert_allclose(mixture.weights[:, 1, [2, 3, 4]], gates[:, 1])
        np.testing.assert_allclose(mixture.weights.sum(-1), 1.0, rtol=1e-5)
    assert np.isnan(telemetry.summarise(first)["load_cv"])


@pytest.mark.parametrize(
    ("make", "gates", "experts"),
    [
        (lambda: layers.OMoE(4, 5, TASKS), ("all tasks",), 4),
        (lambda: layers.CGC(1, 2, 5, TASKS), ("click", "stars"), 5),
        (lambda: layers.DSelectK(4, 5, TASKS), ("click", "stars"), 4),
        (lambda: layers.STEM(1, 1, 5, TASKS), ("click", "stars"), 3),
        (lambda: layers.HierarchicalMoE(2, 2, 5), ("router",), 4),
    ],
)
def test_one_level(make, gates, experts):
    (mixture,) = observed(make())
    assert mixture.gates == gates
    assert mixture.weights.shape == (60, len(gates), experts)


def test_several_levels():
    names = [
        m.gates for m in observed(layers.AdaTT(2, 1, 5, TASKS, num_shared_experts=1))
    ]
    assert names == [("click", "stars", "shared"), ("click", "stars")]
    home = layers.HoME(1, 1, 5, TASKS, groups=[["click"], ["stars"]])
    first, second = observed(home)
    assert first.gates == ("group_0", "group_1")
    assert first.readable.tolist() == [[True, False, True], [False, True, True]]
    assert second.readable.tolist() == [
        [True, False, True, False, True],
        [False, True, False, True, True],
    ]


def test_soft_moe():
    soft = layers.SoftMoE(4, 5, 2)
    inputs = keras.Input((3, 6))
    (mixture,) = telemetry.observe(model_of(soft, inputs), X.reshape(-1, 3, 6)[:20])
    assert mixture.weights.shape == (60, 1, 4)
    np.testing.assert_allclose(mixture.weights.sum(-1), 1.0, rtol=1e-5)


def test_further_inputs():
    inputs, scenario = keras.Input((6,)), keras.Input((), dtype="int32")
    layer = layers.M3oE(2, 5, TASKS, num_scenarios=3)
    model = keras.Model([inputs, scenario], layer(inputs, scenario))
    (mixture,) = telemetry.observe(model, [X, np.arange(60) % 3])
    assert mixture.weights.shape == (60, 2, 2)
    check([mixture])


class Nested(keras.Model):
    def __init__(self):
        super().__init__()
        self.body = keras.Sequential([layers.MoE(4, 6), keras.layers.Dense(6)])
        self.gates = layers.MMoE(4, 5, TASKS)

    def call(self, inputs):
        return self.gates(self.body(inputs))


def test_mixtures_inside_other_layers():
    model = Nested()
    model(X)
    found = telemetry.observe(model, X)
    assert sorted(len(mixture.gates) for mixture in found) == [1, 2]
    assert all(mixture.weights.shape[0] == 60 for mixture in found)


def test_the_model_stays_as_it_is():
    moe = layers.MoE(4, 6, router="noisy_top_k", routing_metrics=("load_cv",))
    model = model_of(moe)
    before = [keras.ops.convert_to_numpy(v) for v in model.variables]
    outputs = keras.ops.convert_to_numpy(model(X))
    telemetry.observe(model, X)
    after = [keras.ops.convert_to_numpy(v) for v in model.variables]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)
    assert "call" not in vars(moe)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(model(X)), outputs)


class Inference(keras.Model):
    """Calls its layers with training=False by default."""

    def __init__(self):
        super().__init__()
        self.moe = layers.MoE(4, 6, routing_metrics=("load_cv",))

    def call(self, inputs, training=False):
        return self.moe(inputs, training=training)


def test_metrics_of_fit_are_not_updated():
    model = Inference()
    model(X)
    before = [keras.ops.convert_to_numpy(s) for s in model.moe.routing_metrics.sums]
    telemetry.observe(model, X)
    after = [keras.ops.convert_to_numpy(s) for s in model.moe.routing_metrics.sums]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)
    assert model.moe.routing_metrics.active


def test_layers_of_the_same_name():
    inputs = keras.Input((6,))
    towers = [
        keras.Model(inputs, layers.MoE(4, 6, name="moe")(inputs)) for _ in range(2)
    ]
    model = keras.Model(inputs, [tower(inputs) for tower in towers])
    names = [mixture.name for mixture in telemetry.observe(model, X)]
    assert names == ["moe", "moe_1"]


class AnyExperts(keras.layers.Layer):
    """Experts of a user, with no more than a call."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(12)

    def call(self, inputs):
        return keras.ops.reshape(self.dense(inputs), (-1, 3, 4))


def test_experts_of_a_user():
    (mixture,) = observed(layers.MMoE(3, None, TASKS, experts=AnyExperts()))
    assert telemetry.summarise(mixture)["kernel_similarity"] is None


def test_gates_without_a_choice_have_no_sign():
    observed(layers.CGC(0, 1, 5, TASKS))
    observed(layers.MoE(8, 6, top_k=7))


def test_bad_models_are_named():
    with pytest.raises(TypeError, match=r"`model` must be a keras.Model"):
        telemetry.observe("model", X)
    with pytest.raises(ValueError, match="not built"):
        telemetry.observe(keras.Sequential([layers.MoE(4, 6)]), X)
    dense = model_of(keras.layers.Dense(2))
    with pytest.raises(ValueError, match=r"must have a mixture.*'Dense'"):
        telemetry.observe(dense, X)
