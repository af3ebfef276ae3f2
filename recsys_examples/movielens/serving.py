"""The SavedModel: predictions for raw pairs, and recommendations.

Signatures:
    serving_default  raw features of users and movies -> one named output per task
    recommend        user ids and k -> unseen movies, sorted by `score`: the fused
                     score of `fusion.fuse`, which uses uncalibrated watch scores

Axis letters: b batch, u known users, i movies, k length of a list.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import keras_moe
from recsys_examples.errors import InputError
from recsys_examples.movielens.command import PRINTED
from recsys_examples.movielens.features import NO_MOVIE, Catalogue, Sequences
from recsys_examples.movielens.fusion import fuse
from recsys_examples.movielens.model import Ranker, prediction
from recsys_examples.runs import find_saved_model

HIGHEST_RATING = 5.0


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
        self._users = KnownUsers(sequences, catalogue)
        self._movie_ids = tf.constant(catalogue.movie_ids)
        self._titles = tf.constant(catalogue.titles)

    def call(self, user_id: Any, k: Any) -> dict[str, Any]:
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
        features, seen, known = self._users(user_id)
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
        return {
            "movie_id": tf.where(
                unseen, tf.gather(self._movie_ids, movies), tf.cast(NO_MOVIE, tf.int64)
            ),
            "title": tf.where(unseen, tf.gather(self._titles, movies), ""),
            "score": best,
            "known_user": known,
            **{task: tf.where(unseen, p, 0.0) for task, p in predictions.items()},
        }


def check_stars(features: dict[str, Any]) -> dict[str, Any]:
    """Return `features`, with an assertion that all ratings are from 0 to 5 stars."""
    stars = features["history_ratings"]
    check = tf.debugging.Assert(
        tf.reduce_all((stars >= 0) & (stars <= HIGHEST_RATING)),
        [f"feature `history_ratings` must be stars from 0 to {HIGHEST_RATING:g}"],
    )
    with tf.control_dependencies([check]):
        return {name: tf.identity(value) for name, value in features.items()}


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
    features = {
        name: tf.TensorSpec(tensor.shape, tensor.dtype, name)
        for name, tensor in ranker.pairs.input.items()
    }
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
    archive.write_out(folder, verbose=False)
    keras_moe.export.write_checksums(folder)


def load_recommender(run: Path, inputs: tuple[str, ...]) -> Any:
    """Load the `recommend` signature of a run or of a SavedModel.

    Args:
        run: the folder.
        inputs: names of the inputs that the signature must have.

    Raises:
        InputError: if there is no SavedModel with that signature, or it is damaged.
    """
    folder = find_saved_model(run)
    try:
        signatures = keras_moe.export.load_saved_model(folder).signatures
    except ValueError as error:
        raise InputError(str(error)) from error
    if "recommend" not in signatures:
        raise InputError(f'{folder} has no signature "recommend"')
    signature = signatures["recommend"]
    found = sorted(signature.structured_input_signature[1])
    missing = {*PRINTED, "known_user"} - {*signature.structured_outputs}
    if found != sorted(inputs) or missing:
        raise InputError(
            f"{folder} is not a model of this example: its `recommend` signature must "
            f"take {sorted(inputs)} and return {[*PRINTED, 'known_user']}; it takes "
            f"{found} and returns {sorted(signature.structured_outputs)}"
        )
    return signature
