"""`router_inputs` and masks of MoE, and routers written by users."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import routers
from keras_moe.layers import MoE
from keras_moe.routing import Routing
from tests.support import moe_oracles, routing_oracles
from tests.support.moe_layers import (
    OUTPUTS,
    D,
    E,
    U,
    array,
    moe,
    oracle_experts,
    randomised,
    tokens,
)


@pytest.mark.parametrize("shape", [(6,), (2, 3), (2, 1, 3)])
def test_ids_have_the_leading_axes(shape):
    x = tokens(*shape)
    ids = np.arange(6).reshape(shape)
    layer = moe("hash")
    flat = array(layer(x.reshape(6, D), router_inputs=np.arange(6)))
    for shaped in (ids, ids[..., None]):
        found = array(layer(x, router_inputs=shaped))
        np.testing.assert_allclose(found.reshape(6, U), flat, **OUTPUTS)


def test_router_inputs_may_have_other_features():
    x, other = tokens(2, 3), np.random.default_rng(5).normal(size=(2, 3, 7))
    layer = moe()
    layer(x, router_inputs=other)
    values = randomised(layer)
    rows = other.reshape(6, 7)
    record = routing_oracles.top_k(rows, values[id(layer.router.kernel)], 2)
    wanted = moe_oracles.moe(
        x.reshape(6, D), record, oracle_experts(layer.experts, values)
    )
    found = array(layer(x, router_inputs=other)).reshape(6, U)
    np.testing.assert_allclose(found, wanted, **OUTPUTS)


@pytest.mark.parametrize("router", ["top_k", "hash"])
def test_the_mask_of_an_embedding_is_used(router):
    """Keras hands it over itself only where a call has no second tensor."""
    ids = keras.Input((3,), dtype="int32")
    embedded = keras.layers.Embedding(10, D, mask_zero=True)(ids)
    given = {"router_inputs": ids} if router == "hash" else {}
    outputs = MoE(E, U, router=router, kernel_initializer="ones")(embedded, **given)
    model = keras.Model(ids, outputs)
    found = array(model(np.array([[1, 2, 0], [3, 0, 0]])))
    assert (found == 0).all(axis=-1).tolist() == [
        [False, False, True],
        [False, True, True],
    ]


def test_bad_inputs_are_named():
    x, layer = tokens(2, 3), moe()
    with pytest.raises(ValueError, match=r"`mask`.*\(2, 3\).*\(2,\)"):
        layer(x, mask=np.ones(2, bool))
    with pytest.raises(ValueError, match=r"`mask`.*\(1, 3\).*\(1,\)"):
        layer(x[:1], mask=np.ones(1, bool))
    with pytest.raises(ValueError, match=r"`router_inputs`.*\(2, 3\).*\(2, 2, 3\)"):
        layer(x, router_inputs=x[:, :2])
    with pytest.raises(ValueError, match="rank >= 2"):
        moe()(np.ones(3))
    with pytest.raises(ValueError, match=r"`router_inputs` must be given.*HashRouter"):
        moe("hash")(x)
    hashed = moe("hash")
    hashed(x, router_inputs=np.arange(6).reshape(2, 3))
    with pytest.raises(ValueError, match=r"integer ids.*`router_inputs`.*float64"):
        hashed(x)


class ByParity(routers.Router):
    """A router of one's own: even ids go to one expert, odd ids to another."""

    reads_ids, has_probs = True, False

    def call(self, tokens, mask=None, training=None):
        indices = ops.expand_dims(ops.mod(tokens, 2), -1)
        return Routing(indices, ops.ones_like(indices, dtype="float32"), mask=mask)


def test_attributes_of_a_custom_router_are_used():
    layer, x, ids = moe(ByParity(E, 1)), tokens(5), np.array([0, 1, 3, 2, 4])
    with pytest.raises(ValueError, match=r"`router_inputs` must be given.*ByParity"):
        layer(x)
    with pytest.raises(ValueError, match=r"`routing_metrics` must not hold.*ByParity"):
        moe(ByParity(E, 1), routing_metrics=["router_entropy"])
    every = array(layer.experts(x))  # (n, e, u)
    found = array(layer(x, router_inputs=ids.astype("int32")))
    np.testing.assert_allclose(found, every[np.arange(5), ids % 2], rtol=1e-6)
