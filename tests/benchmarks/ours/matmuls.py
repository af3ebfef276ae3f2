"""The matmuls of a mixture alone: what a step cannot be faster than.

One matmul for each layer of each expert, gate and tower, and in training two more for
its gradients, by inputs and by weights, in one graph. Nothing else: no bias, no
activation, embedding, loss or optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator

import tensorflow as tf

from tests.benchmarks.click_rows import TASKS, Sizes
from tests.benchmarks.mixture_sizes import ple_sizes
from tests.benchmarks.workload import Workload, repeated


def make(model: str, experts: int, step: str) -> Workload:
    """Return the matmuls of a training or serving step.

    Args:
        model: "MMoE" or "PLE".
        experts: number of experts, for PLE of each level.
        step: "training" or "serving".
    """
    sizes = Sizes()
    n, shapes = sizes.rows, list(layer_shapes(model, experts, sizes))
    widths = sorted({inputs for inputs, _ in shapes})
    rows = {width: tf.random.normal((n, width)) for width in widths}
    kernels = [tf.random.normal(shape) for shape in shapes]
    # One for each layer: TensorFlow computes equal products of a graph only once.
    upstream = [tf.random.normal((n, outputs)) for _, outputs in shapes]

    @tf.function
    def products(rows, kernels, upstream):
        found = []
        for kernel, gradient in zip(kernels, upstream, strict=True):
            inputs = rows[kernel.shape[0]]
            found.append(tf.matmul(inputs, kernel))
            if step == "training":
                found.append(tf.matmul(gradient, kernel, transpose_b=True))
                found.append(tf.matmul(inputs, gradient, transpose_a=True))
        return [product[0, 0] for product in found]  # Cheap to return.

    multiplied = sum(inputs * outputs for inputs, outputs in shapes)
    passes = 3 if step == "training" else 1
    return Workload(
        run=repeated(lambda: products(rows, kernels, upstream)[-1].numpy()),
        packages=("tensorflow",),
        facts={"flops": 2 * n * passes * multiplied},
    )


def layer_shapes(model: str, experts: int, sizes: Sizes) -> Iterator[tuple[int, int]]:
    """Yield the inputs and outputs of each dense layer of a model."""
    d, t, units = sizes.features, len(TASKS), sizes.expert_units[-1]
    if model == "MMoE":
        yield from [*_chain(d, sizes.expert_units)] * experts
        yield from [(d, experts)] * t
    else:
        numbers = ple_sizes(experts)
        levels, shared = numbers["num_levels"], numbers["num_shared_experts"]
        for level in range(levels):
            inputs = d if level == 0 else units
            yield from [*_chain(inputs, sizes.expert_units)] * experts
            yield from [(inputs, shared + numbers["num_task_experts"])] * t
            if level < levels - 1:
                yield inputs, experts
    yield from [*_chain(units, (*sizes.tower_units, 1))] * t


def _chain(inputs: int, widths: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    for width in widths:
        yield inputs, width
        inputs = width
