"""`MMoE` with dense gates, or gates that choose a few experts."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

from keras_moe.layers import MMoE
from tests.benchmarks.keras_steps import count_parameters
from tests.benchmarks.workload import Workload, repeated

ROWS, FEATURES, EXPERT_UNITS, TASKS = 8192, 256, (512, 256), 2


def make(experts: int, top_k: int | None, compiler: str = "graph") -> Workload:
    """Return a forward and backward pass of the layer.

    Args:
        experts: number of experts.
        top_k: number of experts of a gate; None for dense gates.
        compiler: "graph" or "XLA".
    """
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=(ROWS, FEATURES)).astype("float32"))
    layer = MMoE(experts, EXPERT_UNITS, TASKS, top_k=top_k)
    layer.build(x.shape)
    weights = [weight.value for weight in layer.trainable_variables]

    @tf.function(jit_compile=compiler == "XLA")
    def step(x: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.add_n([tf.reduce_sum(tf.square(y)) for y in layer(x)])
        return tape.gradient(loss, [x, *weights])

    return Workload(
        run=repeated(lambda: step(x)),
        parameters=count_parameters(layer),
        packages=("keras", "tensorflow"),
    )
