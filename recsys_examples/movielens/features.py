"""Features: movies as rows of a catalogue, users as sequences of ratings.

Axis letters: b batch, l history length, u users, i movies of the catalogue.

All user features are computed from `Sequences`: ratings that are not in them, such as
those of later windows, cannot leak into a feature.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse

HISTORY_LENGTH = 50
NO_MOVIE = 0  # padding of histories; MovieLens ids start at 1


@dataclass(frozen=True)
class Catalogue:
    """All movies, sorted by id. The row of a movie is its position.

    Attributes:
        movie_ids: (i,) int64, increasing.
        titles: (i,) str.
        genres: (i, largest number of genres) str, padded by "".
        years: (i,) int64, 0 where unknown.
    """

    movie_ids: np.ndarray
    titles: np.ndarray
    genres: np.ndarray
    years: np.ndarray

    @classmethod
    def from_movies(cls, movies: pd.DataFrame) -> Catalogue:
        """Build the catalogue from the movies of a `MovieLens` data set."""
        movies = movies.sort_values("movie_id")
        genres = movies.genres.str.split("|", expand=True).fillna("")
        return cls(
            movie_ids=movies.movie_id.to_numpy(np.int64),
            titles=movies.title.to_numpy(str),
            genres=genres.to_numpy(str),
            years=movies.year.to_numpy(np.int64),
        )

    def __len__(self) -> int:
        return len(self.movie_ids)

    def rows_of(self, movie_ids: np.ndarray) -> np.ndarray:
        """Return the rows of ids, which must be in the catalogue."""
        return np.searchsorted(self.movie_ids, movie_ids)


@dataclass(frozen=True)
class Sequences:
    """The ratings of all users in time order, concatenated.

    The ratings of user row u are `movies[starts[u]:starts[u + 1]]` and likewise in
    the other arrays.

    Attributes:
        user_ids: (u,) int64, increasing. The row of a user is the position.
        starts: (u + 1,) int64.
        movies: (n,) int64, catalogue rows.
        ratings: (n,) float32, stars.
        timestamps: (n,) int64, seconds since 1970 UTC.
    """

    user_ids: np.ndarray
    starts: np.ndarray
    movies: np.ndarray
    ratings: np.ndarray
    timestamps: np.ndarray

    @classmethod
    def from_ratings(
        cls, ratings: pd.DataFrame, catalogue: Catalogue, user_ids: np.ndarray
    ) -> Sequences:
        """Build sequences from ratings that are sorted by user and time.

        Args:
            ratings: data frame such as `Split.train`.
            catalogue: all movies.
            user_ids: the users that get a row, increasing; some may have no ratings.
        """
        rows = np.searchsorted(user_ids, ratings.user_id.to_numpy())
        counts = np.bincount(rows, minlength=len(user_ids))
        return cls(
            user_ids=user_ids,
            starts=np.concatenate([[0], np.cumsum(counts)]),
            movies=catalogue.rows_of(ratings.movie_id.to_numpy()),
            ratings=ratings.rating.to_numpy(np.float32),
            timestamps=ratings.timestamp.to_numpy(np.int64),
        )

    @property
    def lengths(self) -> np.ndarray:
        """(u,): the number of ratings of each user."""
        return np.diff(self.starts)

    @property
    def users(self) -> np.ndarray:
        """(n,): the user row of each rating."""
        return np.repeat(np.arange(len(self.user_ids)), self.lengths)

    def matrix(self, num_movies: int) -> sparse.csr_matrix:
        """Return the (u, i) matrix with a 1 for every rating."""
        ones = np.ones(len(self.movies), np.float32)
        return sparse.csr_matrix(
            (ones, (self.users, self.movies)), (len(self.user_ids), num_movies)
        )

    def histories(
        self, catalogue: Catalogue, users: np.ndarray, ends: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Return the raw features of users after their first `ends` ratings.

        Args:
            catalogue: all movies.
            users: (b,) user rows.
            ends: (b,) number of the user's ratings that are used. Default: all.

        Returns:
            `user_id` (b,), `history` (b, l) movie ids with the latest first, padded by
            `NO_MOVIE`; `history_ratings` (b, l) stars, padded by 0; `last_seen` (b,)
            the year of the latest rating, 0 if there is none.
        """
        ends = self.lengths[users] if ends is None else ends
        back = np.arange(HISTORY_LENGTH)
        happened = back < ends[:, None]
        # Positions of padding read element 0 and are masked below.
        at = np.where(happened, (self.starts[users] + ends)[:, None] - 1 - back, 0)
        if len(self.movies) == 0:
            at_movies, at_ratings, at_times = (np.zeros_like(at),) * 3
        else:
            at_movies = catalogue.movie_ids[self.movies[at]]
            at_ratings, at_times = self.ratings[at], self.timestamps[at]
        years = 1970 + (at_times[:, 0].astype("datetime64[s]")).astype(
            "datetime64[Y]"
        ).astype(np.int64)
        return {
            "user_id": self.user_ids[users],
            "history": np.where(happened, at_movies, NO_MOVIE),
            "history_ratings": np.where(happened, at_ratings, 0).astype(np.float32),
            "last_seen": np.where(happened[:, 0], years, 0),
        }
