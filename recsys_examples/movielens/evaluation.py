"""Evaluation of a trained ranker on a later time window.

Predictions are made by the exported model, from raw features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import keras
import numpy as np
from scipy import sparse
from scipy.special import logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score, root_mean_squared_error

from recsys_examples.movielens.features import Catalogue, Sequences
from recsys_examples.movielens.model import EVALUATION_NEGATIVES, Calibration
from recsys_examples.movielens.ranking import LIKED, group_auc


@dataclass(frozen=True)
class Rows:
    """(user, movie) pairs to predict: those of the window, and sampled negatives.

    Attributes:
        users: (n,) user rows.
        movies: (n,) catalogue rows.
        watched: (n,) bool, whether the pair is in the window.
        ratings: (n,) stars, 0 where not watched.
    """

    users: np.ndarray
    movies: np.ndarray
    watched: np.ndarray
    ratings: np.ndarray

    def parts(self, size: int) -> Iterator[Rows]:
        """Split the rows into parts of at most `size`."""
        for start in range(0, len(self.users), size):
            yield Rows(
                *(getattr(self, f.name)[start : start + size] for f in fields(self))
            )


def sample_rows(
    window: Sequences, rated: sparse.csr_matrix, num_movies: int, seed: int = 0
) -> Rows:
    """Sample unseen movies as negatives for every watched movie of a window.

    Args:
        window: ratings of the window.
        rated: (u, i) sparse, the movies that each user rated until the end of the
            window, which are not sampled.
        num_movies: size of the catalogue.
        seed: seed of the uniform samples.
    """
    rng = np.random.default_rng(seed)
    users = np.repeat(window.users, EVALUATION_NEGATIVES)
    movies = rng.integers(0, num_movies, len(users))
    unseen = np.asarray(rated[users, movies]).ravel() == 0
    return Rows(
        users=np.concatenate([window.users, users[unseen]]),
        movies=np.concatenate([window.movies, movies[unseen]]),
        watched=np.arange(len(window.movies) + unseen.sum()) < len(window.movies),
        ratings=np.concatenate([window.ratings, np.zeros(unseen.sum(), np.float32)]),
    )


def raw_pairs(
    rows: Rows, sequences: Sequences, catalogue: Catalogue
) -> dict[str, np.ndarray]:
    """Return the raw features of the pairs, the inputs of the exported model."""
    return {
        **sequences.histories(catalogue, rows.users),
        "movie_id": catalogue.movie_ids[rows.movies],
        "genres": catalogue.genres[rows.movies],
        "year": catalogue.years[rows.movies],
    }


def predict_pairs(
    pairs: keras.Model, features: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Predict pairs of raw features: (n,) per task."""
    # Keras accepts strings only as tensors.
    tensors = {name: keras.ops.convert_to_tensor(v) for name, v in features.items()}
    return pairs.predict(tensors, batch_size=4096, verbose=0)


def predict_rows(
    pairs: keras.Model,
    rows: Rows,
    sequences: Sequences,
    catalogue: Catalogue,
    part_size: int = 65536,
) -> dict[str, np.ndarray]:
    """Predict rows with histories from `sequences`: (n,) per task.

    Rows are processed in parts of `part_size`, which bounds the memory.
    """
    parts = [
        predict_pairs(pairs, raw_pairs(part, sequences, catalogue))
        for part in rows.parts(part_size)
    ]
    return {task: np.concatenate([part[task] for part in parts]) for task in parts[0]}


def calibrate(
    rows: Rows, predictions: dict[str, np.ndarray], before: Calibration
) -> Calibration:
    """Calibrate the watch scores by Platt scaling (Platt, 1999).

    Args:
        rows: pairs of a window that the model was not trained on.
        predictions: predictions of these pairs.
        before: the calibration of these predictions.
    """
    log_odds = logit(predictions["watch"].astype(np.float64).clip(1e-9, 1 - 1e-9))
    line = LogisticRegression(C=np.inf).fit(log_odds[:, None], rows.watched)
    slope, offset = float(line.coef_[0, 0]), float(line.intercept_[0])
    return Calibration(slope * before.slope, slope * before.offset + offset)


def measure(rows: Rows, predictions: dict[str, np.ndarray]) -> dict[str, float]:
    """Return AUC, log loss, GAUC and RMSE of the tasks that were predicted.

    `watch` is evaluated on all rows, `like` and `rating` on the watched ones only.
    Undefined metrics, such as the AUC of a single class, are omitted.
    """
    found: dict[str, float] = {}
    for task, labels, mask in (
        ("watch", rows.watched, np.ones_like(rows.watched)),
        ("like", rows.ratings >= LIKED, rows.watched),
    ):
        if task in predictions and 0 < labels[mask].mean() < 1:
            scores = predictions[task][mask]
            found[f"{task}_auc"] = float(roc_auc_score(labels[mask], scores))
            found[f"{task}_log_loss"] = float(log_loss(labels[mask], scores))
            found[f"{task}_gauc"] = group_auc(rows.users[mask], labels[mask], scores)
    if "rating" in predictions:
        found["rating_rmse"] = float(
            root_mean_squared_error(
                rows.ratings[rows.watched], predictions["rating"][rows.watched]
            )
        )
    return {name: value for name, value in found.items() if np.isfinite(value)}
