"""The common features of Ali-CCP: their lines, and a database of them on disk.

The skeleton refers to the features of a user by an index. The file of these features is
too large for memory (10 GB), and the order of the skeleton is not documented. So each
line is reduced to the fields that are read, about 100 bytes, and stored in an SQLite
database by its index, from which a batch fetches its users.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np

from recsys_examples.click_conversion import streams
from recsys_examples.errors import InputError
from recsys_examples.runs import replaced

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
        return f"checksums {self._sizes} {self.weighted} {self._user}"

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

    def pack(self, key: str, record: Record) -> bytes:
        """Return a record as bytes, with a checksum of the key and the record."""
        user, indices, weights = record
        packed = np.int64(user).tobytes() + indices.tobytes() + weights.tobytes()
        return packed + _checksum(key, packed)

    def unpack(self, key: str, packed: bytes) -> Record:
        """Return the record that was packed.

        Raises:
            sqlite3.DatabaseError: if the checksum differs.
        """
        packed, checksum = packed[:-4], packed[-4:]
        if _checksum(key, packed) != checksum:
            raise sqlite3.DatabaseError(
                f"the record of {streams.shown(key)} is damaged; remove the file to "
                "build it again"
            )
        end = 8 + 4 * len(self.fields)
        return (
            int(np.frombuffer(packed[:8], np.int64)[0]),
            np.frombuffer(packed[8:end], np.int32),
            np.frombuffer(packed[end:], np.float32),
        )


def _checksum(key: str, packed: bytes) -> bytes:
    return zlib.crc32(key.encode() + packed).to_bytes(4, "little")


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
                found[key] = self._encoder.unpack(key, packed)
        return found


@contextmanager
def open_index(common: Path, folder: Path, encoder: Encoder) -> Iterator[Index]:
    """Open the database of a file of common features, and build it if need be.

    It is built beside its final path and renamed, so that an interrupted run leaves no
    incomplete one. Each record has a checksum.

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
            with replaced(path) as unfinished:
                _build(unfinished, common, source, encoder)
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
                        (key, encoder.pack(key, record)),
                    )
                except sqlite3.IntegrityError:
                    raise InputError(
                        f"{common}, line {number}: a common feature index must occur "
                        f"once; got {streams.shown(key)} again"
                    ) from None
        database.execute("CREATE TABLE source (text TEXT)")
        database.execute("INSERT INTO source VALUES (?)", (source,))
        database.commit()
