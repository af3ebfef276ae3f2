"""Reads text files in batches of lines, with bounded memory, and checks their values.

No function holds more than one batch of lines; a line is at most `MAX_LINE_BYTES` long.
Errors name the file, the line (from 1, including the header) and the rule.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from recsys_examples.click_conversion.data import UNKNOWN, Part
from recsys_examples.errors import InputError

MAX_LINE_BYTES = 1 << 24
DEFAULT_BATCH = 8192

Unclicked = Literal["raise", "drop"]
Lines = list[tuple[int, str]]  # line numbers and texts


def check_batch_size(batch_size: int) -> None:
    """Raise ValueError unless the batch size is positive."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")


def check_choice(name: str, given: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless an argument has one of the values."""
    if given not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}; got {given!r}")


def find_file(path: Path) -> Path:
    """Return the path, or raise InputError if it is no file."""
    if not path.is_file():
        raise InputError(f"{path}: missing")
    return path


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield `(line number, text)` for each line that is not blank.

    Raises:
        InputError: if the file cannot be read, is not UTF-8, or has a line of more than
            `MAX_LINE_BYTES`.
    """
    try:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(MAX_LINE_BYTES):
                number += 1
                if len(raw) == MAX_LINE_BYTES:
                    raise InputError(
                        f"{path}, line {number}: a line must have fewer than "
                        f"{MAX_LINE_BYTES} bytes"
                    )
                # Not splitlines: \x1c to \x1e and others are no line ends here.
                text = _decoded(raw.rstrip(b"\r\n"), path, number)
                if text.strip():
                    yield number, text
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read: {error.strerror or error}"
        ) from error


def _decoded(raw: bytes, path: Path, number: int) -> str:
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}, line {number}: the text must be UTF-8; got the byte "
            f"0x{raw[error.start]:02x}"
        ) from None


def read_header(path: Path, required: Sequence[str]) -> list[str]:
    """Return the names of the columns, after checking that the required are there."""
    for number, text in read_lines(path):
        if number > 1:
            break
        names = [name.strip() for name in text.split(",")]
        for name in required:
            if names.count(name) != 1:
                fault = "missing" if name not in names else "duplicate column"
                raise InputError(f"{path}, line 1, column {name!r}: {fault}")
        return names
    raise InputError(f"{path}, line 1: empty; a header must name the columns")


def read_batches(path: Path, batch_size: int, skip_header: bool) -> Iterator[Lines]:
    """Yield lists of up to `batch_size` lines; raise InputError if there is none."""
    lines: Lines = []
    empty = True
    for number, text in read_lines(path):
        if skip_header and number == 1:
            continue
        empty = False
        lines.append((number, text))
        if len(lines) == batch_size:
            yield lines
            lines = []
    if lines:
        yield lines
    if empty:
        raise InputError(f"{path}: the file has no rows")


def read_numbers(
    path: Path, columns: Sequence[str], batch_size: int
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield line numbers (b,) and values (b, columns), float64, of a csv of numbers.

    Columns of the file that are not asked for may have any text without commas.

    Raises:
        InputError: if a column is missing, a row has another number of values than the
            header, or a value is not a finite number.
    """
    header = read_header(path, columns)
    where = [header.index(name) for name in columns]
    for lines in read_batches(path, batch_size, skip_header=True):
        for number, text in lines:
            count = text.count(",") + 1
            if count != len(header):
                raise InputError(
                    f"{path}, line {number}: a row must have {len(header)} values; "
                    f"got {count}"
                )
        try:
            values = np.loadtxt(
                [text for _, text in lines],
                delimiter=",",
                usecols=where,
                comments=None,
                ndmin=2,
            )
        except ValueError:
            values = np.full((1, 1), np.nan)
        if not np.isfinite(values).all():
            _raise_first_fault(path, lines, where, columns)
        yield [number for number, _ in lines], values


def _raise_first_fault(
    path: Path, lines: Lines, where: list[int], columns: Sequence[str]
) -> None:
    for number, text in lines:
        fields = text.split(",")
        for name, index in zip(columns, where, strict=True):
            try:
                valid = np.isfinite(float(fields[index]))
            except ValueError:
                valid = False
            if not valid:
                raise InputError(
                    f"{path}, line {number}, column {name!r}: must be a finite number; "
                    f"got {shown(fields[index])}"
                )
    # Accepted by float, not by NumPy, such as "1_000".
    raise InputError(
        f"{path}, lines {lines[0][0]} to {lines[-1][0]}: must be numbers of digits"
    )


def whole(
    values: np.ndarray, lines: Sequence[int], path: Path, name: str
) -> np.ndarray:
    """Return a column as int64, after checking that it has whole numbers."""
    fault = (values != np.floor(values)) | (np.abs(values) >= 2**53)
    if fault.any():
        row = int(fault.argmax())
        raise InputError(
            f"{path}, line {lines[row]}, column {name!r}: must be a whole number; got "
            f"{values[row]:g}"
        )
    return values.astype(np.int64)


def binary(
    values: np.ndarray, lines: Sequence[int], path: Path, name: str
) -> np.ndarray:
    """Return a label as float32, after checking that it is 0 or 1."""
    fault = (values != 0) & (values != 1)
    if fault.any():
        row = int(fault.argmax())
        raise InputError(
            f"{path}, line {lines[row]}, column {name!r}: must be 0 or 1; got "
            f"{values[row]:g}"
        )
    return values.astype(np.float32)


def chain(
    click: np.ndarray,
    conversion: np.ndarray,
    lines: Sequence[int],
    path: Path,
    on_unclicked: Unclicked,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the conversion label, NaN without a click, and the mask of rows to keep.

    Raises:
        InputError: if a row has a conversion without a click, and `on_unclicked` is
            `"raise"`.
    """
    fault = (conversion == 1) & (click == 0)
    if on_unclicked == "raise" and fault.any():
        raise InputError(
            f"{path}, line {lines[int(fault.argmax())]}: a conversion must have a "
            "click; got conversion 1 with click 0 (on_unclicked='drop' skips such rows)"
        )
    return np.where(click == 1, conversion, np.float32(np.nan)), ~fault


def bucket(text: str, buckets: int) -> int:
    """Return the index of a category: 0 if the text is empty, else from 1.

    Whole numbers, also written as "7.0", are reduced modulo `buckets - 1`, so that
    consecutive ids do not collide while there are enough buckets. Other texts are
    hashed (CRC-32).

    Example:

    >>> bucket("", 10), bucket("0", 10), bucket("8.0", 10), bucket("9", 10)
    (0, 1, 9, 1)
    """
    text = text.strip()
    return 1 + number_of(text) % (buckets - 1) if text else UNKNOWN


def number_of(text: str) -> int:
    """Return the number of an id, or a hash of one that is no whole number."""
    digits = text.removesuffix(".0")
    if digits.isdecimal() and len(digits) < 19:
        return int(digits)
    return zlib.crc32(text.encode())


def chosen_buckets(
    defaults: dict[str, int], given: dict[str, int] | None
) -> dict[str, int]:
    """Return the vocabulary sizes: the defaults, replaced by those given."""
    given = given or {}
    for name, size in given.items():
        check_choice("a column of buckets", name, list(defaults))
        if size < 2:
            raise ValueError(f"buckets of {name!r} must be at least 2; got {size}")
    return defaults | given


def kept(batch: Part, keep: np.ndarray) -> Iterator[Part]:
    """Yield the kept rows of a batch, if there are any."""
    if keep.all():
        yield batch
    elif keep.any():
        yield batch.take(keep)


def shown(text: str) -> str:
    """Return a text for an error message, shortened."""
    return repr(text if len(text) <= 60 else text[:57] + "...")
