"""The official formats of MovieLens, with validation of every line.

The ratings, up to tens of millions of rows, are read by pandas' C reader and validated
column by column. If a value is invalid, the file is read again line by line, to report
the line number.
"""

import csv
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NoReturn

import numpy as np
import pandas as pd

from recsys_examples.errors import InputError

RATING_COLUMNS = ["user_id", "movie_id", "rating", "timestamp"]
_HIGHEST_RATING = 5.0
NO_GENRES = "(no genres listed)"

# The genre flags of u.item in order, after the first flag, "unknown" (no genre).
_ML_100K_GENRES = [
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
]

# Numbers accepted by pandas' C reader, which is stricter than Python's float.
_NUMBER = re.compile(
    r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*", re.ASCII
)

# "Title (1995)", "Title (1995-1997)" with a hyphen or an en dash, "Title (1995- )",
# "Title (1995) (V)" for a video in ml-100k, and "Title".
_TITLE_AND_YEAR = (
    r"(?s)^\s*(?P<title>.*?)\s*"
    r"(?:\((?P<year>[0-9]{4})(?:\s*[-\u2013]\s*[0-9]{0,4})?\s*\)\s*(?:\(V\))?)?\s*$"
)


def movies_frame(movies: pd.DataFrame) -> pd.DataFrame:
    """Return the movie columns with their types, sorted by id."""
    types = {"movie_id": "int64", "title": "str", "genres": "str", "year": "int64"}
    return movies[list(types)].astype(types).sort_values("movie_id", ignore_index=True)


def _listed_genres(fields: list[str]) -> str:
    genres = fields[2].strip()
    return "" if genres == NO_GENRES else genres


def _flagged_genres(fields: list[str]) -> str:
    unknown, *flags = fields[5:]
    for flag in (unknown, *flags):
        if flag not in ("0", "1"):
            raise ValueError(f"a genre flag must be 0 or 1; got {_shown(flag)}")
    return "|".join(
        genre for genre, flag in zip(_ML_100K_GENRES, flags, strict=True) if flag == "1"
    )


@dataclass(frozen=True)
class Format:
    """The format of a data set: names of the two files, and the format of a line."""

    name: str
    ratings_file: str
    movies_file: str
    ratings_separator: str
    movies_separator: str
    movies_fields: int
    genres: Callable[[list[str]], str]
    may_be_latin_1: bool = True
    lowest_rating: float = 0.5
    ratings_header: str = ""
    movies_header: str = ""

    @property
    def files(self) -> set[str]:
        """The names of the files."""
        return {self.ratings_file, self.movies_file}


FORMATS = (
    Format(
        name="ml-100k",
        ratings_file="u.data",
        movies_file="u.item",
        ratings_separator="\t",
        movies_separator="|",
        movies_fields=24,
        genres=_flagged_genres,
        lowest_rating=1.0,
    ),
    Format(
        name="ml-1m",
        ratings_file="ratings.dat",
        movies_file="movies.dat",
        ratings_separator="::",
        movies_separator="::",
        movies_fields=3,
        genres=_listed_genres,
    ),
    Format(
        name="ml-csv",
        ratings_file="ratings.csv",
        movies_file="movies.csv",
        ratings_separator=",",
        movies_separator=",",
        movies_fields=3,
        genres=_listed_genres,
        may_be_latin_1=False,
        ratings_header="userId,movieId,rating,timestamp",
        movies_header="movieId,title,genres",
    ),
)


# Validation of one line, for both files. These functions raise ValueError; the caller
# adds the file and the line and raises InputError.


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _number(text: str, what: str) -> float:
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"the {what} must be a number; got {_shown(text)}")
    return float(text)


def _whole_number(text: str, what: str, lowest: int = 0) -> int:
    value = _number(text, what)
    if not (value.is_integer() and lowest <= value < 2**63):
        raise ValueError(
            f"the {what} must be a whole number from {lowest}; got {_shown(text)}"
        )
    return int(value)


def _check_field_count(fields: list[str], count: int, separator: str) -> None:
    if len(fields) != count:
        raise ValueError(
            f"a row must have {count} fields; got {len(fields)} in "
            f"{_shown(separator.join(fields))}"
        )


def _check_header(path: Path, header: str, expected: str) -> None:
    if header != expected:
        raise InputError(
            f"{path}, line 1: the header must be {expected!r}; got {_shown(header)}"
        )


# The movies file, which is small and read line by line.


def read_movies(path: Path, form: Format) -> pd.DataFrame:
    """Return the movies, validated line by line."""
    first_lines: dict[int, int] = {}
    movies = []
    for line, fields in _movie_rows(path, form):
        try:
            movie = _movie(fields, form)
        except ValueError as error:
            raise InputError(f"{path}, line {line}: {error}") from None
        first_line = first_lines.setdefault(movie[0], line)
        if first_line != line:
            raise InputError(
                f"{path}, lines {first_line} and {line}: a movie id must occur once; "
                f"got {movie[0]} twice"
            )
        movies.append(movie)
    if not movies:
        raise InputError(f"{path}: the file has no movies")
    frame = pd.DataFrame(movies, columns=["movie_id", "title", "genres"])
    parts = frame["title"].str.extract(_TITLE_AND_YEAR)
    return movies_frame(parts.fillna({"year": "0"}).join(frame.drop(columns="title")))


def _movie(fields: list[str], form: Format) -> tuple[int, str, str]:
    _check_field_count(fields, form.movies_fields, form.movies_separator)
    return (
        _whole_number(fields[0], "movie id", lowest=1),
        fields[1],
        form.genres(fields),
    )


def _movie_rows(path: Path, form: Format) -> Iterator[tuple[int, list[str]]]:
    """Yield `(line number, fields)` for each row that is not blank."""
    text = _decoded(path, form)
    if form.movies_header:
        yield from _csv_rows(path, text, form.movies_header)
        return
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if line.strip():
            yield number, line.rstrip("\n").split(form.movies_separator)


def _csv_rows(path: Path, text: str, header: str) -> Iterator[tuple[int, list[str]]]:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for fields in rows:
            if line == 1:
                _check_header(path, ",".join(fields), header)
            elif fields:
                yield line, fields
            # A quoted title may span several lines.
            line = rows.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}, line {line}: not valid csv: {error}") from None


def _decoded(path: Path, form: Format) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # ml-10m is UTF-8, the older sets are Latin-1. UTF-8 is tried first, because
        # Latin-1 accents are rarely valid UTF-8.
        if form.may_be_latin_1:
            return content.decode("latin-1")
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise InputError(
            f"{path}, line {line}: the text must be UTF-8; got the byte 0x{byte:02x}"
        ) from None


# The ratings file: the fast reader, and line-by-line validation to locate a fault.


def read_ratings(path: Path, form: Format) -> pd.DataFrame:
    """Return the validated ratings, in the order of the file."""
    # pandas takes the number of fields from the first row, which is checked here; it
    # raises an error for longer rows.
    if not _check_rating_lines(path, form, stop=1):
        raise InputError(f"{path}: the file has no ratings")
    try:
        table = _parsed_ratings(path, form)
    except (ValueError, TypeError, OverflowError) as error:
        _raise_first_fault(path, form, str(error))
    if not _is_valid(table, form):
        _raise_first_fault(path, form, "invalid value")
    return table[RATING_COLUMNS].astype({"rating": "float32"})


def _parsed_ratings(path: Path, form: Format) -> pd.DataFrame:
    columns = list(RATING_COLUMNS)
    if form.ratings_separator == "::":
        # pandas' C reader needs one-letter separators: between the two colons is a
        # column that must be empty.
        columns = ["user_id", "gap1", "movie_id", "gap2", "rating", "gap3", "timestamp"]
    whole = {"user_id", "movie_id", "timestamp"}
    # For a value such as 1e30 in an integer column, pandas raises an error, and numpy
    # warns before.
    with np.errstate(invalid="ignore"):
        return pd.read_csv(
            path,
            sep=form.ratings_separator[0],
            names=columns,
            header=None,
            skiprows=1 if form.ratings_header else 0,
            dtype={name: "int64" if name in whole else "float64" for name in columns},
            keep_default_na=False,
            na_values=[""],
            quoting=csv.QUOTE_NONE,
            encoding="utf-8-sig",
            encoding_errors="backslashreplace",
        )


def _is_valid(table: pd.DataFrame, form: Format) -> bool:
    gaps = table.columns.difference(RATING_COLUMNS)
    return bool(
        table[["user_id", "movie_id"]].min().min() >= 1
        and table["timestamp"].min() >= 0
        and table["rating"].between(form.lowest_rating, _HIGHEST_RATING).all()
        and table[gaps].isna().all(axis=None)
    )


def _raise_first_fault(path: Path, form: Format, reason: str) -> NoReturn:
    _check_rating_lines(path, form)
    # Every line is valid: the error has another cause, such as memory.
    raise InputError(f"{path}: cannot be read: {' '.join(reason.split())}")


def _check_rating_lines(path: Path, form: Format, stop: int | None = None) -> int:
    """Check the first `stop` rows (None: all); return the number of rows checked."""
    count = 0
    for line, text in islice(_rating_lines(path, form), stop):
        count += 1
        try:
            _check_rating(text.split(form.ratings_separator), form)
        except ValueError as error:
            raise InputError(f"{path}, line {line}: {error}") from None
    return count


def _check_rating(fields: list[str], form: Format) -> None:
    _check_field_count(fields, len(RATING_COLUMNS), form.ratings_separator)
    user, movie, rating, timestamp = fields
    # The model uses the id 0 for unknown users and padding.
    _whole_number(user, "user id", lowest=1)
    _whole_number(movie, "movie id", lowest=1)
    if not form.lowest_rating <= _number(rating, "rating") <= _HIGHEST_RATING:
        raise ValueError(
            f"the rating must be from {form.lowest_rating:g} to {_HIGHEST_RATING:g}; "
            f"got {_shown(rating)}"
        )
    _whole_number(timestamp, "timestamp")


def _rating_lines(path: Path, form: Format) -> Iterator[tuple[int, str]]:
    """Yield `(line number, text)` for each line that `_parsed_ratings` reads as row."""
    with path.open(encoding="utf-8-sig", errors="backslashreplace") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1 and form.ratings_header:
                _check_header(path, line.rstrip("\n"), form.ratings_header)
            elif line.strip(" \t\n") or form.ratings_separator in line:
                yield number, line.rstrip("\n")


def _line_of(path: Path, form: Format, row: int) -> int:
    return next(islice(_rating_lines(path, form), row, None))[0]


def check_pairs(path: Path, form: Format, ratings: pd.DataFrame) -> None:
    """Raise InputError if a user has rated a movie twice."""
    repeated = ratings.duplicated(["user_id", "movie_id"]).to_numpy()
    if not repeated.any():
        return
    second = int(repeated.argmax())
    user, movie = ratings["user_id"].iloc[second], ratings["movie_id"].iloc[second]
    same = (ratings["user_id"] == user) & (ratings["movie_id"] == movie)
    first = int(same.to_numpy().argmax())
    raise InputError(
        f"{path}, lines {_line_of(path, form, first)} and "
        f"{_line_of(path, form, second)}: a user may rate a movie once; "
        f"got user {user}, movie {movie} twice"
    )


def check_movies_known(
    path: Path, form: Format, ratings: pd.DataFrame, movies: pd.DataFrame
) -> None:
    """Raise InputError if a rated movie is not in the movies file."""
    unknown = ~ratings["movie_id"].isin(movies["movie_id"]).to_numpy()
    if unknown.any():
        row = int(unknown.argmax())
        raise InputError(
            f"{path}, line {_line_of(path, form, row)}: a rated movie must be in "
            f"{form.movies_file}; got movie {ratings['movie_id'].iloc[row]}"
        )
