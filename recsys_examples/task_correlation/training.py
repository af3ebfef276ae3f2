"""Training: all steps of a run in one loop that XLA compiles.

A step of these models takes less time than `fit` needs to hand it a batch. The loop
repeats Keras' own training step, and one compiled loop serves all runs of a model,
each of which starts from weights of its own.
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
    """Trains one of the models from the start, any number of times.

    Args:
        model: one of `models.BODIES`.
        width: of its shared layer or its experts.
        dimension: input features d.
        batch_size: rows a step, b.
    """

    def __init__(self, model: str, width: int, dimension: int, batch_size: int) -> None:
        self._described = (model, width, dimension)
        self._batch_size = batch_size
        self._model = build_model(*self._described)
        self._optimizer = keras.optimizers.Adam()
        self._optimizer.build(self._model.trainable_variables)
        self._model.compile(self._optimizer, "mse", jit_compile=True)

    def run(
        self, pair: Pair, steps: int, learning_rate: float, seed: int
    ) -> tuple[float, ...]:
        """Train from the start; return the mean squared error of each task.

        Args:
            pair: the tasks. Batches are taken in the order of the rows, and from the
                first again after the last.
            steps: number of batches.
            learning_rate: of Adam, whose other settings are the defaults.
            seed: of the initial weights.

        Raises:
            InputError: if the training diverges.
        """
        self._start_again(learning_rate, seed)
        self._train(*self._batches(pair.train), tf.constant(steps))
        losses = self._losses(*_tensors(pair.test)).numpy().tolist()
        if not all(map(math.isfinite, losses)):
            raise InputError(
                f"{self._described[0]} diverged: no finite loss after {steps} steps at "
                f"the learning rate {learning_rate:g}"
            )
        return tuple(losses)

    def _start_again(self, learning_rate: float, seed: int) -> None:
        keras.utils.set_random_seed(seed)
        self._model.set_weights(build_model(*self._described).get_weights())
        for variable in self._optimizer.variables:
            variable.assign(keras.ops.zeros_like(variable))
        self._optimizer.learning_rate = learning_rate

    def _batches(self, rows: Rows) -> tuple[tf.Tensor, tf.Tensor]:
        """(n, d), (n, 2) -> (s, b, d), (s, b, 2), less the rows that fill no batch."""
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
