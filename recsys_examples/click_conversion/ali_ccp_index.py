"""The common features of Ali-CCP: their lines, and a database of them on disk.

The skeleton refers to the features of a user by an index. The file of these features is
too large for memory (10 GB), and the order of the skeleton is not documented. So each
line is reduced to the fields that are read, about 100 bytes, and stored in an SQLite
database by its index, from which a batch fetches its users.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np

from recsys_examples.click_conversion import streams
from recsys_examples.errors import InputError

ENTRIES, FEATURE, VALUE = "\x01", "\x02", "\x03"  # separators of a feature list

_CACHE_KB = 16_000  # memory for pages of the database
_KEYS = 500  # per query; SQLite allows at least 999

Record = tuple[int, np.ndarray, np.ndarray]  # user, indices (fields,), weights


def split_line(path: Path, number: int, text: str, count: int) -> list[str]:
    """Return the values of a line, after checking their number."""
    fields = text.split(",")
    if len(fields) != count:
        raise InputError(
            f"{path}, line {number}: a line must have {count} values; got {len(fields)}"
        )
    return fields


class Encoder:
    """Encodes feature lists.

    Args:
        sizes: vocabulary size of each field that is read.
        weighted: fields whose value is read too.
        user: the field of the user.
    """

    def __init__(
        self, sizes: dict[str, int], weighted: Sequence[str], user: str
    ) -> None:
        self.fields = list(sizes)
        self.weighted = list(weighted)
        self._user = user
        self._sizes = sizes
        self._columns = {field: i for i, field in enumerate(self.fields)}
        self._weights = {field: i for i, field in enumerate(self.weighted)}

    @property
    def description(self) -> str:
        """All settings, to recognise a database with others."""
        return f"{self._sizes} {self.weighted} {self._user}"

    def encode(self, path: Path, number: int, count: str, text: str) -> Record:
        """Return the user, the indices and the weights of a feature list.

        Args:
            path: the file, for errors.
            number: the line, for errors.
            count: the documented number of features.
            text: the feature list.

        Raises:
            InputError: if the list is malformed or has another number of features.
        """
        entries = text.split(ENTRIES) if text else []
        if not count.isdecimal() or int(count) != len(entries):
            raise InputError(
                f"{path}, line {number}: the number of features must be that of the "
                f"list, {len(entries)}; got {streams.shown(count)}"
            )
        user = -1
        indices = np.zeros(len(self.fields), np.int32)
        weights = np.zeros(len(self.weighted), np.float32)
        for entry in entries:
            field, separator, rest = entry.partition(FEATURE)
            feature, other, value = rest.partition(VALUE)
            if not (field and separator and feature and other and value):
                raise _malformed(path, number, entry)
            column = self._columns.get(field)
            if column is None or indices[column]:
                continue
            indices[column] = streams.bucket(feature, self._sizes[field])
            if field == self._user:
                user = streams.number_of(feature)
            if field in self._weights:
                weights[self._weights[field]] = _weight(path, number, entry, value)
        return user, indices, weights

    def pack(self, record: Record) -> bytes:
        """Return a record as bytes."""
        user, indices, weights = record
        return np.int64(user).tobytes() + indices.tobytes() + weights.tobytes()

    def unpack(self, packed: bytes) -> Record:
        """Return the record that was packed."""
        end = 8 + 4 * len(self.fields)
        return (
            int(np.frombuffer(packed[:8], np.int64)[0]),
            np.frombuffer(packed[8:end], np.int32),
            np.frombuffer(packed[end:], np.float32),
        )


def _malformed(path: Path, number: int, entry: str) -> InputError:
    return InputError(
        f"{path}, line {number}: a feature must be field, \\x02, feature, \\x03, "
        f"number; got {streams.shown(entry)}"
    )


def _weight(path: Path, number: int, entry: str, value: str) -> float:
    try:
        weight = float(value)
    except ValueError:
        raise _malformed(path, number, entry) from None
    if not np.isfinite(weight):
        raise _malformed(path, number, entry)
    return weight


class Index:
    """Finds the common features of a batch.

    Args:
        database: the open database.
        encoder: encoder of its records.
    """

    def __init__(self, database: sqlite3.Connection, encoder: Encoder) -> None:
        self._database = database
        self._encoder = encoder

    def find(self, keys: Sequence[str]) -> dict[str, Record]:
        """Return the records of those keys that there are."""
        different = list(dict.fromkeys(keys))
        found = {}
        for start in range(0, len(different), _KEYS):
            part = different[start : start + _KEYS]
            marks = ",".join("?" * len(part))
            query = f"SELECT key, record FROM features WHERE key IN ({marks})"
            for key, packed in self._database.execute(query, part):
                found[key] = self._encoder.unpack(packed)
        return found


@contextmanager
def open_index(common: Path, folder: Path, encoder: Encoder) -> Iterator[Index]:
    """Open the database of a file of common features, and build it if need be.

    It is built beside its final path and renamed, so that an interrupted run leaves no
    incomplete one.

    Args:
        common: the file.
        folder: where the database is kept, as `<name of the file>.sqlite`.
        encoder: encoder of the feature lists.

    Raises:
        InputError: if the file is invalid, or the database cannot be read or written.
    """
    path = folder / f"{common.stem}.sqlite"
    status = common.stat()
    source = f"{status.st_size} {status.st_mtime_ns} {encoder.description}"
    try:
        if not _is_of(path, source):
            partial = path.with_suffix(f".{os.getpid()}.partial")
            try:
                _build(partial, common, source, encoder)
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
        with closing(_connect(path)) as database:
            yield Index(database, encoder)
    except sqlite3.Error as error:
        raise InputError(f"{path}: not a readable database: {error}") from error


def _connect(path: Path) -> sqlite3.Connection:
    # A generator may be advanced by several threads, one at a time, as in tf.data.
    database = sqlite3.connect(path, check_same_thread=False)
    database.execute(f"PRAGMA cache_size = -{_CACHE_KB}")
    return database


def _is_of(path: Path, source: str) -> bool:
    if not path.is_file():
        return False
    with closing(_connect(path)) as database:
        try:
            return database.execute("SELECT text FROM source").fetchall() == [(source,)]
        except sqlite3.OperationalError:  # another database
            return False


def _build(path: Path, common: Path, source: str, encoder: Encoder) -> None:
    with closing(_connect(path)) as database:
        # If the build fails, its file is discarded: no journal is needed.
        database.execute("PRAGMA journal_mode = OFF")
        database.execute("PRAGMA synchronous = OFF")
        database.execute(
            "CREATE TABLE features (key TEXT PRIMARY KEY, record BLOB) WITHOUT ROWID"
        )
        for lines in streams.read_batches(common, 256, skip_header=False):
            for number, text in lines:
                key, count, features = split_line(common, number, text, 3)
                record = encoder.encode(common, number, count, features)
                try:
                    database.execute(
                        "INSERT INTO features VALUES (?, ?)",
                        (key, encoder.pack(record)),
                    )
                except sqlite3.IntegrityError:
                    raise InputError(
                        f"{common}, line {number}: a common feature index must occur "
                        f"once; got {streams.shown(key)} again"
                    ) from None
        database.execute("CREATE TABLE source (text TEXT)")
        database.execute("INSERT INTO source VALUES (?)", (source,))
        database.commit()
