"""Arguments of the wrong kind, which fuzzing had found, one of each cause."""

import json

import keras
import numpy as np
import pytest

from keras_moe import (
    experts,
    initializers,
    layers,
    losses,
    metrics,
    optimizers,
    routers,
)
from keras_moe.multitask import MultiTaskModel, Task, gradients, heads, weighting

X = np.ones((3, 6), "float32")
NAN = float("nan")


@pytest.mark.parametrize("seed", [(0,), "x", NAN, -1, 2**32, 1.0, True, np.array(3)])
@pytest.mark.parametrize(
    "make",
    [
        lambda seed: layers.MoE(4, 5, seed=seed),
        lambda seed: layers.Tower(5, seed=seed),
        lambda seed: routers.TopKRouter(4, seed=seed),
        lambda seed: routers.NoisyTopKRouter(4, seed=seed),
        lambda seed: routers.HashRouter(4, seed=seed),
        lambda seed: weighting.RLW(seed=seed),
        lambda seed: gradients.PCGrad(seed=seed),
    ],
)
def test_seeds(make, seed):
    with pytest.raises(ValueError, match="`seed` must be an integer"):
        make(seed)


def test_the_largest_seed_has_successors():
    layer = layers.PLE(2, 1, 1, 4, 2, dropout=0.5, gate_dropout=0.5, seed=2**32 - 1)
    layer(X, training=True)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: routers.TopKRouter(4, use_bias="x"), "use_bias"),
        (lambda: layers.SoftMoE(4, 5, normalize=None), "normalize"),
        (lambda: layers.MoE(4, {8, 5}), "expert_units"),
        (lambda: layers.MoE(4, {8: 5}), "expert_units"),
        (lambda: layers.MoE(4, np.array(5)), "expert_units"),
        (lambda: layers.MoE(2**31, 5), "num_experts"),
        (lambda: layers.MoE(4, 5, kernel_initializer=X), "kernel_initializer"),
        (lambda: layers.MoE(4, 5, activation=keras.initializers.Zeros()), "activation"),
        (lambda: layers.MoE(4, 5, kernel_regularizer=keras.losses.Loss), "regularizer"),
        (lambda: layers.Tower(5, kernel_initializer="nothing"), "kernel_initializer"),
        (lambda: layers.MMoE(4, 5, 2, gate_temperature=1e-45), "gate_temperature"),
        (lambda: routers.DenseRouter(4, temperature=1e-30), "temperature"),
        (lambda: weighting.DWA(3, temperature=1e-30), "temperature"),
        (lambda: layers.PartitionedNormalization(2, epsilon=1e-45), "epsilon"),
        (lambda: layers.MoE(4, 5, dtype="int32"), "dtype"),
        (lambda: layers.DSelectK(4, 5, 2, gamma=1e-45), "gamma"),
        (lambda: experts.LayerExperts(keras.Input((6,))), "layers"),
        (lambda: weighting.RLW(activity_regularizer="l2"), "activity_regularizer"),
        (lambda: layers.MoE(4, 5, name=""), "name"),
        (lambda: layers.MoE(4, 5, name="a\n"), "name"),
        (lambda: layers.MoE(4, 5, capacity_factor=1e300), "capacity_factor"),
        (lambda: metrics.RoutingMetrics(4, ["load_cv"], prefix=NAN), "prefix"),
        (lambda: metrics.GAUC(group=3), "group"),
        (lambda: metrics.PCOC(name=3), "name"),
        (lambda: metrics.BySegment(keras.metrics.Mean(), 2), "metric"),
        (lambda: optimizers.FusedAdam(beta_1="x"), "beta_1"),
        (lambda: optimizers.LazyAdam(clipnorm=-1.0), "clipnorm"),
        (lambda: optimizers.FusedAdagrad(learning_rate=NAN), "learning_rate"),
        (lambda: optimizers.RowwiseAdagrad(tables=b"x"), "tables"),
        (lambda: initializers.PerExpert("zeros", stream=-1), "stream"),
        (lambda: heads.LogLoss(name=keras.metrics.Mean()), "name"),
        (lambda: heads.LogLoss(name="a/b"), "name"),
        (lambda: heads.LogLoss(reduction=["a"]), "reduction"),
        (lambda: Task("a", loss=keras.layers.Dense(1)), "loss"),
        (lambda: Task("a", defined=keras.regularizers.L2()), "defined"),
        (lambda: optimizers.LazyAdam(weight_decay=X), "weight_decay"),
        (lambda: losses.auxiliary_losses(None, {}), "routing"),
        (lambda: losses.importance_loss("text"), "gate_weights"),
        (lambda: losses.importance_loss(np.ones((3, 4)) * 1j), "gate_weights"),
        (lambda: heads.LogLoss()(np.ones((3, 5)), np.full((3, 1), 0.5)), "y_true"),
        (lambda: MultiTaskModel(*_one_task(), shared_layers=3), "shared_layers"),
    ],
)
def test_the_argument_is_named(make, name):
    with pytest.raises(ValueError, match=f"`[a-z_]*{name}[^`]*` must"):
        make()


def _one_task():
    inputs = keras.Input((6,))
    return inputs, {"a": keras.layers.Dense(1)(inputs)}


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda layer: layer(1.0), "inputs"),
        (lambda layer: layer(X * 1j), "inputs"),
        (lambda layer: layer(X, mask=np.ones(2, bool)), "mask"),
        (lambda layer: layer(X, mask=np.array(["a"] * 3)), "mask"),
        (lambda layer: layer(X, training=np.ones(3)), "training"),
        (lambda layer: layer(X[:, :5]), "inputs"),
    ],
)
def test_the_argument_of_a_call_is_named(call, name):
    layer = layers.MoE(4, 5)
    layer(X)
    with pytest.raises(ValueError, match=f"`{name}`"):
        call(layer)


@pytest.mark.parametrize(
    "units", [(u for u in (8, 5)), np.array([8, 5]), range(8, 9), [np.int64(8), 5]]
)
def test_widths_are_kept_as_integers(units):
    layer = layers.MMoE(4, units, 2)
    assert all(type(size) is int for size in layer.expert_units)
    json.dumps(keras.saving.serialize_keras_object(layer))


def test_a_loss_keeps_its_dtype_in_its_config():
    """Keras leaves it out."""
    loss = heads.LogLoss(dtype="float64")
    again = heads.LogLoss.from_config(loss.get_config())
    assert again.dtype == "float64"
    assert "dtype" not in heads.LogLoss().get_config()


def test_an_initializer_of_none_is_that_of_keras():
    layer = experts.MLPExperts(4, 5, kernel_initializer=None)
    assert isinstance(layer.kernel_initializer, keras.initializers.GlorotUniform)
    layer(X)


def test_a_negative_seed_of_an_initializer():
    layer = experts.MLPExperts(2, 5, kernel_initializer=keras.initializers.HeNormal(-3))
    layer(X)


def test_integers_beside_the_floats_of_a_stream():
    layer = layers.STEM(1, 1, 4, 2)
    tasks = np.ones((3, 2, 6), "float32")
    ones = layer(X, tasks)
    for a, b in zip(layer(X.astype("int32"), tasks), ones, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_router_names_tokens_of_a_wrong_rank():
    for make in (routers.TopKRouter, routers.DenseRouter, routers.SinkhornRouter):
        with pytest.raises(ValueError, match="`tokens` of ndim=2"):
            make(4)(np.ones((2, 3, 6), "float32"))


def test_outputs_of_a_model_are_named():
    inputs, outputs = _one_task()
    with pytest.raises(ValueError, match="every name in `outputs`"):
        MultiTaskModel(inputs, {"a b": outputs["a"]})
