"""The first stage: two towers trained apart, and an index over one side's vectors.

    score(user, movie) = <[u, 1], [v, bias]>

The towers are those of the first example's `watch`: a user's history and id on one
side, a movie's id, genres and year on the other. They are trained with a softmax over
the whole catalogue (`--stack keras-rs`), or with one over the batch in a `tfrs.Model`
(`--stack tfrs`, see tfrs_stack.py).

Axis letters: b batch, i movies of the catalogue, c candidates, d dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import keras_rs
import numpy as np
import tensorflow as tf
from keras import ops

from recsys_examples.movielens import model as movielens
from recsys_examples.movielens.features import Catalogue, Sequences
from recsys_examples.movielens.training import Validation, fit_ranker
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


def fit_retrieval(
    sequences: Sequences,
    catalogue: Catalogue,
    settings: Settings,
    *,
    seed: int,
    validation: Validation | None = None,
    epochs: int | None = None,
    verbose: int = 0,
) -> Retrieval:
    """Train the towers by the chosen stack.

    Args:
        sequences: the ratings to learn from.
        catalogue: all movies.
        settings: the stack, and how long it trains at most.
        seed: seed of the weights and of the order.
        validation: the window on which the number of epochs is chosen.
        epochs: the number of epochs, if it is known.
        verbose: as in `keras.Model.fit`.
    """
    fit: Callable[..., Retrieval] = _fit_with_keras
    if settings.stack == "tfrs":
        from recsys_examples.two_stage.tfrs_stack import fit_with_tfrs

        fit = fit_with_tfrs
    return fit(sequences, catalogue, settings, seed, validation, epochs, verbose)


def _fit_with_keras(
    sequences: Sequences,
    catalogue: Catalogue,
    settings: Settings,
    seed: int,
    validation: Validation | None,
    epochs: int | None,
    verbose: int,
) -> Retrieval:
    fit = fit_ranker(
        sequences,
        catalogue,
        tower_settings(settings),
        tasks=("watch",),
        seed=seed,
        validation=validation,
        epochs=epochs,
        verbose=verbose,
    )
    towers = fit.ranker.towers["watch"]
    return Retrieval(
        query_tower(towers), candidate_vectors(towers), fit.epochs, fit.curves
    )


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


class UnseenRetrieval(keras_rs.layers.BruteForceRetrieval):
    """keras-rs' exact retrieval, of movies that a user has not seen.

    Call arguments:
        inputs: the queries (b, d), and (n, 2) places among the scores (b, i) of
            movies that are no candidates.
    """

    def compute_score(self, query_embedding: Any, candidate_embedding: Any) -> Any:
        queries, seen = query_embedding
        return without(super().compute_score(queries, candidate_embedding), seen)


def without(scores: Any, seen: Any) -> Any:
    """Give `HIDDEN` to the places (n, 2) of scores (b, i)."""
    hidden = tf.fill(tf.shape(seen)[:1], HIDDEN)
    return tf.tensor_scatter_nd_update(scores, seen, hidden)


def make_index(
    candidates: np.ndarray, popularity: np.ndarray, settings: Settings
) -> Index:
    """Return the stack's index of the movies that were rated often enough.

    If there are fewer of them than candidates, the most rated make up for it.

    Args:
        candidates: (i, d) vectors of all movies.
        popularity: (i,) how often each was rated.
        settings: the stack, the number of candidates, and what is enough.
    """
    enough = int((popularity >= settings.fewest_ratings).sum())
    most = np.argsort(-popularity, kind="stable")[: max(enough, settings.candidates)]
    indexed = np.sort(most)
    vectors = candidates[indexed]
    if settings.stack == "tfrs":
        from recsys_examples.two_stage.tfrs_stack import UnseenIndex

        find = UnseenIndex(vectors, settings.candidates)
    else:
        find = UnseenRetrieval(vectors, k=settings.candidates)
    return Index(find, indexed, len(candidates))
