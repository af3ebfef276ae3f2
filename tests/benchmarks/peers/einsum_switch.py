"""The dispatch of Switch Transformer and GShard with one-hot einsums, in TensorFlow.

Axis letters: g groups, s rows of a group, e experts, c slots of an expert in a group,
d features, h hidden units. A tensor of (g, s, e, c) holds which slot a row takes; the
inputs and outputs of the experts are products with it (Lepikhin et al. 2020, algorithm
1; Fedus et al. 2021, figure 15).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from tests.benchmarks import layer_steps
from tests.benchmarks.keras_steps import count_parameters
from tests.benchmarks.layer_work import (
    LayerSizes,
    draw_experts,
    draw_rows,
    facts,
    sizes_of,
)
from tests.benchmarks.peers.groups import GROUP, grouped
from tests.benchmarks.workload import Workload, repeated

CAPACITY_FACTOR = 1.25
NOTE = f"in groups of {GROUP:,} rows, drops choices above 1.25 times the mean"


class EinsumMoE(keras.layers.Layer):
    """Top k of MLP experts.

    Args:
        sizes: the sizes.

    Call arguments:
        inputs: tensor of shape (g, s, d).

    Returns:
        A tensor of shape (g, s, d).
    """

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        self._sizes = sizes

    def build(self, input_shape: Any) -> None:
        e, d, h = self._sizes.experts, self._sizes.features, self._sizes.hidden
        self.router = self.add_weight((d, e))
        self.up, self.up_bias = self.add_weight((e, d, h)), self.add_weight((e, 1, h))
        self.down = self.add_weight((e, h, d))
        self.down_bias = self.add_weight((e, 1, d))

    def call(self, inputs: Any, training: bool = False) -> Any:
        combine = self._combine(inputs, training)
        dispatch = tf.cast(combine > 0, inputs.dtype)
        rows = tf.einsum("gsec,gsd->egcd", dispatch, inputs)
        e, c = self._sizes.experts, combine.shape[-1]
        rows = tf.reshape(rows, (e, -1, self._sizes.features))
        hidden = tf.nn.relu(rows @ self.up + self.up_bias)
        outputs = tf.reshape(
            hidden @ self.down + self.down_bias, (e, -1, c, self._sizes.features)
        )
        return tf.einsum("gsec,egcd->gsd", combine, outputs)

    def _combine(self, inputs: Any, training: bool) -> Any:
        """Return the weights of the slots, (g, s, e, c)."""
        e, k, s = self._sizes.experts, self._sizes.top_k, inputs.shape[1]
        c = math.ceil(CAPACITY_FACTOR * k * s / e)
        probs = tf.nn.softmax(tf.einsum("gsd,de->gse", inputs, self.router))
        weights, chosen = tf.math.top_k(probs, k)
        weights /= tf.reduce_sum(weights, -1, keepdims=True)
        chosen = tf.one_hot(chosen, e)  # (g, s, k, e)
        if training:
            fraction = tf.reduce_mean(chosen, (0, 1, 2))
            balance = tf.reduce_sum(fraction * tf.reduce_mean(probs, (0, 1)))
            self.add_loss(0.01 * e * balance)
        combine, taken = tf.zeros(()), tf.zeros((1, e))
        for choice in range(k):
            mask = chosen[:, :, choice]  # (g, s, e)
            slot = tf.cumsum(mask, axis=1, exclusive=True) + taken
            taken += tf.reduce_sum(mask, axis=1, keepdims=True)
            slots = tf.one_hot(tf.cast(tf.reduce_sum(slot * mask, -1), "int32"), c)
            weighted = mask * weights[:, :, choice, None]
            combine += tf.einsum("gse,gsc->gsec", weighted, slots)
        return combine


def make(
    sizes: Mapping[str, int],
    routing: str = "uniform",
    step: str = "training",
    compiler: str = "graph",
) -> Workload:
    """Return a step of the layer.

    Args:
        sizes: arguments of `LayerSizes`.
        routing: one of `layer_work.ROUTINGS`.
        step: "training" or "forward".
        compiler: "graph" or "XLA".
    """
    work = sizes_of(sizes)
    rows, router_kernel = draw_rows(work, routing)
    x = grouped(rows)
    layer = EinsumMoE(work)
    layer.build(x.shape)
    kernels = draw_experts(work, "MLP")
    layer.router.assign(router_kernel)
    layer.up.assign(kernels["up"])
    layer.down.assign(kernels["down"])
    for bias in (layer.up_bias, layer.down_bias):
        bias.assign(tf.zeros(bias.shape))
    outputs = layer_steps.compiled(layer, x, "forward")().numpy()
    return Workload(
        run=repeated(layer_steps.compiled(layer, x, step, compiler)),
        parameters=count_parameters(layer),
        packages=("keras", "tensorflow"),
        facts=facts(work, "MLP", outputs, NOTE),
    )
