"""Training: all steps of a run in one loop, compiled by XLA.

A training step of these models takes less time than the overhead of `fit` per batch.
The loop calls `keras.Model.train_step`. It is compiled once per model and reused for
all runs, with new initial weights.
"""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf

from recsys_examples.errors import InputError
from recsys_examples.task_correlation.data import Pair, Rows
from recsys_examples.task_correlation.models import build_model


class Trainer:
    """Trains one of the models from new initial weights in each run.

    Args:
        model: one of `models.BODIES`.
        width: width of its shared layer or experts.
        dimension: number of input features d.
        batch_size: rows per step b.
    """

    def __init__(self, model: str, width: int, dimension: int, batch_size: int) -> None:
        self._arguments = (model, width, dimension)
        self._batch_size = batch_size
        self._model = build_model(*self._arguments)
        self._optimizer = keras.optimizers.Adam()
        self._optimizer.build(self._model.trainable_variables)
        self._model.compile(self._optimizer, "mse", jit_compile=True)

    def run(
        self, pair: Pair, steps: int, learning_rate: float, seed: int
    ) -> tuple[float, ...]:
        """Train from new initial weights; return the test MSE of each task.

        Args:
            pair: the tasks. Batches are taken in the order of the rows, cyclically.
            steps: number of training steps.
            learning_rate: learning rate of Adam.
            seed: seed of the initial weights.

        Raises:
            InputError: if the training diverges.
        """
        self._reset(learning_rate, seed)
        self._train(*self._batches(pair.train), tf.constant(steps))
        losses = self._losses(*_tensors(pair.test)).numpy().tolist()
        if not all(map(math.isfinite, losses)):
            raise InputError(
                f"{self._arguments[0]} diverged: the loss is not finite after {steps} "
                f"steps with learning rate {learning_rate:g}"
            )
        return tuple(losses)

    def _reset(self, learning_rate: float, seed: int) -> None:
        keras.utils.set_random_seed(seed)
        self._model.set_weights(build_model(*self._arguments).get_weights())
        for variable in self._optimizer.variables:
            variable.assign(keras.ops.zeros_like(variable))
        self._optimizer.learning_rate = learning_rate

    def _batches(self, rows: Rows) -> tuple[tf.Tensor, tf.Tensor]:
        """(n, d), (n, 2) -> (s, b, d), (s, b, 2), without an incomplete last batch."""
        batches = len(rows.inputs) // self._batch_size
        inputs, labels = (part[: batches * self._batch_size] for part in _tensors(rows))
        return (
            tf.reshape(inputs, (batches, self._batch_size, -1)),
            tf.reshape(labels, (batches, self._batch_size, -1)),
        )

    @tf.function(jit_compile=True)
    def _train(self, inputs: Any, labels: Any, steps: Any) -> None:
        for step in tf.range(steps):
            batch = step % len(inputs)
            self._model.train_step((inputs[batch], labels[batch]))

    @tf.function(jit_compile=True)
    def _losses(self, inputs: Any, labels: Any) -> Any:
        return tf.reduce_mean((self._model(inputs) - labels) ** 2, axis=0)


def _tensors(rows: Rows) -> tuple[tf.Tensor, tf.Tensor]:
    return tf.constant(rows.inputs), tf.constant(rows.labels)
