"""The losses and the fit.

`watch` is learned against all movies that a user has not seen, `like` and `rating` on
the watched movies alone; `labels.py` says which is which.

Axis letters: b batch, i movies of the catalogue, c movies watched next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from recsys_examples.movielens.features import Catalogue, Sequences

# `fuse` and `UNKNOWN_USER` are here under their first address, too.
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


class WatchLoss(keras.losses.Loss):
    """Softmax over the catalogue, plus a little cross-entropy of each movie.

    The softmax ranks: each watched movie against all unseen ones. It knows no level,
    so the cross-entropy adds one and the score becomes a log odds. Movies already
    seen (label -1) take part in neither.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(name="watch")
        self.block, self.level_weight = settings.block, settings.level_weight

    def call(self, y_true: Any, y_pred: Any) -> Any:
        candidate = ops.cast(y_true >= 0, y_pred.dtype)
        watched = ops.maximum(y_true, 0.0)
        among = y_pred + (candidate - 1.0) * 1e9
        softmax = ops.sum(
            watched * (ops.logsumexp(among, -1, keepdims=True) - y_pred), -1
        )
        entropies = candidate * (ops.softplus(y_pred) - watched * y_pred)
        level = ops.sum(entropies, -1)
        return (softmax + self.level_weight * level) / self.block


@dataclass(frozen=True)
class Validation:
    """The window right after the ratings that a ranker is fitted to.

    Attributes:
        sequences: the ratings that are fitted to, and after them the window's.
        task: the ranking of the window.
    """

    sequences: Sequences
    task: RankingTask


@dataclass(frozen=True)
class Fit:
    """A trained ranker and how it got there.

    Attributes:
        ranker: the models.
        curves: by name, one value an epoch.
        epochs: the epoch whose weights were kept, counted from 1.
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
) -> Fit:
    """Train a ranker.

    Args:
        sequences: the ratings to learn from.
        catalogue: all movies.
        settings: sizes and rates.
        tasks: the tasks to learn.
        seed: seed of the weights, the dropout and the order of the examples.
        validation: the window to watch. If given, training stops when its NDCG@10
            (for a model without `watch`, its loss) has not improved for two epochs,
            and the best weights are kept.
        epochs: number of epochs; `settings.max_epochs` by default.
        calibration: of the watch scores, if it is known from an earlier fit.
        jit_compile: whether XLA compiles the training, see `Ranker.behind_lookups`.
        verbose: as in `keras.Model.fit`.
    """
    keras.utils.set_random_seed(seed)
    popularity = np.bincount(sequences.movies, minlength=len(catalogue))
    ranker = build_ranker(
        catalogue, sequences.user_ids, popularity, settings, tasks, calibration
    )
    model = ranker.behind_lookups() if jit_compile else ranker.training

    def taken(examples: Examples) -> keras.utils.PyDataset:
        return LookedUp(examples, ranker.lookups) if jit_compile else examples

    examples = Examples(
        sequences, catalogue, settings, tasks, seed, equal_batches=jit_compile
    )
    compile_ranker(model, settings, tasks, steps=len(examples), jit_compile=jit_compile)
    watched: dict[str, Any] = {}
    if validation is not None:
        watched["validation_data"] = taken(
            Examples(
                validation.sequences,
                catalogue,
                settings,
                tasks,
                known=sequences.lengths,
            )
        )
        watched["callbacks"] = _early_stopping(
            fused_scorer(ranker, sequences, catalogue) if "watch" in tasks else None,
            validation.task,
        )
    history = model.fit(
        taken(examples),
        epochs=epochs or settings.max_epochs,
        verbose=verbose,
        **watched,
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
    """Give a model of these tasks its losses, metrics and optimizer.

    Args:
        model: gives watch (b, i), and like and rating (b, c, 1) with logits of like.
        settings: rates, and weights of the losses.
        tasks: the tasks that the model has.
        steps: batches of an epoch.
        jit_compile: whether XLA compiles the training.
    """
    mean = "mean_with_sample_weight"  # a row of weight 0 then adds exactly nothing
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
        keras.optimizers.Adam(schedule),
        loss={task: losses[task] for task in tasks},
        loss_weights={task: weights[task] for task in tasks},
        weighted_metrics={task: metrics[task] for task in tasks},
        # False would be the same, and "auto" is what Keras makes of a lookup.
        jit_compile=True if jit_compile else "auto",
    )
