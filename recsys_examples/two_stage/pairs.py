"""Pair features of a user and a candidate, for the ranker.

The two towers of the retrieval stage see the user and the movie separately. Pair
features are co-occurrence statistics, such as how often the movie follows those that
the user has just seen, and matches between the movie's genres and those the user rates
highly. They are computed from the ratings given to the layer, without training;
training and serving use the same layer.

Axis letters: b batch, c candidates, l history length, i movies of the catalogue,
g genres, s related movies of a movie, d columns of the table.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from scipy import sparse

from recsys_examples.movielens.features import NO_MOVIE, Catalogue, Sequences
from recsys_examples.movielens.ranking import LIKED

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
_NUM_MOVIE_FEATURES = 4  # columns of the table before the genres
_WINDOW = 10  # number of following movies that are counted
_DECAY = 0.8  # of their weights, per position
_NUM_LATEST = 20  # latest movies of the history whose followers are used
_TIME_CONSTANTS = (3.0, 10.0)  # of the weights of the history, in movies
_SCALES = (10.0, 5.0, 0.5, 0.5)  # scale the count features to about 1
_PRIOR = 5.0  # number of pseudo-ratings for smoothing
_FIRST_MOVIE = 2  # IntegerLookup maps padding to 0 and unknown movies to 1


class PairFeatures(keras.layers.Layer):
    """Features of users, and of pairs of a user and a candidate.

    Args:
        past: the ratings that statistics are computed from.
        catalogue: all movies.
        related: number s of following and of similar movies that are kept per movie.

    Call arguments:
        user: features of users, see `Sequences.histories`.
        rows: (b, c) catalogue rows of the candidates.
        scores: (b, c) scores of the first stage, in descending order.

    Returns:
        Features of the users (b, features), and of the pairs (b, c, features) in the
        order of `PAIR_FEATURES`.
    """

    def __init__(self, past: Sequences, catalogue: Catalogue, related: int) -> None:
        super().__init__(trainable=False)
        self._lookup = keras.layers.IntegerLookup(
            vocabulary=catalogue.movie_ids, mask_token=NO_MOVIE
        )
        self.num_movies = len(catalogue)
        genres = genre_vectors(catalogue)
        # An additional row of zeros for the padding of histories.
        self.genres = tf.constant(np.pad(genres, ((0, 1), (0, 0))))
        self._table = tf.constant(
            np.concatenate([_movie_features(past, catalogue), genres], 1)
        )
        self._following = _Related(follow_shares(past, self.num_movies), related)
        self._similar = _Related(similarity(past, self.num_movies), related)

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
        table = tf.gather(self._table, rows)  # (b, c, d)
        place = tf.math.log1p(tf.range(tf.shape(rows)[1], dtype=tf.float32))
        columns = [
            scores - scores[:, :1],
            tf.broadcast_to(place, tf.shape(scores)),
            *self._count_features(history, watched, taste, rows),
        ]
        of_pair = [
            tf.stack(columns, axis=-1),
            tf.matmul(table[..., _NUM_MOVIE_FEATURES:], genres, transpose_b=True),
            table[..., :_NUM_MOVIE_FEATURES],
        ]
        return of_user, tf.concat(of_pair, axis=-1)

    def _count_features(
        self, history: Any, watched: Any, taste: Any, rows: Any
    ) -> list[Any]:
        """Return four features (b, c) from the co-occurrence statistics."""
        latest = history[:, :_NUM_LATEST]
        ago = np.arange(_NUM_LATEST, dtype=np.float32)
        found = [
            self._following.of(
                latest, watched[:, :_NUM_LATEST] * np.exp(-ago / recency)
            )
            for recency in _TIME_CONSTANTS
        ]
        found += [self._similar.of(history, watched), self._similar.of(history, taste)]
        return [
            scale * tf.gather(values, rows, batch_dims=1)
            for scale, values in zip(_SCALES, found, strict=True)
        ]

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


def genre_vectors(catalogue: Catalogue) -> np.ndarray:
    """Return (i, g) float32 rows of norm 1, or 0 for movies without genres."""
    names = np.unique(catalogue.genres)
    names = names[names != ""]
    hot = (catalogue.genres[:, :, None] == names).any(axis=1).astype(np.float32)
    return hot / np.maximum(np.sqrt(hot.sum(axis=1, keepdims=True)), 1.0)


def follow_counts(past: Sequences, num_movies: int) -> sparse.csr_matrix:
    """Return (i, i) weighted counts of movie b (column) following movie a (row).

    The weight is 1 if b comes next, `_DECAY` if there is one movie between, and so on.
    Ratings with equal timestamps count half in each direction.
    """
    users, times = past.users, past.timestamps
    before, after, weights = [], [], []
    for gap in range(1, min(_WINDOW, len(users) - 1) + 1):
        same_user = users[:-gap] == users[gap:]
        a, b = past.movies[:-gap][same_user], past.movies[gap:][same_user]
        tied = (times[:-gap] == times[gap:])[same_user]
        weight = np.where(tied, 0.5, 1.0) * _DECAY ** (gap - 1)
        before += [a, b[tied]]
        after += [b, a[tied]]
        weights += [weight, weight[tied]]
    if not before:
        return sparse.csr_matrix((num_movies, num_movies))
    pairs = (np.concatenate(before), np.concatenate(after))
    return sparse.csr_matrix((np.concatenate(weights), pairs), (num_movies, num_movies))


def follow_shares(past: Sequences, num_movies: int) -> sparse.csr_matrix:
    """(i, i): counts of b following a, divided by the sum over b; smoothed to 0."""
    counts = follow_counts(past, num_movies)
    return sparse.diags(1 / (np.asarray(counts.sum(axis=1)).ravel() + _PRIOR)) @ counts


def similarity(past: Sequences, num_movies: int) -> sparse.csr_matrix:
    """(i, i): smoothed cosine similarity of the movies' users; 0 on the diagonal."""
    users = past.matrix(num_movies)
    length = np.sqrt(np.asarray(users.sum(axis=0)).ravel() + _PRIOR)
    scale = sparse.diags(1 / length)
    alike = (scale @ (users.T @ users) @ scale).tocsr()
    alike.setdiag(0)
    alike.eliminate_zeros()
    return alike


class _Related:
    """The s most related movies of each movie and their weights, (i + 1, s) each.

    Args:
        relation: (i, i) weights.
        kept: number s of movies that are kept per row.
    """

    def __init__(self, relation: sparse.csr_matrix, kept: int) -> None:
        self._num_movies = relation.shape[0]
        rows = np.zeros((self._num_movies + 1, kept), np.int32)
        weights = np.zeros((self._num_movies + 1, kept), np.float32)
        ends = zip(relation.indptr, relation.indptr[1:], strict=False)
        for movie, (start, end) in enumerate(ends):
            values = relation.data[start:end]
            best = np.argsort(-values, kind="stable")[:kept]
            rows[movie, : len(best)] = relation.indices[start:end][best]
            weights[movie, : len(best)] = values[best]
        self._rows, self._weights = tf.constant(rows), tf.constant(weights)

    def of(self, history: Any, weights: Any) -> Any:
        """(b, l) rows and weights -> (b, i): weighted sum over the history."""
        rows = tf.gather(self._rows, history)  # (b, l, s)
        values = tf.gather(self._weights, history) * weights[..., None]
        per_user = [tf.shape(history)[0], history.shape[1] * self._rows.shape[1]]
        return tf.math.bincount(
            tf.reshape(rows, per_user),
            tf.reshape(values, per_user),
            minlength=self._num_movies,
            maxlength=self._num_movies,
            axis=-1,
        )


def _movie_features(past: Sequences, catalogue: Catalogue) -> np.ndarray:
    """(i, 4): popularity, smoothed mean of stars and of likes, year; standardised."""

    def summed(values: np.ndarray) -> np.ndarray:
        return np.bincount(past.movies, values, minlength=len(catalogue))

    count = summed(np.ones(len(past.movies)))
    columns = [np.log1p(count)]
    for values in (past.ratings, (past.ratings >= LIKED).astype(float)):
        columns.append((summed(values) + _PRIOR * values.mean()) / (count + _PRIOR))
    years = catalogue.years.astype(float)
    dated = years > 0
    columns.append(np.where(dated, years, years[dated].mean() if dated.any() else 0.0))
    table = np.stack(columns, axis=1)
    return ((table - table.mean(0)) / (table.std(0) + 1e-6)).astype(np.float32)
