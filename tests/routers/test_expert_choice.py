"""ExpertChoiceRouter by hand, and its capacity in a graph."""

import keras
import numpy as np
import pytest

from keras_moe import routing
from tests.support.router_cases import (
    Fields,
    arrays,
    assert_equal,
    make,
    model_of,
    on_logits,
    tokens,
)

PAIRS = np.log([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.2, 0.8]])


def test_expert_choice_by_hand():
    # c = ceil(1 * 1 * 4 / 2) = 2: expert 0 takes tokens 0 and 2, expert 1 3 and 1.
    router = on_logits(make("expert_choice", 2, top_k=1))
    found = arrays(router(PAIRS))
    assert found["token_indices"].tolist() == [[0, 2], [3, 1]]
    np.testing.assert_allclose(found["combine_weights"], [[0.9, 0.7], [0.8, 0.4]], 1e-6)
    assert not found["invalid"].any()


def test_expert_choice_passes_over_padding_and_nan_by_hand():
    # c = ceil(1.5 * 1 * 4 / 2) = 3, but only tokens 0 and 1 can be chosen.
    router = on_logits(make("expert_choice", 2, top_k=1, capacity_factor=1.5))
    x = PAIRS.copy()
    x[3] = np.inf
    found = arrays(router(x, mask=np.array([True, True, False, True])))
    assert found["token_indices"].tolist() == [[0, 1, 4], [1, 0, 4]]
    np.testing.assert_allclose(
        found["combine_weights"], [[0.9, 0.6, 0], [0.4, 0.1, 0]], 1e-6
    )
    assert found["invalid"].tolist() == [False, False, False, True]
    # What is padding is not invalid, whatever it holds.
    found = arrays(router(x, mask=np.array([True, True, True, False])))
    assert not found["invalid"].any()


def test_expert_choice_computes_its_capacity_in_the_graph():
    """An exported model does not know n; the slots are those of `expert_capacity`."""
    if keras.backend.backend() == "jax":
        with pytest.raises(ValueError, match="number of tokens to be known"):
            model_of(make("expert_choice"), tokens())
    if keras.backend.backend() != "tensorflow":
        pytest.skip("only TensorFlow has shapes that the run decides")
    import tensorflow as tf

    router = make("expert_choice", 5, top_k=2, capacity_factor=1.1)
    layer = Fields(router)
    layer(tokens())
    signature = [tf.TensorSpec([None, 5], "float32")]
    for jit in (False, True):
        call = tf.function(lambda x: layer(x), signature, jit_compile=jit)
        for n in (0, 1, 3, 7, 10):
            found, expected = call(tokens(n)), layer(tokens(n))
            slots = routing.expert_capacity(n, 5, 2, 1.1)
            assert found[0].shape == (5, slots)
            assert_equal(found, expected, rtol=1e-5, atol=1e-6)
