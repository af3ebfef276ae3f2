"""MoE in half precision: a float32 router, and outputs near float32."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.layers import MoE
from tests.support import backends, dispatches
from tests.support.moe_layers import Call, E, U, array, tokens


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_the_router_of_a_mixed_layer_is_float32(policy):
    layer = MoE(E, (4, U), dtype=policy)
    seen, compute = [], layer._compute

    def watched(tokens, routing, training):
        seen.append((tokens, routing))
        return compute(tokens, routing, training)

    layer._compute = watched
    outputs = layer(tokens(5).astype("float32"))
    rows, record = seen[-1]
    dtype = policy.removeprefix("mixed_")
    assert keras.backend.standardize_dtype(outputs.dtype) == dtype
    assert keras.backend.standardize_dtype(rows.dtype) == dtype
    for tensor in (record.combine_weights, record.router_logits, record.router_probs):
        assert keras.backend.standardize_dtype(tensor.dtype) == "float32"
    assert all(keras.backend.standardize_dtype(loss.dtype) == "float32"
               for loss in layer.losses)  # fmt: skip
    # A float32 kernel times the tokens as they came, not as half precision would.
    logits = array(ops.cast(rows, "float32")) @ array(layer.router.kernel)
    np.testing.assert_allclose(array(record.router_logits), logits, rtol=1e-5)


@pytest.mark.parametrize("way", dispatches.TOKEN_CHOICE)
def test_half_precision_is_near_float32(way):
    x = tokens(40).astype("float32")
    reference, half = (
        MoE(E, (8, U), activation="gelu", dtype=dtype)
        for dtype in ("float32", "mixed_bfloat16")
    )
    reference.dispatch = "dense"
    half.capacity_factor = float(E) if way == "capacity" else None
    half.dispatch = dispatches.dispatch_of(way)
    for layer in (reference, half):
        layer.build(x.shape)
    half.set_weights(reference.get_weights())
    # The router gets what it gets in half precision, or a near choice may fall apart.
    x = array(ops.cast(ops.cast(x, "bfloat16"), "float32"))
    cotangent = np.random.default_rng(0).normal(size=(40, U)).astype("float32")
    wanted = backends.outputs_and_gradients(Call(reference), [x], [cotangent])
    with dispatches.chosen(way):
        found = backends.outputs_and_gradients(Call(half), [x], [cotangent])
    for group, others in zip(found, wanted, strict=True):
        for a, b in zip(group, others, strict=True):
            scale = np.abs(b).max()
            np.testing.assert_allclose(a.astype("float32"), b, atol=0.03 * scale)
