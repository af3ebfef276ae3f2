"""What the ranker sees of a user and a candidate together, as the first stage cannot.

A dot product of two learned vectors knows nothing of what was counted: whether this
movie often comes right after those that the user has just seen, or shares the genres
that the user rates highly. All of it is counted from the past that the layer is made
with; nothing is learned here, so the same layer serves training and the exported model.

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
_OF_MOVIE = 4  # columns of the table that are features themselves
_REACH = 10  # later movies that a movie is counted to be followed by
_FADING = 0.8  # weight of each next one of them
_LATEST = 20  # movies of the history whose followers are looked up
_RECENCY = (3.0, 10.0)  # after so many later movies a weight has fallen by e
_SCALES = (10.0, 5.0, 0.5, 0.5)  # which bring the counts to about 1
_PRIOR = 5.0  # ratings' worth of the mean that smooths a movie's figures
_FIRST_MOVIE = 2  # a lookup's 0 is padding and its 1 is every unknown movie


class PairFeatures(keras.layers.Layer):
    """Features of users, and of users with their candidates.

    Args:
        past: the ratings that may be known.
        catalogue: all movies.
        related: s, how many movies that follow a movie, or are watched by the same
            users, are kept.

    Call arguments:
        user: the features of users, as `Sequences.histories` gives them.
        rows: (b, c) catalogue rows of the candidates.
        scores: (b, c) the first stage's scores, falling.

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
        # One more row for the padding of histories: it weighs nothing.
        self.genres = tf.constant(np.pad(genres, ((0, 1), (0, 0))))
        self._table = tf.constant(
            np.concatenate([_of_movie(past, catalogue), genres], 1)
        )
        self._following = _Related(follow_shares(past, self.num_movies), related)
        self._alike = _Related(likeness(past, self.num_movies), related)

    def call(self, user: dict[str, Any], rows: Any, scores: Any) -> tuple[Any, Any]:
        history = self._rows_of(user["history"])
        watched = tf.cast(user["history"] != NO_MOVIE, tf.float32)
        stars = user["history_ratings"]
        liked = tf.cast(stars >= LIKED, tf.float32) * watched
        count = tf.reduce_sum(watched, 1, keepdims=True)
        share = 1.0 / tf.maximum(count, 1.0)
        mean = tf.reduce_sum(stars * watched, 1, keepdims=True) * share
        taste = (stars - mean) * watched
        genres = self._genres_of(history, watched, taste)
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
            *self._counted(history, watched, taste, rows),
        ]
        of_pair = [
            tf.stack(columns, axis=-1),
            tf.matmul(table[..., _OF_MOVIE:], genres, transpose_b=True),
            table[..., :_OF_MOVIE],
        ]
        return of_user, tf.concat(of_pair, axis=-1)

    def _counted(self, history: Any, watched: Any, taste: Any, rows: Any) -> list[Any]:
        """Return four (b, c): what the history says of the candidates by counts."""
        latest = history[:, :_LATEST]
        ago = np.arange(_LATEST, dtype=np.float32)
        found = [
            self._following.of(latest, watched[:, :_LATEST] * np.exp(-ago / recency))
            for recency in _RECENCY
        ]
        found += [self._alike.of(history, watched), self._alike.of(history, taste)]
        return [
            scale * tf.gather(values, rows, batch_dims=1)
            for scale, values in zip(_SCALES, found, strict=True)
        ]

    def rows_seen(self, history: Any) -> Any:
        """(b, l) movie ids -> (n, 2) users of the batch and rows of known movies."""
        rows = self._rows_of(history)
        known = tf.where(rows < self.num_movies)
        users = tf.cast(known[:, 0], rows.dtype)
        return tf.stack([users, tf.gather_nd(rows, known)], axis=1)

    def knows(self, movie_ids: Any) -> Any:
        """Return where movie ids are of the catalogue."""
        return self._rows_of(movie_ids) < self.num_movies

    def _rows_of(self, movie_ids: Any) -> Any:
        """Return catalogue rows, one too many for padding and what is unknown."""
        known = self._lookup(movie_ids) - _FIRST_MOVIE
        padding = tf.cast(self.num_movies, known.dtype)
        return tf.cast(tf.where(known < 0, padding, known), tf.int32)

    def _genres_of(self, history: Any, watched: Any, taste: Any) -> Any:
        """(b, 2, g): the genres of the history, and of what was rated highly."""
        weights = tf.stack([watched, taste], axis=1)  # (b, 2, l)
        profiles = tf.matmul(weights, tf.gather(self.genres, history))
        return tf.math.l2_normalize(profiles, axis=-1)


def genre_vectors(catalogue: Catalogue) -> np.ndarray:
    """Return (i, g) float32 rows of length 1, or 0 where a movie has no genre."""
    names = np.unique(catalogue.genres)
    names = names[names != ""]
    hot = (catalogue.genres[:, :, None] == names).any(axis=1).astype(np.float32)
    return hot / np.maximum(np.sqrt(hot.sum(axis=1, keepdims=True)), 1.0)


def follow_counts(past: Sequences, num_movies: int) -> sparse.csr_matrix:
    """Count how often movie b (column) comes after movie a (row): (i, i).

    With a weight of 1 if it comes next, of `_FADING` if one movie is between, and so
    on. Ratings of one second have no order, so each follows the other by half.
    """
    users, times = past.users, past.timestamps
    before, after, weights = [], [], []
    for gap in range(1, min(_REACH, len(users) - 1) + 1):
        same_user = users[:-gap] == users[gap:]
        a, b = past.movies[:-gap][same_user], past.movies[gap:][same_user]
        tied = (times[:-gap] == times[gap:])[same_user]
        weight = np.where(tied, 0.5, 1.0) * _FADING ** (gap - 1)
        before += [a, b[tied]]
        after += [b, a[tied]]
        weights += [weight, weight[tied]]
    if not before:
        return sparse.csr_matrix((num_movies, num_movies))
    pairs = (np.concatenate(before), np.concatenate(after))
    return sparse.csr_matrix((np.concatenate(weights), pairs), (num_movies, num_movies))


def follow_shares(past: Sequences, num_movies: int) -> sparse.csr_matrix:
    """(i, i): the share that b has of all that follows a, smoothed towards 0."""
    counts = follow_counts(past, num_movies)
    return sparse.diags(1 / (np.asarray(counts.sum(axis=1)).ravel() + _PRIOR)) @ counts


def likeness(past: Sequences, num_movies: int) -> sparse.csr_matrix:
    """(i, i): the cosine of the users of two movies, smoothed; 0 of a movie itself."""
    users = past.matrix(num_movies)
    length = np.sqrt(np.asarray(users.sum(axis=0)).ravel() + _PRIOR)
    scale = sparse.diags(1 / length)
    alike = (scale @ (users.T @ users) @ scale).tocsr()
    alike.setdiag(0)
    alike.eliminate_zeros()
    return alike


class _Related:
    """The movies most related to each, and how much: (i + 1, s) each.

    Args:
        relation: (i, i), row by row how much each movie is related.
        kept: s.
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
        """(b, l) rows and weights -> (b, i): the weighted sum of what is related."""
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


def _of_movie(past: Sequences, catalogue: Catalogue) -> np.ndarray:
    """(i, 4): popularity, smoothed means of stars and likes, year; standardised."""

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
