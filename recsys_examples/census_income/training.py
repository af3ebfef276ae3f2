"""One run: train, restore the best epoch by validation AUC, evaluate on test rows."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from sklearn.metrics import roc_auc_score

from recsys_examples.census_income.features import Rows, Splits
from recsys_examples.census_income.models import (
    Settings,
    build_models,
    kind_of,
    parameters,
)

_PREDICTION_ROWS = 8192
_STEPS_PER_EXECUTION = 16


@dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Attributes:
        validation: validation AUC by task.
        test: test AUC by task.
        epoch: the best epoch, from 1, by task.
        parameters: number of trainable parameters.
        seconds: duration of training and evaluation.
    """

    validation: Mapping[str, float]
    test: Mapping[str, float]
    epoch: Mapping[str, int]
    parameters: int
    seconds: float


def run(
    model: str,
    settings: Settings,
    tasks: Sequence[str],
    splits: Splits,
    seed: int,
) -> Outcome:
    """Train and evaluate one of the models.

    The weights of the epoch with the best validation AUC of the main task are restored.
    With one model per task, each uses the AUC of its own task.

    Args:
        model: one of `names.CHOICES`, or `names.EQUAL_BOTTOM`.
        settings: hyperparameters.
        tasks: the tasks to learn, the main one first.
        splits: the encoded rows.
        seed: seed of the weights, of dropout and of shuffling.
    """
    started = time.perf_counter()
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    built = build_models(
        model,
        settings,
        tasks,
        splits.table_rows,
        splits.train.codes.shape[1],
        splits.train.numbers.shape[1],
    )
    apart = kind_of(model).tasks_apart
    validation: dict[str, float] = {}
    test: dict[str, float] = {}
    epoch: dict[str, int] = {}
    for network, learned in zip(
        built, [[task] for task in tasks] if apart else [tasks], strict=True
    ):
        best = _fit(network, settings, learned, splits)
        validation |= best.aucs
        test |= aucs(network, splits.test)
        epoch |= dict.fromkeys(learned, best.epoch)
    seconds = time.perf_counter() - started
    return Outcome(validation, test, epoch, parameters(built), seconds)


def aucs(model: keras.Model, rows: Rows) -> dict[str, float]:
    """Return the exact area under the ROC curve of each task."""
    scores = model.predict(rows.inputs, batch_size=_PREDICTION_ROWS, verbose=0)
    return {
        task: _auc(rows.labels[task], score[:, 0]) for task, score in scores.items()
    }


def _auc(labels: np.ndarray, scores: np.ndarray) -> float:
    if not np.isfinite(scores).all():
        return 0.5  # Training diverged: the AUC of a random ranking.
    return float(roc_auc_score(labels, scores))


class BestEpoch(keras.callbacks.Callback):
    """Restores the weights of the epoch with the best validation AUC of one task.

    Args:
        task: the task.
        rows: the validation rows.

    Attributes:
        aucs: AUC of all tasks in the best epoch.
        epoch: the best epoch, from 1.
    """

    def __init__(self, task: str, rows: Rows) -> None:
        super().__init__()
        self._task, self._rows = task, rows
        self.aucs: dict[str, float] = {}
        self.epoch = 0
        self._weights: list[Any] = []

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        found = aucs(self.model, self._rows)
        if not self.aucs or found[self._task] > self.aucs[self._task]:
            self.aucs, self.epoch = found, epoch + 1
            self._weights = self.model.get_weights()

    def on_train_end(self, logs: dict | None = None) -> None:
        self.model.set_weights(self._weights)


def _fit(
    model: keras.Model, settings: Settings, tasks: Sequence[str], splits: Splits
) -> BestEpoch:
    steps = -(-len(splits.train) // settings.batch_size)
    schedule = keras.optimizers.schedules.CosineDecay(
        settings.learning_rate, settings.epochs * steps
    )
    model.compile(
        keras.optimizers.Adam(schedule),
        loss={t: keras.losses.BinaryCrossentropy(from_logits=True) for t in tasks},
        loss_weights={t: settings.auxiliary_weight for t in tasks} | {tasks[0]: 1.0},
        steps_per_execution=_STEPS_PER_EXECUTION,
        # With this few epochs XLA does not save its compile time, and its dropout is
        # slow on CPUs.
        jit_compile=False,
    )
    best = BestEpoch(tasks[0], splits.validation)
    labels = {task: splits.train.labels[task][:, np.newaxis] for task in tasks}
    model.fit(
        splits.train.inputs,
        labels,
        batch_size=settings.batch_size,
        epochs=settings.epochs,
        callbacks=[best],
        verbose=0,
    )
    return best
