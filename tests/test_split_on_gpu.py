"""The dispatch "split" on a GPU of TensorFlow: what its host has to wait for."""

import numpy as np
import pytest

from keras_moe import _backend
from keras_moe import dispatch as dispatch_lib
from keras_moe.experts import MLPExperts
from keras_moe.routing import Routing
from tests.support import dispatches

pytestmark = pytest.mark.skipif(
    dispatches.BACKEND != "tensorflow", reason="others have no such kernels"
)


def test_the_sizes_of_the_pieces_are_all_that_goes_to_the_host(monkeypatch):
    """Forward and backward; and with int64 the numbers stay the same."""
    import tensorflow as tf

    from tests.support.gpu_graph import handed_to_host

    experts = MLPExperts(4, (8, 3))
    experts.build((None, 5))
    rng = np.random.default_rng(0)
    tokens = tf.constant(rng.normal(size=(20, 5)).astype("float32"))
    weights = tf.constant(rng.random((20, 2)).astype("float32"))
    indices = np.argsort(rng.random((20, 4)), axis=1)[:, :2].astype("int32")
    kernels = [w.value for w in experts.trainable_variables]

    def step(tokens, weights, indices, upstream):
        with tf.GradientTape() as tape:
            tape.watch([tokens, weights])
            outputs = dispatch_lib.split(tokens, Routing(indices, weights), experts)
        found = tape.gradient(outputs, [tokens, weights, *kernels], upstream)
        return [outputs, *found]

    given = tokens, weights, tf.constant(indices), tf.ones((20, 3))
    wanted = tf.function(step)(*given)
    monkeypatch.setattr(_backend, "on_accelerator", lambda: True)
    on_gpu = tf.function(step)
    specs = [tf.TensorSpec([None, *x.shape[1:]], x.dtype) for x in given]
    graph = on_gpu.get_concrete_function(*specs).graph
    edges, waits = handed_to_host(graph)
    assert [graph.get_operation_by_name(b).type for _, b in edges] == ["SplitV"]
    assert waits == 1
    for a, b in zip(on_gpu(*given), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
