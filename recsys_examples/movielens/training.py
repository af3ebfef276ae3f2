"""Losses and training.

The negatives of `watch` are all movies that a user has not seen; `like` and `rating`
are trained on the watched movies only. See `labels.py`.

Axis letters: b batch, i movies of the catalogue, c movies watched next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe import optimizers
from keras_moe.callbacks import CollapseAlarm, ExactBackup, ExpertMonitor
from keras_moe.telemetry import rows_needed
from recsys_examples.movielens.features import Catalogue, Sequences

# `fuse` and `UNKNOWN_USER` are re-exported for backward compatibility.
from recsys_examples.movielens.fusion import fuse as fuse
from recsys_examples.movielens.fusion import fused_scorer
from recsys_examples.movielens.labels import UNKNOWN_USER as UNKNOWN_USER
from recsys_examples.movielens.labels import Examples, LookedUp
from recsys_examples.movielens.model import (
    TASKS,
    Calibration,
    Ranker,
    Settings,
    build_ranker,
)
from recsys_examples.movielens.ranking import RankingTask, Scorer, rank

_SECONDS_BETWEEN_BACKUPS = 10.0

OPTIMIZERS = {
    "adam": keras.optimizers.Adam,
    "fused_adam": optimizers.FusedAdam,
    "lazy_adam": optimizers.LazyAdam,
    "rowwise_adagrad": optimizers.RowwiseAdagrad,
}


class WatchLoss(keras.losses.Loss):
    """Softmax cross-entropy over the catalogue, plus weighted binary cross-entropy.

    The softmax compares each watched movie with all unseen ones. It is invariant to a
    shift of the scores, which the binary cross-entropy fixes: scores become log odds.
    Movies already seen (label -1) are excluded from both.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(name="watch")
        self.block, self.level_weight = settings.block, settings.level_weight

    def call(self, y_true: Any, y_pred: Any) -> Any:
        candidate = ops.cast(y_true >= 0, y_pred.dtype)
        watched = ops.maximum(y_true, 0.0)
        masked = y_pred + (candidate - 1.0) * 1e9
        softmax = ops.sum(
            watched * (ops.logsumexp(masked, -1, keepdims=True) - y_pred), -1
        )
        entropies = candidate * (ops.softplus(y_pred) - watched * y_pred)
        level = ops.sum(entropies, -1)
        return (softmax + self.level_weight * level) / self.block


@dataclass(frozen=True)
class Validation:
    """The window that follows the training ratings.

    Attributes:
        sequences: the training ratings, followed by those of the window.
        task: the ranking task of the window.
    """

    sequences: Sequences
    task: RankingTask


@dataclass(frozen=True)
class Fit:
    """A trained ranker and its training curves.

    Attributes:
        ranker: the models.
        curves: training curves by name, one value per epoch.
        epochs: the best epoch, from 1.
    """

    ranker: Ranker
    curves: dict[str, list[float]]
    epochs: int


class RankingOnValidation(keras.callbacks.Callback):
    """Adds `val_ndcg@10` over the whole catalogue to the logs of every epoch."""

    def __init__(self, scorer: Scorer, task: RankingTask) -> None:
        super().__init__()
        self._scorer, self._task = scorer, task

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if logs is not None:
            logs["val_ndcg@10"] = rank(self._scorer, self._task)["ndcg@10"]


def exact_backup(
    folder: Path, callbacks: Sequence[keras.callbacks.Callback], data: Any = None
) -> ExactBackup:
    """Return the backup of one `fit` of a run, whose folder is deleted by the run.

    Args:
        folder: the folder of the backups.
        callbacks: the other callbacks of `fit`.
        data: what `fit` reads, if it has a state, see `ExactBackup`.
    """
    return ExactBackup(
        folder,
        every_seconds=_SECONDS_BETWEEN_BACKUPS,
        data=data,
        callbacks=callbacks,
        delete_at_end=False,
    )


def fit_ranker(
    sequences: Sequences,
    catalogue: Catalogue,
    settings: Settings,
    *,
    tasks: tuple[str, ...] = TASKS,
    seed: int = 0,
    validation: Validation | None = None,
    epochs: int | None = None,
    calibration: Calibration | None = None,
    jit_compile: bool = False,
    verbose: int = 1,
    backup: Path | None = None,
    experts: Path | None = None,
) -> Fit:
    """Train a ranker.

    Args:
        sequences: the training ratings.
        catalogue: all movies.
        settings: hyperparameters.
        tasks: the tasks to learn.
        seed: seed of the weights, of dropout and of the examples.
        validation: the window for early stopping. If given, training stops when its
            NDCG@10 (without `watch`: its loss) has not improved for two epochs, and
            the best weights are restored.
        epochs: number of epochs. Default: `settings.max_epochs`.
        calibration: calibration of the watch scores, if known from an earlier fit.
        jit_compile: whether to compile with XLA, see `Ranker.without_lookups`.
        verbose: as in `keras.Model.fit`.
        backup: folder of backups, from which an interrupted fit goes on.
        experts: file for the observations of the mixture, if the body is one. With it,
            and enough users to tell, a collapse of the mixture gives a warning.
    """
    keras.utils.set_random_seed(seed)
    popularity = np.bincount(sequences.movies, minlength=len(catalogue))
    ranker = build_ranker(
        catalogue, sequences.user_ids, popularity, settings, tasks, calibration
    )
    model = ranker.without_lookups() if jit_compile else ranker.training

    def model_inputs(examples: Examples) -> keras.utils.PyDataset:
        return LookedUp(examples, ranker.lookups) if jit_compile else examples

    examples = Examples(
        sequences, catalogue, settings, tasks, seed, equal_batches=jit_compile
    )
    compile_ranker(model, settings, tasks, steps=len(examples), jit_compile=jit_compile)
    callbacks: list[keras.callbacks.Callback] = []
    window = None
    if validation is not None:
        known = sequences.lengths
        window = model_inputs(
            Examples(validation.sequences, catalogue, settings, tasks, known=known)
        )
        scorer = fused_scorer(ranker, sequences, catalogue)
        callbacks = _early_stopping(
            scorer if "watch" in tasks else None, validation.task
        )
    if backup is not None:
        callbacks = [exact_backup(backup, callbacks, examples), *callbacks]
    if experts is not None and settings.body != "shared_bottom":
        # The last ratings of each user, apart from the examples and their generator.
        last = np.maximum(sequences.lengths - settings.block, 1)
        users = Examples(sequences, catalogue, settings, tasks, known=last)
        sample = model_inputs(users)[0]
        given = sample if len(tasks) > 1 else sample[:1]
        monitor = ExpertMonitor(*given, file=experts)
        callbacks = [*callbacks, monitor]
        # Of fewer users, what looks like a collapse may be chance: the alarm would only
        # warn that it cannot tell. A user has a row or more, so this is a safe bound.
        if len(sequences.lengths) >= rows_needed(settings.num_experts, top_k=1):
            callbacks.append(CollapseAlarm(monitor))
    history = model.fit(
        model_inputs(examples),
        epochs=epochs or settings.max_epochs,
        validation_data=window,
        callbacks=callbacks,
        verbose=verbose,
    )
    curves = {name: [float(v) for v in h] for name, h in history.history.items()}
    return Fit(ranker, curves, _best_epoch(curves))


def _early_stopping(
    scorer: Scorer | None, task: RankingTask
) -> list[keras.callbacks.Callback]:
    if scorer is None:
        return [
            keras.callbacks.EarlyStopping(
                "val_loss", patience=2, restore_best_weights=True
            )
        ]
    return [
        RankingOnValidation(scorer, task),
        keras.callbacks.EarlyStopping(
            "val_ndcg@10", mode="max", patience=2, restore_best_weights=True
        ),
    ]


def _best_epoch(curves: dict[str, list[float]]) -> int:
    if "val_ndcg@10" in curves:
        return int(np.argmax(curves["val_ndcg@10"])) + 1
    if "val_loss" in curves:
        return int(np.argmin(curves["val_loss"])) + 1
    return len(curves["loss"])


def compile_ranker(
    model: keras.Model,
    settings: Settings,
    tasks: tuple[str, ...],
    steps: int,
    jit_compile: bool = False,
) -> None:
    """Compile a ranker with its losses, metrics and optimizer.

    Args:
        model: model with outputs watch (b, i), like and rating (b, c, 1); watch and
            like are logits.
        settings: optimizer, learning rate and loss weights.
        tasks: the tasks of the model.
        steps: batches per epoch.
        jit_compile: whether to compile with XLA.
    """
    mean = "mean_with_sample_weight"  # rows of weight 0 do not change the mean
    losses = {
        "watch": WatchLoss(settings),
        "like": keras.losses.BinaryCrossentropy(from_logits=True, reduction=mean),
        "rating": keras.losses.MeanSquaredError(reduction=mean),
    }
    weights = dict(zip(TASKS, (1.0, *settings.task_weights), strict=True))
    metrics = {
        "watch": [],
        "like": [keras.metrics.AUC(from_logits=True, name="auc")],
        "rating": [keras.metrics.RootMeanSquaredError(name="rmse")],
    }
    schedule = keras.optimizers.schedules.CosineDecay(
        settings.learning_rate, settings.max_epochs * steps, alpha=0.05
    )
    model.compile(
        _optimizer(settings, schedule),
        loss={task: losses[task] for task in tasks},
        loss_weights={task: weights[task] for task in tasks},
        weighted_metrics={task: metrics[task] for task in tasks},
        # "auto" does not compile a model with lookup layers.
        jit_compile=True if jit_compile else "auto",
    )


def _optimizer(settings: Settings, schedule: Any) -> keras.optimizers.Optimizer:
    make = OPTIMIZERS[settings.optimizer]
    if issubclass(make, optimizers.LazyAdam):  # and RowwiseAdagrad
        return make(schedule, table_learning_rate_multiplier=settings.table_multiplier)
    return make(schedule)
