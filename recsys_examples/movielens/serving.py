"""The SavedModel: predictions for raw pairs, and recommendations.

Signatures:
    serving_default  raw features of users and movies -> one named output per task
    recommend        user ids and k -> unseen movies, sorted by `score`: the fused
                     score of `fusion.fuse`, which uses uncalibrated watch scores
    explain, explain_history, experts, movies: see `explaining`

Axis letters: b batch, u known users, i movies, d dimensions of a vector, k length of a
list.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

import keras_moe
from recsys_examples.movielens.explaining import add_signatures
from recsys_examples.movielens.features import NO_MOVIE, Catalogue, Sequences
from recsys_examples.movielens.fusion import fuse
from recsys_examples.movielens.loading import load_recommender as load_recommender
from recsys_examples.movielens.model import Ranker, prediction

HIGHEST_RATING = 5.0


class Ranked(NamedTuple):
    """Lists of movies, and what explains them.

    Attributes:
        lists: dict of (b, k), what the signature `recommend` returns.
        features: dict of the features of the b users.
        movies: (b, k) catalogue rows.
        vectors: (i, d), the vectors of all movies.
    """

    lists: dict[str, Any]
    features: dict[str, Any]
    movies: Any
    vectors: Any


class KnownUsers(keras.layers.Layer):
    """Features of the users known at export.

    Args:
        sequences: ratings of all users at export, for the histories and the movies to
            exclude.
        catalogue: all movies.

    Call arguments:
        user_id: (b,) ids.

    Returns:
        The features of the users, zeros for unknown users; (n, 2) pairs (row of the
        batch, catalogue row) of the movies seen; and (b,) whether the user is known.
    """

    def __init__(self, sequences: Sequences, catalogue: Catalogue) -> None:
        super().__init__()
        self._user_lookup = keras.layers.IntegerLookup(vocabulary=sequences.user_ids)
        self._num_users = len(sequences.user_ids)
        known = sequences.histories(catalogue, np.arange(self._num_users))
        # An additional row of zeros for unknown users.
        self._features = {
            name: tf.constant(np.concatenate([values, np.zeros_like(values[:1])]))
            for name, values in known.items()
        }
        self._seen_starts = tf.constant(
            np.append(sequences.starts, sequences.starts[-1])
        )
        self._seen = tf.constant(sequences.movies)

    def call(self, user_id: Any) -> tuple[dict[str, Any], Any, Any]:
        # IntegerLookup maps unknown ids to 0 and known ids to 1, 2, ...
        found = self._user_lookup(user_id)
        unknown = tf.cast(self._num_users, found.dtype)
        row = tf.where(found == 0, unknown, found - 1)
        features = {name: tf.gather(v, row) for name, v in self._features.items()}
        seen = tf.RaggedTensor.from_row_splits(
            self._seen, self._seen_starts, validate=False
        )
        seen = tf.gather(seen, row)
        at = tf.stack([seen.value_rowids(), seen.values], axis=1)
        return features, at, found != 0


class Recommender(keras.layers.Layer):
    """Ranks the catalogue for users, with their histories at export.

    Every signature that ranks calls the same two functions of TensorFlow, so that a
    SavedModel has their constants once.

    Args:
        ranker: the trained models.
        sequences: ratings of all users at export.
        catalogue: all movies.
    """

    def __init__(
        self, ranker: Ranker, sequences: Sequences, catalogue: Catalogue
    ) -> None:
        super().__init__()
        self._model, self._calibration = ranker.catalogue, ranker.calibration
        self._movies = next(iter(ranker.towers.values())).movies
        self._users = KnownUsers(sequences, catalogue)
        self._movie_ids = tf.constant(catalogue.movie_ids)
        self._titles = tf.constant(catalogue.titles)
        k = tf.TensorSpec((), tf.int32)
        features = feature_specs(ranker.catalogue)
        seen = tf.TensorSpec((None, 2), tf.int32)
        self.rank = tf.function(self._rank, input_signature=[features, seen, k])
        user_id = tf.TensorSpec((None,), tf.int64)
        self.rank_users = tf.function(self._rank_users, input_signature=[user_id, k])

    def call(self, user_id: Any, k: Any) -> dict[str, Any]:
        return self.rank_users(user_id, k).lists

    def _rank_users(self, user_id: Any, k: Any) -> Ranked:
        """Rank for users (b,); `lists` also has whether they are known."""
        features, seen, known = self._users(user_id)
        ranked = self.rank(features, tf.cast(seen, tf.int32), k)
        return ranked._replace(lists={**ranked.lists, "known_user": known})

    def _rank(self, features: dict[str, Any], seen: Any, k: Any) -> Ranked:
        """Rank for user features; `seen` (n, 2) are pairs (row, movie) to exclude."""
        num_movies = len(self._movie_ids)
        checks = [
            tf.debugging.assert_greater_equal(k, 1, "feature `k` must be at least 1"),
            tf.debugging.assert_less_equal(
                *(k, num_movies),
                f"feature `k` must not exceed the catalogue of {num_movies} movies",
            ),
        ]
        with tf.control_dependencies(checks):
            k = tf.identity(k)  # runs the checks before top_k
        scores = self._model(features, training=False)
        ranking = fuse(scores)
        lowest = tf.fill(tf.shape(seen)[:1], ranking.dtype.min)
        ranking = tf.tensor_scatter_nd_update(ranking, seen, lowest)
        best, movies = tf.math.top_k(ranking, k)
        # If fewer than k movies are unseen, the list is padded with blanks.
        unseen = best > best.dtype.min
        predictions = {
            task: prediction(
                task, tf.gather(score, movies, batch_dims=1), self._calibration
            )
            for task, score in scores.items()
        }
        lists = {
            "movie_id": tf.where(
                unseen, tf.gather(self._movie_ids, movies), tf.cast(NO_MOVIE, tf.int64)
            ),
            "title": tf.where(unseen, tf.gather(self._titles, movies), ""),
            "score": best,
            **{task: tf.where(unseen, p, 0.0) for task, p in predictions.items()},
        }
        return Ranked(lists, features, movies, self._movies.all_movies()[0])


def check_stars(features: dict[str, Any]) -> dict[str, Any]:
    """Return `features`, with an assertion that all ratings are from 0 to 5 stars."""
    stars = features["history_ratings"]
    check = tf.debugging.Assert(
        tf.reduce_all((stars >= 0) & (stars <= HIGHEST_RATING)),
        [f"feature `history_ratings` must be stars from 0 to {HIGHEST_RATING:g}"],
    )
    with tf.control_dependencies([check]):
        return {name: tf.identity(value) for name, value in features.items()}


def feature_specs(model: keras.Model) -> dict[str, Any]:
    """Return the shapes and types of a model's inputs by name."""
    return {
        name: tf.TensorSpec(tensor.shape, tensor.dtype, name)
        for name, tensor in model.input.items()
    }


def export_saved_model(
    ranker: Ranker, sequences: Sequences, catalogue: Catalogue, folder: Path
) -> None:
    """Write a SavedModel that requires only TensorFlow.

    Args:
        ranker: the trained models.
        sequences: ratings of all users, for the histories and the movies to exclude.
        catalogue: all movies.
        folder: output folder.
    """
    archive = keras.export.ExportArchive()
    recommender = Recommender(ranker, sequences, catalogue)
    recommender(tf.constant([0], tf.int64), tf.constant(1))  # builds it for export
    archive.track(ranker.pairs)
    archive.track(recommender)
    features = feature_specs(ranker.pairs)
    archive.add_endpoint(
        "serving_default",
        lambda features: ranker.pairs(check_stars(features), training=False),
        [features],
    )
    archive.add_endpoint(
        "recommend",
        recommender.__call__,
        [
            tf.TensorSpec((None,), tf.int64, "user_id"),
            tf.TensorSpec((), tf.int32, "k"),
        ],
    )
    add_signatures(archive, recommender, check_stars, ranker, sequences, catalogue)
    archive.write_out(folder, verbose=False)
    keras_moe.export.write_checksums(folder)
