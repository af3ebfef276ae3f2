"""Inputs beside `inputs` have its batch, also where only the run knows the batch."""

import keras
import numpy as np
import pytest

from keras_moe.layers import STEM, DSelectK, EPNet, MMoE, MoE, PPNet

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="an unknown batch is TensorFlow's"
)


@pytest.mark.parametrize(
    ("make", "argument", "shape"),
    [
        (lambda: MMoE(4, 4, 2), "gate_inputs", (2,)),
        (lambda: DSelectK(4, 4, 2), "gate_inputs", (2,)),
        (lambda: STEM(1, 1, 4, 2), "task_inputs", (2, 6)),
        (lambda: EPNet(3), "domain_inputs", (2,)),
        (lambda: PPNet(4, 2), "prior_inputs", (2,)),
        (lambda: MoE(4, 4), "router_inputs", (2,)),
    ],
    ids=["MMoE", "DSelectK", "STEM", "EPNet", "PPNet", "MoE"],
)
def test_another_batch_is_refused_before_anything_uses_it(make, argument, shape):
    import tensorflow as tf

    layer = make()
    call = tf.function(
        lambda a, b: layer(a, **{argument: b}),
        input_signature=[tf.TensorSpec((None, 6)), tf.TensorSpec((None, *shape))],
    )
    x = np.ones((4, 6), "float32")
    call(x, np.ones((4, *shape), "float32"))
    for rows in (1, 3, 5):
        with pytest.raises(tf.errors.InvalidArgumentError, match=f"`{argument}` must"):
            call(x, np.ones((rows, *shape), "float32"))
    # No product may fail before, in whatever order the graph runs.
    graph = call.get_concrete_function().graph
    products = [_ancestors(op) for op in graph.get_operations() if "MatMul" in op.type]
    theirs = [found for found in products if graph.inputs[1].op in found]
    assert theirs
    (check,) = [op for op in graph.get_operations() if op.type == "Assert"]
    assert all(check in found for found in theirs)


def _ancestors(op):
    found, waiting = set(), [op]
    while waiting:
        op = waiting.pop()
        if op not in found:
            found.add(op)
            waiting += [*(tensor.op for tensor in op.inputs), *op.control_inputs]
    return found
