"""Results in a JSON Lines file, from which an interrupted study can resume.

The first line holds the data and versions that the records depend on; every further
line is one record. An incomplete last line is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recsys_examples.errors import InputError
from recsys_examples.runs import make_folder


class RecordsFile:
    """An append-only file of records, each written to disk at once.

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
            `resume` is True, if its first line differs from `depends_on`, or if it
            cannot be read.
    """

    def __init__(self, path: Path, depends_on: Mapping[str, Any], resume: bool) -> None:
        self.path = path
        self.found: list[tuple[str, dict[str, Any]]] = []
        if resume:
            self._read(depends_on)
            return
        make_folder(path.parent)
        try:
            path.touch(exist_ok=False)
        except FileExistsError as error:
            raise InputError(
                f"{path} holds the results of a study: add --resume to continue it, "
                "or choose another folder with --out"
            ) from error
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from error
        self.add(depends_on)

    def add(self, *records: Mapping[str, Any]) -> None:
        """Append records; those of one call are written together."""
        text = "".join(json.dumps(r, allow_nan=False) + "\n" for r in records)
        try:
            with self.path.open("a") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
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
            raise InputError(f"{self.path}: no study to resume: no complete line")
        self._check_same(_parsed(lines[0], f"{self.path}, line 1"), depends_on)
        for number, line in enumerate(lines[1:], start=2):
            where = f"{self.path}, line {number}"
            self.found.append((where, _parsed(line, where)))
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))

    def _check_same(self, found: dict[str, Any], depends_on: Mapping[str, Any]) -> None:
        now = json.loads(json.dumps(depends_on))
        for name in sorted(found.keys() | now.keys()):
            if found.get(name) != now.get(name):
                raise InputError(
                    f"{self.path}: these results were made with {name} = "
                    f"{found.get(name)}, this study has {now.get(name)}"
                )


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not a line of JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: not a JSON object")
    return value
