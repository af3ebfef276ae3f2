"""Examples, losses and the fit.

An example is a user at a moment of the past: the history until then, and the next few
movies that the user watched. Every movie that the user had not rated by then and does
not watch next is unseen, and `watch` is learned against all of them. `like` and
`rating` are learned on the watched movies alone.

Axis letters: b batch, i movies of the catalogue, c movies watched next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from recsys_examples.errors import InputError
from recsys_examples.movielens.features import Catalogue, Sequences
from recsys_examples.movielens.model import (
    TASKS,
    Calibration,
    Ranker,
    Settings,
    build_ranker,
)
from recsys_examples.movielens.ranking import LIKED, RankingTask, Scorer, rank

UNKNOWN_USER = 0  # MovieLens ids start at 1
_HIDDEN_USERS = 0.2  # share of examples without the user id, so that "unknown" is known
_ALREADY_SEEN = -1.0


class Examples(keras.utils.PyDataset):
    """Cuts each user's ratings into blocks, at another offset every epoch.

    Item j is a batch (features, labels, sample weights). The label of `watch` is
    (b, i): 1 watched next, 0 unseen, -1 already seen and no candidate. Those of `like`
    and `rating` are (b, c, 1), with a sample weight (b, c) of 0 where the user's
    ratings end before the block does.

    Args:
        sequences: the ratings to cut.
        catalogue: all movies.
        settings: sizes of block and batch.
        tasks: the tasks to give labels for.
        seed: seed of the offsets, the order and the hidden user ids.
        known: (u,) how many of each user's first ratings are only history. If given,
            the examples are for validation: the same ones every time, no id hidden.
        equal_batches: whether all batches have one size, in every epoch, as XLA
            wants it, which compiles anew for each size. Then a few examples of an
            epoch may come twice, or not at all.
    """

    def __init__(
        self,
        sequences: Sequences,
        catalogue: Catalogue,
        settings: Settings,
        tasks: tuple[str, ...] = TASKS,
        seed: int = 0,
        known: np.ndarray | None = None,
        equal_batches: bool = False,
    ) -> None:
        super().__init__()
        self._sequences, self._catalogue = sequences, catalogue
        self._settings, self._tasks = settings, tasks
        self._rng = np.random.default_rng(seed)
        self._known = known
        self._cut()
        # Keras asks once for the number of batches, while the number of examples
        # differs a little from epoch to epoch: so the size of a batch gives way.
        self._num_batches = -(-len(self._users) // settings.batch_size)
        self._equal_size = None
        if equal_batches and self._num_batches:
            self._equal_size = -(-len(self._users) // self._num_batches)
        if known is None and not len(self._users):
            raise InputError(
                "nothing to learn from: no user has two ratings in the training window"
            )

    def _cut(self) -> None:
        block = self._settings.block
        lengths = self._sequences.lengths
        # The first movie has no history; from there every `block`-th rating starts one.
        if self._known is None:
            offsets = self._rng.integers(1, block + 1, len(lengths))
            # Whoever has a second rating gives an example, wherever the cut falls.
            offsets = np.minimum(offsets, np.maximum(lengths - 1, 1))
        else:
            offsets = np.maximum(self._known, 1)
        counts = np.maximum(0, -(-(lengths - offsets) // block))
        users = np.repeat(np.arange(len(lengths)), counts)
        nth = np.arange(len(users)) - np.repeat(np.cumsum(counts) - counts, counts)
        order = self._rng.permutation(len(users))
        self._users = users[order]
        self._ends = (offsets[users] + nth * block)[order]

    def on_epoch_end(self) -> None:
        if self._known is None:
            self._cut()

    def __len__(self) -> int:
        return self._num_batches

    def __getitem__(self, index: int) -> tuple[dict, dict, dict]:
        batch = self._batch(index)
        users, ends = self._users[batch], self._ends[batch]
        features = self._sequences.histories(self._catalogue, users, ends)
        if self._known is None:
            hidden = self._rng.random(len(users)) < _HIDDEN_USERS
            features["user_id"] = np.where(hidden, UNKNOWN_USER, features["user_id"])

        starts = self._sequences.starts[users]
        steps = ends[:, None] + np.arange(self._settings.block)
        watched = steps < self._sequences.lengths[users][:, None]
        at = np.where(watched, starts[:, None] + steps, 0)
        movies = np.where(watched, self._sequences.movies[at], 0)
        stars = self._sequences.ratings[at]
        features["next_movies"] = movies.astype(np.int32)
        ones = np.ones(len(users), np.float32)
        defined = watched.astype(np.float32)
        labels = {
            "watch": self._watch_labels(starts, ends, movies, watched),
            "like": (stars >= LIKED).astype(np.float32)[..., None],
            "rating": stars[..., None],
        }
        weights = {"watch": ones, "like": defined, "rating": defined}
        return (
            features,
            {task: labels[task] for task in self._tasks},
            {task: weights[task] for task in self._tasks},
        )

    def _batch(self, index: int) -> slice | np.ndarray:
        if self._equal_size is not None:
            first = index * self._equal_size
            return np.arange(first, first + self._equal_size) % len(self._users)
        first, end = (len(self._users) * i // len(self) for i in (index, index + 1))
        return slice(first, end)

    def _watch_labels(
        self,
        starts: np.ndarray,
        ends: np.ndarray,
        movies: np.ndarray,
        watched: np.ndarray,
    ) -> np.ndarray:
        labels = np.zeros((len(starts), len(self._catalogue)), np.float32)
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            labels[row, self._sequences.movies[start : start + end]] = _ALREADY_SEEN
            labels[row, movies[row, watched[row]]] = 1.0
        return labels


class LookedUp(keras.utils.PyDataset):
    """Examples for `Ranker.behind_lookups`: the same, with ids looked up.

    Args:
        examples: the examples.
        lookups: `Ranker.lookups`.
    """

    def __init__(self, examples: Examples, lookups: keras.Model) -> None:
        super().__init__()
        self._examples, self._lookups = examples, lookups

    def on_epoch_end(self) -> None:
        self._examples.on_epoch_end()

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> tuple[tuple, dict, dict]:
        features, labels, weights = self._examples[index]
        return tuple(self._lookups.predict_on_batch(features)), labels, weights


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


def fused_scorer(ranker: Ranker, sequences: Sequences, catalogue: Catalogue) -> Scorer:
    """Rank by the fused scores, see `fuse`."""

    def score(users: np.ndarray) -> np.ndarray:
        features = sequences.histories(catalogue, users)
        scores = ranker.catalogue.predict(features, batch_size=256, verbose=0)
        return ops.convert_to_numpy(fuse(scores))

    return score


def fuse(scores: dict[str, Any]) -> Any:
    """Add log sigmoids of watch and like, as far as the model has these tasks.

    The watch score is the log odds among all unseen movies, as it was learned, and not
    the calibrated one behind the probability that is shown: at odds of one to some
    unseen movies nearly every movie of a list is certain, and like would decide alone.
    """
    parts = [ops.log_sigmoid(scores[t]) for t in ("watch", "like") if t in scores]
    return sum(parts[1:], parts[0])


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
