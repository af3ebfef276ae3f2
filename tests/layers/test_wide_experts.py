"""Wide experts, which TensorFlow computes one by one without XLA: the same numbers."""

import keras
import numpy as np
import pytest

from keras_moe.experts import GLUExperts, MLPExperts
from keras_moe.layers import (
    CGC,
    PLE,
    STEM,
    AdaTT,
    CrossStitch,
    DSelectK,
    HoME,
    M3oE,
    MMoE,
    PPNet,
    SharedBottom,
    SoftMoE,
)

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="compares TensorFlow's compilers"
)

UNITS, TASKS = (33, 32), ["click", "buy"]
DOUBLE = {"dtype": "float64"}
CALLS = {
    "MLPExperts": lambda: MLPExperts(3, UNITS, **DOUBLE),
    "MLPExperts-one-layer": lambda: MLPExperts(3, 64, **DOUBLE),
    "GLUExperts": lambda: GLUExperts(3, 32, 5, use_bias=True, **DOUBLE),
    "SharedBottom": lambda: SharedBottom(UNITS, TASKS, **DOUBLE),
    "MMoE": lambda: MMoE(3, UNITS, TASKS, **DOUBLE),
    "DSelectK": lambda: DSelectK(4, UNITS, TASKS, **DOUBLE),
    "CGC": lambda: CGC(0, 2, UNITS, TASKS, **DOUBLE),
    "PLE": lambda: PLE(2, 2, 1, UNITS, TASKS, **DOUBLE),
    "PLE-shared-only": lambda: PLE(2, 2, 0, UNITS, TASKS, **DOUBLE),
    "AdaTT": lambda: AdaTT(2, 1, UNITS, TASKS, num_shared_experts=1, **DOUBLE),
    "STEM": lambda: STEM(1, 2, UNITS, TASKS, num_levels=2, **DOUBLE),
    "HoME": lambda: HoME(1, 2, UNITS, TASKS, **DOUBLE),
    "HoME-plain": lambda: HoME(
        1, 2, UNITS, TASKS, expert_normalization=False, feature_gate_rank=0, **DOUBLE
    ),
    "CrossStitch": lambda: CrossStitch(UNITS, TASKS, **DOUBLE),
    "PPNet": lambda: PPNet(UNITS, TASKS, **DOUBLE),
    "SoftMoE": lambda: SoftMoE(3, UNITS, **DOUBLE),
    "M3oE": lambda: M3oE(2, UNITS, TASKS, num_scenarios=2, **DOUBLE),
}


@pytest.mark.parametrize("name", CALLS)
def test_outputs_and_all_gradients_equal_those_of_stacked_matmuls(name):
    """With XLA the layers multiply all experts at once, which the oracles check."""
    import tensorflow as tf

    layer = CALLS[name]()
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=(2, 3, 7)))
    more = (np.array([[0, 1, 1], [1, 0, 1]]),) if name == "M3oE" else ()
    layer(x, *more)
    for weight in layer.weights:
        if not weight.dtype.startswith("int"):
            weight.assign(weight + 0.3 * rng.normal(size=weight.shape))

    def call(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = keras.tree.flatten(layer(x, *more))
            loss = sum(tf.reduce_sum(y * tf.cos(y + i)) for i, y in enumerate(outputs))
        found = tape.gradient(loss, [x, *[w.value for w in layer.trainable_variables]])
        return [*outputs, *[tf.convert_to_tensor(gradient) for gradient in found]]

    alone = tf.function(call).get_concrete_function(x)
    stacked = tf.function(call, jit_compile=True)
    for found, wanted in zip(alone(x), stacked(x), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-11)
    kinds = [op.type for op in alone.graph.get_operations()]
    whole = stacked.get_concrete_function(x)
    batched = [op.type for op in whole.graph.get_operations()]
    if not isinstance(layer, SharedBottom):  # It has one "expert".
        assert kinds.count("MatMul") > batched.count("MatMul")
