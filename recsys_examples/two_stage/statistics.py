"""Statistics of movies, from which the pair features are computed.

How often a movie follows another one, how similar the users of two movies are, and how
popular and how well rated a movie is. All are counted from ratings, without training.

Axis letters: i movies of the catalogue, g genres, s related movies of a movie.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from recsys_examples.movielens.features import Catalogue, Sequences
from recsys_examples.movielens.ranking import LIKED

NUM_MOVIE_FEATURES = 4  # popularity, stars, liked, year
_WINDOW = 10  # number of following movies that are counted
_DECAY = 0.8  # of their weights, per position
_PRIOR = 5.0  # number of pseudo-ratings for smoothing


@dataclass(frozen=True)
class Related:
    """The s most related movies of each movie.

    Attributes:
        rows: (i, s) int32 catalogue rows.
        weights: (i, s) float32, 0 where there are fewer than s.
    """

    rows: np.ndarray
    weights: np.ndarray

    @classmethod
    def most(cls, relation: sparse.csr_matrix, kept: int) -> Related:
        """Keep the `kept` largest weights of each row of a relation (i, i)."""
        num_movies = relation.shape[0]
        rows = np.zeros((num_movies, kept), np.int32)
        weights = np.zeros((num_movies, kept), np.float32)
        ends = zip(relation.indptr, relation.indptr[1:], strict=False)
        for movie, (start, end) in enumerate(ends):
            values = relation.data[start:end]
            best = np.argsort(-values, kind="stable")[:kept]
            rows[movie, : len(best)] = relation.indices[start:end][best]
            weights[movie, : len(best)] = values[best]
        return cls(rows, weights)


@dataclass(frozen=True)
class Statistics:
    """What the pair features know of the movies.

    Attributes:
        movie_ids: (i,) int64.
        movies: (i, `NUM_MOVIE_FEATURES`) standardised features of the movies.
        genres: (i, g) vectors of norm 1, or 0 for movies without genres.
        following: the movies that follow each movie.
        similar: the movies with similar users.
    """

    movie_ids: np.ndarray
    movies: np.ndarray
    genres: np.ndarray
    following: Related
    similar: Related

    @classmethod
    def of(cls, past: Sequences, catalogue: Catalogue, related: int) -> Statistics:
        """Return the statistics of ratings.

        Args:
            past: the ratings.
            catalogue: all movies.
            related: number s of following and of similar movies that are kept.
        """
        size = len(catalogue)
        return cls(
            catalogue.movie_ids,
            _movie_features(past, catalogue),
            genre_vectors(catalogue),
            Related.most(follow_shares(past, size), related),
            Related.most(similarity(past, size), related),
        )


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
