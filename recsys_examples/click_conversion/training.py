"""Training and evaluation, with one compiled model for many runs.

Axis letters: s steps, b rows of a step.

A model is traced once per process; each run assigns new initial weights and resets
the optimizer. The steps over a batch of the source (for data in memory: an epoch) run
in one graph, as a step takes less time than the overhead of `fit` per step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from recsys_examples.click_conversion.data import Part
from recsys_examples.click_conversion.models import Columns, Shape, build_model
from recsys_examples.click_conversion.problems import Outputs, Problem, total_loss
from recsys_examples.click_conversion.sources import Source

_PREDICTION_ROWS = 8192


class Trainer:
    """Trains one model from new initial weights in each run.

    Args:
        problem: the tasks.
        model: one of `problem.models`.
        columns: the inputs.
        shape: the size.
        loss_weighting: name of a loss weighting or combination of gradients, or None.
        batch_size: rows of a training step.
    """

    def __init__(
        self,
        problem: Problem,
        model: str,
        columns: Columns,
        shape: Shape,
        loss_weighting: str | None,
        batch_size: int,
    ) -> None:
        self._arguments = (problem, model, columns, shape, loss_weighting)
        self._problem, self._columns = problem, columns
        self._batch_size = batch_size
        self._model = build_model(*self._arguments)
        self._optimizer = keras.optimizers.Adam()
        self._model.compile(self._optimizer)
        self._optimizer.build(self._model.trainable_variables)
        self._initial: tuple[int, list[Any]] | None = None
        # Rows and steps vary: one graph for all.
        self._steps = tf.function(self._run_steps, reduce_retracing=True)
        self._forward = tf.function(self._model, reduce_retracing=True)

    def losses(
        self, source: Source, seed: int, learning_rate: float, epochs: Sequence[int]
    ) -> dict[int, float]:
        """Train; return the validation loss after each of the numbers of epochs.

        The loss is infinite if the training diverged.
        """
        self._reset(seed, learning_rate)
        found = {}
        for epoch in range(1, max(epochs) + 1):
            self._train(source, seed, epoch)
            if epoch in epochs:
                parts = source.parts("validation", seed)
                sums = [
                    self._problem.losses(part, self._predict(part)) for part in parts
                ]
                loss = total_loss(sums)
                found[epoch] = loss if math.isfinite(loss) else math.inf
        return found

    def test(
        self, source: Source, seed: int, learning_rate: float, epochs: int
    ) -> dict[str, float]:
        """Train; return the metrics of test rows."""
        self._reset(seed, learning_rate)
        for epoch in range(1, epochs + 1):
            self._train(source, seed, epoch)
        meters = self._problem.meters()
        for part in source.parts("test", seed):
            self._problem.measure(meters, part, self._predict(part))
        return meters.results()

    def _reset(self, seed: int, learning_rate: float) -> None:
        for variable, new in zip(
            self._model.variables, self._initial_values(seed), strict=True
        ):
            variable.assign(new)
        for variable in self._optimizer.variables:
            variable.assign(keras.ops.zeros_like(variable))
        self._optimizer.learning_rate = learning_rate

    def _initial_values(self, seed: int) -> list[Any]:
        """Return the values of a new model; runs of a grid begin with the same."""
        if self._initial is None or self._initial[0] != seed:
            keras.utils.set_random_seed(seed)
            self._initial = (seed, build_model(*self._arguments).variables)
        return self._initial[1]

    def _train(self, source: Source, seed: int, epoch: int) -> None:
        """Train on all rows once, in random order within a batch of the source."""
        rng = np.random.default_rng([seed, epoch])
        for part in source.parts("train", seed):
            steps = max(1, len(part) // self._batch_size)
            rows = len(part) // steps
            order = rng.permutation(len(part))[: steps * rows]

            def stepwise(values: np.ndarray) -> tf.Tensor:
                """(n, ...) -> (s, b, ...)."""
                shape = (steps, rows, *values.shape[1:])  # noqa: B023
                return tf.constant(values[order].reshape(shape))  # noqa: B023

            inputs = encode(part, self._columns)
            labels = self._problem.labels(part)
            self._steps(
                {name: stepwise(values) for name, values in inputs.items()},
                {name: stepwise(values) for name, values in labels.items()},
                tf.constant(steps),
            )

    def _run_steps(self, inputs: Any, labels: Any, steps: Any) -> None:
        for step in tf.range(steps):
            x = {name: values[step] for name, values in inputs.items()}
            y = {name: values[step] for name, values in labels.items()}
            self._model.train_step((x, y))

    def _predict(self, part: Part) -> Outputs:
        inputs = encode(part, self._columns)
        found = []
        for start in itertools.count(0, _PREDICTION_ROWS):
            if start >= len(part):
                break
            rows = slice(start, start + _PREDICTION_ROWS)
            batch = {name: tf.constant(v[rows]) for name, v in inputs.items()}
            found.append(self._forward(batch))
        return {
            name: np.concatenate([batch[name].numpy() for batch in found])
            for name in found[0]
        }


def encode(part: Part, columns: Columns) -> dict[str, np.ndarray]:
    """Return the inputs of `models.build_model` for rows."""
    found = {}
    if columns.numbers:
        found["numbers"] = _stacked(part, columns.numbers)
    if columns.vocabulary:
        found["codes"] = _stacked(part, [name for name, _ in columns.vocabulary])
    return found


def _stacked(part: Part, names: Sequence[str]) -> np.ndarray:
    return np.stack([part.features[name] for name in names], axis=1)
