"""The two towers and the index of movie vectors, shared by both stacks.

    score(user, movie) = <[u, 1], [v, bias]>

The towers are those of the task `watch` of the MovieLens example: the user tower takes
the history and the id, the movie tower the id, genres and year.

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

MASKED_SCORE = np.float32(-1e9)  # below all scores of a model


@dataclass(frozen=True)
class Retrieval:
    """Two trained towers.

    Attributes:
        query: model from features of users to vectors (b, d).
        candidates: (i, d) vectors of all movies.
        epochs: the best epoch, from 1.
        curves: training curves by name, one value per epoch.
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
    """Return settings of the MovieLens example for the towers of one task."""
    return movielens.Settings(
        body="shared_bottom", max_epochs=settings.retrieval_epochs
    )


def query_tower(towers: movielens.Towers) -> keras.Model:
    """Return the user tower, with a 1 appended for the bias: (b, d)."""
    vectors = towers.users.output
    return keras.Model(
        towers.users.input, ops.concatenate([vectors, ops.ones_like(vectors[:, :1])], 1)
    )


def candidate_vectors(towers: movielens.Towers) -> np.ndarray:
    """Return the movie vectors, with the bias as the last dimension: (i, d)."""
    vectors, biases = towers.movies.all_movies()
    both = ops.concatenate([vectors, ops.expand_dims(biases, -1)], 1)
    return ops.convert_to_numpy(both)


class Index(keras.layers.Layer):
    """Retrieves candidates that a user has not seen.

    Args:
        find: layer from queries (b, d) and seen (n, 2) to scores and positions (b, c)
            in the index.
        indexed: catalogue rows of the movies in the index.
        size: number of movies of the catalogue.

    Call arguments:
        inputs: queries (b, d), and (n, 2) pairs (row of the batch, catalogue row) of
            the movies seen.

    Returns:
        Scores in descending order and catalogue rows, (b, c) each. If a user has fewer
        than c candidates, the remaining scores are near `MASKED_SCORE`.
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


def mask_scores(scores: Any, seen: Any) -> Any:
    """Set the scores (b, i) at the positions `seen` (n, 2) to `MASKED_SCORE`."""
    masked = tf.fill(tf.shape(seen)[:1], MASKED_SCORE)
    return tf.tensor_scatter_nd_update(scores, seen, masked)
