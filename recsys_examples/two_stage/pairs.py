"""Pair features of a user and a candidate, for the ranker.

The two towers of the retrieval stage see the user and the movie separately. Pair
features are co-occurrence statistics, such as how often the movie follows those that
the user has just seen, and matches between the movie's genres and those the user rates
highly. They are computed from statistics (statistics.py), without training; training
and serving use the same layer.

Axis letters: b batch, c candidates, l history length, i movies of the catalogue,
g genres, s related movies of a movie, m related movies of a history.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from recsys_examples.movielens.features import NO_MOVIE
from recsys_examples.movielens.ranking import LIKED
from recsys_examples.two_stage.statistics import Related, Statistics

PAIR_FEATURES = (
    "score_to_best",
    "place",
    "follows_last",
    "follows_recent",
    "watched_with",
    "rated_with",
    "genres_of_history",
    "genres_of_taste",
    "popularity",
    "stars",
    "liked",
    "year",
)
_NUM_LATEST = 20  # latest movies of the history whose followers are used
_TIME_CONSTANTS = (3.0, 10.0)  # of the weights of the history, in movies
_SCALES = (10.0, 5.0, 0.5, 0.5)  # scale the count features to about 1
_LARGE_CATALOGUE = 50_000  # movies from which few candidates are searched for
_LARGE_SHARE = 16  # of the catalogue, in candidates
_FIRST_MOVIE = 2  # IntegerLookup maps padding to 0 and unknown movies to 1


class PairFeatures(keras.layers.Layer):
    """Features of users, and of pairs of a user and a candidate.

    Args:
        statistics: statistics of the movies, from the ratings of the past.

    Call arguments:
        user: features of users, see `Sequences.histories`.
        rows: (b, c) catalogue rows of the candidates.
        scores: (b, c) scores of the first stage, in descending order.

    Returns:
        Features of the users (b, features), and of the pairs (b, c, features) in the
        order of `PAIR_FEATURES`.
    """

    def __init__(self, statistics: Statistics) -> None:
        super().__init__(trainable=False)
        self._lookup = keras.layers.IntegerLookup(
            vocabulary=statistics.movie_ids, mask_token=NO_MOVIE
        )
        self.num_movies = len(statistics.movie_ids)
        # An additional row of zeros for the padding of histories.
        self._genres = _constant(np.pad(statistics.genres, ((0, 1), (0, 0))))
        self._movies = _constant(statistics.movies)
        self._following = SumOfRelated(statistics.following)
        self._similar = SumOfRelated(statistics.similar)

    @property
    def genres(self) -> Any:
        """(i + 1, g): the genre vectors, and zeros."""
        return self._genres.value

    def call(self, user: dict[str, Any], rows: Any, scores: Any) -> tuple[Any, Any]:
        history = self._rows_of(user["history"])
        watched = tf.cast(user["history"] != NO_MOVIE, tf.float32)
        stars = user["history_ratings"]
        liked = tf.cast(stars >= LIKED, tf.float32) * watched
        count = tf.reduce_sum(watched, 1, keepdims=True)
        share = 1.0 / tf.maximum(count, 1.0)
        mean = tf.reduce_sum(stars * watched, 1, keepdims=True) * share
        taste = (stars - mean) * watched
        genres = self._genre_profiles(history, watched, taste)
        of_user = tf.concat(
            [
                tf.math.log1p(count),
                mean - 3.5 * tf.minimum(count, 1.0),
                tf.reduce_sum(liked, 1, keepdims=True) * share,
                tf.reduce_mean(scores, 1, keepdims=True) - scores[:, :1],
                tf.cast(user["last_seen"][:, None] > 0, tf.float32),
                tf.reshape(genres, (-1, 2 * genres.shape[2])),
            ],
            axis=1,
        )
        place = tf.math.log1p(tf.range(tf.shape(rows)[1], dtype=tf.float32))
        columns = [
            scores - scores[:, :1],
            tf.broadcast_to(place, tf.shape(scores)),
            *self._count_features(history, watched, taste, rows),
        ]
        of_pair = [
            tf.stack(columns, axis=-1),
            tf.matmul(tf.gather(self.genres, rows), genres, transpose_b=True),
            tf.gather(self._movies.value, rows),
        ]
        return of_user, tf.concat(of_pair, axis=-1)

    def _count_features(
        self, history: Any, watched: Any, taste: Any, rows: Any
    ) -> list[Any]:
        """Return four features (b, c) from the co-occurrence statistics."""
        latest = history[:, :_NUM_LATEST]
        ago = np.arange(_NUM_LATEST, dtype=np.float32)
        recent = watched[:, :_NUM_LATEST]
        decayed = [recent * np.exp(-ago / recency) for recency in _TIME_CONSTANTS]
        found = [
            *self._following(latest, decayed, rows),
            *self._similar(history, [watched, taste], rows),
        ]
        return [scale * f for scale, f in zip(_SCALES, found, strict=True)]

    def rows_seen(self, history: Any) -> Any:
        """(b, l) movie ids -> (n, 2) pairs (row of the batch, row of a known movie)."""
        rows = self._rows_of(history)
        known = tf.where(rows < self.num_movies)
        users = tf.cast(known[:, 0], rows.dtype)
        return tf.stack([users, tf.gather_nd(rows, known)], axis=1)

    def is_known(self, movie_ids: Any) -> Any:
        """Return whether movie ids are in the catalogue."""
        return self._rows_of(movie_ids) < self.num_movies

    def _rows_of(self, movie_ids: Any) -> Any:
        """Return catalogue rows; `num_movies` for padding and unknown movies."""
        known = self._lookup(movie_ids) - _FIRST_MOVIE
        padding = tf.cast(self.num_movies, known.dtype)
        return tf.cast(tf.where(known < 0, padding, known), tf.int32)

    def _genre_profiles(self, history: Any, watched: Any, taste: Any) -> Any:
        """(b, 2, g): genre profiles of the history, plain and weighted by rating."""
        weights = tf.stack([watched, taste], axis=1)  # (b, 2, l)
        profiles = tf.matmul(weights, tf.gather(self.genres, history))
        return tf.math.l2_normalize(profiles, axis=-1)


class SumOfRelated(keras.layers.Layer):
    """The summed weights of the candidates among the related movies of a history.

    Args:
        related: the related movies of each movie.

    Call arguments:
        history: (b, l) catalogue rows, `num_movies` for padding.
        weights: (b, l) weights of the history, one tensor per feature.
        rows: (b, c) catalogue rows of the candidates.

    Returns:
        One (b, c) tensor per feature.
    """

    def __init__(self, related: Related) -> None:
        super().__init__(trainable=False)
        self.num_movies, kept = related.rows.shape
        self._length = kept
        # An additional row without weight for the padding of histories.
        self._rows = _constant(np.pad(related.rows, ((0, 1), (0, 0))))
        self._weights = _constant(np.pad(related.weights, ((0, 1), (0, 0))))

    def call(self, history: Any, weights: list[Any], rows: Any) -> list[Any]:
        shape = [tf.shape(history)[0], history.shape[1] * self._length]
        found = tf.reshape(tf.gather(self._rows.value, history), shape)
        kept = tf.gather(self._weights.value, history)  # (b, l, s)
        values = [tf.reshape(kept * w[..., None], shape) for w in weights]
        if _is_sparse(rows.shape[1], self.num_movies):
            return sums_by_search(found, values, rows)
        return [
            tf.gather(_sums(found, v, self.num_movies), rows, batch_dims=1)
            for v in values
        ]


def sums_by_search(found: Any, values: list[Any], rows: Any) -> list[Any]:
    """Sum the values of each candidate, without a table of the whole catalogue.

    Args:
        found: (b, m) catalogue rows.
        values: tensors (b, m).
        rows: (b, c) catalogue rows of the candidates, each at most once.

    Returns:
        For each of `values` the sums (b, c) over the places where `found` is the row.
    """
    count = tf.shape(rows)[1]
    order = tf.argsort(rows, axis=1)
    ordered = tf.gather(rows, order, batch_dims=1)
    place = tf.minimum(tf.searchsorted(ordered, found), count - 1)
    hit = tf.cast(tf.gather(ordered, place, batch_dims=1) == found, tf.float32)
    sums = tf.stack([_sums(place, value * hit, count) for value in values], axis=-1)
    back = tf.argsort(order, axis=1)
    return tf.unstack(tf.gather(sums, back, batch_dims=1), axis=-1)


def _is_sparse(candidates: int | None, num_movies: int) -> bool:
    """Whether a search costs less than a table (b, i), by measurement."""
    return (
        candidates is not None
        and num_movies >= _LARGE_CATALOGUE
        and candidates * _LARGE_SHARE < num_movies
    )


def _sums(places: Any, values: Any, size: Any) -> Any:
    """(b, m) places and values -> (b, size): sums of the values by place."""
    return tf.math.bincount(places, values, minlength=size, maxlength=size, axis=-1)


def _constant(values: np.ndarray) -> keras.Variable:
    """Return a variable that is not trained: it is not copied into the graph."""
    return keras.Variable(values, trainable=False, dtype=values.dtype.name)
