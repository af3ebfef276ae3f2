"""Reads the Census-Income files, as published or with 34 columns, into data frames.

Every column is read as a categorical of strings, and each distinct value is validated
once. If one is invalid, the file is read again line by line, to report its location.
"""

from __future__ import annotations

import csv
import gzip
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TextIO

import pandas as pd

from recsys_examples.census_income.columns import (
    CATEGORIES,
    INCOMES,
    LABEL,
    NUMBERS,
    OFFICIAL,
    OPTIONAL,
)
from recsys_examples.errors import InputError

DATA_VARIABLE = "KERAS_MOE_DATA"
SUBFOLDER = "census-income"

_OFFICIAL_FILES = ("census-income.data", "census-income.test")
_CUT_FILES = ("train.csv", "test.csv")
_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?")


@dataclass(frozen=True)
class Census:
    """The official train and test rows.

    Attributes:
        train: data frame with `columns`: float for numbers, else categorical of
            strings.
        test: data frame with the same columns.
        name: description of the files, for titles.
    """

    train: pd.DataFrame
    test: pd.DataFrame
    name: str

    @property
    def columns(self) -> list[str]:
        """The columns of the files, in the official order."""
        return list(self.train.columns)


def load_census(data_dir: Path | str | None = None) -> Census:
    """Read Census-Income.

    Args:
        data_dir: a folder with `census-income.data` and `census-income.test` as
            published (42 columns, no header), or else with `train.csv` and `test.csv`
            (a header, and at least the 34 columns that are not in
            `columns.OPTIONAL`), each with or without `.gz`; or a folder with such a
            subfolder `census-income`. Default: the environment variable
            `KERAS_MOE_DATA`.

    Returns:
        The rows in the order of the files. Values are stripped; "?" and "NA" are
        categories.

    Raises:
        InputError: if no folder is given, or a file is missing or invalid; the message
            names the file, the line (from 1) and the column. Categories must be
            documented (`columns.CATEGORIES`), numbers must be at least 0, and labels
            must be in `columns.INCOMES`.
    """
    folder = _folder(data_dir)
    try:
        train, test = _pair(folder)
        census = Census(_read(train), _read(test), _name(train))
    except OSError as error:
        where, why = error.filename or folder, error.strerror or error
        raise InputError(f"{where}: cannot be read: {why}") from error
    for column in set(census.train.columns) ^ set(census.test.columns):
        has, lacks = (train, test) if column in census.train.columns else (test, train)
        raise InputError(
            f"{lacks}, line 1, column {column!r}: missing, but present in {has.name}"
        )
    return census


def _folder(data_dir: Path | str | None) -> Path:
    given = os.environ.get(DATA_VARIABLE) if data_dir is None else data_dir
    if not given:
        raise InputError(
            "no data folder: set --data-dir or the environment variable "
            f"{DATA_VARIABLE} to a folder with the Census-Income (KDD) files "
            "(https://doi.org/10.24432/C5N30T)"
        )
    folder = Path(given)
    if not folder.exists():
        raise InputError(f"{folder}: the data folder does not exist")
    if not folder.is_dir():
        raise InputError(f"{folder}: the data folder must be a folder; got a file")
    return folder


def _pair(folder: Path) -> tuple[Path, Path]:
    """Find the train and the test file; the official files take precedence."""
    incomplete = None
    for place in (folder, folder / SUBFOLDER):
        for names in (_OFFICIAL_FILES, _CUT_FILES):
            train, test = (_with_or_without_gz(place / name) for name in names)
            if train and test:
                return train, test
            if train or test:
                incomplete = place / names[1 if train else 0], train or test
    if incomplete:
        missing, found = incomplete
        raise InputError(
            f"{missing}: missing, with or without .gz; required beside {found}"
        )
    raise InputError(
        f"{folder}: no Census-Income files; looked for "
        f"{' + '.join(_OFFICIAL_FILES)} and for {' + '.join(_CUT_FILES)}, with or "
        f"without .gz, here and in {SUBFOLDER}"
    )


def _with_or_without_gz(path: Path) -> Path | None:
    zipped = path.with_name(f"{path.name}.gz")
    return next((p for p in (path, zipped) if p.is_file()), None)


def _is_official(path: Path) -> bool:
    return path.name.startswith(_OFFICIAL_FILES)


def _name(path: Path) -> str:
    return "official files" if _is_official(path) else "files with a header"


# One file.


def _read(path: Path) -> pd.DataFrame:
    try:
        names = _header(path)
        # pandas takes the number of fields from the first row, which is checked here.
        # It raises an error for longer rows and fills shorter ones with NaN.
        if not _check_lines(path, names, stop=1):
            raise InputError(f"{path}: the file has no rows")
        table = pd.read_csv(
            path,
            names=names,
            header=None,
            skiprows=0 if _is_official(path) else 1,
            dtype=str,
            keep_default_na=False,
            na_values=[],
            quoting=csv.QUOTE_NONE,
            encoding_errors="backslashreplace",
        ).astype("category")
    except (EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    except (pd.errors.ParserError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        _raise_first_fault(path, names, str(error))
    if not all(_is_valid(table[name]) for name in names):
        _raise_first_fault(path, names, "invalid value")
    return pd.DataFrame(
        {name: _values(table[name]) for name in OFFICIAL if name in table}
    )


def _header(path: Path) -> list[str]:
    """Return the names of a file's columns, in its order."""
    if _is_official(path):
        return list(OFFICIAL)
    with _open(path) as lines:
        header = lines.readline()
    if not header.strip():
        raise InputError(f"{path}, line 1: empty; a header must name the columns")
    names = [name.strip() for name in header.split(",")]
    for name in names:
        if name not in OFFICIAL:
            raise InputError(
                f"{path}, line 1, column {_shown(name)}: not a column of Census-Income"
            )
        if names.count(name) > 1:
            raise InputError(f"{path}, line 1, column {name!r}: duplicate column")
    for name in OFFICIAL:
        if name not in names and name not in OPTIONAL:
            raise InputError(f"{path}, line 1, column {name!r}: missing")
    return names


def _open(path: Path) -> TextIO:
    opened = gzip.open if path.suffix == ".gz" else open
    return opened(path, "rt", encoding="utf-8-sig", errors="backslashreplace")


def _is_valid(column: pd.Series) -> bool:
    if column.isna().any():
        return False
    try:
        for text in column.cat.categories:
            _check_value(str(column.name), text.strip())
    except ValueError:
        return False
    return True


def _values(column: pd.Series) -> pd.Series:
    texts = [text.strip() for text in column.cat.categories]
    if column.name in NUMBERS:
        return pd.Series(pd.Index(texts).astype("float64")[column.cat.codes])
    return pd.Series(pd.Categorical(pd.Index(texts)[column.cat.codes]))


def _check_value(name: str, text: str) -> None:
    """Raise ValueError if a value is invalid in its column."""
    if name in NUMBERS:
        if not _NUMBER.fullmatch(text):
            raise ValueError(f"must be a number >= 0; got {_shown(text)}")
    elif name == LABEL:
        if text not in INCOMES:
            raise ValueError(
                f"must be {' or '.join(map(repr, INCOMES))}; got {_shown(text)}"
            )
    elif text not in CATEGORIES[name]:
        raise ValueError(f"unknown category {_shown(text)}")


# Line by line, to locate a fault.


def _raise_first_fault(path: Path, names: Sequence[str], reason: str) -> NoReturn:
    _check_lines(path, names)
    # Every line is valid: the error has another cause, such as memory.
    raise InputError(f"{path}: cannot be read: {' '.join(reason.split())}")


def _check_lines(path: Path, names: Sequence[str], stop: int | None = None) -> int:
    """Check the first `stop` rows (None: all); return the number of rows checked."""
    count = 0
    for line, fields in _rows(path):
        if count == stop:
            break
        count += 1
        if len(fields) < len(names):
            raise InputError(
                f"{path}, line {line}, column {names[len(fields)]!r}: missing; a row "
                f"must have {len(names)} values, got {len(fields)}"
            )
        if len(fields) > len(names):
            raise InputError(
                f"{path}, line {line}, after column {names[-1]!r}: a row must have "
                f"{len(names)} values, got {len(fields)}"
            )
        for name, field in zip(names, fields, strict=True):
            try:
                _check_value(name, field.strip())
            except ValueError as error:
                raise InputError(
                    f"{path}, line {line}, column {name!r}: {error}"
                ) from None
    return count


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield `(line number, fields)` for each line that is not blank."""
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            if (number == 1 and not _is_official(path)) or not line.strip():
                continue
            yield number, line.rstrip("\n").split(",")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
