"""Results in a JSON Lines file, from which an interrupted study can resume.

The first line holds the data and versions that the records depend on; every further
line is one record. Each line has a checksum. An incomplete last line is dropped.
"""

from __future__ import annotations

import contextlib
import json
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recsys_examples import files
from recsys_examples.errors import InputError
from recsys_examples.runs import CHECKSUM, is_whole, make_folder, sealed

_DAMAGED = "damaged: its checksum differs"
_REMEDY = "remove the line to do this run again"
_NO_STUDY = "start a study in another folder with --out"


class RecordsFile:
    """An append-only file of records, each written to disk at once.

    One process at a time may have it open.

    Args:
        path: the file. Missing folders are created.
        depends_on: JSON object of what the records depend on, such as versions.
        resume: whether to continue from the records in the file.

    Attributes:
        path: the file.
        found: pairs `(location, record)` of the records read from the file. The
            location, "path, line number", is for error messages.

    Raises:
        InputError: if the file exists and `resume` is False, if it does not exist and
            `resume` is True, if its first line differs from `depends_on`, if it cannot
            be read or is damaged, or if another process writes to it.
    """

    def __init__(self, path: Path, depends_on: Mapping[str, Any], resume: bool) -> None:
        self.path = path
        self.found: list[tuple[str, dict[str, Any]]] = []
        if not resume:
            self._create(depends_on)
        try:
            self._handle = os.open(path, os.O_RDWR)
        except OSError as error:
            raise InputError(f"{path}: no study to resume: {error.strerror}") from error
        # The lock lasts as long as this object.
        close = weakref.finalize(self, os.close, self._handle)
        try:
            if not files.try_lock(self._handle):
                raise InputError(f"{path}: another process is writing to this study")
            if resume:
                self._read(depends_on)
        except InputError:
            close()
            raise

    def add(self, *records: Mapping[str, Any]) -> None:
        """Append records; those of one call are written together, or not at all."""
        end = os.lseek(self._handle, 0, os.SEEK_END)
        try:
            text = _lines(*records)
            while text:  # a disk that is nearly full takes a part
                text = text[os.write(self._handle, text) :]
            os.fsync(self._handle)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, end)
            raise InputError(f"{self.path}: {error.strerror}") from error

    def _create(self, depends_on: Mapping[str, Any]) -> None:
        make_folder(self.path.parent)
        try:
            with files.atomic_write(self.path) as unfinished:
                unfinished.write_bytes(_lines(depends_on))
        except FileExistsError as error:
            raise InputError(
                f"{self.path} holds the results of a study: add --resume to continue "
                "it, or choose another folder with --out"
            ) from error
        except OSError as error:
            raise InputError(f"{self.path}: {error.strerror}") from error

    def _read(self, depends_on: Mapping[str, Any]) -> None:
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise InputError(
                f"{self.path}: no study to resume: {error.strerror}"
            ) from error
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.split(b"\n")[:-1]
        if not lines:
            raise InputError(
                f"{self.path}: no study to resume: no complete line; {_NO_STUDY}"
            )
        first = _parsed(lines[0], f"{self.path}, line 1", _NO_STUDY)
        # Files of earlier versions have no checksums.
        has_checksums = first.pop(CHECKSUM, None) is not None
        self._check_same(first, depends_on)
        for number, line in enumerate(lines[1:], start=2):
            where = f"{self.path}, line {number}"
            record = _parsed(line, where)
            if has_checksums and CHECKSUM not in record:
                raise InputError(f"{where}: {_DAMAGED}; {_REMEDY}")
            record.pop(CHECKSUM, None)
            self.found.append((where, record))
        if len(whole) < len(content):
            os.ftruncate(self._handle, len(whole))

    def _check_same(self, found: dict[str, Any], depends_on: Mapping[str, Any]) -> None:
        now = json.loads(json.dumps(depends_on))
        for name in sorted(found.keys() | now.keys()):
            if found.get(name) != now.get(name):
                raise InputError(
                    f"{self.path}: these results were made with {name} = "
                    f"{found.get(name)}, this study has {now.get(name)}"
                )


def _lines(*records: Mapping[str, Any]) -> bytes:
    texts = (json.dumps(sealed(dict(r)), allow_nan=False) + "\n" for r in records)
    return "".join(texts).encode()


def _parsed(line: bytes, where: str, remedy: str = _REMEDY) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not a line of JSON: {error}; {remedy}") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: not a JSON object; {remedy}")
    if not is_whole(value):
        raise InputError(f"{where}: {_DAMAGED}; {remedy}")
    return value
