"""What a trained ranker is worth on a window of time it has not seen.

Predictions are asked of the model that is exported, from raw features.
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
    """(user, movie) pairs to predict: the window's, and unseen ones beside them.

    Attributes:
        users: (n,) user rows.
        movies: (n,) catalogue rows.
        watched: (n,) bool, whether the pair is of the window.
        ratings: (n,) stars, 0 where not watched.
    """

    users: np.ndarray
    movies: np.ndarray
    watched: np.ndarray
    ratings: np.ndarray

    def parts(self, size: int) -> Iterator[Rows]:
        """Cut the rows into parts of at most `size`."""
        for start in range(0, len(self.users), size):
            yield Rows(
                *(getattr(self, f.name)[start : start + size] for f in fields(self))
            )


def sample_rows(
    window: Sequences, rated: sparse.csr_matrix, num_movies: int, seed: int = 0
) -> Rows:
    """Put unseen movies beside every watched one of a window.

    Args:
        window: the window's ratings.
        rated: (u, i) sparse, what each user rated until the end of the window: never
            taken for unseen.
        num_movies: size of the catalogue.
        seed: seed of the sample, which is uniform.
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
    """Return the raw features of the pairs, as a client of the model would send."""
    return {
        **sequences.histories(catalogue, rows.users),
        "movie_id": catalogue.movie_ids[rows.movies],
        "genres": catalogue.genres[rows.movies],
        "year": catalogue.years[rows.movies],
    }


def predict_pairs(
    pairs: keras.Model, features: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Predict pairs of raw features: (n,) for each task."""
    # Keras takes strings as tensors only.
    tensors = {name: keras.ops.convert_to_tensor(v) for name, v in features.items()}
    return pairs.predict(tensors, batch_size=4096, verbose=0)


def predict_rows(
    pairs: keras.Model,
    rows: Rows,
    sequences: Sequences,
    catalogue: Catalogue,
    at_once: int = 65536,
) -> dict[str, np.ndarray]:
    """Predict rows from what `sequences` tell of their users: (n,) for each task.

    The histories of so many rows at once bound the memory.
    """
    parts = [
        predict_pairs(pairs, raw_pairs(part, sequences, catalogue))
        for part in rows.parts(at_once)
    ]
    return {task: np.concatenate([part[task] for part in parts]) for task in parts[0]}


def calibrate(
    rows: Rows, predictions: dict[str, np.ndarray], before: Calibration
) -> Calibration:
    """Fit the line from watch scores to log odds (Platt, 1999) to predicted rows.

    Args:
        rows: pairs of a window that the model was not trained on.
        predictions: of these pairs.
        before: the calibration that the predictions were made with.
    """
    log_odds = logit(predictions["watch"].astype(np.float64).clip(1e-9, 1 - 1e-9))
    line = LogisticRegression(C=np.inf).fit(log_odds[:, None], rows.watched)
    slope, offset = float(line.coef_[0, 0]), float(line.intercept_[0])
    return Calibration(slope * before.slope, slope * before.offset + offset)


def measure(rows: Rows, predictions: dict[str, np.ndarray]) -> dict[str, float]:
    """Return AUC, log loss, GAUC and RMSE of the tasks that were predicted.

    `watch` is measured on all rows, `like` and `rating` on the watched ones only.
    A figure that is undefined, as an AUC of liked movies alone, is left out.
    """
    found: dict[str, float] = {}
    for task, labels, on in (
        ("watch", rows.watched, np.ones_like(rows.watched)),
        ("like", rows.ratings >= LIKED, rows.watched),
    ):
        if task in predictions and 0 < labels[on].mean() < 1:
            scores = predictions[task][on]
            found[f"{task}_auc"] = float(roc_auc_score(labels[on], scores))
            found[f"{task}_log_loss"] = float(log_loss(labels[on], scores))
            found[f"{task}_gauc"] = group_auc(rows.users[on], labels[on], scores)
    if "rating" in predictions:
        found["rating_rmse"] = float(
            root_mean_squared_error(
                rows.ratings[rows.watched], predictions["rating"][rows.watched]
            )
        )
    return {name: value for name, value in found.items() if np.isfinite(value)}
