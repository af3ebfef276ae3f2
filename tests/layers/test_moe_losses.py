"""Auxiliary losses that MoE adds."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.layers import MoE
from tests.support import backends, routing_oracles
from tests.support.moe_layers import (
    E,
    U,
    array,
    float32_model,
    loss_values,
    moe,
    tokens,
)


def test_losses_are_weighted():
    x = tokens(9)
    mask = np.ones(9, bool)
    mask[4] = False
    layer = moe(
        load_balancing_loss_weight=0.5,
        importance_loss_weight=0.25,
        router_z_loss_weight=2.0,
        entropy_loss_weight=-0.125,
    )
    layer(x, mask=mask)
    record = routing_oracles.top_k(x, array(layer.router.kernel), 2)
    probs, indices = record["router_probs"], record["expert_indices"]
    gates = np.zeros((9, E))
    for i, j in np.ndindex(9, 2):
        gates[i, indices[i, j]] = record["combine_weights"][i, j]
    wanted = [
        0.5 * routing_oracles.load_balancing_loss(probs, indices, mask),
        0.25 * routing_oracles.cv_squared_of_sums(gates, mask),
        2.0 * routing_oracles.router_z_loss(record["router_logits"], mask),
        -0.125 * routing_oracles.entropy_loss(probs, mask),
    ]
    np.testing.assert_allclose(
        loss_values(layer), sorted(wanted), **backends.tolerance(1e-6)
    )


@pytest.mark.parametrize(
    ("router", "names"),
    [
        (None, {"load_balancing"}),
        ("noisy_top_k", {"importance", "load"}),
        ("bias_balanced", set()),
        ("expert_choice", set()),
        ("hash", set()),
        ("dense", set()),
    ],
)
def test_default_losses_of_each_router(router, names):
    layer = MoE(E, U, router=router)
    assert set(layer.loss_weights) == names
    given = {"router_inputs": np.arange(5)} if router == "hash" else {}
    x = tokens(5).astype("float32")
    layer(x, training=True, **given)
    assert len(layer.losses) == len(names)
    layer(x, **given)
    # The load is that of the noise, and in inference there is none.
    assert len(layer.losses) == len(names - {"load"})


def test_the_losses_reach_the_router_in_fit():
    """Without a task, the balance is all there is to learn."""
    x = (tokens(128) + np.array([2.0, 0, 0])).astype("float32")
    model, layer = float32_model(load_balancing_loss_weight=10.0)
    model.compile(keras.optimizers.Adam(0.05), loss=lambda y, p: ops.mean(0.0 * p))
    before = [array(w) for w in layer.experts.weights]
    losses = model.fit(x, x[:, :U], 128, epochs=30, verbose=0).history["loss"]
    assert losses[0] > 10.5
    assert losses[-1] < losses[0] - 0.2
    assert losses[-1] > 9.5
    for a, b in zip(layer.experts.weights, before, strict=True):
        assert (array(a) == b).all()
