"""Two towers and an index over one side's vectors: what both stacks make.

    score(user, movie) = <[u, 1], [v, bias]>

The towers are those of the first example's `watch`: a user's history and id on one
side, a movie's id, genres and year on the other.

Axis letters: b batch, i movies of the catalogue, c candidates, d dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from recsys_examples.movielens import model as movielens
from recsys_examples.two_stage.settings import Settings

HIDDEN = np.float32(-1e9)  # below every score that a model gives


@dataclass(frozen=True)
class Retrieval:
    """Two trained towers.

    Attributes:
        query: the features of users -> (b, d) vectors.
        candidates: (i, d) vectors of all movies.
        epochs: the epoch whose weights were kept, counted from 1.
        curves: by name, one value an epoch.
    """

    query: keras.Model
    candidates: np.ndarray
    epochs: int
    curves: dict[str, list[float]]

    def scores(self, features: dict[str, np.ndarray]) -> np.ndarray:
        """Return the scores (b, i) of all movies."""
        queries = self.query.predict(features, batch_size=256, verbose=0)
        return queries @ self.candidates.T


def tower_settings(settings: Settings) -> movielens.Settings:
    """Return the first example's settings for towers of one task."""
    return movielens.Settings(
        body="shared_bottom", max_epochs=settings.retrieval_epochs
    )


def query_tower(towers: movielens.Towers) -> keras.Model:
    """Return the user side with a 1 for the movie's bias: (b, d)."""
    vectors = towers.users.output
    return keras.Model(
        towers.users.input, ops.concatenate([vectors, ops.ones_like(vectors[:, :1])], 1)
    )


def candidate_vectors(towers: movielens.Towers) -> np.ndarray:
    """Return the movie side with the bias as the last dimension: (i, d)."""
    vectors, biases = towers.movies.all_movies()
    both = ops.concatenate([vectors, ops.expand_dims(biases, -1)], 1)
    return ops.convert_to_numpy(both)


class Index(keras.layers.Layer):
    """Finds candidates that a user has not seen.

    Args:
        find: queries (b, d) and seen (n, 2) -> scores and places (b, c), where places
            are those of movies in the index.
        indexed: catalogue rows of the movies in the index.
        size: movies of the catalogue.

    Call arguments:
        inputs: the queries (b, d), and (n, 2) the user of the batch and the catalogue
            row of every movie that was seen.

    Returns:
        Falling scores and catalogue rows, (b, c) each. Where no movie is left, the
        score is near `HIDDEN`.
    """

    def __init__(
        self, find: keras.layers.Layer, indexed: np.ndarray, size: int
    ) -> None:
        super().__init__()
        self.find = find
        self._rows = tf.constant(indexed, tf.int32)
        places = np.full(size, -1, np.int64)
        places[indexed] = np.arange(len(indexed))
        self._places = tf.constant(places)

    def call(self, inputs: tuple[Any, Any]) -> tuple[Any, Any]:
        queries, seen = inputs
        places = tf.gather(self._places, seen[:, 1])
        seen = tf.stack([tf.cast(seen[:, 0], places.dtype), places], axis=1)
        scores, found = self.find((queries, tf.boolean_mask(seen, places >= 0)))
        return scores, tf.gather(self._rows, found)


def without(scores: Any, seen: Any) -> Any:
    """Give `HIDDEN` to the places (n, 2) of scores (b, i)."""
    hidden = tf.fill(tf.shape(seen)[:1], HIDDEN)
    return tf.tensor_scatter_nd_update(scores, seen, hidden)
