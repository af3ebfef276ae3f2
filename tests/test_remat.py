"""Recomputed forward passes: the same choices and gradients, one step of a bias."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.layers import MoE, SoftMoE
from keras_moe.routers import BiasBalancedRouter

ON_JAX = keras.backend.backend() == "jax"
# In a graph of TensorFlow about 1 of 60 runs with recomputation has other gradients,
# also those of plain Dense layers (Keras 3.15, TensorFlow 2.21).
EAGER = keras.backend.backend() == "tensorflow"
X = np.random.default_rng(0).normal(size=(32, 6)).astype("float32")


class Recomputed(keras.Model):
    """A layer between two others, recomputed in the backward pass or not."""

    def __init__(self, layer, remat):
        super().__init__()
        self.before, self.layer = keras.layers.Dense(6), layer
        self.after, self.remat = keras.layers.Dense(1), remat

    def call(self, x, training=None):
        def compute(x):
            return self.layer(x, training=training)

        return self.after(
            (keras.remat(compute) if self.remat else compute)(self.before(x))
        )


def _trained(make, remat, optimizer, batch_size=8):
    keras.utils.set_random_seed(0)
    model = Recomputed(make(), remat)
    model(X[:2])
    model.compile(optimizer, "mse", run_eagerly=EAGER)
    history = model.fit(
        X, X[:, :1], batch_size=batch_size, epochs=3, verbose=0, shuffle=False
    ).history
    return history, [np.array(ops.convert_to_numpy(w)) for w in model.weights], model


MAKERS = {
    "bias_balanced": lambda: MoE(
        4, (8, 6), router=BiasBalancedRouter(4, 2, bias_update_rate=0.3)
    ),
    "bias_balanced-blocked": lambda: MoE(
        4,
        (8, 6),
        router=BiasBalancedRouter(4, 1, bias_update_rate=0.3),
        dispatch="blocked",
    ),
    "top_k": lambda: MoE(4, (8, 6), load_balancing_loss_weight=0.0),
    "capacity": lambda: MoE(
        4, (8, 6), load_balancing_loss_weight=0.0, capacity_factor=0.8
    ),
    "expert_choice": lambda: MoE(4, (8, 6), router="expert_choice"),
    "sinkhorn": lambda: MoE(4, (8, 6), router="sinkhorn"),
    "dense": lambda: MoE(4, (8, 6), router="dense"),
    "metrics": lambda: MoE(
        4,
        (8, 6),
        load_balancing_loss_weight=0.0,
        routing_metrics=("expert_load", "load_cv", "router_entropy"),
        name="moe",
    ),
}

# On JAX, Keras lets no state and no loss out of what is recomputed.
STATELESS = ["top_k", "capacity", "expert_choice", "sinkhorn", "dense"]


@pytest.mark.parametrize("name", STATELESS if ON_JAX else MAKERS)
def test_training_is_the_same_when_recomputed(name):
    plain, recomputed = (
        _trained(MAKERS[name], remat, keras.optimizers.SGD(0.1))
        for remat in (False, True)
    )
    assert plain[0].keys() == recomputed[0].keys()
    for key, values in plain[0].items():
        np.testing.assert_allclose(recomputed[0][key], values, rtol=1e-5, atol=1e-6)
    for a, b in zip(plain[1], recomputed[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("remat", [False] if ON_JAX else [False, True])
def test_a_bias_moves_once_for_accumulated_gradients(remat):
    """Four batches of 8 rows with accumulation move it as one batch of 32 does."""

    def optimizer(steps):
        return keras.optimizers.SGD(0.1, gradient_accumulation_steps=steps)

    make = MAKERS["bias_balanced"]
    _, whole, _ = _trained(make, False, keras.optimizers.SGD(0.1), batch_size=32)
    _, parts, model = _trained(make, remat, optimizer(4))
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    bias = ops.convert_to_numpy(model.layer.router.expert_bias)
    # Three epochs of one step each: no expert has moved more often.
    assert np.abs(bias).max() <= 3 * 0.3 + 1e-6
    assert np.abs(bias).max() > 0


def test_a_soft_mixture_is_the_same_when_recomputed():
    x = np.random.default_rng(0).normal(size=(4, 5, 6)).astype("float32")
    found = []
    for remat in (False, True):
        keras.utils.set_random_seed(0)
        model = Recomputed(SoftMoE(3, (8, 6)), remat)
        model(x)
        model.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=EAGER)
        model.fit(x, x[..., :1], epochs=2, verbose=0, shuffle=False)
        found.append([ops.convert_to_numpy(w) for w in model.weights])
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
